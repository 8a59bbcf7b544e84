"""
The folder of a run: its lock, its log, and what an earlier run left there.
"""

import contextlib
import fcntl
import json
import math
import os
import subprocess
import sys
import uuid
from pathlib import Path

from configurator import print_line
from nanoloop import ROOT
from nanoloop.checks import UserError


def open_out_dir(out_dir, say=None):
    """Creates out_dir and locks it. Returns the lock, held while it lives. Raises ValueError if it cannot."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = open(out_dir / '.lock', 'w')
    except OSError as error:
        raise UserError(f'out_dir={str(out_dir)!r} cannot be written: {error.strerror}') from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f'out_dir={str(out_dir)!r} is in use by another run') from None
    except OSError as error:
        print(f'{out_dir} cannot be locked against a second run: {error.strerror}', file=sys.stderr)
    return lock


def archive_previous_run(out_dir, say=None):
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

    def __init__(self, c, resumed, say=None):
        self.file = open(Path(c.out_dir) / 'log.jsonl', 'ab', buffering=0)
        size = os.fstat(self.file.fileno()).st_size
        self.file.truncate(min(size, resumed.get('log_bytes', 0)))  # later steps will be run again
        self.wandb, self.wandb_id = None, resumed.get('wandb_id') or uuid.uuid4().hex[:8]
        if c.wandb_log:
            try:
                import wandb
            except ImportError:
                raise UserError('wandb_log=True needs wandb: pip install wandb') from None
            run = dict(project=c.wandb_project, name=c.wandb_run_name, id=self.wandb_id, resume='allow')
            self.wandb = wandb.init(**run, config=dict(c))

    def write(self, text, record):
        print_line(text)
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
