"""lm-evaluation-harness sees the numbers and the texts that the program itself computes."""

import json
import socket
from dataclasses import asdict
from functools import partial
from operator import itemgetter
from types import SimpleNamespace

import pytest
import torch
from helpers import randomize

import eval as eval_script
from model import GPT, GPTConfig
from nanoloop import scoring
from nanoloop.checks import UserError
from nanoloop.generate import generate
from nanoloop.harness_args import ModelArgs
from nanoloop.perplexity import rolling_windows
from nanoloop.results import read_csv
from nanoloop.tokenizer import Characters, HuggingFace
from runs import lmeval

lm_eval = pytest.importorskip('lm_eval', reason='lm-eval is not installed: pip install -e ".[harness]"')
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

from nanoloop import harness  # noqa: E402
from nanoloop.harness import NanoLoop, group_by_context  # noqa: E402

LETTERS = 'abcdefghij \n'
SIZES = dict(block_size=16, n_head=2, n_embd=12, n_prelude=1, n_block=1, n_coda=1, n_loop=3)
PLAIN = dict(device='cpu', dtype='float32')


def save(path, tokenizer, vocab_size, **changes):
    """Saves a model with random weights as a checkpoint. Returns its path, as text."""
    config = GPTConfig(**SIZES, vocab_size=vocab_size, **changes)
    model = randomize(GPT(config))
    parts = dict(model=model.state_dict(), model_args=asdict(config), tokenizer=tokenizer.spec)
    torch.save(parts | dict(config={}, iter_num=7), path)
    return str(path)


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    """A checkpoint of characters, with learned positions."""
    return save(tmp_path_factory.mktemp('harness') / 'model.pt', Characters(LETTERS), len(LETTERS))


@pytest.fixture(scope='module')
def rope(tmp_path_factory):
    """A checkpoint of characters, with RoPE."""
    folder = tmp_path_factory.mktemp('harness')
    return save(folder / 'model.pt', Characters(LETTERS), len(LETTERS), pos='rope', exit_gate=True)


def make(path, **args):
    """Returns the harness's model of a checkpoint, in float64."""
    lm = NanoLoop(init_from=path, **PLAIN, **args)
    lm.model.double()
    return lm


def asks(*args):
    """Returns requests as the harness makes them."""
    return [SimpleNamespace(args=strings) for strings in args]


def text_of(n, seed=0):
    """Returns a text of n letters."""
    ids = torch.randint(len(LETTERS), (n,), generator=torch.Generator().manual_seed(seed))
    return ''.join(LETTERS[i] for i in ids)


def by_forward(lm, ids, n_scored, n_loop=None):
    """Returns log p of the last ids, float64, and whether each is the most likely one: one forward pass."""
    idx = torch.tensor([ids])
    with torch.no_grad():
        ces, _ = lm.model.loss_table(idx[:, :-1], idx[:, 1:].contiguous(), n_loop, (-1,))  # (1, 1, T)
        (s,), attn_inputs = lm.model.loop_states(idx[:, :-1], n_loop or lm.policy.n_loop)
        top = lm.model.logits(lm.model.run_coda(s, attn_inputs)).argmax(dim=-1)
    right = bool((top == idx[:, 1:])[0, -n_scored:].all())
    return -float(ces[0, 0, -n_scored:].sum()), right


# -----------------------------------------------------------------------------
# log-likelihoods


@pytest.mark.parametrize('size', [3, 16])
@pytest.mark.parametrize('n', [0, 1, 2, 3, 4, 15, 16, 17, 32, 33, 50])
def test_windows_are_those_of_the_harness(n, size):
    ids = list(range(1, n + 1))
    expected = map(make_disjoint_window, get_rolling_token_windows(ids, 0, size, 1))
    windows = rolling_windows(ids, 0, size)
    cut = [(text.ids[: text.scored.start], text.ids[text.scored]) for text in windows]
    assert cut == list(expected) and all(text.scored.stop == len(text.ids) for text in windows)


@pytest.mark.parametrize('n', [1, 9, 16, 17, 50])
def test_rolling_equals_the_models_own_cross_entropy(path, n):
    lm, text = make(path), text_of(n)
    ids = [lm.eot_token_id, *lm.tok_encode(text)]
    expected = 0
    for start in range(1, len(ids), 16):  # every token once; the last window has all 16 tokens in view
        end = min(start + 16, len(ids))
        expected += by_forward(lm, ids[max(0, end - 17) : end], end - start)[0]
    again, other = lm.loglikelihood_rolling(asks((text,), (text_of(30, 1),)), disable_tqdm=True)
    assert again == pytest.approx(expected, abs=1e-9) and other != again
    assert lm.eot_token_id == LETTERS.index('\n') and lm.loglikelihood_rolling(asks(('',))) == [0]


@pytest.mark.parametrize(
    'args',
    [
        dict(),
        dict(n_loop=1, batch_size=1),
        dict(n_loop=5, kv_budget=5, batch_size=3),
        dict(exit='diff', exit_threshold=0),
    ],
)
def test_a_continuation_has_its_log_likelihood_and_its_greedy_flag(path, args):
    lm = make(path, **args)
    asked = [('abc', 'd'), ('abc', 'ef'), ('abc', 'g'), ('', 'abca'), (' ', 'ab'), ('a', text_of(16))]
    asked += [(text_of(25), 'ab'), (text_of(25), 'cde'), (text_of(14), 'a'), (text_of(14), 'ab'), ('b', '')]
    likely = lm.generate_until(asks(*((text, dict(max_gen_toks=2)) for text, _ in asked[:3])))
    asked += [(text, best) for (text, _), best in zip(asked[:3], likely, strict=True)]
    results = lm.loglikelihood(asks(*asked), disable_tqdm=True)
    for (context, continuation), (log_p, greedy) in zip(
        asked[:-4] + asked[-3:], results[:-4] + results[-3:], strict=True
    ):
        ids = [LETTERS.index(char) for char in context + continuation]
        n = len(continuation) + len(context) - len(context.rstrip())  # a blank belongs to the continuation
        ids = ids if n < len(ids) else [LETTERS.index('\n'), *ids]
        expected, right = by_forward(lm, ids[-17:], n, args.get('n_loop'))
        assert (log_p, greedy) == (pytest.approx(expected, abs=1e-9), right)
    assert results[-4] == (0, True) and [greedy for _, greedy in results[-3:]] == [True] * 3
    assert not all(greedy for _, greedy in results)


def test_a_continuation_beyond_the_context_is_scored_token_by_token(path):
    lm, text = make(path), text_of(40)
    ((long, _),) = lm.loglikelihood(asks(('', text)))
    assert long == pytest.approx(lm.loglikelihood_rolling(asks((text,)))[0], abs=1e-9)


def test_choices_share_the_computation_of_a_long_context_only(path):
    lm = make(path)
    tokens = [('x', [1] * 6, [2, 3]), ('y', [1] * 6, [2, 4, 5]), ('z', [1] * 6, [5, 5]), ('w', [1], [2, 3])]
    tokens += [('v', [1], [2]), ('u', [1] * 15, [2, 3]), ('t', [1] * 15, [4])]
    beyond = [('s', [1] * 20, [2, 3]), ('r', [1] * 20, [4])]  # they lose different beginnings
    items = group_by_context(tokens, [lm.texts_of(*ids) for _, *ids in tokens])
    items += group_by_context(beyond, [lm.texts_of(*ids) for _, *ids in beyond])
    names = [[name for name, _ in item.info['requests']] for item in items]
    assert names == [['x', 'y'], ['z'], ['w'], ['v'], ['u', 't'], ['s'], ['r']]


# -----------------------------------------------------------------------------
# texts


@pytest.mark.parametrize(
    'args',
    [
        dict(n_loop=2),
        dict(batch_size=1),
        dict(exit='gate', exit_threshold=0.6, min_loops=2),
        dict(kv_budget=1, batch_size=2),
    ],
)
def test_generated_texts_equal_those_of_single_prompts(rope, args):
    lm = make(rope, **args)
    prompts = ['abc', 'a', text_of(11), 'hello'.replace('l', 'i').replace('o', 'j'), text_of(30), '']
    options = dict(n_loop=lm.policy.n_loop, kv_budget=lm.policy.kv_budget, early_exit=lm.policy.early_exit)
    for n in (6, 20):  # 20: more than fits into block_size
        expected = []
        for prompt in prompts:
            ids = [LETTERS.index(char) for char in prompt or '\n']
            ids = ids[-10:] if n == 6 else ids  # what leaves room for 6 tokens
            out = generate(lm.model, torch.tensor([ids]), n, temperature=0, **options)[0, len(ids) :]
            expected.append(''.join(LETTERS[i] for i in out))
        asked = [(prompt, dict(max_gen_toks=n, until=[])) for prompt in prompts]
        assert lm.generate_until(asks(*asked), disable_tqdm=True) == expected
        assert len(set(expected)) > 2
        # ends of their own, in one batch
        stops = [[text[3]] if i % 2 else ['zz', text[1:3]] for i, text in enumerate(expected)]
        asked = [
            (prompt, dict(max_gen_toks=n, until=stop)) for prompt, stop in zip(prompts, stops, strict=True)
        ]
        cut = [
            text[: min(text.index(s) for s in stop if s in text)]
            for text, stop in zip(expected, stops, strict=True)
        ]
        assert lm.generate_until(asks(*asked)) == cut


def test_sampling_follows_gen_kwargs_and_the_seed(rope):
    def draw(seed=5, **kwargs):
        torch.manual_seed(seed)
        lm = make(rope)
        assert torch.initial_seed() == seed  # what the tasks of the harness draw is not touched
        return lm.generate_until(asks(*[('ab', dict(max_gen_toks=8, **kwargs))] * 4))

    greedy, drawn = draw(), draw(do_sample=True, temperature=1.5)
    assert len(set(greedy)) == 1 and len(set(drawn)) > 1 and drawn == draw(do_sample=True, temperature=1.5)
    assert drawn != draw(6, do_sample=True, temperature=1.5)
    assert greedy == draw(do_sample=False, temperature=1.5) == draw(temperature=1.5, top_k=1, num_beams=1)
    assert draw(temperature=1.5, top_p=1e-6) == greedy and draw(temperature=1.5, top_k=0) == drawn


def test_requests_of_unlike_settings_are_not_mixed(rope):
    lm = make(rope)
    asked = [('ab', dict(max_gen_toks=4)), ('c', dict(max_new_tokens=2)), ('ab', dict(max_gen_toks=2))]
    texts = lm.generate_until(asks(*asked))
    assert [len(text) for text in texts] == [4, 2, 2] and texts[0][:2] == texts[2]
    stops = [harness.read_generation(kwargs)[1] for kwargs in ({}, dict(until=None), dict(until='a'))]
    assert stops == [[], [], ['a']]


def drawn(*tokens):
    """Returns a stream of Generation that yields these tokens, (B,) each."""

    def stream(generation, n):
        generation.stats.loops_taken[1] += 1
        yield from torch.tensor(tokens)

    return stream


def test_a_special_end_of_text_token_ends_a_text(tmp_path, monkeypatch):
    tokenizers = pytest.importorskip('tokenizers')
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({'<|endoftext|>': 0, 'a': 1, 'b': 2}, []))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.add_special_tokens(['<|endoftext|>'])
    lm = make(save(tmp_path / 'model.pt', HuggingFace(bpe.to_str()), 3))
    assert lm.prefix_token_id == 0
    monkeypatch.setattr(harness.Generation, 'stream', drawn([1, 0], [2, 1], [0, 1], [2, 2]))
    assert lm.generate_until(asks(('a', {}), ('b', {}))) == ['ab', '']


def test_a_newline_ends_no_text_of_characters(path, monkeypatch):
    monkeypatch.setattr(harness.Generation, 'stream', drawn([11], [0], [11]))
    assert make(path).generate_until(asks(('a', dict(max_gen_toks=3, until='\nb')))) == ['\na\n']


def test_processes_share_the_requests_of_a_call(rope, monkeypatch):
    lm, shares = make(rope), {}
    texts = asks(*((text_of(n, n),) for n in (4, 30, 9, 2)))
    prompts = asks(*((text_of(n, n), dict(max_gen_toks=4)) for n in (3, 8, 5)))
    calls = [(lm.loglikelihood_rolling, texts), (lm.generate_until, prompts)]
    alone = [method(requests) for method, requests in calls]

    def gather(m, value):
        shares[m.rank] = value
        return [value, shares[1]]

    monkeypatch.setattr(lm.cache_hook, 'add_partial', lambda *args: pytest.fail('one of two has it'))
    monkeypatch.setattr(scoring, 'gather', gather)
    monkeypatch.setattr(harness, 'gather', gather)
    lm.m.world = 2
    for (method, requests), expected in zip(calls, alone, strict=True):
        for lm.m.rank in (1, 0):
            together = method(requests)
        assert together == (expected if method == lm.generate_until else pytest.approx(expected, abs=1e-9))
        answers = [share[0] if method == lm.generate_until else share[0][0] for share in shares.values()]
        assert sorted(map(len, answers)) == [len(requests) // 2, (len(requests) + 1) // 2]


# -----------------------------------------------------------------------------
# the harness, on a task of files


def write_tasks(folder):
    """Writes a task of each kind as the harness reads it, with its data. Returns their names."""
    pages = [dict(page=text_of(n, n).replace('\n', 'a').strip()) for n in (9, 40, 3)]
    questions = [dict(q=text_of(6, i), choices=['a', 'bc', 'dj'], answer=i % 3) for i in range(12)]
    prompts = [dict(q=text_of(n, n)) for n in (3, 8, 5)]
    rolling = dict(output_type='loglikelihood_rolling', doc_to_text='', doc_to_target='page')
    choice = dict(output_type='multiple_choice', doc_to_choice='choices', doc_to_target='answer')
    generation = dict(until=['a'], max_gen_toks=5)
    for name, rows, keys in (
        ('pages', pages, rolling | dict(metric_list=[dict(metric='bits_per_byte')])),
        ('choices', questions, choice | dict(doc_to_text='{{q}}', target_delimiter='')),
        (
            'prompts',
            prompts,
            dict(
                output_type='generate_until', doc_to_text='q', doc_to_target='x', generation_kwargs=generation
            ),
        ),
    ):
        data = folder / f'{name}.jsonl'
        data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
        files = dict(data_files=dict(test=str(data)), cache_dir=f'{folder}/cache')
        keys |= dict(task=f'own_{name}', dataset_path='json', dataset_kwargs=files, test_split='test')
        (folder / f'{name}.yaml').write_text(json.dumps(keys))  # JSON is YAML
    return ['own_pages', 'own_choices', 'own_prompts']


@pytest.fixture
def own_tasks(monkeypatch):
    """Spares the 10 s in which the harness reads its thousands of tasks, and its logs on a closed stderr."""
    monkeypatch.setattr('lm_eval.utils.setup_logging', lambda: None)
    monkeypatch.setattr('lm_eval.tasks.TaskManager', partial(TaskManager, include_defaults=False))


def read_results(folder):
    """Returns what the harness has written: its results, and {task: the answers to each question}."""
    (file,) = folder.rglob('results*.json')
    answers = {}
    for path in folder.rglob('samples*.jsonl'):
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        answers[path.name.split('_')[2]] = [
            sample['resps'] for sample in sorted(samples, key=itemgetter('doc_id'))
        ]
    return json.loads(file.read_text()), answers


def test_the_command_answers_as_the_model_does_without_a_network(
    call, own_tasks, rope, tmp_path, monkeypatch
):
    names = write_tasks(tmp_path)
    questions = [json.loads(line) for line in (tmp_path / 'choices.jsonl').read_text().splitlines()]
    monkeypatch.setattr(socket.socket, 'connect', lambda *args: pytest.fail('it connects'))
    wikitext = ['--tasks=wikitext', f'--wikitext={tmp_path}/pages.jsonl', f'--csv={tmp_path}/eval.csv']
    flags = [f'--init_from={rope}', '--device=cpu', '--dtype=float32', '--loops=1,2']
    assert call(eval_script.main, *flags, *wikitext)[0] == 0
    for row in read_csv(tmp_path / 'eval.csv'):
        n = int(row['loops'])
        model = ['--model_args', f'init_from={rope},dtype=float32', f'n_loop={n}']
        more = ['--include_path', str(tmp_path), '--output_path', f'{tmp_path}/{n}', '--log_samples']
        status, out, err = call(lmeval.main, *model, *more, '--tasks', *names)
        assert status == 0 and '|own_choices|' in out and '|own_prompts|' in out, err
        results, answers = read_results(tmp_path / str(n))
        about = [results['config'][key] for key in ('model', 'batch_size', 'n_loop', 'step')]
        assert about == ['nanoloop', 'auto', n, 7]
        assert set(results['config']['mean_loops'].values()) == {n}
        bpb = results['results']['own_pages']['bits_per_byte,none']
        assert bpb == pytest.approx(float(row['bpb']), rel=1e-6)

        lm = make(rope, n_loop=n)
        for question, answer in zip(questions, answers['choices'], strict=True):
            expected = lm.loglikelihood(asks(*((question['q'], choice) for choice in question['choices'])))
            for ((log_p, greedy),), (reference, flag) in zip(answer, expected, strict=True):
                assert float(log_p) == pytest.approx(reference, abs=1e-4) and greedy == str(flag)


def test_exits_change_the_numbers_as_in_eval_and_low_precision_does_not_round_them(
    call, own_tasks, rope, tmp_path
):
    write_tasks(tmp_path)
    wikitext = ['--tasks=wikitext', f'--wikitext={tmp_path}/pages.jsonl', f'--csv={tmp_path}/eval.csv']
    flags = [f'--init_from={rope}', '--device=cpu', '--dtype=bfloat16', '--loops=3']
    policies = ['--exit=gate', '--exit_threshold=0.6', '--kv_budget=1']
    assert call(eval_script.main, *flags, *policies, *wikitext)[0] == 0
    rows = read_csv(tmp_path / 'eval.csv')
    texts = [json.loads(line)['page'] for line in (tmp_path / 'pages.jsonl').read_text().splitlines()]
    losses = []
    for row, args in zip(rows, [{}, dict(exit='gate', exit_threshold=0.6), dict(kv_budget=1)], strict=True):
        lm = NanoLoop(init_from=rope, device='cpu', dtype='bfloat16', **args)
        log_p = lm.loglikelihood_rolling(asks(*((text,) for text in texts)), disable_tqdm=True)
        losses.append(-sum(log_p) / sum(map(len, texts)))
        assert losses[-1] == pytest.approx(float(row['loss']), rel=1e-7)
        assert lm.mean_loops['loglikelihood_rolling'] == pytest.approx(float(row['mean_loops']))
    assert len(set(losses)) == 3


def test_an_evaluation_that_was_stopped_continues_from_the_cache(own_tasks, rope, tmp_path, monkeypatch):
    names, path = write_tasks(tmp_path), f'{tmp_path}/cache'
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def evaluate(**options):
        with pytest.MonkeyPatch.context() as patch:
            for method, answer in options.items():
                patch.setattr(NanoLoop, method, answer)
            lm = NanoLoop(init_from=rope, batch_size=1, **PLAIN)
            return lm_eval.simple_evaluate(
                lm, tasks=names, task_manager=manager, use_cache=path, bootstrap_iters=0
            )

    def stop(*args):
        raise KeyboardInterrupt

    def stop_after_one(self, *args):
        if done:
            raise KeyboardInterrupt
        done.append(args)
        return original(self, *args)

    original, done = NanoLoop.generate, []
    with pytest.raises(KeyboardInterrupt):
        evaluate(generate=stop_after_one)
    rest = []
    again = evaluate(texts_of=stop, generate=lambda self, *args: rest.append(args) or original(self, *args))
    assert len(done) == 1 and len(rest) == 2  # no text is scored again, and two of three are generated
    assert again['results'] == evaluate(texts_of=stop, generate=stop)['results']


@pytest.mark.parametrize(
    'argv, told',
    [
        ('--model_args out_dir=x,n_lop=2', "model_args='n_lop', expected one of out_dir, init_from, n_loop"),
        ('--model_args pretrained=gpt2', "model_args='pretrained', expected one of out_dir, init_from"),
        ('--model_args n_loop=two', "n_loop='two', expected int or None"),
        ('--model_args n_loop=0', 'n_loop=0, expected at least 1'),
        ('--model_args n_loop=1.5', 'n_loop=1.5, expected int or None'),
        ('--model_args exit=kl', 'exit_threshold=None, expected a number with exit=kl: try 0.001'),
        ('--model_args exit=x', "exit='x', expected one of '', kl, diff, gate"),
        ('--model_args min_loops=2', 'min_loops=2, expected 1 without an exit'),
        ('--model_args batch_size=0', 'batch_size=0, expected auto or a number, at least 1'),
        ('--batch_size huge', "batch_size='huge', expected auto or a number"),
        ('--model_args device=cpu --device cpu', "model_args='device', expected no flag --device beside it"),
        ('--tasks own_page', 'Tasks not found: own_page'),
        ('--config nowhere.yaml', 'Config file not found'),
        ('', 'No tasks specified'),
        ('--tasks own_pages --model_args out_dir=nowhere', "out_dir='nowhere': there is no folder nowhere"),
        ('--tasks own_pages --model_args init_from={rope},kv_budget=4', 'expected at most the 3 loops'),
        ('--tasks own_pages --model_args init_from={path},exit=gate', 'the model has no exit gate'),
        ('--tasks own_pages --model_args init_from={rope},device=tpu', "device='tpu', expected auto, cpu"),
        ('--tasks own_pages --model_args init_from={rope},dtype=int8', "dtype='int8', expected one of auto"),
        ('--tasks own_pages --model_args init_from={rope} --apply_chat_template', 'have no chat template'),
        ('--tasks own_prompts --model_args init_from={rope} --gen_kwargs temperature=-1', 'temperature=-1.0'),
        ('--tasks own_prompts --model_args init_from={rope} --gen_kwargs max_gen_toks=x', 'invalid literal'),
        (
            '--tasks own_prompts --model_args init_from={rope} --gen_kwargs until=3',
            'until=[3], expected a text',
        ),
        (
            '--tasks own_prompts --model_args init_from={rope} --gen_kwargs penalty=3',
            "gen_kwargs='penalty', exp",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line(argv, told, call, own_tasks, path, rope, tmp_path):
    write_tasks(tmp_path)
    argv = argv.format(path=path, rope=rope).split()
    argv += ['--tasks', 'own_pages'] * (argv[:1] == ['--model_args'])
    status, _, err = call(lmeval.main, *argv, '--include_path', str(tmp_path))
    last = err.splitlines()[-1]
    assert status == 2 and last.startswith('lmeval.py: ') and told in last and 'Traceback' not in err


def test_chat_templates_are_refused(path):
    with pytest.raises(UserError, match="models have no chat template"):
        make(path).apply_chat_template([dict(role='user', content='a')])


def test_text_outside_the_vocabulary_is_refused(path):
    lm = make(path)
    with pytest.raises(UserError, match='characters that the tokenizer does not know'):
        lm.loglikelihood_rolling(asks(('XYZ',)))
    lm.words = Characters(LETTERS + 'X')  # a token more than the model has
    with pytest.raises(UserError, match="text='aX', expected text in the 12 tokens of the model"):
        lm.generate_until(asks(('aX', {})))


def test_model_arguments_and_the_harness_own_file_of_flags(call, own_tasks, rope, tmp_path, monkeypatch):
    write_tasks(tmp_path)
    seen = []
    monkeypatch.setattr(NanoLoop, '__init__', lambda self, **args: seen.append(args) or stop())

    def stop():
        raise UserError('seen')

    folder = tmp_path / 'of flags.yaml'
    folder.write_text(f'tasks: [own_pages]\nbatch_size: 7\nmodel_args: {{init_from: {rope}}}\n')
    common = '--include_path', str(tmp_path)
    assert call(lmeval.main, '--config', str(folder), *common)[0] == 2
    assert call(lmeval.main, '--config', str(folder), '--model_args', 'out_dir=a,device=cpu', *common)[0] == 2
    assert seen == [
        dict(init_from=rope, batch_size=7, device='auto'),
        dict(out_dir='a', batch_size=7, device='cpu'),
    ]


def test_a_folder_may_be_a_number_or_in_the_home_folder(monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    assert ModelArgs(out_dir=123).out_dir == '123' and ModelArgs(batch_size='4').batch_size == 4
    assert ModelArgs(init_from='ouro:~/Ouro').init_from == 'ouro:/home/me/Ouro'
