"""A run's folder belongs to one run at a time, and its log holds what happened to the run that it is of."""

import fcntl
import json

import pytest

from nanoloop import run_folder
from train import main


def test_a_lost_log_begins_anew(call, flags, tmp_path):
    call(main, *flags)
    (tmp_path / 'out' / 'log.jsonl').write_text('')
    assert call(main, *flags, '--init_from=resume', '--max_iters=15')[0] == 0
    lines = (tmp_path / 'out' / 'log.jsonl').read_text().splitlines()
    assert [json.loads(line)['iter'] for line in lines if 'lr' in line] == [12, 13, 14]


def test_a_log_alone_is_no_earlier_run(call, flags, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'log.jsonl').write_text('old')
    assert call(main, *flags)[0] == 0 and not (tmp_path / 'out' / 'run-1').exists()


def test_a_folder_without_locks_is_used_and_that_is_told(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(95, 'Operation not supported')

    monkeypatch.setattr(fcntl, 'flock', flock)
    said = []
    assert run_folder.open_out_dir(tmp_path / 'new', said.append) is None
    assert said == [f'{tmp_path}/new cannot be locked against a second run: Operation not supported']


def test_a_lock_ends_with_its_file(tmp_path):
    lock = run_folder.open_out_dir(tmp_path)
    with pytest.raises(ValueError, match='is in use by another run'):
        run_folder.open_out_dir(tmp_path)
    lock.close()
    run_folder.open_out_dir(tmp_path).close()


def test_every_earlier_run_gets_a_folder_of_its_own(tmp_path):
    said = []
    for n in (1, 2):
        for name in ('ckpt.pt', 'log.jsonl', 'notes.txt'):
            (tmp_path / name).write_text(str(n))
        run_folder.archive_previous_run(tmp_path, said.append)
    assert [(tmp_path / f'run-{n}' / 'ckpt.pt').read_text() for n in (1, 2)] == ['1', '2']
    assert (tmp_path / 'notes.txt').exists() and not (tmp_path / 'log.jsonl').exists() and len(said) == 2


def test_a_commit_is_marked_where_files_differ_from_it(monkeypatch):
    outputs = iter(['abc\n', ' M model.py\n', 'abc\n', ''])
    monkeypatch.setattr(run_folder.subprocess, 'check_output', lambda *args, **keys: next(outputs))
    assert [run_folder.git_commit() for _ in range(2)] == ['abc+', 'abc']
