"""The picture of runs: what it shows is what was logged."""

import json

import numpy as np
import pytest
import torch
from helpers import read_log

import plot
from train import main


@pytest.fixture
def drawn(monkeypatch):
    """drawn() -> {(row, title, y label): axis} of the visible panels of the last picture."""
    pytest.importorskip('matplotlib')
    from matplotlib import pyplot

    figures, real = [], pyplot.subplots
    monkeypatch.setattr(pyplot, 'subplots', lambda *a, **k: figures.append(real(*a, **k)) or figures[-1])

    def panels():
        rows = figures[-1][1]
        return {
            (i, axis.get_title(), axis.get_ylabel()): axis
            for i, row in enumerate(rows)
            for axis in row
            if axis.get_visible()
        }

    return panels


def test_runs_are_compared_in_one_panel_and_looked_into_one_by_one(call, flags, tmp_path, drawn):
    call(main, *flags, '--diagnose=3')
    call(main, *flags, f'--out_dir={tmp_path}/plain')
    folders = f'--out_dir={tmp_path}/out,{tmp_path}/plain'
    status, out, err = call(plot.main, folders, f'--image={tmp_path}/a.png')
    assert status == 0 and out.endswith(f'drawn: {tmp_path}/a.png\n'), err
    assert (
        f'train.py --out_dir={tmp_path}/out --init_from=resume --eval_only=True --eval_loops=1,2' in out
        and '--diagnose' not in out
    )
    assert (tmp_path / 'a.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
    losses = drawn()[0, '', 'loss, nats per token'].get_lines()
    assert [line.get_label() for line in losses] == ['out, train', 'out, val', 'plain, train', 'plain, val']
    for line, name, key in zip(
        losses, ('out', 'out', 'plain', 'plain'), ('train/loss', 'val/loss') * 2, strict=True
    ):
        expected = [record[key] for record in read_log(tmp_path / name) if key in record]
        assert line.get_ydata().tolist() == expected
    records = [record for record in read_log(tmp_path / 'out') if 'hidden_norm/loop_00' in record]
    for k, line in enumerate(drawn()[1, 'out', "norm of the last block's output"].get_lines()):
        assert line.get_xdata().tolist() == [0, 3, 6, 9]
        assert line.get_ydata().tolist() == [record[f'hidden_norm/loop_{k:02d}'] for record in records]
    assert len(drawn()) == 1 + 5 and all(axis.get_xlabel() == 'step' for axis in drawn().values())


def test_seeds_are_a_mean_and_a_band_and_evaluations_a_curve_over_loops(call, flags, tmp_path, drawn):
    losses = []
    for seed in (1, 2):
        keys = [*flags, f'--seed={seed}', f'--out_dir={tmp_path}/{seed}']
        call(main, *keys)
        losses.append(
            [record['val/loss'] for record in read_log(tmp_path / str(seed)) if 'val/loss' in record]
        )
        for n_loop in (1, 2, 4):
            call(main, *keys, '--init_from=resume', '--eval_only=True', f'--n_loop={n_loop}')
    for suffix in ('.svg', '.pdf'):
        image = tmp_path / f'a{suffix}'
        status, out, _ = call(plot.main, f'--out_dir={tmp_path}/1+{tmp_path}/2', f'--image={image}')
        assert status == 0 and image.stat().st_size > 1000 and 'for what happens loop by loop' in out
    _, val = drawn()[0, '', 'loss, nats per token'].get_lines()
    assert np.allclose(val.get_ydata(), np.mean(losses, axis=0)) and val.get_label() == '1 + 2, val'
    band = drawn()[0, '', 'loss, nats per token'].collections[1].get_paths()[0].vertices[:, 1]
    assert band.min() == np.min(losses) and band.max() == np.max(losses)
    (line,) = drawn()[0, '', 'validation loss, nats per token'].get_lines()
    assert line.get_xdata().tolist() == [1, 2, 4]
    assert line.get_ydata()[1] == pytest.approx(np.mean(losses, axis=0)[-1])  # as many loops as in training


def write_log(folder, evaluations, other=()):
    folder.mkdir()
    (folder / 'log.jsonl').write_text(''.join(f'{json.dumps(record)}\n' for record in evaluations))
    (folder / 'eval.jsonl').write_text(''.join(f'{json.dumps(record)}\n' for record in other))


def evaluation(step, loss, **others):
    return {'iter': step, 'val/loss': loss} | {f'val/loss@{n[1:]}': x for n, x in others.items()}


def test_eval_loops_are_a_line_per_number_of_loops_in_a_panel_of_each_group(call, tmp_path, drawn):
    a = [evaluation(0, 9.0, n1=9.0, n10=9.0, n2=9.0), evaluation(5, 2.0, n1=3.0, n10=1.5, n2=2.5)]
    b = [evaluation(0, 9.5, n1=9.5), evaluation(5, 2.2, n1=3.4), evaluation(9, 2.1, n1=3.2, n2=None)]
    for name, records in (('a', a), ('b', b), ('plain', [evaluation(0, 9.0), evaluation(5, 2.0)])):
        write_log(tmp_path / name, records)
    groups = f'{tmp_path}/a+{tmp_path}/b,{tmp_path}/plain,{tmp_path}/b'
    status, _, err = call(plot.main, f'--out_dir={groups}')
    assert status == 0, err
    panels = {title: axis for (_, title, label), axis in drawn().items() if 'validation' in label}
    assert list(panels) == ['a + b', 'b'] and len(drawn()) == 3  # and the losses of all
    lines = {line.get_label(): line for line in panels['a + b'].get_lines()}
    assert list(lines) == ['val, 1 loop', 'val, 2 loops', 'val, 10 loops']
    assert lines['val, 1 loop'].get_xdata().tolist() == [0, 5, 9]
    assert np.allclose(lines['val, 1 loop'].get_ydata(), [9.25, 3.2, 3.2])
    assert lines['val, 10 loops'].get_ydata().tolist() == [9.0, 1.5]
    (line,) = panels['b'].get_lines()
    assert line.get_label() == 'val, 1 loop' and line.get_ydata().tolist() == [9.5, 3.4, 3.2]
    assert line.get_color() == lines['val, 1 loop'].get_color()
    assert len({line.get_color() for line in lines.values()}) == 3
    # comparable, and not squeezed by the untrained model
    assert panels['a + b'].get_ylim() == panels['b'].get_ylim() == pytest.approx((1.405, 3.495))
    assert {axis.get_xlabel() for axis in panels.values()} == {'step'}


def test_one_evaluation_with_eval_loops_is_a_curve_over_loops(call, tmp_path, drawn):
    last = evaluation(9, 2.0, n1=3.0, n8=1.5) | dict(n_loop=4, dataset='x')
    early = evaluation(5, 7.0, n1=7.0, n3=7.0) | dict(n_loop=4, dataset='x')
    write_log(tmp_path / 'a', [evaluation(9, 2.0)], [early, last])
    status, out, _ = call(plot.main, f'--out_dir={tmp_path}/a')
    assert status == 0 and 'for the loss against loops' not in out
    (line,) = drawn()[0, '', 'validation loss, nats per token'].get_lines()
    assert line.get_xydata().tolist() == [[1, 3.0], [4, 2.0], [8, 1.5]]


def test_a_run_that_was_evaluated_at_its_start_only_is_drawn(call, tmp_path, drawn):
    write_log(tmp_path / 'a', [evaluation(0, 2.0, n1=3.0)])
    assert call(plot.main, f'--out_dir={tmp_path}/a')[0] == 0
    low, high = drawn()[0, 'a', 'validation loss, nats per token'].get_ylim()
    assert low < 3 < high


def test_what_cannot_be_drawn_is_told(call, tmp_path):
    status, _, err = call(plot.main, f'--out_dir={tmp_path}')
    assert status == 2 and 'expected the folder of a run with a log.jsonl' in err
    (tmp_path / 'log.jsonl').write_text('{\n')
    status, _, err = call(plot.main, f'--out_dir={tmp_path}')
    assert status == 2 and 'is broken' in err
    (tmp_path / 'log.jsonl').write_text('{"iter": 0, "train/loss": 1.0}\n')
    status, _, err = call(plot.main, f'--out_dir={tmp_path}', f'--image={tmp_path}/a.jpg')
    assert status == 2 and 'expected a file in a folder that exists, .png, .pdf, .svg' in err
    status, _, err = call(plot.main, f'--png={tmp_path}/a.png')
    assert status == 2 and "unknown key 'png', did you mean 'image'?" in err


@pytest.mark.parametrize('names', ['a,', ',a', 'a+', 'a++b', ''])
def test_an_empty_name_between_runs_is_refused(call, names):
    status, _, err = call(plot.main, f'--out_dir={names}')
    assert status == 2 and 'the name of a folder before and after each , and +' in err


def test_runs_on_different_data_have_no_mean(call, tmp_path):
    for name, sha256 in (('a', '1'), ('b', '1'), ('c', '2')):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'log.jsonl').write_text('{"iter": 0, "train/loss": 1.0}\n')
        state = dict(model={}, model_args={}, config=dict(dataset=f'set{sha256}'), data=dict(sha256=sha256))
        torch.save(state, tmp_path / name / 'ckpt.pt')
    image = f'--image={tmp_path}/x.png'
    status, _, err = call(plot.main, f'--out_dir={tmp_path}/a+{tmp_path}/b+{tmp_path}/c', image)
    assert status == 2 and f'joined by +, not {tmp_path}/a (set1) and {tmp_path}/c (set2)' in err
    assert call(plot.main, f'--out_dir={tmp_path}/a+{tmp_path}/b,{tmp_path}/c', image)[0] == 0


def test_a_comparison_does_not_replace_the_picture_of_one_run(call, flags, tmp_path, drawn):
    call(main, *flags)
    call(main, *flags, f'--out_dir={tmp_path}/b')
    for folders, image in (
        (f'{tmp_path}/out', 'log.png'),
        (f'{tmp_path}/out,{tmp_path}/b', 'comparison.png'),
    ):
        assert call(plot.main, f'--out_dir={folders}')[1].endswith(f'drawn: {tmp_path}/out/{image}\n')
