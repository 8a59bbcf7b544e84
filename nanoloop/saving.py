"""
Saves the checkpoints of a run: ckpt.pt, the one before it as prev.pt, the best one as best.pt.

Whatever ends the process, also a power cut, the files that are there are whole.
"""

import os
import shutil
from pathlib import Path

import torch

from nanoloop.files import reason_of, replace_file, sync, sync_folder
from nanoloop.parallel import whole_state


def whole_states(m, model, optimizers, average=None):
    """Returns the entries `model`, `optimizer` and, with an average, `ema` of a checkpoint.

    They are whole on every rank, but on rank 0 only if the weights are sharded. average: an ema.Average.
    """
    states = [whole_state(m, optimizer) for optimizer in optimizers]
    entries = dict(model=whole_state(m, model), optimizer=states if len(states) > 1 else states[0])
    return entries if average is None else dict(entries, ema=whole_state(m, average))


def save_checkpoint(out_dir, checkpoint, log, best, old_best=None, say=None):
    """Saves a checkpoint as ckpt.pt and, if best, as best.pt; the ckpt.pt before it becomes prev.pt.

    The checkpoint holds the length of the log, which is on the disk before it. old_best: the name that
    best.pt gets because its loss cannot be compared with the losses of this run, see keep_old_best; None =
    it can. Raises OSError with the reason if the checkpoint cannot be saved.
    """
    path, prev, best_path = (out_dir / name for name in ('ckpt.pt', 'prev.pt', 'best.pt'))
    try:
        log.open()
        os.fsync(log.file)
        position = dict(log_bytes=os.fstat(log.file.fileno()).st_size, wandb_id=log.wandb_id)
        with replace_file(path, 'wb') as file:
            torch.save(checkpoint | position, file)
            sync(file)  # now, since best.pt becomes this file before ckpt.pt does
            if old_best and best_path.exists():
                keep_old_best(best_path, old_best, say)
            if path.exists():
                replace_by_link(path, prev)
            if best:  # before ckpt.pt: after a crash in between, resuming makes this evaluation again
                replace_by_link(Path(file.name), best_path)
        if old_best and not best:  # after ckpt.pt: until then best.pt is the best of the checkpoint
            best_path.unlink(missing_ok=True)
    except (RuntimeError, OSError) as error:  # torch's zip writer reports a full disk as a RuntimeError
        good = next((str(file) for file in (path, prev) if file.exists()), 'none')
        raise OSError(
            f'the checkpoint cannot be saved: {reason_of(error)}; the last good one: {good}'
        ) from None


def check_space(out_dir, model):
    """Raises OSError if a checkpoint does not fit on the disk: it would be told only when one is saved.

    Counted are the weights, and a number of the optimizer for every one that is trained.
    """
    least = sum(p.nbytes * (1 + p.requires_grad) for p in model.parameters())
    free = shutil.disk_usage(out_dir).free
    if free < least:
        sizes = f'{least / 2**20:,.0f} MiB or more, {free / 2**20:,.0f} are free'
        raise OSError(f'out_dir={str(out_dir)!r} has no space for a checkpoint, which takes {sizes}')


def keep_old_best(best, name, say=None):
    """Gives best.pt a second name, name.pt, or name-2.pt and so on if other files have that one."""
    if any(os.path.samefile(best, other) for other in best.parent.glob('best-before-*.pt')):
        return  # a save was interrupted behind this place
    names = (best.with_name(f'{name}{number}.pt') for number in ('', *(f'-{n}' for n in range(2, 10**3))))
    new = next(path for path in names if not path.exists())
    replace_by_link(best, new)
    sync_folder(best.parent)
    if say:
        say(f'best.pt is of before this change: it is now {new}')


def replace_by_link(source, target):
    """Makes target the same file as source in one step; a copy where the file system has no hard links."""
    new = target.with_name(target.name + '.tmp')
    new.unlink(missing_ok=True)
    try:
        os.link(source, new)
    except OSError:
        shutil.copyfile(source, new)
    os.replace(new, target)
    new.unlink(missing_ok=True)  # os.replace of a file by itself does nothing and leaves `new` behind


def quarantine_broken(out_dir, read):
    """Renames a broken ckpt.pt: the next save would put it in the place of a good prev.pt.

    read: the path of the checkpoint that could be read instead. Returns a text that says so, '' if none is
    broken.
    """
    path = out_dir / 'ckpt.pt'
    if Path(read).name == path.name or not path.exists():
        return ''
    os.replace(path, f'{path}.broken')
    return f'{path} is broken: it is now {path}.broken'
