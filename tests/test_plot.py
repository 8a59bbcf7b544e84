"""The picture of runs: what it shows is what was logged."""

import pytest

import plot
from train import main


def test_runs_are_drawn_beside_each_other(call, flags, tmp_path, monkeypatch):
    pytest.importorskip('matplotlib')
    from matplotlib import pyplot

    call(main, *flags, '--diagnose=3')
    call(main, *flags, f'--out_dir={tmp_path}/plain')
    figures, real = [], pyplot.subplots
    monkeypatch.setattr(pyplot, 'subplots', lambda *a, **k: figures.append(real(*a, **k)) or figures[-1])
    status, out, err = call(
        plot.main, f'--out_dir={tmp_path}/out,{tmp_path}/plain', f'--png={tmp_path}/a.png'
    )
    assert status == 0 and out.endswith(f'drawn: {tmp_path}/a.png\n'), err
    assert (tmp_path / 'a.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
    seen, plain = figures[0][1]
    records = plot.read_log(tmp_path / 'out')
    lines = {axis.get_title(): axis.get_lines() for axis in seen}
    train = lines['out: loss, nats'][0]
    assert train.get_ydata().tolist() == [line['train/loss'] for line in records if 'lr' in line]
    for k, line in enumerate(lines["norm of the last block's output"]):
        expected = [
            record[f'hidden_norm/loop_{k:02d}'] for record in records if 'hidden_norm/loop_00' in record
        ]
        assert line.get_xdata().tolist() == [0, 3, 6, 9] and line.get_ydata().tolist() == expected
    assert all(len(found) > 0 for found in lines.values())
    assert [len(axis.get_lines()) for axis in plain] == [2, 0, 0, 0, 0, 0]


def test_what_cannot_be_drawn_is_told(call, tmp_path):
    status, _, err = call(plot.main, f'--out_dir={tmp_path}')
    assert status == 2 and 'expected the folder of a run with a log.jsonl' in err
    (tmp_path / 'log.jsonl').write_text('{\n')
    status, _, err = call(plot.main, f'--out_dir={tmp_path}')
    assert status == 2 and 'is broken' in err
