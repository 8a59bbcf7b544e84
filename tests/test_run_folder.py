"""A run's folder belongs to one run at a time, and its log holds what happened to the run that it is of."""

import contextlib
import errno
import fcntl
import json
import os
import sys
import types

import pytest
import torch

from nanoloop import run_folder, saving
from nanoloop.checks import UserError
from nanoloop.files import NOT_SUPPORTED, sync_folder
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


def test_a_run_that_was_killed_before_its_first_checkpoint_is_archived(call, flags, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'log.jsonl').write_text('{"iter": 0}\n{"it')
    status, out, _ = call(main, *flags, '--max_iters=1')
    assert status == 0 and f'held an earlier run, it is now in {tmp_path}/out/run-1' in out
    assert (tmp_path / 'out' / 'run-1' / 'log.jsonl').read_text() == '{"iter": 0}\n{"it'


def test_an_archived_run_takes_all_its_files_along(tmp_path):
    names = [
        'ckpt.pt',
        'prev.pt',
        'best.pt',
        'log.jsonl',
        'eval.jsonl',
        'eval.csv',
        'eval.png',
        'best-before-4.pt',
        'best-before-20.pt',
    ]
    for name in names:
        (tmp_path / name).write_text(name)
    run_folder.archive_previous_run(tmp_path)
    assert {path.name for path in (tmp_path / 'run-1').iterdir()} == set(names)
    assert [path.name for path in tmp_path.iterdir()] == ['run-1']


def test_the_best_of_other_data_keeps_a_name_and_is_never_overwritten(tmp_path):
    best, said = tmp_path / 'best.pt', []
    for text in ('first', 'second', 'second', 'third'):
        if not best.exists() or best.read_text() != text:
            best.unlink(missing_ok=True)
            best.write_text(text)
        saving.keep_old_best(best, 'best-before-20', said.append)
    names = ['best-before-20.pt', 'best-before-20-2.pt', 'best-before-20-3.pt']
    assert [(tmp_path / name).read_text() for name in names] == ['first', 'second', 'third']
    assert said[0] == f'best.pt is of before this change: it is now {tmp_path}/best-before-20.pt'
    assert len(said) == 3 and best.read_text() == 'third'


def test_a_folder_without_locks_is_used_and_that_is_told(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(95, 'Operation not supported')

    monkeypatch.setattr(fcntl, 'flock', flock)
    said = []
    assert run_folder.open_out_dir(tmp_path / 'new', said.append) is None
    assert said == [f'{tmp_path}/new cannot be locked against a second run: Operation not supported']


@pytest.mark.parametrize('code', sorted(NOT_SUPPORTED))
def test_a_folder_that_cannot_be_synced_is_used_and_that_is_told_once(tmp_path, monkeypatch, code):
    def fsync(file):
        raise OSError(code, 'no')

    monkeypatch.setattr(os, 'fsync', fsync)
    said = []
    run_folder.open_out_dir(tmp_path, said.append).close()
    expected = f'{tmp_path} cannot be synced: after a power cut the last checkpoint may be missing (no)'
    assert said == [expected] and sync_folder(tmp_path) == 'no'


def test_a_disk_that_fails_is_no_folder_that_cannot_be_synced(tmp_path, monkeypatch):
    def fsync(file):
        raise OSError(errno.EIO, 'Input/output error')

    monkeypatch.setattr(os, 'fsync', fsync)
    with pytest.raises(OSError, match=f'Input/output error: .{tmp_path}'):
        run_folder.open_out_dir(tmp_path)


@pytest.mark.parametrize(
    'module, expected',
    [('', 'needs wandb: pip install'), ('raise AttributeError("no float_")', 'wandb.init failed: no float_')],
)
def test_a_wandb_that_cannot_start_is_told(tmp_path, monkeypatch, module, expected):
    """An empty one stands for the folder wandb/ of earlier runs, another for a version that does not fit."""
    (tmp_path / 'wandb.py').write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'wandb', raising=False)
    c = types.SimpleNamespace(wandb_project='p', wandb_run_name='r')
    with pytest.raises(UserError, match=expected):
        run_folder.start_wandb(c, 'id')
    sys.modules.pop('wandb', None)


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


def test_a_full_disk_is_told_as_such(tmp_path, monkeypatch):
    """torch.save itself ends with a message about its own file format."""

    @contextlib.contextmanager
    def on_a_full_disk(path, mode):
        with open('/dev/full', mode) as file:
            yield file

    monkeypatch.setattr(saving, 'replace_file', on_a_full_disk)
    log = types.SimpleNamespace(open=lambda: None, file=open(tmp_path / 'log', 'wb'), wandb_id='')
    for size in (10, 10**6):
        with pytest.raises(OSError, match='cannot be saved: No space left on device; the last'):
            saving.save_checkpoint(tmp_path, dict(x=torch.zeros(size)), log, best=False)
