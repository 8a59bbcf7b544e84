"""
What a run leaves behind, and how it is kept whole: ckpt.pt (last), prev.pt (the one before), best.pt (lowest
validation loss) and log.jsonl in out_dir; the lock against a second run; the signals that end a run, saved.

At every moment ckpt.pt or prev.pt is a whole checkpoint, whatever dies: files are written under another name,
forced to the disk, and renamed.
"""

import contextlib
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import torch
import torch.distributed as dist

from checks import Mistake, check
from configurator import RANK, ROOT, tell
from pretrained import GPT2, find_pretrained, read_checkpoint

PLACES = 'the folder of a run with a checkpoint, the path of one, of a model by export.py or of a GPT-2'

# -----------------------------------------------------------------------------
# checkpoints


def replace_by_link(source, target):
    """Makes target the same file as source, at once; a copy where the file system has no links."""
    new = target.with_name(target.name + '.tmp')
    new.unlink(missing_ok=True)
    try:
        os.link(source, new)
    except OSError:
        shutil.copyfile(source, new)
    os.replace(new, target)
    new.unlink(missing_ok=True)  # replacing a file by itself leaves the other name behind


def save_checkpoint(out_dir, checkpoint, log, best):
    """Writes ckpt.pt, and best.pt if best, with the place in the log. Raises OSError with the reason."""
    path, prev, new = (out_dir / name for name in ('ckpt.pt', 'prev.pt', 'ckpt.pt.tmp'))
    try:
        os.fsync(log.file)
        place = dict(log_bytes=os.fstat(log.file.fileno()).st_size, wandb_id=log.wandb_id)
        with open(new, 'wb') as file:
            torch.save(checkpoint | place, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            replace_by_link(path, prev)
        if best:  # before ckpt.pt: after a crash in between the evaluation is made again
            replace_by_link(new, out_dir / 'best.pt')
        os.replace(new, path)
        folder = os.open(out_dir, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (RuntimeError, OSError) as error:  # torch's zip writer tells a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        kept = next((str(file) for file in (path, prev) if file.exists()), 'none')
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(f'the checkpoint cannot be saved: {reason}; the last good one: {kept}') from None


def find_paths(path, names=('ckpt.pt', 'prev.pt')):
    """The checkpoints there are at path: the file itself, or those of names in a run's folder."""
    path = Path(path)
    return [path] if path.is_file() else [path / name for name in names if (path / name).exists()]


def read_first(paths):
    """The first of these checkpoints that loads; of those before it is told why not."""
    *others, last = paths
    for path in others:
        try:
            return read_checkpoint(path)
        except ValueError as error:
            if RANK == 0:
                print(error, file=sys.stderr)
    return read_checkpoint(last)


def find_checkpoint(init_from, out_dir, given=()):
    """The checkpoint init_from names, None for scratch. Raises ValueError if there is none that loads.

    given: {key: value} of GPTConfig, which decide how GPT-2's weights are used.
    """
    if init_from == 'scratch':
        return None
    named = init_from not in ('resume', 'auto')
    if paths := find_paths(init_from if named else out_dir):
        return read_first(paths)
    if init_from == 'auto':
        return None
    check(named, 'init_from', init_from, f'a checkpoint in {out_dir}, there is none')
    found = find_pretrained(init_from, given)
    check(found, 'init_from', init_from, f'scratch, resume, auto, {PLACES}, {", ".join(GPT2)}, ouro:FOLDER')
    return found


def set_broken_aside(out_dir):
    """Renames a ckpt.pt that cannot be read: the next save must not put it in the place of a good prev.pt."""
    path = out_dir / 'ckpt.pt'
    try:
        read_checkpoint(path)
    except ValueError:
        if path.exists():
            os.replace(path, out_dir / 'ckpt.pt.broken')


# -----------------------------------------------------------------------------
# the folder and its log


def open_out_dir(out_dir):
    """Creates out_dir and locks it. Returns the lock, held while it lives. Raises ValueError if it cannot."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = open(out_dir / '.lock', 'w')
    except OSError as error:
        raise Mistake(f'out_dir={str(out_dir)!r} cannot be written: {error.strerror}') from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Mistake(f'out_dir={str(out_dir)!r} is in use by another run') from None
    except OSError as error:
        print(f'{out_dir} cannot be locked against a second run: {error.strerror}', file=sys.stderr)
    return lock


def move_aside(out_dir):
    """Moves an earlier run's files to out_dir/run-N: starting from scratch deletes nothing."""
    paths = [out_dir / name for name in ('ckpt.pt', 'prev.pt', 'best.pt', 'log.jsonl')]
    paths = [path for path in paths if path.exists()]
    if any(path.suffix == '.pt' for path in paths):  # a log alone is of a run that never saved
        n = next(n for n in range(1, 10**6) if not (out_dir / f'run-{n}').exists())
        (out_dir / f'run-{n}').mkdir()
        for path in paths:
            os.replace(path, out_dir / f'run-{n}' / path.name)
        print(f'{out_dir} held an earlier run, it is now in {out_dir}/run-{n}')


class Log:
    """log.jsonl, an object per line; stdout and, if wandb_log, Weights & Biases get the same. Rank 0 only."""

    def __init__(self, c, resumed):
        self.file = open(Path(c.out_dir) / 'log.jsonl', 'ab', buffering=0)
        size = os.fstat(self.file.fileno()).st_size
        self.file.truncate(min(size, resumed.get('log_bytes', 0)))  # later steps will be run again
        self.wandb, self.wandb_id = None, resumed.get('wandb_id') or uuid.uuid4().hex[:8]
        if c.wandb_log:
            try:
                import wandb
            except ImportError:
                raise Mistake('wandb_log=True needs wandb: pip install wandb') from None
            run = dict(project=c.wandb_project, name=c.wandb_run_name, id=self.wandb_id, resume='allow')
            self.wandb = wandb.init(**run, config=dict(c))

    def write(self, text, record):
        tell(text)
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()}
        self.file.write(json.dumps(finite).encode() + b'\n')
        if self.wandb:
            self.wandb.log(record, step=record['iter'])


def git_commit():
    """The commit of this repository, with a + if files differ from it; None outside of git."""
    git = ('git', '-C', str(ROOT))
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        call = dict(text=True, stderr=subprocess.DEVNULL)
        commit = subprocess.check_output((*git, 'rev-parse', 'HEAD'), **call).strip()
        return commit + '+' * bool(subprocess.check_output((*git, 'status', '--porcelain', '-uno'), **call))


# -----------------------------------------------------------------------------
# signals, and what ranks agree on


def largest_of_ranks(m, value, op=dist.ReduceOp.MAX):
    """The largest of all ranks' integers, agreed on between CPUs: no device is waited for."""
    if m.cpu_group is None:
        return value
    value = torch.tensor([value])
    dist.all_reduce(value, op=op, group=m.cpu_group)
    return int(value)


def sum_of_ranks(m, value):
    return largest_of_ranks(m, value, dist.ReduceOp.SUM)


def on_first_rank(m, work):
    """Calls work() on the first rank; if it fails, all ranks leave together."""
    failure = None
    if m.rank == 0:
        try:
            work()
        except (ValueError, OSError) as error:
            failure = error
    if largest_of_ranks(m, int(failure is not None)):
        raise failure or SystemExit(1)


class Signals:
    """SIGTERM and SIGINT raise a flag, read where the run can be saved. Repeats are ignored, since torchrun
    sends each several times to its workers; a Ctrl-C more than 2 s after the first signal kills."""

    def __init__(self, m):
        self.m, self.number, self.agreed, self.first = m, 0, 0, 0.0

    def __enter__(self):
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self.before.items():  # torchrun goes on sending until all workers have left
            signal.signal(number, signal.SIG_IGN if self.agreed and self.m.world > 1 else handler)
        if self.number and isinstance(error, Exception) and not isinstance(error, ValueError | OSError):
            # the signal has reached a process that this one needs: a compiler, another rank
            print(f'stopped by {signal.Signals(self.number).name} ({kind.__name__})', file=sys.stderr)
            sys.exit(128 + self.number)

    def note(self, number, frame):
        if self.number and number == signal.SIGINT and time.monotonic() - self.first > 2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not self.number:
            self.number, self.first = number, time.monotonic()

    def stopped(self):
        """The signal that some rank got, 0 if none did. All ranks call this at the same places."""
        self.agreed = largest_of_ranks(self.m, self.number)
        return self.agreed
