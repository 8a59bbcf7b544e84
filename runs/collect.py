"""
Prints a table of what eval.py measured: a configuration per line, a difficulty of a task per column, each the
mean and the standard deviation over seeds.

    python runs/collect.py out-mano/* [--task=mano] [--column=accuracy]

A run's folder is named CONFIGURATION-SEED and has an eval.csv. Of several rows with the same task, loops and
policy the last one counts. Columns of accuracies are in percent.
"""

import functools
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import command

# a Ctrl-C while the rest is imported is handled from here on
# isort: split
import torch

from model import GPT
from nanoloop.checkpoint import configure_checkpoint, find_checkpoint
from nanoloop.checkpoint_files import BEST, checkpoint_paths
from nanoloop.checks import UserError, check
from nanoloop.count import parameters
from nanoloop.generated_eval import majority_in
from nanoloop.results import COLUMNS, read_csv

KEYS = dict(task='mano', column='accuracy')


class Cell(NamedTuple):
    """What one run scored on one difficulty."""

    value: float
    majority: float  # percent of the most common answer, nan if it is not known
    flops: str  # per token


def read_flags(argv):
    """Returns the folders and the keys of the command line. Raises UserError."""
    keys, folders = dict(KEYS), []
    for arg in argv:
        name, equals, value = arg.removeprefix('--').partition('=')
        if arg.startswith('-'):
            known = f'--{" or --".join(f"{key}=..." for key in KEYS)}'
            check(name in keys and equals, 'argument', arg, known)
            keys[name] = value
        else:
            folders.append(Path(arg))
    check(folders, 'argument', '', 'folders of runs, as in python runs/collect.py out-mano/*')
    return folders, keys


def read_rows(folder, column):
    """Returns the rows of a folder's eval.csv, dicts. Raises UserError if rows or columns are missing."""
    path = folder / 'eval.csv'
    check(path.is_file(), 'folder', str(folder), 'a run with an eval.csv, which eval.py writes')
    rows = read_csv(path)
    check(rows, 'folder', str(folder), 'rows in its eval.csv')
    check(column in COLUMNS, 'column', column, f'one of {", ".join(COLUMNS)}')
    return rows


def read_cells(folder, task, column):
    """Returns {(loops, policy): {difficulty: Cell}} of a run. The task's own row is the difficulty `mean`."""
    cells = {}
    for row in read_rows(folder, column):
        name, _, level = row['task'].partition('/')
        if name == task and row[column]:
            cell = Cell(float(row[column]), majority_in(row['note']), row['flops_per_token'])
            cells.setdefault((row['loops'], row['policy']), {})[level or 'mean'] = cell
    check(cells, 'task', task, f'one with {column} in {folder}/eval.csv')
    return cells


@functools.cache
def count_parameters(folder):
    """Returns the number of parameters of a run's model as a text, ? if there is no checkpoint."""
    if not checkpoint_paths(folder, BEST):
        return '?'
    config, *_ = configure_checkpoint(find_checkpoint(str(folder), prefer=BEST))
    with torch.device('meta'):
        return f'{parameters(GPT(config))["total"]:,}'


def level_order(level):
    """Orders difficulties by their numbers, `mean` last."""
    number = re.search('[0-9]+$', level)
    return level == 'mean', int(number[0]) if number else 0, level


def mean_and_deviation(values, percent):
    """Returns the mean of values and their standard deviation (n - 1), a text; of one value only itself."""
    scale, digits = (100, 1) if percent else (1, 4)
    text = f'{scale * statistics.mean(values):.{digits}f}'
    return text + (f' ±{scale * statistics.stdev(values):.{digits}f}' if len(values) > 1 else '')


def table(folders, task, column):
    """Yields the lines of the table."""
    groups, majorities = {}, {}
    for folder in folders:
        configuration = re.sub('-[0-9]+$', '', folder.resolve().name)
        for setting, cells in read_cells(folder, task, column).items():
            groups.setdefault((configuration, *setting), []).append((folder, cells))
            majorities |= {level: cell.majority for level, cell in cells.items()}
    levels, percent = sorted(majorities, key=level_order), column.startswith('accuracy')
    lines = [['configuration', 'loops', 'n', 'parameters', 'FLOPs/token', *levels]]
    for (configuration, loops, policy), runs in groups.items():
        (folder, first), *_ = runs
        sizes = count_parameters(folder), next(iter(first.values())).flops
        line = [configuration, f'{loops} {policy}'.strip(), str(len(runs)), *sizes]
        for level in levels:
            values = [cells[level].value for _, cells in runs if level in cells]
            missing = f' (n={len(values)})' if 0 < len(values) < len(runs) else ''
            line.append(mean_and_deviation(values, percent) + missing if values else '')
        lines.append(line)
    if percent:
        lines.append(['majority answer', '', '', '', '', *(f'{majorities[level]:.1f}' for level in levels)])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for cells in lines:
        yield '  '.join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]).rstrip()


@command
def main(argv):
    if {'-h', '--help'} & set(argv):
        return print(__doc__)
    folders, keys = read_flags(argv)
    try:
        for line in table(folders, **keys):
            print(line)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f'an eval.csv of {", ".join(map(str, folders))} has no number where one is due: {error}'
        ) from None


if __name__ == '__main__':
    main()
