"""--eval_loops: the validation loss with other numbers of loops, of the pass that gives the ordinary one."""

import contextlib
import dataclasses
import itertools
import json
import types

import pytest
import torch
from helpers import TABLES, TINY, load, randomize, read_log, same

import model as model_file
import train
from model import GPT, INJECT, GPTConfig
from nanoloop.datasets import Split, read_meta
from nanoloop.evaluate import evaluate
from train import main

LOSS_KEYS = {'iter', 'train/eval_loss', 'val/loss', 'val/ppl', 'val/bpb'}
SIZES = dict(block_size=8, vocab_size=12, n_embd=16, n_head=2, n_prelude=1, n_block=2, n_coda=1, n_loop=3)
STARTS = [(name, state) for name, entry in INJECT.items() for state in entry.states]
TURNS = dict(state_update=TABLES['state_update'], norm_place=TABLES['norm_place'], pos=TABLES['pos'])
MORE = [
    dict(exit_gate=True),
    dict(window_pattern='LS', window_size=3),
    dict(recompute=True),
    dict(bptt_k=None),
]
KINDS = [  # every entry of every table, all starts of every injection
    dict(input_injection=injection, state_init=state)
    | {key: list(table)[i % len(table)] for key, table in TURNS.items()}
    | MORE[i // 2 % len(MORE)]
    for i, (injection, state) in enumerate(STARTS)
]


def evaluate_model(model, folder, eval_loops):
    """Returns what evaluate gives for 2 batches of each split."""
    m = types.SimpleNamespace(rank=0, world=1, cpu_group=None, autocast=contextlib.nullcontext)
    m.to_device = lambda x: x
    c = types.SimpleNamespace(eval_iters=2, batch_size=10, eval_loops=eval_loops, dataset='tiny')
    splits = {name: Split(folder, read_meta(folder), name, 8, 12) for name in ('train', 'val')}
    return evaluate(model, splits, c, m, [1] * 12)


@pytest.mark.parametrize(
    'kind, dtype', [*zip(KINDS, itertools.cycle([torch.float32, torch.float64]))], ids=str
)
def test_loops_evaluated_together_equal_loops_one_by_one(tiny_data, kind, dtype):
    config = GPTConfig(**SIZES, **kind)
    model = randomize(GPT(config)).to(dtype).train()
    together = evaluate_model(model, tiny_data, '7,1,2')  # n_loop is not among them
    alone = evaluate_model(model, tiny_data, '')
    assert list(together['val']) == ['loss', 'ppl', 'bpb', 'loss@7', 'loss@1', 'loss@2']
    for split in ('train', 'val'):
        assert alone[split] == {key: together[split][key] for key in ('loss', 'ppl', 'bpb')}
    assert together['train'] == alone['train'] and model.training
    for n in (7, 1, 2):
        other = GPT(dataclasses.replace(config, n_loop=n)).to(dtype)
        other.load_state_dict(model.state_dict())
        assert together['val'][f'loss@{n}'] == evaluate_model(other, tiny_data, '')['val']['loss']


def test_one_pass_gives_all_loops_and_the_training_split_costs_nothing_more(tiny_data, monkeypatch):
    model, loops, real = GPT(GPTConfig(**SIZES)), [], GPT.iterate
    monkeypatch.setattr(
        model_file.GPT, 'iterate', lambda self, e, s, i, *rest: loops.append(i) or real(self, e, s, i, *rest)
    )
    passes = {'': 3, '3': 3, '1,2': 3, '1,2,5': 5}
    for eval_loops, most in passes.items():
        loops.clear()
        evaluate_model(model, tiny_data, eval_loops)
        assert loops == 2 * [0, 1, 2] + 2 * list(range(most)), eval_loops


HARD = '--loop_sampling=uniform --loop_max=3 --state_init=random --objective=exit --exit_gate=True'.split()


@pytest.mark.parametrize('more', [[], [*HARD, '--dropout=0.1', '--patience=2']], ids=['plain', 'hard'])
def test_a_run_logs_other_loops_and_is_otherwise_the_same(call, flags, tmp_path, more):
    call(main, *flags, *more)
    status, out, err = call(main, *flags, *more, f'--out_dir={tmp_path}/with', '--eval_loops=1,2,9')
    assert status == 0, err
    plain, other = read_log(tmp_path / 'out'), read_log(tmp_path / 'with')
    timing = {'train/ms', 'train/tok_per_sec'}
    extra = {'val/loss@1', 'val/loss@2', 'val/loss@9'}
    for a, b in zip(plain, other, strict=True):
        assert {k: v for k, v in a.items() if k not in timing} == {
            k: v for k, v in b.items() if k not in timing | extra
        }
        evaluated = 'val/loss' in a
        assert evaluated <= (a.keys() == LOSS_KEYS) and (extra <= b.keys()) == evaluated
        assert not evaluated or b['val/loss@2'] == b['val/loss']  # the model's own number
    for name in ('ckpt.pt', 'best.pt'):
        a, b = (load(tmp_path / folder / name) for folder in ('out', 'with'))
        assert same(a['model'], b['model']) and a['best_val_loss'] == b['best_val_loss']
    last = [line for line in other if 'val/loss' in line][-1]
    told = ', '.join(f'val loss@{n} {last[f"val/loss@{n}"]:.4f}' for n in (1, 2, 9))
    assert f'val bpb {last["val/bpb"]:.4f}, {told}, took ' in out and out.count('val loss@1') == 4
    if more:
        return
    for n in (1, 9):  # one by one, as a resumed run
        keys = [f'--out_dir={tmp_path}/with', '--init_from=resume', '--eval_only=True', f'--n_loop={n}']
        assert call(main, *keys)[0] == 0
    lines = [json.loads(line) for line in (tmp_path / 'with' / 'eval.jsonl').read_text().splitlines()]
    assert [line['val/loss'] for line in lines] == [last['val/loss@1'], last['val/loss@9']]
    assert all(line.keys() == LOSS_KEYS | extra | {'n_loop', 'dataset'} for line in lines)
    assert all(line[key] == last[key] for line in lines for key in extra)  # of the key that was saved


def test_other_eval_loops_are_told_and_keep_the_best_loss(call, flags, tmp_path):
    call(main, *flags)
    before = load(tmp_path / 'out' / 'ckpt.pt')
    torch.save(before | dict(best_val_loss=0.1, stale=5), tmp_path / 'out' / 'ckpt.pt')
    resume = [f'--out_dir={tmp_path}/out', '--init_from=resume']
    status, out, _ = call(main, *resume, '--eval_loops=1,5', '--max_iters=13')
    assert status == 0 and "changed: eval_loops was '', is 1,5\n" in out and 'begin anew' not in out
    after = load(tmp_path / 'out' / 'ckpt.pt')
    assert (after['best_val_loss'], after['stale']) == (0.1, 6)
    assert not list((tmp_path / 'out').glob('best-before*'))
    _, out, _ = call(main, *resume, '--eval_loops=', '--max_iters=14')
    assert "changed: eval_loops was 1,5, is ''\n" in out and 'val loss@' not in out


@pytest.mark.parametrize(
    'value', ['0', '-1', '1,1', '1,,2', ',', '1.5', '1;2', 'all', 'None', '[1,2]', '1_0']
)
def test_a_wrong_value_is_refused_before_anything_is_allocated(call, tmp_path, monkeypatch, value):
    monkeypatch.setattr(train, 'setup', None)
    status, _, err = call(main, f'--out_dir={tmp_path}/out', *TINY, f'--eval_loops={value}')
    assert status == 2 and err.count('\n') == 1
    expected = 'expected different numbers with commas between them, none below 1, such as 1,2,4\n'
    assert err.endswith(f'eval_loops={value!r}, {expected}') and not (tmp_path / 'out').exists()
