import itertools
import os
import re
import shutil
import signal
import time

import pytest
import torch

import bench
import sample
import train
from model import GPT, GPTConfig
from nanoloop.added_tokens import chat_tokenizer
from nanoloop.bench_decode import bytes_per_step
from nanoloop.generate import Generation
from nanoloop.tokenizer import Bytes, Characters
from sample import TextStream, main


def trained(call, flags):
    assert call(train.main, *flags, '--max_iters=4')[0] == 0
    return [arg for arg in flags if arg.startswith('--out_dir')] + ['--device=cpu', '--dtype=float32']


def test_samples_of_a_batch_end_in_a_line_of_dashes_and_nothing_else_is_on_stdout(call, flags):
    argv = [*trained(call, flags), '--start=abc', '--num_samples=3', '--max_new_tokens=20']
    status, out, err = call(main, *argv)
    samples = out.split('\n---------------\n')
    assert status == 0 and len(samples) == 4 and samples[-1] == '' and len(set(samples[:3])) == 3
    assert all(len(text) == 23 and text.startswith('abc') for text in samples[:3])
    assert 'step 4, n_loop 2' in err and out == call(main, *argv)[1]


def test_a_stream_prints_the_same_text(call, flags):
    options = [*trained(call, flags), '--start=ab', '--max_new_tokens=30', '--top_p=0.9']
    assert call(main, *options, '--stream=True')[1] == call(main, *options)[1]


def test_temperature_zero_is_the_same_for_every_seed(call, flags):
    options = [*trained(call, flags), '--temperature=0', '--max_new_tokens=20']
    assert call(main, *options, '--seed=1')[1] == call(main, *options, '--seed=2')[1]


def test_prompts_come_from_files(call, flags, tmp_path):
    options = trained(call, flags)
    (tmp_path / 'prompt.txt').write_text('hij abc')
    assert call(main, *options, f'--start=FILE:{tmp_path}/prompt.txt')[1].startswith('hij abc')


def test_special_tokens_that_are_ordinary_bytes_are_told(capsys):
    for start, told in (('a<|endoftext|>', True), ('a<|endoftext', False)):
        assert len(sample.read_prompt(start, Bytes(), 256)[1]) == len(start)
        expected = '<|endoftext|> is ordinary text here: this tokenizer has no special tokens'
        assert (expected in capsys.readouterr().err) == told
    chat = chat_tokenizer(Bytes())
    assert sample.read_prompt('<|bos|>a<|foo|>', chat, 265)[1] == [256, *b'a<|foo|>']
    assert '<|foo|> is ordinary text here: the special tokens are <|bos|>, ' in capsys.readouterr().err
    assert sample.read_prompt('', chat, 265)[1] == [256] and not capsys.readouterr().err


def test_another_number_of_loops_is_noted_and_changes_the_text(call, flags):
    options = [*trained(call, flags), '--max_new_tokens=60', '--temperature=2']
    status, out, err = call(main, *options, '--n_loop=9')
    assert status == 0 and 'n_loop 9, trained with 2' in err and out != call(main, *options)[1]


def test_stop_ends_each_sample_before_it(call, flags):
    options = [*trained(call, flags), '--num_samples=4', '--max_new_tokens=200', '--temperature=1']
    whole = call(main, *options)[1].split('\n---------------\n')[:4]
    cut = call(main, *options, '--stop=a')[1].split('\n---------------\n')[:4]
    assert all('a' in text for text in whole) and cut == [text.split('a')[0] for text in whole]


def test_text_keeps_back_what_may_become_the_stop_and_what_is_half_a_character():
    text = TextStream(Characters('abcd'), 'abc')
    parts = [text.add(i) for i in (3, 0, 1, 3, 0, 1, 2, 3)]
    assert parts == ['d', '', '', 'abd', '', '', '', ''] and text.done
    text = TextStream(Characters('abcd'), 'abca', '', 'bd')
    assert [text.add(i) for i in (1, 2, 0, 1, 2, 3, 0, 1, 3)] == ['', 'bc', '', '', '', 'abcd', '', '', 'a']
    assert text.done and text.text[: text.printed] == 'bcabcda'
    assert TextStream(Bytes(), 'cd', 'ab').grow('xabcdy') == 'x'
    text = TextStream(Bytes(), '')
    assert [text.add(i) for i in 'é'.encode() + b'\xe2'] == ['', 'é', ''] and text.rest() == '\ufffd'


def test_bench_reports_both_settings_and_their_ratio(call, flags):
    argv = [*flags, '--warmup=1', '--rounds=2', '--steps=2', '--vs=--n_loop=4']
    status, out, err = call(bench.main, *argv)
    lines = out.splitlines()
    assert status == 0 and not err
    assert lines[-3].startswith('this: ') and lines[-2].startswith('--n_loop=4: ') and 'mfu ' in lines[-2]
    ratio = float(lines[-1].split(': ')[1].split()[0])
    assert lines[-1].startswith('time per step, --n_loop=4 / this: ') and ratio > 0
    assert any(line.startswith('peak: ') for line in lines)
    status, out, _ = call(bench.main, *argv[:-1], '--peak_flops=1e6')
    assert status == 0 and 'peak: ' not in out and float(out.split('mfu ')[1].split('%')[0]) > 100


def test_sampling_is_without_dropout_and_heeds_top_k(call, flags):
    options = [*trained(call, [*flags, '--dropout=0.5']), '--max_new_tokens=30']
    greedy = call(main, *options, '--temperature=0')[1]
    assert call(main, *options, '--temperature=0')[1] == greedy  # dropout would draw anew
    assert call(main, *options, '--top_k=1')[1] == greedy
    assert call(main, *options, '--top_p=1e-6')[1] == greedy != call(main, *options, '--temperature=5')[1]


def test_the_best_checkpoint_is_sampled_from(call, flags, tmp_path):
    options = trained(call, flags)
    best = torch.load(tmp_path / 'out' / 'best.pt', weights_only=True)
    (tmp_path / 'out' / 'best.pt').unlink()  # it is a link to ckpt.pt
    torch.save(dict(best, iter_num=3), tmp_path / 'out' / 'best.pt')
    assert 'step 3,' in call(main, *options)[2]
    (tmp_path / 'out' / 'best.pt').write_bytes(b'cut')
    status, out, err = call(main, *options)
    assert (
        status == 0
        and 'best.pt cannot be read: it was cut, or is no checkpoint' in err
        and 'step 4,' in err
        and out
    )


def test_a_run_in_a_folder_of_any_name(call, flags, tmp_path, monkeypatch):
    """Its checkpoints come before what its name, or an older export in it, might mean."""
    options = trained(call, flags)[1:]
    monkeypatch.chdir(tmp_path)
    for name in ('gpt2', 'scratch', 'auto'):
        shutil.copytree('out', name)
        (tmp_path / name / 'config.json').write_text('{"n_loop": 2}')
        status, _, err = call(main, f'--out_dir={name}', *options)
        assert status == 0 and f'{name}/best.pt: step 4' in err
        new = f'--out_dir=b-{name}'
        assert call(train.main, *flags[:1], f'--init_from=./{name}', new, '--max_iters=0')[0] == 0
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b' / 'config.json').write_text('3')
    status, _, err = call(main, '--out_dir=b', *options)
    assert status == 2 and err.splitlines()[-1].startswith('sample.py: ')


def test_seeds_and_an_empty_prompt(call, flags):
    options = [*trained(call, flags), '--max_new_tokens=40']
    assert call(main, *options, '--seed=1')[1] != call(main, *options, '--seed=2')[1]
    greedy = [call(main, *options, '--temperature=0', f'--start={start}')[1] for start in ('', '\n', 'a')]
    assert '\n' + greedy[0] == greedy[1] != 'a' + greedy[0]


@pytest.mark.parametrize('number, expected', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_the_text_so_far(call, flags, monkeypatch, number, expected):
    class Interrupted(Generation):
        def stream(self, n):
            yield from itertools.islice(super().stream(n), 7)
            os.kill(os.getpid(), number)
            time.sleep(10)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist's processes ignore it
    options = [*trained(call, flags), '--start=abc', '--num_samples=2', '--temperature=0']
    whole = call(main, *options)[1].split('\n---------------\n')[:2]
    monkeypatch.setattr(sample, 'Generation', Interrupted)
    for key in ('--stream=False', '--stream=True', '--stop=' + whole[0][9:11]):
        status, out, _ = call(main, *options, key)
        texts = out.split('\n---------------\n')
        assert status == expected and texts[0] == whole[0][:10] and len(texts) == 3 - ('stream=T' in key)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    signal.signal(signal.SIGINT, before)


def test_what_may_have_become_the_stop_is_printed_at_the_end(call, flags):
    options = [*trained(call, flags), '--temperature=0', '--max_new_tokens=20', '--start=abc']
    whole = call(main, *options)[1]
    end = whole.split('\n---------------\n')[0][-1]
    assert call(main, *options, f'--stop={end}Q')[1] == whole


def test_a_prompt_beyond_the_models_vocabulary_is_refused(call, flags, tmp_path):
    options = trained(call, flags)
    checkpoint = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    torch.save(dict(checkpoint, tokenizer=dict(kind='byte')), tmp_path / 'bytes.pt')
    status, _, err = call(main, *options, f'--out_dir={tmp_path}/bytes.pt', '--start=z')
    assert status == 2 and "start='z', expected text in the tokens of the checkpoint" in err


def test_counting_needs_no_memory_and_no_training(call):
    status, out, err = call(bench.main, 'config/train_ouro_2_6b.py', '--count_only=True')
    lines = {' '.join(line.split()[:2]): line for line in out.splitlines() if not line.startswith(' ')}
    assert status == 0 and not err and '2,667,974,657' in lines['total parameters']
    assert '192 (0 + 48 x 4 + 0)' in lines['executed layers'] and 'attention' in lines['training FLOPs']


def test_an_assumed_vocabulary_and_effective_parameters_are_explained(call):
    small = ['--n_embd=16', '--n_head=2', '--n_loop=3']
    out = call(bench.main, '--dataset=openwebtext', '--count_only=True', *small)[1]
    assert 'is assumed: the data set openwebtext is not prepared, run: python data/openwebtext/prep' in out
    assert '(those of the loop counted n_loop times)' in out


def test_the_ratio_of_a_bench_is_of_the_seconds_measured(call, flags, monkeypatch):
    monkeypatch.setattr(bench.Setting, 'run', lambda side, steps: 0.25 * side.c.n_loop)
    out = call(bench.main, *flags, '--rounds=3', '--vs=--n_loop=6')[1].splitlines()
    assert out[-1] == 'time per step, --n_loop=6 / this: 3.000 (median of 3, 3.000 to 3.000)'
    assert out[-3].startswith('this: 500.00 ms per step') and out[-2].startswith('--n_loop=6: 1500.00 ms')


def test_exits_and_the_cache_are_reported(call, flags):
    options = [*trained(call, flags), '--n_loop=8', '--start=abc', '--max_new_tokens=40', '--temperature=0']
    plain = call(main, *options)
    # 1 + 8 + 1 slots of keys and values, a row, 8 positions and an unseen one, 16 numbers of 4 bytes
    assert (
        f'keys and values: {2 * 10 * 16 * 9 * 4 / 2**20:.1f} MiB' in plain[2]
        and 'loops per token' not in plain[2]
    )
    status, out, err = call(main, *options, '--exit=diff', '--exit_threshold=1e9', '--min_loops=2')
    assert status == 0 and 'loops per token: 2.00 on average, of ' in err and '(2: 100.0%)' in err
    assert call(main, *options, '--exit=kl', '--exit_threshold=0')[1] == plain[1]
    fast = call(main, *options, '--speculate=3', '--draft_loops=2')
    kept, of = map(int, re.search(r'drafts: (\d+) of (\d+) kept', fast[2]).groups())
    assert fast[1] == plain[1] and 0 < kept <= of <= 3 * 39 and '40 tokens in' in fast[2]
    assert call(main, *options, '--speculate=3', '--num_samples=2')[1] == plain[1] * 2


def test_what_the_keys_say_reaches_the_model(call, flags, monkeypatch):
    class Recorded(Generation):
        def __init__(self, model, idx, **options):
            drawn.append(dict(options, dtype=model.lm_head.weight.dtype, tokens=0))
            super().__init__(model, idx, **dict(options, compile=False))

        def stream(self, n):
            for token in super().stream(n):
                drawn[-1]['tokens'] += 1
                yield token

    options, drawn = trained(call, flags)[:-1], []
    monkeypatch.setattr(sample, 'Generation', Recorded)
    keys = ['--n_loop=3', '--kv_budget=2', '--warm_start=True', '--compile=True', '--dtype=bfloat16']
    assert call(main, *options, *keys, '--max_new_tokens=30', '--stop=a', '--temperature=3')[0] == 0
    (found,) = drawn
    assert found['dtype'] == torch.bfloat16 and found['compile'] and found['warm_start']
    assert (found['n_loop'], found['kv_budget']) == (3, 2) and found['tokens'] < 30


def test_bench_measures_no_weights_but_in_decoding(call, flags, tmp_path):
    for keys, told in [
        (['--init_from=x'], "init_from='x', expected scratch, or --mode=decode"),
        (['--init_from=x', '--count_only=True'], "init_from='x', expected scratch"),
        (['--mode=decode', '--vs=--n_loop=8'], "vs='--n_loop=8', expected nothing with --mode=decode"),
    ]:
        status, _, err = call(bench.main, *flags, *keys)
        assert status == 2 and told in err


def test_bench_sets_ways_of_decoding_side_by_side(call, flags, tmp_path):
    call(train.main, *flags, '--exit_gate=True', '--max_iters=2')
    options = [f'--init_from={tmp_path}/out', '--device=cpu', '--compile=False', '--dtype=float32']
    status, out, err = call(
        bench.main, '--mode=decode', *options, '--tokens=6', '--rounds=1', '--combined=True'
    )
    assert status == 0, err
    assert f'{tmp_path}/out/ckpt.pt, step 2: ' in out and 'compile: False' in out
    table = out[out.index('decoding ') :].splitlines()[1:]
    names, exits = ['recomputing all', 'cached', 'kv_budget=1'], ['kl at 0.001', 'diff at 0.1', 'gate at 0.5']
    combined = [f'exit={exit}{draft}' for exit in exits for draft in ('', ', speculate=4')]
    assert [line.split('  ')[0] for line in table] == [*names, 'speculate=4', *combined]
    names += [f'exit={exit}' for exit in exits]
    assert 'GB/s, measured' in out and float(table[1].split()[2]) == 1.0
    more = ['--sequences=2,3', '--prompt=5', '--bandwidth=100']
    out = call(bench.main, '--mode=decode', *options, '--tokens=6', '--rounds=1', *more)[1]
    assert 'bandwidth: 100.0 GB/s, as given' in out and '3 rows, a prompt of 5 tokens, a step reads' in out
    for table in out.split('decoding ')[1:]:
        lines = [line for line in table.splitlines()[1:] if not line.endswith('values)')]
        assert [line.split('  ')[0] for line in lines] == names
        assert ['%' in line for line in lines[:3]] == [False, True, True]
    status, _, err = call(bench.main, '--mode=decode', *options, '--sequences=')
    assert status == 2 and "sequences='', expected a number of rows" in err


def test_a_step_reads_what_its_products_and_its_attention_read():
    """Counted by hand: the loop's weights once per loop, keys and values of every row and executed layer."""
    keys = dict(n_embd=8, n_head=2, n_kv_head=1, vocab_size=7, block_size=6, norm='rmsnorm_fixed', pos='rope')
    model = GPT(
        GPTConfig(n_prelude=1, n_block=1, n_coda=1, n_loop=3, window_pattern='LS', window_size=2, **keys)
    )
    layer = 16 * 8 + 8 * 8 + 2 * 32 * 8  # c_attn, c_proj, the MLP
    weights = 5 * layer + 3 * 16 * 8 + 7 * 8  # executed layers, W[e; s] in every loop, the head
    assert bytes_per_step(model, 4, [1]) == 4 * (weights + 4 * 5 * 8)
    columns = (4 + 6) / 2 * 2 + 3 * 3  # at lengths 4 and 9: prelude and coda see up to 6, the loop 3
    assert bytes_per_step(model, 4, [4, 9]) == 4 * (weights + 4 * columns * 8)
