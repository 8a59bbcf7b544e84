"""Supervised fine-tuning: conversations packed into rows, mixtures, and epochs over rows."""

import json
import random
import re
import runpy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT
from test_conversation import ChatBytes, assistant, user

import train
from configurator import configure
from model import GPT, GPTConfig
from nanoloop.batches import steps_of_epochs, steps_per_epoch, take_rows
from nanoloop.checkpoint import load_checkpoint
from nanoloop.checks import UserError
from nanoloop.conversation import read_conversations, render, render_prompt
from nanoloop.datasets import open_split, read_meta
from nanoloop.mixture import Part, describe, hold_out, take, write_rows
from nanoloop.optimizer import lr_at
from nanoloop.packing import pack
from nanoloop.prepare import Writer
from nanoloop.tokenizer import make_tokenizer

TOKENIZER = ChatBytes()
TOKENIZER.token_bytes = [1] * 256 + [0] * 9
BOS = TOKENIZER.special_ids['<|bos|>']

# -----------------------------------------------------------------------------
# packing


def random_conversations(dice, n, longest):
    """Returns n conversations (ids, mask) of random lengths; each has its number in its ids."""
    made = []
    for number in range(n):
        size = dice.choice([1, longest, dice.randint(1, longest)])
        made.append(([1000 + number] * size, [dice.randint(0, 1) for _ in range(size)]))
    return made


@pytest.mark.parametrize('seed', range(30))
def test_packing_loses_no_conversation_and_cuts_none(seed):
    dice = random.Random(seed)
    row_len, n = dice.randint(1, 60), dice.choice([0, 1, 2, 50, 300])
    conversations = random_conversations(dice, n, row_len)
    rows = list(pack(iter(conversations), row_len, filler=7, n_waiting=dice.choice([1, 3, 100])))
    found = {}
    for ids, mask in rows:
        assert len(ids) == len(mask) == row_len
        end = ids.index(7) if 7 in ids else row_len
        assert end > 0 and ids[end:] == [7] * (row_len - end) and not any(mask[end:])
        start = 0
        while start < end:  # equal ids in a row are one conversation, whole
            size = ids[start:end].count(ids[start])
            assert ids[start] not in found and ids[start : start + size] == [ids[start]] * size
            found[ids[start]] = ids[start : start + size], mask[start : start + size]
            start += size
    assert [found[1000 + number] for number in range(n)] == conversations


def test_a_row_takes_the_longest_conversation_that_fits():
    lengths = [3, 9, 4, 6, 1, 2]
    rows = list(pack((([i] * i, [1] * i) for i in lengths), 10, filler=0))
    assert [ids for ids, _ in rows] == [[9] * 9 + [1], [6] * 6 + [4] * 4, [3] * 3 + [2] * 2 + [0] * 5]
    assert rows[-1][1] == [1] * 5 + [0] * 5
    first_come = list(pack((([i] * i, [1] * i) for i in lengths), 10, filler=0, n_waiting=1))
    assert [ids[0] for ids, _ in first_come] == [3, 9, 4, 1]


# -----------------------------------------------------------------------------
# mixtures


def items(*texts):
    return [dict(messages=[user(f'say {text}'), assistant(text)]) for text in texts]


def contents(parts):
    return [part[i][-1]['content'] for part in parts for i in range(len(part))]


def test_a_part_is_the_first_conversations_or_all_in_turns():
    source = items('a', 'b', 'c')
    assert contents([take('x', source, 2)]) == ['a', 'b']
    assert contents([take('x', source, 7)]) == [*'abcabca']
    assert describe([take('x', source, 1000), take('y', source, 0)]) == '1,000 of x'


def test_what_is_held_out_is_never_in_train_also_not_in_another_part():
    texts = [str(i) for i in range(200)]
    first, second = take('first', items(*texts), 400), take('second', items(*texts[100:], *'abcd'), 104)
    train, val = hold_out([first, second], 0.1)
    assert [part.name for part in train] == [part.name for part in val] == ['first', 'second']
    trained, held = contents(train), contents(val)
    assert not set(trained) & set(held) and set(trained) | set(held) == {*texts, *'abcd'}
    assert len(held) == len(set(held)) and 20 <= len(val[0]) <= 30
    assert all(trained.count(text) == 2 for text in texts[:100] if text in trained)
    again = hold_out([take('other', items(*reversed(texts)), 200)], 0.1)[1]
    assert set(contents(again)) == set(contents(hold_out([first], 0.1)[1]))  # of any order


def test_a_part_always_keeps_something_to_train_on():
    for n in (1, 2, 3):
        train, val = hold_out([take('x', items(*'abc'[:n]), n)], 0.9)
        assert (
            len(train[0]) >= 1 and len(val[0]) == (n > 1) * len(val[0]) and len(train[0]) + len(val[0]) == n
        )
        assert n == 1 or len(val[0]) >= 1


def prepare(tmp_path, train, val, row_len=40, **options):
    """Writes a data set of parts. Returns its folder."""
    writer = Writer(tmp_path / 'sft', TOKENIZER, 'test', resume=False)
    for split, parts in dict(train=train, val=val).items():
        write_rows(writer, split, parts, row_len, **options)
    writer.finish(row_len=row_len)
    return tmp_path / 'sft'


def read_rows(folder, split, row_len):
    ids = np.fromfile(folder / f'{split}.bin', '<u2').reshape(-1, row_len)
    return ids, np.fromfile(folder / f'{split}.mask', np.uint8).reshape(-1, row_len)


def conversations_in(ids):
    """Returns the conversations of a row without its filler, lists of ids."""
    starts = [i for i, token in enumerate(ids) if token == BOS] + [len(ids)]
    return [ids[a:b] for a, b in zip(starts, starts[1:], strict=False) if b > a + 1]


def test_a_data_set_has_every_conversation_whole_and_counts_what_the_assistant_writes(tmp_path):
    dice, lines = random.Random(3), []
    source = items(*('x' * dice.randint(0, 30) + str(i) for i in range(300)))
    folder = prepare(tmp_path, [take('x', source, 300)], [take('y', source, 5)], row_len=40, say=lines.append)
    rendered = [render(item['messages'], TOKENIZER) for item in source]
    fitting = {tuple(ids): mask for ids, mask in rendered if len(ids) <= 40}
    ids, mask = read_rows(folder, 'train', 40)
    found = [tuple(found) for row in ids.tolist() for found in conversations_in(row)]
    assert sorted(found) == sorted(fitting)
    assert mask.sum() == sum(map(sum, fitting.values()))
    assert (mask.astype(bool) & (ids == BOS)).sum() == 0
    left_out = f'; left out: {300 - len(fitting)} longer than a row'
    assert lines[0].startswith(
        f'sft: train has {len(fitting)} conversations in {len(ids)} rows of 40 tokens, '
    )
    assert lines[0].endswith(left_out)
    split = open_split(folder, read_meta(folder), 'train', 39, 265)
    assert split.train_windows.sum() == len(ids)


def test_all_tokens_counts_prompts_but_not_what_fills_up_a_row(tmp_path):
    source = items('a', 'b')
    folder = prepare(tmp_path, [take('x', source, 2)], [take('x', source, 1)], all_tokens=True)
    ids, mask = read_rows(folder, 'train', 40)
    used = sum(len(render(item['messages'], TOKENIZER)[0]) for item in source)
    assert mask.sum() == used < mask.size
    assert ids[mask == 0].tolist() == [BOS] * (mask.size - used)


def test_a_split_without_a_conversation_that_fits_is_refused_with_what_helps(tmp_path):
    part, silent = take('x', items('a' * 99), 1), Part('x', [dict(messages=[user('a')])], [0])
    for wrong, told in (
        (part, '1 longer than a row.*a larger --block_size'),
        (silent, '1 without an answer.; each needs a message of the assistant'),
    ):
        with pytest.raises(UserError, match=f'sft: train has no conversation of 1 .left out: {told}'):
            prepare(tmp_path, [wrong], [part])


def test_the_order_of_a_mixture_is_always_the_same_and_mixes_its_parts(tmp_path):
    parts = [take('x', items(*map(str, range(50))), 50), take('y', items(*map(str, range(50, 100))), 50)]
    rows = [read_rows(prepare(tmp_path / name, parts, parts), 'train', 40)[0] for name in 'ab']
    assert (rows[0] == rows[1]).all()
    texts = [bytes(t for t in row if t < 256) for row in rows[0].tolist()[:20]]
    assert any(int(text[4:6]) < 50 for text in texts) and any(int(text[4:6]) >= 50 for text in texts)


# -----------------------------------------------------------------------------
# epochs

SMALL = ['--device=cpu', '--compile=False', '--sample_tokens=0', '--n_prelude=1', '--n_block=1', '--n_coda=0']
SMALL += [
    '--n_loop=2',
    '--n_head=2',
    '--n_embd=16',
    '--warmup_iters=0',
    '--learning_rate=1e-2',
    '--dropout=0.1',
]
SMALL += ['--decay_lr=False', '--eval_iters=1', '--batch_size=3', '--gradient_accumulation_steps=4']


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    """A data set of 31 training rows in three files, each of which has another content."""
    folder = tmp_path_factory.mktemp('rows')
    writer = Writer(folder, TOKENIZER, 'test', shard_tokens=12 * 9, resume=False)
    for number in range(31):
        writer.add('train', [BOS, 100 + number] + [5] * 7, [0, 1] + [number % 2] * 7)
    writer.add('val', [BOS] * 18, [1] * 18)
    writer.finish(row_len=9)
    return folder


def keys(**more):
    given = dict(seed=1, batch_size=3, gradient_accumulation_steps=4, epochs=1.0)
    return SimpleNamespace(**(given | more))


def places(world):
    return [SimpleNamespace(world=world, rank=rank) for rank in range(world)]


def global_batch(split, c, step, world):
    """Returns the numbers of the rows in the micro-batches of a step, in their order."""
    micros = c.gradient_accumulation_steps // world
    batches = [take_rows(split, c, m, step, micro) for micro in range(micros) for m in places(world)]
    return [int(target[0]) - 100 for batch in batches for target in batch.targets if target[0] != -1]


@pytest.mark.parametrize('more', [{}, dict(batch_size=1), dict(batch_size=31, gradient_accumulation_steps=4)])
def test_an_epoch_has_each_row_once_in_an_order_of_its_own_that_depends_on_the_seed(rows, more):
    split, c = open_split(rows, read_meta(rows), 'train', 8, 265), keys(**more)
    n = steps_per_epoch(31, c)
    epochs = [[row for step in range(n) for row in global_batch(split, c, e * n + step, 1)] for e in range(3)]
    assert all(sorted(epoch) == list(range(31)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3 and epochs[0] != sorted(epochs[0])
    other = keys(seed=2, **more)
    assert [row for step in range(n) for row in global_batch(split, other, step, 1)] != epochs[0]


def test_the_global_batches_of_an_epoch_do_not_depend_on_the_number_of_processes(rows):
    split, c = open_split(rows, read_meta(rows), 'train', 8, 265), keys()
    for step in range(2 * steps_per_epoch(31, c)):
        assert (
            global_batch(split, c, step, 1)
            == global_batch(split, c, step, 2)
            == global_batch(split, c, step, 4)
        )


@pytest.mark.parametrize(
    'epochs, n_rows, steps',
    [
        (1.0, 31, 3),
        (1.0, 24, 2),
        (2.0, 31, 6),
        (0.5, 24, 1),
        (0.5, 31, 2),
        (1.5, 24, 3),
        (0.1, 360, 3),
        (0.01, 31, 1),
    ],
)
def test_the_steps_of_epochs(epochs, n_rows, steps):
    assert steps_of_epochs(n_rows, keys(epochs=epochs)) == steps  # of 12 rows each


@pytest.fixture
def run(rows, tmp_path, call):
    """run(name, *flags) -> (status, stdout, stderr) of training on the rows, its weights in tmp_path/name."""
    return lambda name, *flags: call(
        train.main, *SMALL, f'--dataset={rows}', f'--out_dir={tmp_path / name}', *flags
    )


def weights(path):
    return torch.load(path, weights_only=True)['model']


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_of_epochs_resumes_to_the_bit_in_the_middle_and_at_the_end_of_an_epoch(run, tmp_path):
    status, out, err = run('whole', '--epochs=2')
    assert status == 0 and 'epochs = 2: 31 rows in 3 steps, max_iters = 6' in out, err
    whole = weights(tmp_path / 'whole' / 'ckpt.pt')
    for name, epochs in (('middle', 0.5), ('end', 1)):
        assert run(name, f'--epochs={epochs}')[0] == 0
        assert not equal(weights(tmp_path / name / 'ckpt.pt'), whole)
        status, out, _ = run(name, '--epochs=2', '--init_from=resume')
        assert status == 0 and f'resuming at step {2 if epochs == 0.5 else 3} of 6' in out
        assert equal(weights(tmp_path / name / 'ckpt.pt'), whole)
    status, out, _ = run('end', '--init_from=resume')  # the checkpoint's epochs
    assert status == 0 and 'resuming at step 6 of 6: nothing is left to do, a larger epochs goes on' in out


def test_without_epochs_rows_are_drawn_as_before(rows):
    split = open_split(rows, read_meta(rows), 'train', 8, 265)
    drawn = split.draw(np.random.default_rng(5), 64)[1][:, 0] - 100
    assert drawn.tolist() == np.random.default_rng(5).integers(31, size=64).tolist()


@pytest.mark.parametrize(
    'flags, told',
    [
        (['--max_iters=5'], 'epochs=1.0, expected None with max_iters=5: give one of the two'),
        (['--dataset=mano:3'], 'epochs=1.0, expected None with dataset=mano:3: only the rows of a folder'),
        (['--epochs=0'], 'epochs=0.0, expected above 0'),
        (['--epochs=inf'], 'epochs='),
        (['--epochs=-1'], 'epochs=-1.0, expected above 0'),
        (['--rl_task=mano:1'], 'None with rl_task'),
    ],
)
def test_epochs_of_what_has_no_rows_are_refused(run, flags, told):
    status, _, err = run('out', '--epochs=1', *flags)
    assert status == 2 and told in err and err.count('\n') == 1, err


def test_a_text_has_no_epochs(run, tmp_path):
    writer = Writer(tmp_path / 'text', TOKENIZER, 'test', resume=False)
    for split in ('train', 'val'):
        writer.add(split, list(range(99)))
    writer.finish()
    status, _, err = run('out', '--epochs=1', f'--dataset={tmp_path / "text"}')
    assert status == 2 and 'only the rows of a folder, as data/sft has, are counted; give max_iters' in err


# -----------------------------------------------------------------------------
# the loss, and the whole


@pytest.mark.parametrize('n_loop', [1, 3])
def test_the_loss_on_prompts_is_exactly_zero_by_gradient(tmp_path, n_loop):
    source = items('aa', 'b', 'cccc')
    folder = prepare(tmp_path, [take('x', source, 3)], [take('x', source, 1)])
    split = open_split(folder, read_meta(folder), 'train', 39, 265)
    idx, targets = (torch.from_numpy(a) for a in split.read_train_windows(np.arange(2), 2))
    sizes = dict(n_prelude=1, n_block=1, n_coda=1, n_head=2, n_embd=16, block_size=39, vocab_size=265)
    model, read = GPT(GPTConfig(**sizes)), []
    for p in model.parameters():
        torch.nn.init.normal_(p)
    model.transformer.ln_f.register_forward_hook(lambda module, args, out: read.append(out))
    logits, loss = model(idx, targets, n_loop=n_loop)
    assert len(read) == 1
    (gradient,) = torch.autograd.grad(loss, read[0])  # (B, T, C)
    ids, mask = read_rows(folder, 'train', 40)
    counts = torch.from_numpy(mask[:, 1:]) == 1  # (B, T)
    assert 0 < counts.sum() < counts.numel()
    assert (gradient[~counts] == 0).all() and (gradient[counts] != 0).any(dim=-1).all()
    nats = torch.nn.functional.cross_entropy(
        logits[counts].double(), torch.from_numpy(ids[:, 1:].astype(np.int64))[counts]
    )
    assert loss.item() == pytest.approx(nats.item(), rel=1e-5)


def test_the_schedule_and_the_rates_are_those_of_looped_nanochat():
    files = [f'config/{name}.py' for name in ('train_looped_nanochat', 'sft', 'sft_looped_nanochat')]
    c = configure((train.TrainConfig, GPTConfig), files, say=None)
    c.update(max_iters=100)
    published = dict(epochs=1.0, weight_decay=0.0, embedding_lr=0.2, head_lr=0.004, matrix_lr=0.02, n_loop=4)
    assert {key: c[key] for key in published} == published and c.loop_sampling == 'poisson'
    assert c.batch_size * c.gradient_accumulation_steps * c.block_size == 524_288
    assert c.eval_iters == 20 * c.gradient_accumulation_steps and c.eval_interval == 150
    rates = [lr_at(step, c) for step in (0, 79, 90, 99)]
    assert rates[:2] == [0.005, 0.005] and rates[2] == pytest.approx(0.0025) and 0 < rates[3] < 0.0005


PREPARE = runpy.run_path(str(ROOT / 'data' / 'sft' / 'prepare.py'))['main']
WHO = 'nanoLOOP.'
QUESTIONS = ['Who are you?', 'who are you', 'What is your name?', 'Your name?', 'Hi, who is this?']


def write_chat(path):
    """Writes conversations that tell who the model is, and one that is too long, each of them twice."""
    lines = [[user(f'{question}{" " * i}'), assistant(WHO)] for i in range(3) for question in QUESTIONS]
    lines.append([user('x' * 200), assistant(WHO)])
    path.write_text('\n'.join(json.dumps(line) for line in lines * 2))
    return path


def test_a_base_model_is_fine_tuned_and_says_who_it_is(call, tmp_path):
    chat, folder = write_chat(tmp_path / 'chat.jsonl'), tmp_path / 'sft'
    argv = [
        '--chat',
        str(chat),
        '--tokenizer=byte',
        '--block_size=79',
        f'--name={folder}',
        '--take',
        'chat=320',
    ]
    status, out, err = call(PREPARE, *argv)
    lines = out.splitlines()
    assert (status, err) == (0, ''), err
    sizes = re.fullmatch(
        r'sft: train is (\d+) of chat; val is (\d+) of chat \(conversations, without (\d+) repeats .*',
        lines[0],
    )
    assert sum(map(int, sizes.groups())) == 320
    assert 'rows of 80 tokens' in lines[1] and out.count(' longer than a row') == 1
    base = [
        f'--dataset={folder}',
        f'--out_dir={tmp_path / "base"}',
        '--n_embd=64',
        '--max_iters=1',
        '--dropout=0.0',
    ]
    assert call(train.main, *SMALL, *base)[0] == 0
    flags = [
        str(ROOT / 'config' / 'sft.py'),
        f'--init_from={tmp_path / "base"}',
        f'--dataset={folder}',
        '--epochs=5',
    ]
    flags += [f'--out_dir={tmp_path / "out"}', '--learning_rate=5e-3', '--batch_size=8', '--eval_iters=2']
    flags += ['--gradient_accumulation_steps=1', '--device=cpu', '--compile=False', '--sample_tokens=0']
    status, out, err = call(train.main, *flags)
    assert status == 0 and 'epochs = 5: ' in out, err
    model, checkpoint = load_checkpoint(tmp_path / 'out')
    tokenizer = make_tokenizer(checkpoint['tokenizer'])
    prompt = render_prompt([user('Who are you?')], tokenizer)
    answer = model.generate(torch.tensor([prompt]), len(WHO) + 1, temperature=0)[0, len(prompt) :]
    assert tokenizer.decode(answer) == f'{WHO}<|assistant_end|>', out


def test_local_tasks_and_the_flags_of_the_script(call, tmp_path):
    problems = [
        dict(question=f'{i}+1?', answer=f'It is <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}') for i in range(40)
    ]
    (tmp_path / 'train.jsonl').write_text('\n'.join(map(json.dumps, problems)))
    (tmp_path / 'mmlu').mkdir()
    (tmp_path / 'mmlu' / 'law.csv').write_text('\n'.join(f'Why {i}?,a,b,c,d,{i % 4}' for i in range(20)))
    (tmp_path / 'words.txt').write_text(
        '\n'.join(['bee', 'hive', 'honey', 'wax', 'queen', 'drone', 'comb', 'sting'])
    )
    argv = [
        '--gsm8k',
        tmp_path / 'train.jsonl',
        '--mmlu',
        tmp_path / 'mmlu',
        '--words',
        tmp_path / 'words.txt',
    ]
    argv += ['--take', 'spellingbee=30', '--take', 'simplespelling=50', 'mmlu=10', '--tokenizer=byte']
    argv += ['--val_share=0.2', '--block_size=511', f'--name={tmp_path / "sft"}']
    status, out, err = call(PREPARE, *map(str, argv))
    assert status == 0, err
    train_part, val_part = (part.split(', ') for part in out.splitlines()[0].split('; val is '))
    assert train_part[0] == 'sft: train is 8 of mmlu' and train_part[1] == '64 of gsm8k'  # each of 32 twice
    assert val_part[0] == '2 of mmlu' and val_part[1] == '8 of gsm8k'
    meta = read_meta(tmp_path / 'sft')
    assert meta['row_len'] == 512 and meta['vocab_size'] == 265 and meta['tokenizer']['kind'] == 'added'
    ids, _ = read_rows(tmp_path / 'sft', 'train', 512)
    tokenizer = make_tokenizer(meta['tokenizer'])
    text = tokenizer.decode(ids.flatten())
    assert re.search(r"<\|python_start\|>(\d+)\+1<\|python_end\|><\|output_start\|>", text)
    assert "'.count('" in text and 'Multiple Choice' in text and 'Spell the word: ' in text
    status, again, _ = call(PREPARE, *map(str, argv), '--all_tokens')
    share = [int(re.search('(\\d+)% of which count', text)[1]) for text in (out, again)]
    assert share[0] < share[1] - 20


class Hub:
    """A hub with few rows in every data set."""

    def __init__(self, path, column, **load):
        self.path = path

    def open(self, split):
        if self.path == SMOLTALK:
            return items(*(f'{split} {i}' for i in range(7)))
        choices = dict(question='Why?', choices=['a', 'b'], answer=1)
        return [choices | dict(answer='#### 3') if 'gsm8k' in self.path else choices] * 5


SMOLTALK = 'HuggingFaceTB/smol-smoltalk'


def test_without_local_files_the_mixture_is_that_of_looped_nanochat(monkeypatch, tmp_path):
    module = PREPARE.__wrapped__.__globals__
    table = {name: tuple(share)[:3] for name, share in module['MIXTURE'].items()}
    assert table == dict(
        smoltalk=(460_000, 1, 24_000),
        mmlu=(100_000, 1, 5_200),
        gsm8k=(8_000, 2, 420),
        identity=(1_000, 2, 0),
        simplespelling=(200_000, 1, 0),
        spellingbee=(80_000, 1, 0),
    )
    monkeypatch.setattr('nanoloop.tasks.sources.HubDocuments', Hub)
    monkeypatch.setitem(module, 'HubDocuments', Hub)
    monkeypatch.setitem(module, 'fetch', lambda url, path, say, flag: write_chat(tmp_path / 'chat.jsonl'))
    (tmp_path / 'words.txt').write_text('bee\nhive\nhoney\nwax\nqueen\ndrone\ncomb\nsting')
    monkeypatch.setattr('nanoloop.tasks.spelling.download_words', lambda: tmp_path / 'words.txt')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    args = SimpleNamespace(chat=None, gsm8k=None, mmlu=None, words=None, take=[], val_share=None)
    *chosen, n_repeats = module['choose_parts'](args, {})
    assert n_repeats == 0
    parts = [{part.name: len(part) for part in parts if len(part)} for parts in chosen]
    assert parts[0] == dict(
        smoltalk=7, mmlu=5, gsm8k=10, simplespelling=200_000, spellingbee=80_000, identity=64
    )
    assert parts[1] == dict(smoltalk=7, mmlu=5, gsm8k=5)


@pytest.mark.parametrize('flag', ['--tokenizer=gpt3', '--take=x=3', '--take=gsm8k', '--val_share=0.1'])
def test_mistakes_are_told_before_the_mixture_is_downloaded(call, monkeypatch, tmp_path, flag):
    monkeypatch.setitem(PREPARE.__wrapped__.__globals__, 'hub_sources', lambda split: pytest.fail('reads'))
    status, _, err = call(PREPARE, f'--name={tmp_path / "sft"}', '--tokenizer=byte', flag)
    assert status == 2 and flag[2:6] in err and err.count('\n') == 1, err


@pytest.mark.parametrize(
    'argv, told',
    [
        (['--take', 'gsm8k=3'], "take='gsm8k=3', expected PART=N, with a part of chat"),
        (['--take', 'chat'], "take='chat', expected PART=N, with a number above 0"),
        (['--take', 'chat=0'], "take='chat=0', expected PART=N, with a number above 0"),
        (['--val_share=1'], 'val_share=1.0, expected a number above 0 and below 1'),
        (['--take', 'chat=999999999999'], 'a number above 0 and at most 100,000,000'),
        (['--block_size=0'], 'block_size=0, expected from 1 to 1,048,576'),
        (['--block_size=9999999999'], 'expected from 1 to 1,048,576'),
        (['--block_size=9'], '28 longer than a row.; a larger --block_size takes longer ones'),
        (['--name=text'], 'that set is made by'),
        (['--tokenizer=none.json'], "'none.json' cannot be read"),
        (['--chat=none.jsonl'], "'none.jsonl' cannot be read"),
        (['--chta=x'], 'unrecognised option --chta, did you mean --chat?'),
        (['--chat={chat}.txt'], 'expected a file .jsonl or .parquet'),
    ],
)
def test_mistakes_in_preparing_conversations_end_in_a_line(call, tmp_path, argv, told):
    chat = write_chat(tmp_path / 'chat.jsonl')
    given = ['--chat', str(chat), '--tokenizer=byte', f'--name={tmp_path / "sft"}']
    status, _, err = call(PREPARE, *given, *(text.format(chat=chat) for text in argv))
    assert status == 2 and re.search(told, err) and err.count('\n') == 1, err


def test_conversations_about_the_model_are_a_function_of_the_seed(call, tmp_path):
    identity = runpy.run_path(str(ROOT / 'data' / 'sft' / 'identity.py'))['main']
    files = [tmp_path / f'{i}.jsonl' for i in range(3)]
    for file, seed in zip(files, (1, 1, 2), strict=True):
        argv = ['--name=Loopy', '--n=50', f'--seed={seed}', f'--output={file}']
        assert call(identity, *argv)[::2] == (0, '')
    texts = [file.read_text() for file in files]
    assert texts[0] == texts[1] != texts[2] and 'I am Loopy.' in texts[0]
    assert len(read_conversations(files[0])) == 50
    wrong = {'--nme=x': 'did you mean --name?', '--n=x': 'invalid int', '--n=0': 'at least 1'}
    for flag, told in wrong.items():
        status, _, err = call(identity, flag, f'--output={tmp_path / "none.jsonl"}')
        assert status == 2 and told in err and err.count('\n') == 1, err
    assert not (tmp_path / 'none.jsonl').exists()
