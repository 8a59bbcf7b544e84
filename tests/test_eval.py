"""eval.py: its rows, what it does not measure again, and what it refuses."""

import json
import math
import os
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import TINY, read_log

import eval as eval_script
import nanoloop.evaluator as evaluator
import train
from eval import main
from nanoloop import files
from nanoloop.checks import UserError
from nanoloop.eval_tasks import EvalTask, judge_window, summarise_windows
from nanoloop.evaluator import Evaluator
from nanoloop.prepare import write_text
from nanoloop.results import COLUMNS, KEY, Results, against_one_loop, csv_beside, format_table, read_csv
from nanoloop.scoring import Evaluation, Item, Text
from nanoloop.tokenizer import Bytes


@pytest.fixture(scope='module')
def trained(tiny_data, tmp_path_factory):
    """The folder of a run of 4 steps."""
    out_dir = tmp_path_factory.mktemp('eval') / 'out'
    train.main([f'--dataset={tiny_data}', f'--out_dir={out_dir}', *TINY, '--max_iters=4', '--eval_iters=0'])
    return out_dir


@pytest.fixture
def run(trained, tmp_path):
    """Flags of eval.py for a run, and its folder."""
    out_dir = shutil.copytree(trained, tmp_path / 'out')
    return [f'--out_dir={out_dir}', '--device=cpu', '--dtype=float32'], out_dir


def rows_of(out_dir):
    return read_csv(csv_beside(dict(path=f'{out_dir}/best.pt')))


def test_the_loss_equals_that_of_the_training_run(call, run):
    flags, out_dir = run
    status, out, err = call(main, *flags, '--loops=1,2,5')
    assert status == 0, err
    one, two, five = rows_of(out_dir)
    best = min(
        record['val/loss'] for record in read_log(out_dir) if record.get('val/loss') and record['iter']
    )
    assert float(two['loss']) == pytest.approx(best, abs=1e-6)
    assert len({row['loss'] for row in (one, two, five)}) == 3
    assert float(two['bpb']) == pytest.approx(float(two['loss']) / math.log(2), abs=1e-6)  # a byte per letter
    assert float(two['ppl']) == pytest.approx(math.exp(float(two['loss'])), rel=1e-6)
    flops = [float(row['flops_per_token']) for row in (one, two, five)]
    assert flops[2] - flops[1] == pytest.approx(3 * (flops[1] - flops[0]))
    assert 'loss: loss' in out and out.splitlines()[0].split()[:3] == ['task', 'n_loop', 'loss']


def test_only_missing_rows_are_measured(call, run, monkeypatch):
    flags, out_dir = run
    measured = []

    def score(model, evaluation, policies, *args):
        measured.append([(policy.n_loop, policy.name) for policy in policies])
        return original(model, evaluation, policies, *args)

    original = evaluator.score
    monkeypatch.setattr(evaluator, 'score', score)
    first = call(main, *flags, '--loops=1,2', '--windows=8')[1]
    csv = csv_beside(dict(path=f'{out_dir}/best.pt'))
    csv.write_bytes(csv.read_bytes()[:-9])  # the second line was cut when the machine failed
    again = call(main, *flags, '--loops=1,2', '--windows=8')[1]
    assert first == again and measured == [[(1, ''), (2, '')], [(2, '')]]
    more = ['--exit=diff', '--exit_threshold=0.5,0.1', '--kv_budget=1']
    assert call(main, *flags, '--loops=1,2', '--windows=8', *more)[0] == 0
    assert measured[2:] == [[(2, 'exit=diff 0.5'), (2, 'exit=diff 0.1'), (2, 'kv_budget=1')]]
    assert call(main, *flags, '--loops=1,2', '--windows=9')[0] == 0 and measured[3:] == [[(1, ''), (2, '')]]
    assert len(rows_of(out_dir)) == 7 and all(row.keys() == set(COLUMNS) for row in rows_of(out_dir))


def test_every_items_decision_is_written(call, run, tmp_path):
    flags, _ = run
    assert call(main, *flags, '--loops=1,2', '--windows=5', f'--items={tmp_path}/items.jsonl')[0] == 0
    records = [json.loads(line) for line in (tmp_path / 'items.jsonl').read_text().splitlines()]
    assert [(r['loops'], r['index']) for r in records] == [(n, i) for n in (1, 2) for i in range(5)]
    assert all(r['task'] == 'loss' and r['nll'] > 0 and r['tokens'] for r in records)


def test_items_of_rows_that_are_there_already_are_missed_aloud(call, run, tmp_path):
    flags, _ = run
    assert call(main, *flags, '--loops=1,2', '--windows=5')[0] == 0
    err = call(main, *flags, '--loops=1,2,3', '--windows=5', f'--items={tmp_path}/items.jsonl')[2]
    assert 'items.jsonl: without the items of 2 rows that had been measured before' in err
    assert {json.loads(line)['loops'] for line in (tmp_path / 'items.jsonl').open()} == {3}


@pytest.mark.parametrize('exits', [[], ['--exit=diff', '--exit_threshold=0.5,0.1']])
def test_a_long_evaluation_says_how_far_it_is(call, run, monkeypatch, exits):
    flags, _ = run
    monkeypatch.setattr(eval_script.Progress, 'LINE_S', 0.0)
    err = call(main, *flags, *exits, '--loops=1,2', '--windows=40', '--batch_tokens=64')[2]
    lines = [line for line in err.splitlines() if line.startswith('... loss: ')]
    told = [int(line.split()[2]) for line in lines]
    assert len(told) > 4 and told == sorted(told) and told[0] == 0
    assert f'... loss: {told[-1]} of {told[-1]} items (' in lines[-1]


def test_ctrl_c_says_what_is_kept(call, run, monkeypatch):
    flags, out_dir = run

    def score(model, evaluation, policies, *args):
        raise KeyboardInterrupt

    assert call(main, *flags, '--loops=1', '--windows=5')[0] == 0
    monkeypatch.setattr(evaluator, 'score', score)
    status, _, err = call(main, *flags, '--loops=1,2', '--windows=5')
    assert status == 130 and err.splitlines()[-1].startswith('stopped: 1 rows are in ')


def test_only_rank_0_writes_items(tmp_path):
    row = dict.fromkeys((*KEY, 'run'), 'x')
    for rank in (1, 0):
        assert not (tmp_path / 'items').exists()
        measuring = Evaluator(None, SimpleNamespace(rank=rank), [], None, {}, 1, tmp_path / 'items', None)
        measuring.write_items(row, [dict(index=0)])
    assert json.loads((tmp_path / 'items').read_text()) == row | dict(index=0)


def two_halves(c, tokenizer, config, say):
    """Returns two Evaluations of one text each."""
    items = [Item([Text([1, 2, 3, 4], slice(1, 4))], dict(index=0))]
    loss = lambda item, ces, predicted: dict(loss=float(ces[0].mean()))  # noqa: E731
    return [Evaluation(f'two/{i}', '', items, loss, lambda records: records[0]) for i in 'ab']


def test_a_tasks_own_row_is_added_once(call, run, monkeypatch):
    flags, out_dir = run
    means = lambda rows: dict(loss=sum(row['loss'] for row in rows) / len(rows), note='mean')  # noqa: E731
    monkeypatch.setitem(eval_script.TASKS, 'two', EvalTask(two_halves, means))
    for _ in range(2):
        assert call(main, *flags, '--tasks=two', '--loops=1,2')[0] == 0
        rows = {(row['task'], row['loops']): float(row['loss']) for row in rows_of(out_dir)}
        assert len(rows) == len(rows_of(out_dir)) == 6
        assert all(rows['two', n] == pytest.approx(rows['two/a', n]) for n in '12')


def test_the_rows_that_are_finished_are_those_that_rank_0_sees(call, run, monkeypatch):
    flags, out_dir = run
    assert call(main, *flags, '--windows=3')[0] == 0
    seen = rows_of(out_dir)
    csv_beside(dict(path=f'{out_dir}/best.pt')).unlink()
    monkeypatch.setattr(eval_script, 'gather', lambda m, rows: [seen, rows])
    monkeypatch.setattr(evaluator, 'score', lambda *args: pytest.fail('it is measured again'))
    assert call(main, *flags, '--windows=3')[0] == 0


def test_data_in_other_tokens_is_refused(call, run, tmp_path):
    (tmp_path / 'input.txt').write_text('some bytes ' * 100)
    write_text(tmp_path / 'bytes', [tmp_path / 'input.txt'], Bytes(), 'text')
    status, _, err = call(main, *run[0], f'--dataset={tmp_path}/bytes')
    assert status == 2 and 'expected one in the tokens of the model, of kind char, not byte' in err


def test_special_tokens_do_not_count_in_bits_per_byte():
    item = Item([Text([1, 0, 2, 1], slice(1, 4))], dict(index=0))
    record = judge_window(item, [np.array([5.0, 2.0, 1.0])], None, np.array([0, 1, 2]))
    assert record == dict(nll=8.0, tokens=3, nll_of_bytes=3.0, bytes=3)
    columns = summarise_windows([record, record])
    assert columns['bpb'] == pytest.approx(1 / math.log(2)) and columns['loss'] == pytest.approx(8 / 3)


def test_results_are_drawn(call, run):
    pytest.importorskip('matplotlib')
    flags, out_dir = run
    options = ['--loops=1,2', '--windows=4', '--exit=kl', '--exit_threshold=0.1', '--plot=True']
    status, out, _ = call(main, *flags, *options)
    image = csv_beside(dict(path=f'{out_dir}/best.pt')).with_suffix('.png')
    assert status == 0 and out.splitlines()[-1] == f'drawn: {image}' and image.read_bytes()[:4] == b'\x89PNG'


@pytest.mark.parametrize(
    'options, told',
    [
        (['--tasks=losss'], "tasks='losss', expected names of loss, wikitext"),
        (['--tasks='], "tasks='', expected a name"),
        (['--loops=1,x'], "loops='1,x', expected different numbers"),
        (['--loops=0'], "loops='0', expected different numbers with commas between them, none below 1"),
        (['--loops=2,2'], 'expected different numbers'),
        (['--fewshot_seeds='], "fewshot_seeds='', expected at least one number"),
        (['--fewshot_seeds=1,01'], "fewshot_seeds='1,01', expected different numbers"),
        (['--fewshot_seeds=1;2'], 'expected different numbers'),
        (['--fewshot_seeds=1_0'], 'expected different numbers'),
        (['--exit=diff'], 'exit_threshold=None, expected a number with exit=diff: try 0.1'),
        (['--exit=gate'], 'the model has no exit gate'),
        (['--exit=gate', '--exit_threshold=0.5'], 'the model has no exit gate'),
        (['--exit_threshold=0.1'], "expected '' without an exit"),
        (['--kv_budget=3'], 'expected at most the 2 loops'),
        (['--dataset=nothing'], 'there is no folder'),
        (['--split=test'], 'has no test split'),
        (['--tasks=core', '--core_dir=nowhere'], 'nowhere'),
        (['--tasks=mano'], 'a model trained with --dataset=mano'),
        (['--csv=nowhere/eval.csv'], 'expected a file in a folder that exists'),
        (['--items=nowhere/items.jsonl'], 'expected a file in a folder that exists'),
        (['--windows=-1'], 'windows=-1'),
    ],
)
def test_what_is_wrong_is_told_before_weights_are_loaded(options, told, call, run, monkeypatch):
    flags, _ = run
    monkeypatch.setattr(eval_script, 'load_checkpoint', lambda *args: pytest.fail('weights are loaded'))
    status, out, err = call(main, *flags, *options)
    assert status == 2 and told in err and out == ''


def test_a_csv_of_another_run_is_refused(call, run, tmp_path):
    flags, out_dir = run
    csv = tmp_path / 'eval.csv'
    assert call(main, *flags, '--windows=2', f'--csv={csv}')[0] == 0
    checkpoint = torch.load(f'{out_dir}/best.pt', weights_only=True)
    torch.save(checkpoint | dict(wandb_id='another'), f'{out_dir}/best.pt')
    status, _, err = call(main, *flags, '--windows=2', f'--csv={csv}')
    assert status == 2 and f'{csv} has results of another run' in err
    csv.write_text('a,b\n1,2\n')
    assert 'is not a table of eval.py' in call(main, *flags, f'--csv={csv}')[2]


def test_a_checkpoint_that_names_no_data_needs_one(call, run):
    flags, out_dir = run
    checkpoint = torch.load(f'{out_dir}/best.pt', weights_only=True)
    torch.save(checkpoint | dict(config={}), f'{out_dir}/best.pt')
    status, out, err = call(main, *flags)
    assert status == 2 and out == '' and "dataset='', expected a data set, the checkpoint names none" in err


def test_two_evaluations_can_write_into_one_file(tmp_path):
    """A line waits for that of another process: it could be taken for a half line."""
    results = Results(tmp_path / 'eval.csv', 'r1')
    writer = threading.Thread(target=results.write, args=(results.add(dict(task='loss', run='r1')),))
    with open(tmp_path / 'eval.csv', 'ab') as other:
        files.wait_for_file(other)
        writer.start()
        writer.join(0.3)
        assert writer.is_alive()
    writer.join(10)
    assert not writer.is_alive() and read_csv(tmp_path / 'eval.csv') == results.rows


def test_a_row_is_found_by_its_key_and_belongs_to_one_run(tmp_path):
    results = Results(tmp_path / 'eval.csv', 'r1')
    row = dict(
        task='loss', loops=2, policy='', settings='a, "b"', dtype='float32', step=5, run='r1', loss=0.5
    )
    results.write(results.add(row))
    again = Results(tmp_path / 'eval.csv', 'r1')
    assert again.rows == results.rows and again.find(row)['loss'] == '0.5'
    assert again.find(row | dict(step=6)) is None and again.find(row | dict(settings='a')) is None
    with pytest.raises(UserError, match='another run'):
        Results(tmp_path / 'eval.csv', 'r2')


def test_the_table_shows_what_was_measured():
    row = {column: '' for column in COLUMNS} | dict(
        task='mano', loops='1', accuracy='0.5', accuracy_se='0.01'
    )
    rows = [row, row | dict(loops='4', accuracy='0.75', accuracy_se='nan', flops_per_token='2e9')]
    head, one, four = format_table(rows)
    assert head.split() == ['task', 'n_loop', 'accuracy', 'GFLOP/token']
    assert one.split() == ['mano', '1', '0.5000', '+-', '0.0100'] and four.split() == [
        'mano',
        '4',
        '0.7500',
        '2',
    ]
    parts = [row | dict(task=f'mano/l={i}', note='the same') for i in (1, 2)]
    assert [line.count('the same') for line in format_table(parts)] == [0, 1, 0]  # where it changes
    others = [row | dict(task=task, note='the same') for task in ('gsm8k', 'spellingbee')]
    assert [line.count('the same') for line in format_table(others)] == [0, 1, 1]
    rows += [part | dict(loops=n) for part in parts for n in '14']  # no line for the parts of a task
    line = 'mano: accuracy 0.5000 with 1 loop, 0.7500 with 4: +0.2500'
    assert against_one_loop(rows, 4) == against_one_loop(rows, 2) == [line]  # 2 was not measured
    rows.append(row | dict(loops='8', accuracy='0.8'))  # more than the model is made for
    assert against_one_loop(rows, 4) == [line]
    assert against_one_loop(rows, 1) == ['mano: accuracy 0.5000 with 1 loop, 0.8000 with 8: +0.3000']


@pytest.mark.parametrize('file', ['eval.csv', 'new.csv'])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(monkeypatch, tmp_path, file):
    (tmp_path / 'eval.csv').touch()
    asked = []
    monkeypatch.setattr(files.os, 'access', lambda path, mode: asked.append((path, mode)))  # a read-only disk
    with pytest.raises(ValueError, match='csv=.*, expected a file that can be written'):
        Results(tmp_path / file, 'r1')
    assert asked == [(tmp_path / 'eval.csv' if file == 'eval.csv' else tmp_path, os.W_OK)]
