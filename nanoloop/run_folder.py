"""
The folder of a run: its lock, its log, and the files that an earlier run has left there.
"""

import contextlib
import json
import math
import os
import re
import subprocess
import uuid
from pathlib import Path

from nanoloop import ROOT
from nanoloop.checks import UserError, missing_package
from nanoloop.files import lock_folder, sync_folder


def check_out_dir(name):
    """Raises UserError if a file is where the folder of a run, or one above it, is to be."""
    there = next((path for path in (Path(name), *Path(name).parents) if path.exists()), None)
    if there is not None and not there.is_dir():
        raise UserError(f'out_dir={str(name)!r}: {there} is a file, expected a folder')


def open_out_dir(out_dir, say=None):
    """Creates out_dir and locks it against a second run. Returns the lock, which ends when it is closed.

    Returns None, with a warning, if the file system has no locks. Also warns if it cannot sync folders.
    Raises UserError if the folder cannot be written, or if another run holds the lock.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / '.lock').touch()
    except OSError as error:
        raise UserError(f'out_dir={str(out_dir)!r} cannot be written: {error.strerror}') from None
    fault = sync_folder(out_dir)
    if fault and say:
        say(f'{out_dir} cannot be synced: after a power cut the last checkpoint may be missing ({fault})')
    try:
        return lock_folder(out_dir, 'a second run', say)
    except BlockingIOError:
        raise UserError(f'out_dir={str(out_dir)!r} is in use by another run') from None


def archive_previous_run(out_dir, say=None):
    """Moves the files of an earlier run to out_dir/run-N, if it has saved a checkpoint or logged a step."""
    paths = [out_dir / name for name in ('ckpt.pt', 'prev.pt', 'best.pt', 'log.jsonl')]
    paths += [
        out_dir / name for name in ('eval.jsonl', 'eval.csv', 'eval.png', 'eval-ema.csv', 'eval-ema.png')
    ]
    paths += sorted(out_dir.glob('best-before-*.pt'))
    paths = [path for path in paths if path.exists()]
    logged = any(path.suffix == '.jsonl' and b'\n' in path.read_bytes() for path in paths)
    if not logged and not any(path.suffix == '.pt' for path in paths):
        return  # a log without a whole line is overwritten
    n = next(n for n in range(1, 10**6) if not (out_dir / f'run-{n}').exists())
    (out_dir / f'run-{n}').mkdir()
    for path in paths:
        os.replace(path, out_dir / f'run-{n}' / path.name)
    if say:
        say(f'{out_dir} held an earlier run, it is now in {out_dir}/run-{n}')


def earlier_runs(out_dir):
    """Returns a text that names the folders of earlier runs in out_dir, '' if there are none."""
    folders = [path for path in Path(out_dir).glob('run-*') if re.fullmatch(r'run-\d+', path.name)]
    folders = sorted(filter(Path.is_dir, folders), key=lambda path: (len(path.name), path.name))
    shown = ', '.join(map(str, folders[-3:]))
    return f'earlier runs: {"..., " * (len(folders) > 3)}{shown}' if folders else ''


class Log:
    """The log of a run, on rank 0: log.jsonl with a JSON object per line and, if asked for, Weights & Biases.

    Until open() is called, records wait in memory. So a run that ends before its first step leaves the files
    of an earlier run where they were.

    c: the keys of the run. state: the checkpoint that is resumed, {} for a new run. say: gets the text.
    """

    def __init__(self, c, state, say=None):
        self.say, self.path, self.kept_bytes = say, Path(c.out_dir) / 'log.jsonl', state.get('log_bytes', 0)
        self.file, self.waiting, self.resuming = None, b'', bool(state)
        self.wandb, self.wandb_id = None, state.get('wandb_id') or uuid.uuid4().hex[:8]
        if c.wandb_log:
            self.wandb = start_wandb(c, self.wandb_id)

    def open(self):
        """Opens the file, unless it is open, and cuts off what follows the checkpoint: these steps run again.

        The files of an earlier run move to run-N before.
        """
        if self.file:
            return
        if not self.resuming:
            archive_previous_run(self.path.parent, self.say)
        self.file = open(self.path, 'ab', buffering=0)
        self.file.truncate(min(os.fstat(self.file.fileno()).st_size, self.kept_bytes))
        self.file.write(self.waiting)

    def write(self, text, record):
        """Prints the text and logs the record, {key: number} with the key iter, see to_json."""
        if self.say:
            self.say(text)
        if self.file:
            self.file.write(to_json(record))
        else:
            self.waiting += to_json(record)
        if self.wandb:
            try:
                self.wandb.log(record, step=record['iter'])
            except Exception as error:  # log.jsonl has everything: a run does not end over its copy
                self.wandb = None
                if self.say:
                    self.say(f'wandb.log failed, the run goes on without it: {error}')


def start_wandb(c, run_id):
    """Returns the run of Weights & Biases to log to. Raises UserError if it cannot be had."""
    try:
        import wandb

        if not hasattr(wandb, 'init'):  # the folder wandb/ of earlier runs is a package without a file
            raise ImportError
        run = dict(project=c.wandb_project, name=c.wandb_run_name, id=run_id, resume='allow')
        return wandb.init(**run, config=dict(c))
    except ImportError:
        raise missing_package('wandb_log=True', 'wandb', 'wandb') from None
    except Exception as error:  # of its own types: no login, no network, a version that does not fit
        hint = 'log in with `wandb login`, or set WANDB_MODE=offline'
        raise UserError(f'wandb_log=True, but wandb.init failed: {error}; {hint}') from None


def append_evaluation(c, record):
    """Appends the record of an evaluation to the run's eval.jsonl, in one write, with loops and data set."""
    with open(Path(c.out_dir) / 'eval.jsonl', 'ab', buffering=0) as file:
        file.write(to_json(record | dict(n_loop=c.n_loop, dataset=c.dataset)))


def read_records(path):
    """Returns the records of a file of JSON lines. Raises UserError if it is broken."""
    complete_lines, _, _ = path.read_text().rpartition('\n')  # the last line of a killed run may be cut
    try:
        return [json.loads(line) for line in complete_lines.splitlines()]
    except ValueError:
        raise UserError(f'{path} is broken') from None


def to_json(record):
    """Returns a record {key: number} as a line of JSON; inf and nan become null."""
    finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()}
    return json.dumps(finite).encode() + b'\n'


def git_commit():
    """Returns the commit of this repository, with a + if tracked files differ from it; None without git."""
    git = ('git', '-C', str(ROOT))
    options = dict(text=True, stderr=subprocess.DEVNULL)
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.check_output((*git, 'rev-parse', 'HEAD'), **options).strip()
        changes = subprocess.check_output((*git, 'status', '--porcelain', '-uno'), **options)
        return f'{commit}+' if changes else commit
