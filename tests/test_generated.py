"""Data sets that are made while they are needed: rows, answers, what is held out, training and evaluation."""

import csv
import itertools
import os
import random
import re
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, load, read_log, same

import sample
import train
from configurator import configure
from model import GPT, GPTConfig
from nanoloop.baselines import apply_baseline
from nanoloop.batches import window_batches
from nanoloop.checkpoint import tokenizer_dict
from nanoloop.checks import UserError
from nanoloop.count import flops, parameters
from nanoloop.datasets import find_data, identify, open_split, read_meta
from nanoloop.generated import GENERATED, HELD_OUT, value_distribution
from nanoloop.generated_eval import combine, draw_questions, majority_in, mano, p_hop
from nanoloop.results import COLUMNS
from nanoloop.tokenizer import make_tokenizer
from runs import collect
from train import TrainConfig

NAMES = ['mano:1', 'mano:4', 'mano:10', 'p_hop:1', 'p_hop:3']
LETTERS = 'abcdefgh'


def rows_of(name, n, split='train', level=None, seed=0):
    """Returns (data, words of n rows as lists, levels)."""
    data = find_data(name)
    rows, levels = data.draw(np.random.default_rng(seed), n, split, level)
    return data, [[data.words[i] for i in row] for row in rows], levels


def value(words):
    """Evaluates a prefix expression by recursion and takes it from the list, modulo 23."""
    word = words.pop(0)
    if word not in '+-*':
        return int(word)
    a, b = value(words), value(words)
    return {'+': a + b, '-': a - b, '*': a * b}[word] % 23


def hop(context, k):
    """Follows k hops from the last letter of a text, by search from the right."""
    at = len(context) - 1
    for _ in range(k):
        at = context.rindex(context[at], 0, at) + 1
    return context[at]


def split_of(name, split='train'):
    data = find_data(name)
    meta = read_meta(data)
    return open_split(data, meta, split, data.row_len - 1, meta['vocab_size'])


# -----------------------------------------------------------------------------
# rows


@pytest.mark.parametrize('name', ['mano:1', 'mano:2', 'mano:10'])
def test_rows_of_mano_are_expressions_with_their_values(name):
    data, rows, levels = rows_of(name, 300)
    for row, level in zip(rows, levels.tolist(), strict=True):
        end = 2 * level + 5
        assert row[:2] == ['<bos>', f'<len_{level}>'] and row[end - 2] == '<ans>' and len(row) == data.row_len
        expression = row[2 : end - 2]
        assert sum(word in '+-*' for word in expression) == level
        assert value(expression) == int(row[end - 1]) and expression == []
        assert set(row[end:]) <= {'<pad>'}


@pytest.mark.parametrize('name', ['p_hop:1', 'p_hop:4'])
def test_rows_of_p_hop_are_answered_by_search(name):
    _, rows, levels = rows_of(name, 300)
    for row, level in zip(rows, levels.tolist(), strict=True):
        assert row[:2] == ['<bos>', f'<hops_{level}>'] and row[-2] == '<ans>'
        context = ''.join(row[2:-2])
        assert hop(context, level) == row[-1]
        assert all(a != b for a, b in itertools.pairwise(context))
        assert {context.count(letter) for letter in LETTERS} == {len(context) // 8}


def test_contexts_of_p_hop_are_uniform_among_the_allowed_ones():
    """With three letters: 6 first blocks, each with 4 second blocks that do not begin as it ends."""
    data = GENERATED['p_hop'](1)
    data.LETTERS = 'abc'
    contexts = data.draw_contexts(np.random.default_rng(0), 24000)
    _, counts = np.unique(contexts, axis=0, return_counts=True)
    assert len(counts) == 24 and np.abs(counts - 1000).max() < 4.5 * 1000**0.5


def test_difficulties_and_splits_of_the_tree_are_uniform():
    _, rows, levels = rows_of('mano:5', 30000)
    assert np.abs(np.bincount(levels)[1:] - 6000).max() < 4.5 * 6000**0.5
    left = []  # operations of the left expression of five
    for row, level in zip(rows, levels.tolist(), strict=True):
        if level == 5:
            rest = row[3 : 3 + 10]
            length = len(rest)
            value(rest)
            left.append((length - len(rest) - 1) // 2)
    expected = len(left) / 5
    assert np.abs(np.bincount(left, minlength=5) - expected).max() < 4.5 * expected**0.5
    words = list(itertools.chain.from_iterable(row[2 : row.index('<ans>')] for row in rows))
    for kinds in ('+-*', list(map(str, range(23)))):
        counts = np.array([words.count(word) for word in kinds])
        assert np.abs(counts - counts.mean()).max() < 5 * counts.mean() ** 0.5


def test_the_majority_baseline_of_mano():
    """91 / 1,587 by hand for one operation; of 10 operations, 7.0 % by many draws (ouro_huginn.md 2.1)."""
    data = find_data('mano:10')
    assert data.majority(1) == pytest.approx(91 / 1587, rel=1e-12)
    assert data.majority(10) == pytest.approx(0.070, abs=0.0005)
    every = [eval(f'(a {o} b) % 23', dict(a=a, b=b)) for o in '+-*' for a in range(23) for b in range(23)]
    assert np.allclose(value_distribution(1), np.bincount(every) / len(every), atol=1e-15)
    dice = np.random.default_rng(0)
    rows = data.draw_rows(dice, np.full(20000, 3))
    drawn = np.bincount(rows[:, 10] - data.FIRST_NUMBER, minlength=23) / 20000
    assert np.abs(drawn - value_distribution(3)).max() < 4.5 * (0.07 / 20000) ** 0.5


@pytest.mark.parametrize('level', [1, 2, 4])
def test_no_letter_is_a_better_guess_in_p_hop(level):
    _, rows, _ = rows_of('p_hop:4', 8000, level=level)
    counts = np.array([sum(row[-1] == letter for row in rows) for letter in LETTERS])
    share = find_data('p_hop:4').majority(level)
    assert share == 1 / 8 and np.abs(counts - 8000 * share).max() < 4.5 * (8000 * share) ** 0.5
    blocks = np.array([row[2:-2] for row in rows]).reshape(8000, 5, 8)
    answers = np.array([row[-1] for row in rows])[:, None, None]
    by_place = (blocks == answers).mean(axis=0)  # (5, 8): how often the letter at a place is the answer
    assert by_place.max() < 1 / 7 + 4.5 * (1 / 7 / 8000) ** 0.5


# -----------------------------------------------------------------------------
# what is held out


@pytest.mark.parametrize('name', NAMES)
def test_train_and_val_have_no_question_in_common_but_tables(name):
    data, drawn = find_data(name), []
    for split in ('train', 'val'):
        rows, levels = data.draw(np.random.default_rng(3), 2000, split)
        shares = np.bincount(levels, minlength=data.size + 1)[1:] / 2000
        assert abs(shares - 1 / data.size).max() < 4.5 * (1 / data.size / 2000) ** 0.5  # all alike
        drawn.append({tuple(row) for row in rows[levels > data.tables]})
        if data.tables:
            assert 0 < data.held_out(rows, levels)[levels <= data.tables].mean() < 0.2
    assert not drawn[0] & drawn[1]


def test_one_of_16_questions_is_held_out_of_every_difficulty():
    data = find_data('mano:6')
    for level in range(1, 7):
        levels = np.full(20000, level)
        rows = np.unique(data.draw_rows(np.random.default_rng(0), levels), axis=0)
        share = data.held_out(rows, levels[: len(rows)]).mean()
        assert abs(share - 1 / HELD_OUT) < 4.5 * (share / len(rows)) ** 0.5


def test_a_question_is_held_out_whatever_the_size_of_the_data_set():
    """So a model of mano:10 is asked nothing that it has seen when --dataset=mano:3 is evaluated."""
    small, large = find_data('mano:3'), find_data('mano:10')
    rows, levels = small.draw(np.random.default_rng(0), 200, 'val')
    rows, levels = rows[levels > small.tables], levels[levels > small.tables]
    wide = np.pad(rows, ((0, 0), (0, large.row_len - small.row_len)), constant_values=small.PAD)
    assert large.held_out(wide, levels).all()


# -----------------------------------------------------------------------------
# windows, batches, names


@pytest.mark.parametrize('name', NAMES)
def test_only_the_answer_is_a_target(name):
    split = split_of(name)
    data = split.data
    inputs, targets = split.draw(np.random.default_rng(0), 50)
    rows, levels = data.draw(np.random.default_rng(0), 50, 'train')
    assert (inputs == rows[:, :-1]).all() and ((targets != -1).sum(axis=1) == 1).all()
    places = (targets != -1).argmax(axis=1)
    each = np.arange(50)
    assert [data.words[i] for i in inputs[each, places]] == ['<ans>'] * 50
    assert (targets[each, places] == rows[each, data.answer_places(levels)]).all()


def test_windows_of_evaluations_are_a_fixed_list():
    one, two = split_of('mano:2', 'val'), split_of('mano:2', 'val')
    windows = one.eval_windows()
    assert windows[:5] == one.eval_windows(5) and len(windows) == 10000
    inputs, targets = one.read_windows(windows[100:103], 5)
    again = two.read_windows(windows[100:102], 2)
    assert (inputs[:2] == again[0]).all() and (targets[:2] == again[1]).all()
    assert (inputs[3:] == 0).all() and (targets[3:] == -1).all()
    assert (np.array(one.read_window(*windows[101])) == np.stack((inputs[1], targets[1]))).all()


def test_any_number_of_ranks_draws_the_same_rows():
    c = SimpleNamespace(seed=3, batch_size=4, gradient_accumulation_steps=2)
    split = split_of('mano:3')

    def step_5(rank, world):
        batches = window_batches(split, c, SimpleNamespace(rank=rank, world=world, copies_in_threads=False))(
            5
        )
        return [next(batches) for _ in range(2 // world)]

    alone, pair = step_5(0, 1), step_5(0, 2) + step_5(1, 2)
    assert all(
        torch.equal(a.idx, b.idx) and torch.equal(a.targets, b.targets)
        for a, b in zip(alone, pair, strict=True)
    )
    assert not torch.equal(alone[0].idx, alone[1].idx)


@pytest.mark.parametrize(
    'name', ['mano:0', 'mano:', 'mano:x', 'mano:-1', 'mano:65', 'mano:1e3', 'p_hop:\u0663', 'p_hop:33']
)
def test_a_wrong_size_is_told_in_one_line(name):
    with pytest.raises(
        UserError, match=f'dataset={re.escape(repr(name))}, expected (mano|p_hop):N with at most N'
    ):
        find_data(name)


def test_a_wrong_name_is_told_with_the_generated_ones():
    with pytest.raises(UserError, match='no folder .*manoo, expected one of .*mano:N, p_hop:N'):
        read_meta(find_data('manoo'))


def test_a_path_with_a_slash_is_a_folder():
    assert find_data(f'.{os.sep}mano').name == 'mano' and find_data('mano').name == 'mano:10'


def test_a_folder_with_the_name_of_a_task_is_not_replaced_silently(monkeypatch, tmp_path):
    monkeypatch.setattr('nanoloop.datasets.DATA', tmp_path)
    (tmp_path / 'mano').mkdir()
    with pytest.raises(
        UserError, match="dataset='mano', expected mano:10 for the generated task, or .*/mano for"
    ):
        find_data('mano')
    assert find_data('mano:10').size == 10 and find_data(f'{tmp_path}/mano') == tmp_path / 'mano'


def test_a_checkpoint_without_tokenizer_takes_none_from_a_generated_name():
    assert tokenizer_dict(dict(config=dict(dataset='mano'), model_args=dict(vocab_size=31))) is None


def test_identity_is_name_and_version(monkeypatch):
    def identity(name):
        return identify(find_data(name), read_meta(find_data(name)))

    first = identity('mano')
    assert identity('mano:10') == first and identity('mano:9')['sha256'] != first['sha256']
    monkeypatch.setattr(GENERATED['mano'], 'version', 99)
    assert identity('mano')['sha256'] != first['sha256']


# -----------------------------------------------------------------------------
# training, sampling, evaluation

FLAGS = [flag for flag in TINY if not flag.startswith('--block_size')] + ['--dataset=mano:2', '--n_loop=1']


def test_training_resumes_bit_for_bit_and_sample_answers(call, tmp_path):
    whole, cut = [*FLAGS, f'--out_dir={tmp_path}/a'], [*FLAGS, f'--out_dir={tmp_path}/b']
    status, out, err = call(train.main, *whole)
    assert status == 0, err
    assert 'data set mano:2: rows of 9 tokens of 31 words, drawn when they are needed' in out
    assert call(train.main, *cut, '--max_iters=8', '--lr_decay_iters=12')[0] == 0
    assert call(train.main, *cut, '--init_from=resume', '--max_iters=12')[0] == 0
    a, b = (load(tmp_path / name / 'ckpt.pt') for name in 'ab')
    assert same(a['model'], b['model']) and a['model_args']['block_size'] == 8
    assert read_log(tmp_path / 'a')[-1]['val/loss'] == read_log(tmp_path / 'b')[-1]['val/loss']
    prompt = '<bos> <len_2> + * 3 4 5 <ans>'
    argv = [
        f'--out_dir={tmp_path}/a',
        f'--start={prompt}',
        '--max_new_tokens=1',
        '--temperature=0',
        '--device=cpu',
    ]
    status, out, err = call(sample.main, *argv)
    assert status == 0, err
    assert re.fullmatch(re.escape(prompt) + r' \S+\n-+\n', out)
    status, _, err = call(sample.main, *argv, '--start=<bos> <len_9> x')
    assert status == 2 and 'words that the tokenizer does not know: <len_9> x; it knows <bos> <ans>' in err


@pytest.mark.parametrize('flag, told', [
    ('--block_size=9', 'block_size=9, expected 8: mano:2 has rows of 9 tokens'),
    ('--vocab_size=30', 'vocab_size=30, expected at least 31, the words of mano:2'),
    ('--dataset=mano:zwei', "dataset='mano:zwei', expected mano:N with at most N operations, N from 1 to 64"),
])  # fmt: skip
def test_keys_that_do_not_go_with_the_rows(call, tmp_path, flag, told):
    status, _, err = call(train.main, *FLAGS, f'--out_dir={tmp_path}/a', flag)
    assert status == 2 and told in err and err.count('\n') == 1


def test_words_and_ids():
    tokenizer = make_tokenizer(read_meta(find_data('mano:3'))['tokenizer'])
    text = '<bos> <len_1> - 22 0 <ans> 22'
    assert tokenizer.encode(f' {text}\n') == [0, 29, 4, 28, 6, 1, 28]
    assert tokenizer.decode(tokenizer.encode(text)).strip() == text
    assert tokenizer.words[tokenizer.eot_token] == '<bos>' and set(tokenizer.token_bytes) == {0}
    assert tokenizer.decode([31, 32]) == ' <len_3> ?'


KEYS = SimpleNamespace(dataset='', windows=50)


def evaluations(make, name, block_size=64, **keys):
    tokenizer = make_tokenizer(read_meta(find_data(name))['tokenizer'])
    c = SimpleNamespace(**(vars(KEYS) | keys))
    return tokenizer, make(c, tokenizer, SimpleNamespace(block_size=block_size), None)


@pytest.mark.parametrize('make, name, levels', [(mano, 'mano:3', 'l'), (p_hop, 'p_hop:2', 'hops')])
def test_questions_are_held_out_and_asked_by_difficulty(make, name, levels):
    tokenizer, made = evaluations(make, name)
    task, size = name.split(':')
    assert [e.name for e in made] == [f'{task}/{levels}={i + 1}' for i in range(int(size))]
    data = find_data(name)
    for level, evaluation in enumerate(made, start=1):
        assert len({tuple(item.texts[0].ids) for item in evaluation.items}) == len(evaluation.items) == 50
        for item in evaluation.items:
            (text,) = item.texts
            (answer,) = np.array(text.ids)[text.scored]
            assert answer == item.info['answer'] == text.ids[-1] and tokenizer.words[text.ids[-2]] == '<ans>'
            row = np.full((1, data.row_len), 2)
            row[0, : len(text.ids)] = text.ids
            assert level <= data.tables or data.held_out(row, np.array([level])).all()


def test_fewer_questions_are_the_first_of_more_and_the_easiest_run_out():
    data = find_data('mano:2')
    many = draw_questions(data, 2, 700)
    assert (draw_questions(data, 2, 30) == many[:30]).all() and len(np.unique(many, axis=0)) == 700
    assert 1500 < len(draw_questions(data, 1, 2000)) <= 3 * 23 * 23


def test_records_and_means():
    _, (one, two) = evaluations(mano, 'mano:2')
    dice = random.Random(0)
    rows = []
    for evaluation in (one, two):
        guesses = [dice.choice([item.info['answer'], 0]) for item in evaluation.items]
        records = [
            evaluation.judge(item, [np.array([0.5])], [np.array([guess])])
            for item, guess in zip(evaluation.items, guesses, strict=True)
        ]
        row = evaluation.summarise(records)
        right = np.array(
            [guess == item.info['answer'] for item, guess in zip(evaluation.items, guesses, strict=True)]
        )
        assert records[0] == dict(correct=int(right[0]), losses=[0.5], predicted=[guesses[0]])
        assert row['accuracy'] == right.mean() and row['items'] == 50 and row['loss'] == 0.5
        assert row['accuracy_se'] == pytest.approx(right.std(ddof=1) / 50**0.5)
        rows.append(row)
    assert [row['note'] for row in rows] == ['majority answer 5.7 %', 'majority answer 6.2 %']
    mean = combine(rows)
    assert mean['accuracy'] == (rows[0]['accuracy'] + rows[1]['accuracy']) / 2 and mean['items'] == 100
    assert mean['accuracy_se'] == pytest.approx(np.hypot(*(row['accuracy_se'] for row in rows)) / 2)
    assert mean['note'].startswith('mean over 2 difficulties, ')
    assert majority_in(mean['note']) == pytest.approx(5.96, abs=0.1)


def test_a_model_of_other_data_is_refused():
    bytes_only = make_tokenizer(dict(kind='byte'))
    with pytest.raises(UserError, match="tasks='mano', expected a model trained with --dataset=mano:1"):
        mano(KEYS, bytes_only, SimpleNamespace(block_size=64), None)
    with pytest.raises(UserError, match='mano:4: this one does not know <len_3> <len_4>'):
        evaluations(mano, 'mano:2', dataset='mano:4')
    with pytest.raises(UserError, match='block_size of at least 8 for mano:2, not 7'):
        evaluations(mano, 'mano:2', block_size=7)
    assert len(evaluations(mano, 'mano:4', dataset='mano:2')[1]) == 2
    assert len(evaluations(mano, 'mano:4', dataset='wikitext103')[1]) == 4
    assert len(evaluations(mano, 'mano:4', dataset='p_hop:2')[1]) == 4


# -----------------------------------------------------------------------------
# the comparison: config/mano_*.py and runs/collect.py


def test_the_configurations_of_mano_are_baselines_of_each_other():
    """Equal data and training; as many parameters, or as many FLOPs; as --baseline would make them."""
    looped, same_params, same_flops = (
        configure((TrainConfig, GPTConfig), [f'config/mano_{name}.py', '--vocab_size=32'], say=None)
        for name in ('looped', 'same_params', 'same_flops')
    )
    models = [GPT(c.build(GPTConfig)) for c in (looped, same_params, same_flops)]
    sizes, costs = [parameters(m)['total'] for m in models], [flops(m) for m in models]
    assert sizes[0] == sizes[1] < sizes[2] / 3 and costs[0] == costs[2] != costs[1]
    assert find_data(looped.dataset).row_len == looped.block_size + 1
    for name, c in dict(same_params=same_params, same_flops=same_flops).items():
        made = type(looped)(looped)
        made['baseline'] = name
        apply_baseline(made)
        expected = c | dict(out_dir=made.out_dir, baseline=name, window_pattern=made.window_pattern)
        assert dict(made) == expected


def commands(folder, script, **environment):
    """Runs a script of runs/ with programs that print their arguments. Returns the lines."""
    for name in ('python', 'srun'):
        (folder / name).write_text(f'#!/bin/sh\necho {"python " * (name == "python")}"$@"\n')
        (folder / name).chmod(0o755)
    env = dict(PATH=f'{folder}:/usr/bin:/bin', SLURM_SUBMIT_DIR=str(folder), **environment)
    argv = ['bash', str(ROOT / 'runs' / script), '--max_iters=7']
    return subprocess.run(argv, env=env, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_jobs_of_the_array_are_the_runs_of_the_script(tmp_path):
    alone = commands(tmp_path, 'mano.sh')
    array = re.search('--array=0-([0-9]+)', (ROOT / 'runs' / 'mano.sbatch').read_text())
    jobs = [
        line
        for i in range(int(array[1]) + 1)
        for line in commands(tmp_path, 'mano.sbatch', SLURM_ARRAY_TASK_ID=str(i))
    ]
    assert len(set(jobs)) == 18 and sorted(jobs) == sorted(alone[:-1])
    first = 'python train.py config/mano_looped.py --seed=1 --out_dir=out-mano/looped-1 --init_from=auto'
    assert jobs[:2] == [
        f'{first} --max_iters=7',
        'python eval.py --out_dir=out-mano/looped-1/ckpt.pt --tasks=mano',
    ]
    assert all((ROOT / line.split()[2]).is_file() for line in jobs if 'train.py' in line)
    folders = {
        word.split('=')[1].removesuffix('/ckpt.pt')
        for line in jobs
        for word in line.split()
        if 'out_dir' in word
    }
    assert alone[-1].startswith('python runs/collect.py ') and set(alone[-1].split()[2:]) == folders


def write_eval(folder, rows):
    folder.mkdir()
    with open(folder / 'eval.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for task, loops, accuracy, note in rows:
            row = dict(task=task, loops=loops, accuracy=accuracy, note=note, loss=2.5, flops_per_token=1234)
            writer.writerow(row)


def majority(share):
    return f'majority answer {share} %'


def test_collect_prints_means_and_deviations_over_seeds(call, tmp_path):
    for seed, (easy, hard) in enumerate([(0.9, 0.1), (1.0, 0.2), (0.95, 0.3)], start=1):
        rows = [('mano/l=10', 4, hard, majority(7.0)), ('mano/l=2', 4, 0.0, majority(6.2))]
        rows += [('mano/l=2', 4, easy, majority(6.2)), ('loss', 4, '', ''), ('mano', 4, 0.5, majority(6.6))]
        write_eval(tmp_path / f'looped-{seed}', rows)
    write_eval(tmp_path / 'plain-1', [('mano/l=2', 1, 0.25, majority(6.2))])
    folders = [str(path) for path in sorted(tmp_path.iterdir())]
    status, out, err = call(collect.main, *folders)
    assert status == 0, err
    head, looped, plain, last = (re.split(' {2,}', line.strip()) for line in out.splitlines())
    assert head == ['configuration', 'loops', 'n', 'parameters', 'FLOPs/token', 'l=2', 'l=10', 'mean']
    assert looped == ['looped', '4', '3', '?', '1234', '95.0 ±5.0', '20.0 ±10.0', '50.0 ±0.0']
    assert plain == ['plain', '1', '1', '?', '1234', '25.0'] and last == [
        'majority answer',
        '6.2',
        '7.0',
        '6.6',
    ]
    status, out, _ = call(collect.main, *folders, '--column=loss')
    assert status == 0 and '2.5000 ±0.0000' in out and 'majority' not in out


@pytest.mark.parametrize('argv, told', [
    ([], "argument='', expected folders of runs"),
    (['absent'], "folder='absent', expected a run with an eval.csv"),
    (['run', '--task=core'], "task='core', expected one with accuracy in run/eval.csv"),
    (['run', '--column=speed'], "column='speed', expected one of task, loops"),
    (['run', '--tasks=mano'], "argument='--tasks=mano', expected --task=... or --column=..."),
    (['broken'], 'has no number where one is due'),
])  # fmt: skip
def test_collect_tells_mistakes_in_one_line(call, tmp_path, monkeypatch, argv, told):
    monkeypatch.chdir(tmp_path)
    write_eval(tmp_path / 'run', [('mano/l=1', 1, 0.5, majority(5.7))])
    write_eval(tmp_path / 'broken', [('mano/l=1', 1, 'x', majority(5.7))])
    status, _, err = call(collect.main, *argv)
    assert status == 2 and told in err and err.count('\n') == 1
