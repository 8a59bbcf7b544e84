"""Comparisons: against scipy, the formulas written out, and simulated differences that are known."""

import csv
import json
import math
import re
import statistics
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from helpers import TINY

import eval as eval_script
import nanoloop.uncertainty as uncertainty
import train
from model import GPTConfig
from nanoloop.checks import UserError
from nanoloop.compared_runs import Run, pair_items, read_items, sums_by_item
from nanoloop.comparisons import COLUMNS
from nanoloop.results import COLUMNS as EVAL_COLUMNS
from nanoloop.results import KEY
from nanoloop.uncertainty import Pairs, holm, mean_difference, paired_bootstrap, unpaired, welch
from runs import compare

stats = pytest.importorskip('scipy.stats')


def make_run(folder, rows, n_loop=None, step=100, **state):
    """Writes a run with rows of eval.csv, {column: value} each, and with a checkpoint if n_loop is given."""
    folder.mkdir()
    same = dict(policy='', settings='data=1', dtype='float32', step=step, run=folder.name)
    same |= dict(items=50, tokens=50, checkpoint=f'{folder}/ckpt.pt')
    with open(folder / 'eval.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, EVAL_COLUMNS)
        writer.writeheader()
        writer.writerows(same | dict(flops_per_token=1000 * row['loops']) | row for row in rows)
    if n_loop:
        args = asdict(GPTConfig(n_loop=n_loop, vocab_size=8, block_size=8))
        config = dict(gradient_accumulation_steps=2, batch_size=4, block_size=8, seed=len(folder.name))
        saved = dict(model={}, model_args=args, config=config, wandb_id=folder.name, iter_num=step)
        torch.save(saved | state, folder / 'ckpt.pt')
    return folder


def accuracies(*values, task='mano', **columns):
    """Returns rows of a task with accuracies for 1, 2, 4, ... loops."""
    return [
        dict(task=task, loops=2**i, accuracy=x, accuracy_se=0.01, **columns) for i, x in enumerate(values)
    ]


def make_items(path, run, task, loops, records):
    """Appends records of items as eval.py does."""
    head = dict(task=task, loops=loops, policy='', settings='data=1', dtype='float32', step=100, run=run)
    assert head.keys() == {*KEY, 'run'}
    with open(path, 'a') as file:
        file.writelines(json.dumps(head | record) + '\n' for record in records)


def read(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


# -----------------------------------------------------------------------------
# statistics


def test_welch_equals_its_formula():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 5), rng.normal(1, 3, 4)
    spread = [x.var(ddof=1) / len(x) for x in (a, b)]
    df = sum(spread) ** 2 / sum(s**2 / (len(x) - 1) for s, x in zip(spread, (a, b), strict=True))
    value, error = b.mean() - a.mean(), math.sqrt(sum(spread))
    half = stats.t.ppf(0.975, df) * error
    result = welch(a, b)
    assert result[:3] == pytest.approx((value, value - half, value + half))
    assert result.p == pytest.approx(2 * stats.t.sf(abs(value) / error, df))
    assert result.method == f"Welch's t-test, df={df:.1f}"


def test_no_test_without_a_spread():
    for values, why in (([[1.0], [1, 2]], 'no test with n=1'), ([[1, 1], [2, 2]], 'no test: the seeds')):
        result = welch(*values)
        assert math.isnan(result.p) and math.isnan(result.low) and result.method.startswith(why)
        assert result.value == np.mean(values[1]) - np.mean(values[0])
    assert welch([1, 2], [3, math.nan]).method == 'no test: a value is not finite'
    assert welch([1, 1, 1], [1, 2, 4]).p == stats.ttest_1samp([1, 2, 4], 1).pvalue  # and no warning
    assert math.isnan(mean_difference([2.0]).low) and mean_difference([2.0, 2.0]).value == 2


def test_holm_equals_a_calculation_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0] and holm([]) == []


def simulate(rng, kind):
    """Returns Pairs whose true difference is 0.1, and the difference of two sums with their standard errors.

    Items have an ability or a loss of their own, which both measurements share.
    """
    n = 80
    if kind == 'questions':
        hard = rng.random(n)
        first, second = ((rng.random(n) < 0.5 * hard + gain).astype(float) for gain in (0.2, 0.3))
        counts = np.ones(n)
    else:  # windows of unlike numbers of tokens
        counts = rng.integers(1, 40, n).astype(float)
        hard = 2 + rng.normal(0, 0.5, n)
        first, second = (counts * (hard + gain + rng.normal(0, 0.1, n)) for gain in (0, 0.1))
    results = [uncertainty.ratio_and_error(values, counts) for values in (first, second)]
    return Pairs(first, second, counts), results[1][0] - results[0][0], [error for _, error in results]


@pytest.mark.parametrize('kind', ['questions', 'windows'])
def test_the_paired_bootstrap_covers_the_truth_and_is_narrower_than_unpaired(kind, monkeypatch):
    monkeypatch.setattr(uncertainty, 'RESAMPLES', 499)
    rng, inside, narrower = np.random.default_rng(0), 0, []
    for _ in range(300):
        pairs, value, errors = simulate(rng, kind)
        paired, wide = paired_bootstrap([pairs]), unpaired(value, errors)
        assert paired.value == pytest.approx(value) and paired.low < value < paired.high
        inside += paired.low < 0.1 < paired.high
        narrower.append((paired.high - paired.low) / (wide.high - wide.low))
    assert 0.91 * 300 <= inside <= 0.98 * 300
    assert np.mean(narrower) < (0.95 if kind == 'questions' else 0.4)


def test_the_mean_over_tasks_is_resampled_within_each():
    """Its variance is the weighted sum of the variances of the tasks' means."""
    rng = np.random.default_rng(0)
    parts = [
        Pairs(np.zeros(n), rng.normal(1, spread, n), np.ones(n), weight)
        for n, spread, weight in ((400, 1, 0.5), (100, 3, 0.25))
    ]
    result = paired_bootstrap(parts)
    assert result.value == pytest.approx(0.5 * parts[0].second.mean() + 0.25 * parts[1].second.mean())
    error = math.sqrt(sum(p.weight**2 * p.second.var() / len(p.second) for p in parts))
    assert (result.high - result.low) / 2 == pytest.approx(1.96 * error, rel=0.05)
    assert 'over 500 items' in result.method and paired_bootstrap(parts) == result  # the same every time


def test_what_has_no_interval_says_so():
    one, none = (Pairs(np.zeros(n), np.full(n, float(n == 1)), np.ones(n)) for n in (1, 2))
    assert (
        paired_bootstrap([one]) == (1.0, *paired_bootstrap([one])[1:])
        and 'one item' in paired_bootstrap([one]).method
    )
    assert math.isnan(paired_bootstrap([none]).low) and 'no item differs' in paired_bootstrap([none]).method
    assert unpaired(1.0, [0.1, math.nan]).method == 'no items, no standard errors'
    assert unpaired(1.0, [3.0, 4.0]).high == pytest.approx(1 + 5 * 1.959964, abs=1e-5)


# -----------------------------------------------------------------------------
# runs


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The words of a command that compares three seeds of a looped model and three of a plain one."""
    monkeypatch.chdir(tmp_path)
    for i in (1, 2, 3):
        make_run(tmp_path / f'looped-{i}', accuracies(0.3 + i / 99, 0.5, 0.6 + i / 50), 4, flops=4e9)
        make_run(tmp_path / f'plain-{i}', accuracies(0.4 + i / 20, 0.1), 1, flops=1e9)
    return ['+'.join(f'{name}-{i}' for i in (1, 2, 3)) for name in ('looped', 'plain')]


def test_configurations_are_compared_by_welch_at_the_loops_that_they_are_made_for(call, folders):
    status, out, err = call(compare.main, *folders, '--csv=all.csv')
    assert (status, err) == (0, ''), err
    rows = read('all.csv')
    assert rows[0].keys() == set(COLUMNS)
    mean = next(row for row in rows if (row['first'], row['first_loops']) == ('plain', '1 loop'))
    values = [0.45, 0.5, 0.55]
    assert mean['n_first'] == '3' and float(mean['mean_first']) == pytest.approx(0.5)
    assert float(mean['sd_first']) == pytest.approx(statistics.stdev(values))
    tests = [row for row in rows if row['kind'] == 'configurations']
    points = [(row['first_loops'], row['second_loops']) for row in tests]
    assert points == [('4 loops', '1 loop'), ('1 loop', '1 loop')]  # a plain model has no second loop
    others = [0.62, 0.64, 0.66], [0.3 + i / 99 for i in (1, 2, 3)]
    expected = [stats.ttest_ind(values, other, equal_var=False) for other in others]
    assert [float(row['p']) for row in tests] == pytest.approx([x.pvalue for x in expected], rel=1e-6)
    assert [float(row['low']) for row in tests] == pytest.approx(
        [x.confidence_interval().low for x in expected], rel=1e-6
    )
    assert [float(row['p_holm']) for row in tests] == pytest.approx(holm([x.pvalue for x in expected]))
    assert 'looped against plain: equal training tokens, unequal training FLOPs\n' in out
    assert (
        'at equal training tokens: looped - plain\nat equal training FLOPs: none of these\ntests: 2, 2' in out
    )


def test_means_are_drawn_in_a_band_of_one_deviation(call, folders):
    pyplot = pytest.importorskip('matplotlib.pyplot')
    status, out, err = call(compare.main, *folders, '--image=means.png')
    assert (status, err) == (0, '') and 'drawn: means.png' in out
    left, _ = pyplot.gcf().axes
    looped, plain = left.lines
    values = [[0.3 + i / 99 for i in (1, 2, 3)], [0.5] * 3, [0.62, 0.64, 0.66]]
    means, deviations = ([f(same) for same in values] for f in (statistics.fmean, statistics.stdev))
    assert looped.get_label() == 'looped (n = 3)' and looped.get_xdata().tolist() == [1, 2, 4]
    assert looped.get_ydata() == pytest.approx(means) and plain.get_ydata()[0] == pytest.approx(0.5)
    band = left.collections[0].get_paths()[0].vertices[:, 1]
    edges = (mean + sign * sd for mean, sd in zip(means, deviations, strict=True) for sign in (-1, 1))
    assert all(abs(band - edge).min() < 1e-12 for edge in edges)


@pytest.mark.parametrize('step, flops, told', [
    (100, 4e9, ('equal', 'equal')),
    (101, 4.04e9, ('equal', 'equal')),  # within 1 %
    (102, 4.05e9, ('unequal', 'unequal')),
    (100, None, ('equal', 'unknown')),
    (200, 4e9, ('unequal', 'equal')),
])  # fmt: skip
def test_costs_are_equal_within_one_percent_only(call, tmp_path, step, flops, told):
    make_run(tmp_path / 'a-1', accuracies(0.5, 0.6), 2, flops=4e9)
    make_run(tmp_path / 'b-1', accuracies(0.5, 0.6), 2, step=step, **({'flops': flops} if flops else {}))
    status, out, _ = call(compare.main, f'{tmp_path}/a-1', f'{tmp_path}/b-1')
    tokens, flops = told
    assert f'a-1 against b-1: {tokens} training tokens, {flops} training FLOPs' in out
    for name, state in zip(('tokens', 'FLOPs'), told, strict=True):
        assert (f'at equal training {name}: a-1 - b-1' in out) == (state == 'equal')
    assert status == 0 and 'no test with n=1' in out and 'tests: 0\n' in out


def test_a_run_that_costs_more_makes_its_configuration_unequal(call, folders, tmp_path):
    make_run(tmp_path / 'plain-4', accuracies(0.4, 0.1), 1, step=200, flops=4e9)
    out = call(compare.main, folders[0], f'{folders[1]}+plain-4')[1]
    assert 'looped against plain: unequal training tokens, unequal training FLOPs' in out
    assert re.search(r'plain .* 100, 200 +6,400 to 12,800 +1e\+09 to 4e\+09', out)


def test_costs_of_an_earlier_step_come_from_the_log(tmp_path):
    folder = make_run(tmp_path / 'a', accuracies(0.5), 2, step=30)
    state = torch.load(folder / 'ckpt.pt')
    torch.save(state | dict(iter_num=90, flops=9e5), folder / 'ckpt.pt')
    records = [{'iter': i, 'train/flops': 1e4 * (i + 1)} for i in (0, 20, 40)] + [{'iter': 40, 'val/loss': 1}]
    (folder / 'log.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    assert Run(str(folder)).cost('mano') == (30 * 2 * 4 * 8, 3e5)
    (folder / 'best.pt').write_text('broken')  # and ckpt.pt says the same
    assert Run(str(folder)).cost('mano') == (30 * 2 * 4 * 8, 3e5)
    torch.save(state | dict(wandb_id='another'), folder / 'ckpt.pt')
    assert all(map(math.isnan, Run(str(folder)).cost('mano')))


def test_a_step_can_be_chosen_and_the_last_one_is_the_default(call, tmp_path):
    rows = [dict(row, step=step) for step in (50, 100) for row in accuracies(step / 1000, step / 500)]
    folder = make_run(tmp_path / 'a', rows, 2)
    last, first = Run(str(folder)), Run(f'{folder}@50')
    assert (last.step('mano'), first.step('mano')) == ('100', '50')
    assert first.rows['mano'][1, '']['accuracy'] == '0.05' and first.cost('mano')[0] == 50 * 64
    assert 'of mano the rows of step 100 count, others are left out' in call(compare.main, str(folder))[1]
    assert 'left out' not in call(compare.main, f'{folder}@50')[1]


def test_doubtful_seeds_are_noted(call, tmp_path, folders):
    config = torch.load(tmp_path / 'plain-2' / 'ckpt.pt')['config']
    make_run(tmp_path / 'plain-44', accuracies(0.5), 1, config=config | dict(batch_size=5))
    out = call(compare.main, 'plain-2+plain-44')[1]
    assert 'note: plain: batch_size is 4, 5\n' in out and 'note: plain: the seeds are 7, 7\n' in out


# -----------------------------------------------------------------------------
# loops of one checkpoint


def test_one_loop_against_n_is_always_told(call, tmp_path):
    exits = dict(task='mano', loops=4, policy='exit=kl 0.1', accuracy=0.6, accuracy_se=0.01)
    make_run(tmp_path / 'a', [*accuracies(0.3, 0.5, 0.7), exits], 4)
    out = call(compare.main, f'{tmp_path}/a')[1]
    lines = out[out.index('1 loop against n, of one checkpoint:') :].splitlines()[2:]
    points = [re.search('(?<=accuracy  ).*?(?=  )', line)[0] for line in lines]
    expected = ['1 loop against 4 loops', '4 loops against 2 loops', '4 loops against 4 loops exit=kl 0.1']
    assert points == expected
    half = 1.96 * math.hypot(0.01, 0.01)
    assert (
        f'+0.4000     +{0.4 - half:.4f} to +{0.4 + half:.4f}  no items: unpaired standard errors' in lines[0]
    )
    make_run(tmp_path / 'b', accuracies(0.3, 0.5, 0.7)[2:], 4)
    assert 'not measured with 1 loop: eval.py --loops=1,4' in call(compare.main, f'{tmp_path}/b')[1]
    make_run(tmp_path / 'c', accuracies(0.3), 1)
    assert 'loop against' not in call(compare.main, f'{tmp_path}/c')[1]


def test_loops_are_compared_in_pairs_of_the_items_that_eval_has_written(call, tiny_data, tmp_path):
    out_dir, items = tmp_path / 'out', tmp_path / 'items'
    train.main([f'--dataset={tiny_data}', f'--out_dir={out_dir}', *TINY, '--max_iters=4', '--eval_iters=0'])
    keys = [f'--out_dir={out_dir}', '--device=cpu', '--windows=9', '--loops=1,2,3', f'--items={items}']
    assert call(eval_script.main, *keys)[0] == 0
    for column, values, counts in (('loss', 'nll', 'tokens'), ('bpb', 'nll_of_bytes', 'bytes')):
        keys = [str(out_dir), f'--items={items}', f'--csv={tmp_path}/all.csv', f'--column={column}']
        status, out, err = call(compare.main, *keys)
        assert status == 0, err
        row = next(row for row in read(tmp_path / 'all.csv') if row['kind'] == 'loops')
        records = [json.loads(line) for line in items.read_text().splitlines()]
        first, second = ([r for r in records if r['loops'] == n] for n in (1, 2))
        changes = [b[values] - a[values] for a, b in zip(first, second, strict=True)]
        expected = sum(changes) / sum(r[counts] for r in first) / (1 if column == 'loss' else math.log(2))
        assert row['method'] == 'paired bootstrap over 9 items' and row['first_loops'] == '1 loop'
        assert float(row['difference']) == pytest.approx(expected, rel=1e-6)
        assert float(row['low']) < expected < float(row['high'])
    cost = Run(str(out_dir)).cost('loss')
    state = torch.load(out_dir / 'ckpt.pt')
    assert cost[0] == 4 * math.prod(state['config'][k] for k in ('batch_size', 'block_size'))
    assert cost[1] == state['flops']


def test_pages_and_questions_are_the_items(tmp_path):
    windows = {(i, None): dict(index=i, page=i // 2, nll=i, tokens=1) for i in range(4)}
    assert sums_by_item(windows, 'loss') == ({0: 1, 1: 5}, {0: 2, 1: 2})
    draws = {(i, seed): dict(index=i, seed=seed, correct=i) for i in (0, 1) for seed in (1, 2)}
    assert sums_by_item(draws, 'accuracy') == ({0: 0, 1: 2}, {0: 2, 1: 2})


def test_a_mean_over_tasks_is_made_of_their_items(tmp_path):
    """CORE: the mean of (accuracy - baseline) / (1 - baseline) over tasks."""
    rng, rows, path, totals = np.random.default_rng(0), [], tmp_path / 'items', {1: [], 2: []}
    for name, baseline, n in (('a', 0.25, 40), ('b', 0.5, 60)):
        for loops in (1, 2):
            correct = (rng.random(n) < 0.3 * loops).astype(int).tolist()
            centered = (np.mean(correct) - baseline) / (1 - baseline)
            totals[loops].append(centered)
            rows.append(dict(task=f'core/{name}', loops=loops, accuracy=np.mean(correct), centered=centered))
            records = [dict(index=i, seed=1234, correct=x) for i, x in enumerate(correct)]
            make_items(path, 'run', f'core/{name}', loops, records)
    rows += [dict(task='core', loops=loops, centered=np.mean(totals[loops])) for loops in (1, 2)]
    run = Run(str(make_run(tmp_path / 'run', rows)))
    items = read_items([path], [run])
    result = paired_bootstrap(pair_items(run, 'core', 'centered', ((1, ''), (2, '')), items))
    assert result.value == pytest.approx(np.mean(totals[2]) - np.mean(totals[1]))
    assert 'over 100 items' in result.method
    assert pair_items(run, 'core/a', 'loss', ((1, ''), (2, '')), items) is None  # they have no losses
    make_items(path, 'run', 'core/a', 2, [dict(index=0, seed=1234, correct=1 - items_of(items, 'core/a', 2))])
    with pytest.raises(UserError, match='expected those of the rows of run, whose difference is'):
        pair_items(run, 'core', 'centered', ((1, ''), (2, '')), read_items([path], [run]))
    make_items(path, 'run', 'core/a', 2, [dict(index=40, seed=1234, correct=1)])
    with pytest.raises(UserError, match="'core/a', expected the same items for 1 loop and 2 loops in run"):
        pair_items(run, 'core', 'centered', ((1, ''), (2, '')), read_items([path], [run]))


def items_of(items, task, loops):
    """Returns `correct` of the first item of a row."""
    return next(v for k, v in items.items() if k[1:3] == (task, str(loops)))[0, 1234]['correct']


# -----------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize('argv, told', [
    ([], "runs='', expected folders of runs: A1+A2+A3 B1+B2+B3"),
    (['a+'], "runs='a+', expected folders of runs"),
    (['absent'], "run='absent', expected a folder with an eval.csv"),
    (['empty'], "run='empty', expected one with rows in empty/eval.csv"),
    (['a@7'], "run='a@7', expected one with rows of step 7 in a/eval.csv"),
    (['other.csv'], 'other.csv is not a table of eval.py, it has no column task'),
    (['cut'], 'cut/eval.csv is not a table of eval.py, it has no column'),
    (['broken'], "broken/eval.csv has accuracy='x' in row 2, where a number is due"),
    (['no-loops'], "no-loops/eval.csv has loops='' in row 2, where a number is due"),
    (['mixed'], "run='mixed', expected rows of one run, not of r1 and r2"),
    (['a+a'], "run='a', expected different runs: it is the run of a"),
    (['a', 'copy'], "run='copy', expected different runs: it is the run of a"),
    (['a', 'loss'], 'expected a task that all have: a has mano; loss has loss'),
    (['a', 'b', '--tasks=core'], "tasks='core', expected some of mano"),
    (['a', '--column=loss'], "column='loss', expected one that all rows of mano have"),
    (['a', '--column=ppl'], "column='ppl', expected one of '', accuracy"),
    (['a+plain'], "runs='a+plain', expected seeds of one configuration, not n_loop=2 and 1"),
    (['a+texts'], "runs='a+texts', expected seeds of one configuration, not data=None and 5"),
    (['a', 'data'], "task='mano', expected the same settings in all rows, not 'data=1' (a/eval.csv) and"),
    (['a+half'], "the same dtype in all rows, not 'float32' (a/eval.csv) and 'bfloat16' (half/eval.csv)"),
    (['loss', 'tokens'], 'the same tokens in all rows, not '),
    (['a', '--items=absent'], "'absent' cannot be read: No such file"),
    (['a', '--items=other.csv'], 'other.csv, line 1 is no JSON'),
    (['a', '--items=old'], 'old, line 1: no record of eval.py --items, no run'),
    (['a', '--items=items'], "items='items', expected items of the runs a, it has those of b"),
    (['a', '--csv=a/eval.csv'], "csv='a/eval.csv', expected a new file, or one that this script has written"),
    (['a', '--csv=absent/x.csv'], 'expected a file in a folder that exists'),
    (['a', '--image=x.jpg'], "image='x.jpg', expected a file in a folder that exists, .png, .pdf, .svg"),
    (['a', '--task=mano'], "unknown key 'task', did you mean 'tasks'?"),
])  # fmt: skip
def test_mistakes_are_told_in_one_line(call, tmp_path, monkeypatch, argv, told):
    monkeypatch.chdir(tmp_path)
    rows = accuracies(0.5, 0.6)
    for name, changed in dict(
        a={}, b={}, copy=dict(run='a'), data=dict(settings='data=2'), half=dict(dtype='bfloat16')
    ).items():
        make_run(tmp_path / name, [row | changed for row in rows], 2)
    make_run(tmp_path / 'plain', rows, 1)
    make_run(tmp_path / 'texts', rows, 2, data=dict(sha256='5'))
    make_run(tmp_path / 'empty', [])
    make_run(tmp_path / 'broken', [dict(rows[0], accuracy='x')])
    make_run(tmp_path / 'no-loops', [dict(rows[0], loops='')])
    make_run(tmp_path / 'mixed', [dict(row, run=f'r{i}') for i, row in enumerate(rows, 1)])
    for name, n in dict(loss=50, tokens=40).items():
        make_run(tmp_path / name, [dict(task='loss', loops=1, loss=2.5, tokens=n)])
    make_run(tmp_path / 'cut', rows)
    with open(tmp_path / 'cut' / 'eval.csv', 'a') as file:
        file.write('mano,4\n')
    (tmp_path / 'other.csv').write_text('a,b\n1,2\n')
    (tmp_path / 'old').write_text('{"task": "mano", "loops": 1, "policy": "", "step": 100, "index": 0}\n')
    make_items(tmp_path / 'items', 'b', 'mano', 1, [dict(index=0, correct=1)])
    status, out, err = call(compare.main, *argv)
    assert status == 2 and told in err and err.count('\n') == 1 and out == ''
    assert 'accuracy' in (tmp_path / 'a' / 'eval.csv').read_text()


def test_a_missing_scipy_is_told(call, folders, monkeypatch):
    monkeypatch.setitem(sys.modules, 'scipy', None)
    status, out, err = call(compare.main, *folders)
    assert (
        status == 2 and out == '' and err == 'compare.py: comparing needs scipy: pip install -e ".[eval]"\n'
    )


def test_data_is_the_same_under_another_path(call, tmp_path):
    for name, path in (('a', 'x'), ('b', '/y z')):
        settings = f'dataset={path} split=val windows=0 data=12'
        make_run(tmp_path / name, accuracies(0.5, 0.6, settings=settings), 2)
    assert call(compare.main, f'{tmp_path}/a', f'{tmp_path}/b')[0] == 0
