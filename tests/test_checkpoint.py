"""Checkpoints stay whole, whatever goes wrong and whenever, and one name means one model everywhere."""

import math
import os
import signal
import types
import zipfile

import pytest
import torch
from helpers import TINY, load, read_log, same, script

import train
from nanoloop import checkpoint_files, pretraining, saving
from train import main


class Crash(BaseException):
    """The process dies here: nothing handles this."""


def die_at(monkeypatch, n):
    """Lets the process die before the n-th operation that changes the disk's contents: it does no more."""
    count = []

    def dying(real, counts=True):
        def call(*args, **keys):
            count.extend([real] * counts)
            if len(count) >= n:
                raise Crash
            return real(*args, **keys)

        return call

    for name in ('fsync', 'link', 'replace'):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
    monkeypatch.setattr(os, 'unlink', dying(os.unlink, counts=False))  # a dead process cleans nothing up


def falling(monkeypatch):
    """Every evaluation is the best so far, and takes no time."""

    def evaluate(model, splits, *rest):
        loss = 1 / model.lm_head.weight.detach().norm().item()
        return {name: dict(loss=loss, ppl=1.0, bpb=1.0) for name in splits}

    monkeypatch.setattr(pretraining, 'evaluate', evaluate)


def test_a_crash_between_any_two_operations_of_a_save_loses_nothing(call, flags, tmp_path, monkeypatch):
    falling(monkeypatch)
    flags = [*flags, '--max_iters=8', '--lr_decay_iters=8']  # two saves
    assert call(main, *flags)[0] == 0
    whole, n = load(tmp_path / 'out' / 'ckpt.pt'), 0
    while True:
        n += 1
        out = tmp_path / str(n)
        with monkeypatch.context() as patch:
            die_at(patch, n)
            try:
                call(main, *flags, f'--out_dir={out}')
                break
            except Crash:
                pass
        loaded = {path.name: load(path) for path in out.glob('*.pt')}  # all of them load
        if n > 8:  # the first save is behind it
            assert 'ckpt.pt' in loaded
        if 'ckpt.pt' in loaded:
            assert loaded['best.pt']['best_val_loss'] <= loaded['ckpt.pt']['best_val_loss']
        assert call(main, *flags, f'--out_dir={out}', '--init_from=auto')[0] == 0
        assert same(whole['model'], load(out / 'ckpt.pt')['model'])
        assert load(out / 'best.pt')['best_val_loss'] == load(out / 'ckpt.pt')['best_val_loss']
        steps = [[line['iter'] for line in read_log(path)] for path in (out, tmp_path / 'out')]
        assert steps[0] == steps[1]
        assert not list(out.glob('*.tmp'))
    assert n > 15


@pytest.mark.parametrize('best', [True, False])
def test_a_crash_while_the_measure_changes_never_loses_the_best_of_before(tmp_path, monkeypatch, best):
    """The first save after resuming with other loops gives best.pt another name."""
    for n in range(1, 99):
        out, crashed = tmp_path / str(n), False
        out.mkdir()
        for name in ('ckpt.pt', 'best.pt'):
            (out / name).write_text('old')
        with open(out / 'log.jsonl', 'wb') as file, monkeypatch.context() as patch:
            log = types.SimpleNamespace(open=lambda: None, file=file, wandb_id='')
            save = lambda: saving.save_checkpoint(out, dict(x=1), log, best, 'best-before-4')  # noqa: E731, B023
            die_at(patch, n)
            try:
                save()
            except Crash:
                crashed = True
            patch.undo()
            old = [path.name for path in out.glob('best*.pt') if path.read_bytes() == b'old']
            assert old
            if (out / 'ckpt.pt').read_bytes() == b'old' and not best:
                assert 'best.pt' in old
            if crashed:
                save()
        assert (out / 'best-before-4.pt').read_text() == 'old'
        assert best or len([*out.glob('best-before-*')]) == 1
        assert load(out / 'best.pt')['x'] == 1 if best else not (out / 'best.pt').exists()
        assert load(out / 'ckpt.pt')['x'] == 1 and not list(out.glob('*.tmp'))
        if not crashed:
            break
    assert n > 8


def test_a_save_forces_everything_to_the_disk_before_it_counts(call, flags, tmp_path, monkeypatch):
    done, sizes = [], {}

    def fsync(fd):
        fd = fd if isinstance(fd, int) else fd.fileno()
        path = os.readlink(f'/proc/self/fd/{fd}')
        sizes[os.path.basename(path)] = os.fstat(fd).st_size
        done.append(f'fsync {os.path.basename(path)}')
        os.fdatasync(fd)

    def replace(source, target):
        done.append(f'{os.path.basename(source)} > {os.path.basename(target)}')
        os.rename(source, target)

    monkeypatch.setattr(saving.os, 'fsync', fsync)
    monkeypatch.setattr(saving.os, 'replace', replace)
    call(main, *flags, '--max_iters=8')
    second = done[done.index('ckpt.pt.tmp > ckpt.pt') + 2 :]  # after the first save and its fsync of out
    best = ['best.pt.tmp > best.pt'] if 'best.pt.tmp > best.pt' in second else []
    first = ['fsync log.jsonl', 'fsync ckpt.pt.tmp', 'prev.pt.tmp > prev.pt']
    assert second == [*first, *best, 'fsync ckpt.pt.tmp', 'ckpt.pt.tmp > ckpt.pt', 'fsync out']
    assert sizes['ckpt.pt.tmp'] == (tmp_path / 'out' / 'ckpt.pt').stat().st_size


def test_a_path_that_is_not_utf8_is_read(tmp_path):
    """As every path with other characters is, in a locale without UTF-8."""
    path = tmp_path / os.fsdecode(b'\xff.pt')
    try:
        path.touch()
    except OSError:
        pytest.skip('this file system has UTF-8 only')
    with open(path, 'wb') as file:
        torch.save(dict(model={'w': torch.arange(3)}, model_args={}), file)
    assert checkpoint_files.read_checkpoint(path)['model']['w'].tolist() == [0, 1, 2]


def test_a_checkpoint_without_checksums_is_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(dict(model={'w': torch.arange(3)}, model_args={}), tmp_path / 'a.pt')
    finally:
        torch.serialization.set_crc32_options(before)
    assert zipfile.ZipFile(tmp_path / 'a.pt').testzip()
    assert checkpoint_files.read_checkpoint(tmp_path / 'a.pt')['model']['w'].tolist() == [0, 1, 2]


def cut(file):
    file.truncate(1000)


def flip(file):
    """Changes a byte of a weight: the file is loaded as before, but its checksum is another one."""
    place = file.read().index(load(file.name)['model']['lm_head.weight'].numpy().tobytes()) + 100
    file.seek(place)
    byte = file.read(1)
    file.seek(place)
    file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize('damage', [cut, flip])
def test_a_broken_checkpoint_never_takes_the_place_of_the_one_before(
    call, flags, tmp_path, monkeypatch, damage
):
    call(main, *flags)
    with open(tmp_path / 'out' / 'ckpt.pt', 'r+b') as file:
        damage(file)
    broken = (tmp_path / 'out' / 'ckpt.pt').read_bytes()
    before = load(tmp_path / 'out' / 'prev.pt')['iter_num']

    def replace(source, target):
        if str(target).endswith('ckpt.pt'):
            raise Crash
        os.rename(source, target)

    monkeypatch.setattr(saving.os, 'replace', replace)
    with pytest.raises(Crash):
        call(main, *flags, '--init_from=auto', '--max_iters=14')
    assert load(tmp_path / 'out' / 'prev.pt')['iter_num'] == before
    assert (tmp_path / 'out' / 'ckpt.pt.broken').read_bytes() == broken


@pytest.mark.parametrize('where', ['evaluation', 'weights'])
def test_what_is_not_finite_is_never_saved(call, flags, tmp_path, monkeypatch, where):
    real, calls = train.train_step, []

    def step(objective, *rest):
        result = real(objective, *rest)
        calls.append(1)
        if len(calls) == 6 and where == 'weights':
            with torch.no_grad():
                objective.model.norm_recur.weight[0] = math.nan
        return result

    monkeypatch.setattr(train, 'train_step', step)
    if where == 'weights':
        falling(monkeypatch)
    else:
        values = iter([5.0, 3.0, math.nan])
        fake = lambda _, splits, *rest: dict.fromkeys(splits, dict(loss=next(values), ppl=1.0, bpb=1.0))  # noqa: E731
        monkeypatch.setattr(pretraining, 'evaluate', fake)
    status, _, err = call(main, *flags, '--max_bad_steps=100')
    assert status == 2 and 'learning_rate=0.01, expected a lower one' in err
    checkpoint = load(tmp_path / 'out' / 'ckpt.pt')
    assert checkpoint['iter_num'] == 4 and all(w.isfinite().all() for w in checkpoint['model'].values())


@pytest.mark.parametrize('signalled', [True, False])
def test_a_signal_that_kills_the_compiler_of_an_evaluation_still_saves(
    call, flags, tmp_path, monkeypatch, signalled
):
    real, calls = pretraining.evaluate, []

    def evaluate(*args):
        calls.append(1)
        if len(calls) == 1:  # of the untrained model
            return real(*args)
        if signalled:
            os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError('the compiler died')

    monkeypatch.setattr(pretraining, 'evaluate', evaluate)
    if signalled:
        assert call(main, *flags)[0] == 128 + signal.SIGINT
        assert load(tmp_path / 'out' / 'ckpt.pt')['iter_num'] == 4
    else:
        with pytest.raises(RuntimeError, match='the compiler died'):
            call(main, *flags)


def test_an_interrupt_saves_also_when_the_reader_of_stdout_is_gone(tmp_path, tiny_data):
    long = [*TINY, '--max_iters=100000', f'--out_dir={tmp_path}/out']
    run = script('train.py', f'--dataset={tiny_data}', *long)
    while 'iter 5:' not in run.stdout.readline():
        assert run.poll() is None
    run.stdout.close()  # as tee's end, when a Ctrl-C reaches both
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=30) == 128 + signal.SIGINT
    n = load(tmp_path / 'out' / 'ckpt.pt')['iter_num']
    assert n > 5 and sum('lr' in line for line in read_log(tmp_path / 'out')) == n


def test_given_keys_reach_the_optimizer_of_a_resumed_run(call, flags, tmp_path):
    call(main, *flags)
    changed = ['--weight_decay=0.5', '--beta2=0.9', '--max_iters=13']
    assert call(main, f'--out_dir={tmp_path}/out', '--init_from=resume', *changed)[0] == 0
    groups = load(tmp_path / 'out' / 'ckpt.pt')['optimizer']['param_groups']
    assert [group['weight_decay'] for group in groups] == [0.5, 0.0, 0.5, 0.0]  # not of injection and norms
    assert [tuple(group['betas']) for group in groups] == [(0.9, 0.9)] * 4


@pytest.mark.parametrize('before, after', [('bfloat16', 'float16'), ('float16', 'float32')])
def test_a_run_goes_on_in_another_precision(call, flags, tmp_path, before, after):
    call(main, *flags, f'--dtype={before}')
    status, out, _ = call(main, *flags, '--init_from=resume', '--max_iters=14', f'--dtype={after}')
    assert status == 0 and f'not bit-exact: dtype was torch.{before}, is torch.{after}' in out
    assert load(tmp_path / 'out' / 'ckpt.pt')['iter_num'] == 14


def test_ranks_that_would_resume_at_different_steps_are_refused(call, flags, monkeypatch):
    monkeypatch.setattr(train, 'max_over_ranks', lambda m, value: value + 3)
    status, _, err = call(main, *flags)
    assert status == 2 and 'expected a folder that all machines share' in err


def test_a_disk_without_space_for_a_checkpoint_is_told_before_the_first_step(
    call, flags, tmp_path, monkeypatch
):
    parameters, told = [], []
    real = saving.shutil.disk_usage

    def usage(path):
        told.append(str(path))
        return real(path)._replace(free=parameters[0])

    monkeypatch.setattr(saving.shutil, 'disk_usage', usage)
    parameters.append(10**9)
    assert call(main, *flags)[0] == 0
    weights = sum(x.nbytes for x in load(tmp_path / 'out' / 'ckpt.pt')['model'].values())
    tied = load(tmp_path / 'out' / 'ckpt.pt')['model']['lm_head.weight'].nbytes  # it is there twice
    for free, status in ((2 * (weights - tied), 0), (2 * (weights - tied) - 1, 1)):
        parameters[0] = free
        got, _, err = call(main, *flags, f'--out_dir={tmp_path}/{status}')
        assert got == status and ('has no space for a checkpoint' in err) == bool(status)
        assert (tmp_path / str(status) / 'ckpt.pt').exists() == (status == 0)
    assert told == [f'{tmp_path}/{name}' for name in ('out', '0', '1')]
