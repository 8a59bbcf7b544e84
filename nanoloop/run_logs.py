"""
Reads what runs have logged: log.jsonl and eval.jsonl of their folders.
"""

import re
from pathlib import Path
from typing import NamedTuple

from nanoloop.checks import check
from nanoloop.run_folder import read_records


class Run(NamedTuple):
    """What a run has logged."""

    name: str
    records: list  # of log.jsonl, dicts
    evaluations: list  # of eval.jsonl, dicts: evaluations with other numbers of loops


def read_run(folder):
    """Reads the logs of a run. Raises UserError if there are none."""
    folder = Path(folder)
    check((folder / 'log.jsonl').exists(), 'out_dir', str(folder), 'the folder of a run with a log.jsonl')
    records = read_records(folder / 'log.jsonl')
    check(records, 'out_dir', str(folder), 'a run that has logged something')
    evaluations = folder / 'eval.jsonl'
    return Run(folder.name, records, read_records(evaluations) if evaluations.exists() else [])


def check_same_data(folders):
    """Raises UserError if the checkpoints of runs that are drawn as their mean are of different data sets."""
    from nanoloop.checkpoint_files import checkpoint_paths, read_first  # they import torch

    data = {}
    for folder in folders:
        if paths := checkpoint_paths(folder):
            checkpoint = read_first(paths)
            config = checkpoint.get('config', {})
            identity = (checkpoint.get('data') or {}).get('sha256') or config.get('dataset')
            data.setdefault(identity, f'{folder} ({config.get("dataset")})')
    expected = f'runs of one data set joined by +, not {" and ".join(data.values())}'
    check(len(data) < 2, 'out_dir', '+'.join(folders), expected)


def series(records, key, x='iter'):
    """Returns {x: value} of a log key, from the records that have a value for it."""
    return {record[x]: record[key] for record in records if record.get(key) is not None}


def loops_logged(records):
    """Returns the numbers of loops whose validation losses --eval_loops has logged, in rising order."""
    keys = {key for record in records for key in record}
    return sorted(int(m[1]) for key in keys if (m := re.fullmatch(r'val/loss@(\d+)', key)))


def loss_by_loops(run, dataset):
    """Returns {number of loops: validation loss} of a run's last evaluated step on a data set."""
    records = [record for record in run.evaluations if record.get('dataset') == dataset]
    last = max((record['iter'] for record in records), default=0)
    records = [record for record in records if record['iter'] == last]
    losses = {n: series(records, f'val/loss@{n}') for n in loops_logged(records)}
    return {n: line[last] for n, line in losses.items() if line} | series(records, 'val/loss', 'n_loop')
