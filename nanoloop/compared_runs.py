"""
Runs that are compared: what eval.py has measured of them, and what their training has cost.

A configuration is one or more runs that differ in their seed. Rows that are compared are of the same data,
in the same precision.
"""

import functools
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanoloop.checkpoint import configure_checkpoint
from nanoloop.checkpoint_files import BEST, checkpoint_paths, read_checkpoint
from nanoloop.checks import UserError, check
from nanoloop.results import AVERAGED, KEY, VALUES, as_text, read_csv, run_id
from nanoloop.run_folder import read_records
from nanoloop.tables import read_jsonl
from nanoloop.uncertainty import Pairs

# measures that can be compared, and the columns in which their rows must agree beside data and precision:
# per token only a loss in the same tokens is the same measure
MEASURES = dict(accuracy=('items',), loss=('tokens', 'items'), centered=('items',), bpb=())
# keys of a run that may differ between the seeds of a configuration
FREE = 'out_dir init_from seed device compile backend eval_only sample_tokens diagnose log_interval'.split()
FREE += 'weights wandb_log wandb_project wandb_run_name peak_flops always_save_checkpoint dataset'.split()


class Run:
    """A run and its rows, {task: {(loops, policy): a line of eval.csv}}.

    name: the run's folder or a file of rows; with @STEP behind it the rows of that step. Raises UserError.
    """

    def __init__(self, name):
        folder, step = split_step(name)
        self.path = folder / 'eval.csv' if folder.is_dir() else folder
        check(
            self.path.is_file(), 'run', name, 'a folder with an eval.csv, which eval.py writes, or the file'
        )
        lines = [line for line in read_csv(self.path) if step in ('', line['step'])]
        check(lines, 'run', name, f'one with rows{f" of step {step}" if step else ""} in {self.path}')
        check_numbers(lines, self.path)
        own = self.path.resolve()
        beside = {'eval.csv': own.parent.name, f'eval{AVERAGED}.csv': own.parent.name + AVERAGED}
        self.name = beside.get(own.name, own.stem.removeprefix('eval-'))
        runs = {line['run'] for line in lines}
        check(len(runs) == 1, 'run', name, f'rows of one run, not of {" and ".join(sorted(runs))}')
        self.id = lines[0]['run'] or str(own)
        self.rows, self.left_out = last_rows(lines)

    @functools.cached_property
    def checkpoints(self):
        """The checkpoints of the run that are still there: beside the rows, or where they name one."""
        named = (Path(row['checkpoint']).parent for rows in self.rows.values() for row in rows.values())
        folders, found = dict.fromkeys((self.path.parent, *named)), []
        for path in (path for folder in folders for path in checkpoint_paths(folder, BEST)):
            try:
                checkpoint = read_checkpoint(path)
            except UserError:
                continue  # it is broken, and another one may say the same
            if run_id(checkpoint) == self.id.removesuffix(AVERAGED):
                found.append(checkpoint)
        return found

    @functools.cached_property
    def n_loop(self):
        """The number of loops that the model is made for; without a checkpoint the most of a row."""
        if self.checkpoints:
            config, *_ = configure_checkpoint(self.checkpoints[0])
            return config.n_loop
        return max(loops for rows in self.rows.values() for loops, _ in rows)

    @property
    def config(self):
        """The keys of the run, {} if no checkpoint has them."""
        return next((c['config'] for c in self.checkpoints if isinstance(c.get('config'), dict)), {})

    def step(self, task):
        """The step of a task's rows, a text."""
        return next(iter(self.rows[task].values()))['step']

    def cost(self, task):
        """Returns the training tokens and training FLOPs of the weights of a task's rows; nan for unknown."""
        step = float(self.step(task) or 'nan')
        sizes = [self.config.get(key) for key in ('gradient_accumulation_steps', 'batch_size', 'block_size')]
        tokens = step * math.prod(sizes) if None not in sizes else math.nan
        saved = [c['flops'] for c in self.checkpoints if c.get('iter_num') == step and c.get('flops')]
        if saved:
            return tokens, float(saved[0])
        return tokens, float(np.interp(step, *self.logged_flops, left=math.nan, right=math.nan))

    @functools.cached_property
    def logged_flops(self):
        """Numbers of steps and the training FLOPs up to them by the log, two tuples."""
        paths = (Path(c['path']).parent / 'log.jsonl' for c in self.checkpoints)
        log = next((path for path in paths if path.is_file()), None)
        records = read_records(log) if log else []
        points = {0: 0.0} | {r['iter'] + 1: r['train/flops'] for r in records if r.get('train/flops')}
        return tuple(zip(*sorted(points.items()), strict=True))


def split_step(name):
    """Returns (path, step) of the name of a run, FOLDER or FOLDER@STEP; '' = no step."""
    found = re.fullmatch(r'(.+)@([0-9]+)', name)
    return (Path(found[1]), found[2]) if found and not Path(name).exists() else (Path(name), '')


def check_numbers(lines, path):
    """Raises UserError for a line of an eval.csv with a text where a number is due."""
    for number, line in enumerate(lines, 2):
        for column in ('loops', 'step', 'flops_per_token', *VALUES):
            try:
                int(line[column]) if column == 'loops' else float(line[column] or 'nan')
            except ValueError:
                text = f'{path} has {column}={line[column]!r} in row {number}, where a number is due'
                raise UserError(text) from None


def last_rows(lines):
    """Returns ({task: {(loops, policy): line}}, tasks of which lines are left out).

    Of a task those lines count that have step, settings and dtype of its last one.
    """
    same = ('settings', 'dtype', 'step')
    last = {line['task']: [line[key] for key in same] for line in lines}
    rows, left_out = {task: {} for task in last}, set()
    for line in lines:
        if [line[key] for key in same] == last[line['task']]:
            rows[line['task']][int(line['loops']), line['policy']] = line
        else:
            left_out.add(line['task'])
    return rows, left_out


# -----------------------------------------------------------------------------
# configurations


class Configuration(NamedTuple):
    """Runs that differ in their seed."""

    name: str
    runs: list  # of Run

    @property
    def n_loop(self):
        return max(run.n_loop for run in self.runs)

    @property
    def tasks(self):
        return dict.fromkeys(task for run in self.runs for task in run.rows)

    def points(self, task):
        """Returns {(loops, policy): rows, one of each run that has it} of a task."""
        rows = [run.rows.get(task, {}) for run in self.runs]
        return {point: [part[point] for part in rows if point in part] for part in rows for point in part}

    def costs(self, task):
        """Returns training tokens and training FLOPs of a task's rows, a value per run each."""
        return [*zip(*(run.cost(task) for run in self.runs if task in run.rows), strict=True)]


def read_configurations(arguments):
    """Returns a Configuration per argument, runs joined by +. Raises UserError if they cannot be compared."""
    groups = [argument.split('+') for argument in arguments]
    check(groups and all(map(all, groups)), 'runs', ' '.join(arguments), 'folders of runs: A1+A2+A3 B1+B2+B3')
    configurations, ids = [], {}
    for argument, group in zip(arguments, groups, strict=True):
        runs = [Run(name) for name in group]
        for name, run in zip(group, runs, strict=True):
            expected = f'different runs: it is the run of {ids.get(run.id)}'
            check(run.id not in ids, 'run', name, expected)
            ids[run.id] = name
        names = dict.fromkeys(re.sub('-[0-9]+$', '', run.name) for run in runs)
        name = runs[0].name if len(runs) == 1 else '+'.join(names)
        if any(name == other.name for other in configurations):
            name = argument
        configurations.append(Configuration(name, runs))
        check_seeds(configurations[-1])
    return configurations


def check_seeds(configuration):
    """Raises UserError if runs joined by + have other models or other data."""
    known = [run for run in configuration.runs if run.checkpoints]
    for run in known[1:]:
        first, own = (r.checkpoints[0] for r in (known[0], run))
        pairs = [(first['model_args'], own['model_args'], key) for key in own['model_args']]
        pairs.append((first.get('data') or {}, own.get('data') or {}, 'sha256'))
        for old, new, key in pairs:
            what = 'data' if key == 'sha256' else key
            names = f'{known[0].path.parent}+{run.path.parent}'
            expected = f'seeds of one configuration, not {what}={old.get(key)} and {new.get(key)}'
            check(old.get(key) == new.get(key), 'runs', names, expected)


def doubts(configurations):
    """Yields lines on what may be a mistake."""
    for configuration in configurations:
        configs = [run.config for run in configuration.runs if run.config]
        keys = {key for config in configs for key in config} - set(FREE)
        values = {key: [config.get(key) for config in configs] for key in sorted(keys)}
        for key, found in values.items():
            if any(value != found[0] for value in found):
                yield f'note: {configuration.name}: {key} is {", ".join(map(str, found))}'
        seeds = [config.get('seed') for config in configs]
        if len(set(seeds)) < len(seeds):
            yield f'note: {configuration.name}: the seeds are {", ".join(map(str, seeds))}'
        for run in configuration.runs:
            for task in sorted(run.left_out):
                step = f'step {run.step(task)}' if run.step(task) else 'the last settings'
                yield f'note: {run.path}: of {task} the rows of {step} count, others are left out'


def check_same_measure(configurations, task, measure):
    """Raises UserError unless a task's rows of all runs are of the same data, measured alike."""
    rows = [(run, row) for c in configurations for run in c.runs for row in run.rows.get(task, {}).values()]
    (first, row), *others = rows
    for key in ('settings', 'dtype', *MEASURES[measure]):
        advice = 'measure them alike'
        if key == 'tokens':
            advice = '--column=bpb compares models with different tokens'
        for run, other in others:
            values = f'{row[key]!r} ({first.path}) and {other[key]!r} ({run.path})'
            same = same_data(other[key]) == same_data(row[key])
            check(same, 'task', task, f'the same {key} in all rows, not {values}: {advice}')


def same_data(settings):
    """Returns settings without the name of a data set whose hash they have: it may have several paths."""
    return re.sub(r'^dataset=.*(?= split=.* data=)', '', settings)


# -----------------------------------------------------------------------------
# items


def read_items(paths, runs):
    """Returns {key of a row: {(index, seed): record}} of files that eval.py --items has written, see key_of.

    Raises UserError for another file, and for one that has no item of these runs.
    """
    found, ids = {}, {run.id for run in runs}
    for path in paths:
        records = read_jsonl(path)
        for number, record in enumerate(records, 1):
            missing = [key for key in ('run', *KEY, 'index') if key not in record]
            if missing:
                raise UserError(f'{path}, line {number}: no record of eval.py --items, no {missing[0]}')
            found.setdefault(key_of(record), {})[record['index'], record.get('seed')] = record
        others = ', '.join(dict.fromkeys(str(record['run']) for record in records)) or 'no run'
        expected = f'items of the runs {", ".join(sorted(ids))}, it has those of {others}'
        check(any(record['run'] in ids for record in records), 'items', str(path), expected)
    return found


def key_of(row):
    """Returns what a row and the records of its items have in common."""
    return tuple(as_text(row[key]) for key in ('run', *KEY))


def sums_of(record, measure):
    """Returns (value, count) of a record: the result of many is sum(values) / sum(counts)."""
    if measure in ('accuracy', 'centered'):
        return record['correct'], 1
    if measure == 'bpb':
        return record.get('nll_of_bytes', record['nll']) / math.log(2), record.get('bytes', 0)
    if 'nll' in record:
        return record['nll'], record['tokens']
    (loss,) = record['losses']
    return loss, 1


def sums_by_item(records, measure):
    """Returns ({item: sum of its values}, {item: sum of its counts}), in the order of the items.

    What is not independent is one item: the windows of a page, the draws of a question.
    """
    values, counts = {}, {}
    for (index, _), record in sorted(records.items(), key=lambda entry: str(entry[0])):
        item, (value, count) = record.get('page', index), sums_of(record, measure)
        values[item], counts[item] = values.get(item, 0) + value, counts.get(item, 0) + count
    return values, counts


def pair_items(run, task, measure, points, items):
    """Returns the Pairs of two points of a task, a list, for uncertainty.paired_bootstrap.

    points: two keys of the task's rows. items: see read_items. A task that is a mean over others has Pairs of
    each. None if there are no items, or if they have no such measure. Raises UserError for items that are not
    those of the rows.
    """
    parts, pairs = [name for name in run.rows if name.startswith(f'{task}/')] or [task], []
    for part in parts:
        rows = [run.rows[part].get(point) for point in points]
        records = [row and items.get(key_of(row)) for row in rows]
        if not all(records):
            return None
        try:
            (first, counts), (second, others) = (sums_by_item(record, measure) for record in records)
        except (KeyError, ValueError):
            return None
        same = first.keys() == second.keys() and counts == others
        check(same, 'items', part, f'the same items for {" and ".join(map(as_point, points))} in {run.name}')
        arrays = (np.array([*values.values()], dtype=np.float64) for values in (first, second, counts))
        pairs.append(Pairs(*arrays, weight=slope(rows, measure) / len(parts)))
    first, second = (float(run.rows[task][point][measure]) for point in points)
    if not math.isfinite(first + second):
        return None
    value = sum(p.weight * (p.second - p.first).sum() / p.counts.sum() for p in pairs)
    expected = f'those of the rows of {run.name}, whose difference is {second - first:.6f}, not {value:.6f}'
    check(math.isclose(value, second - first, abs_tol=1e-4 * max(1, abs(first))), 'items', task, expected)
    return pairs


def slope(rows, measure):
    """Returns the change of a measure with the accuracy of its items: a centered one is (a - b) / (1 - b)."""
    if measure != 'centered':
        return 1.0
    known = [row for row in rows if float(row['accuracy']) < 1]  # where all are right there is no change
    return (1 - float(known[0]['centered'])) / (1 - float(known[0]['accuracy'])) if known else 1.0


def as_point(point):
    """Returns a number of loops and a policy as a text."""
    loops, policy = point
    return f'{loops} loop{"s" * (loops > 1)} {policy}'.strip()
