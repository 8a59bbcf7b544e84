"""
Compares configurations, and the numbers of loops of each checkpoint, by what eval.py has measured.

    python runs/compare.py A1+A2+A3 B1+B2+B3
    python runs/compare.py A1+A2+A3 B1+B2+B3@4000 --tasks=mano,mano/* --csv=comparison.csv
    python runs/compare.py A1 --items=items.jsonl
    python runs/compare.py A1+A2+A3 B1+B2+B3 --image=comparison.png

An argument is a configuration: runs joined by +, which differ in their seed. A run is its folder, or the
eval.csv in it. Of each task the rows of the last evaluation count, with @STEP behind a run those of that
step. Differences are second - first, with 95 % intervals: for two configurations by Welch's t-test over
seeds, for the loops of one checkpoint by a paired bootstrap over the items that eval.py --items=FILE has
written. Costs of training are equal if those of all runs are within 1 %.
Needs: pip install -e ".[eval]"
"""

import csv
import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import command, configure, expand_home

# a Ctrl-C while the rest is imported is handled from here on
# isort: split
from nanoloop.checks import Choice, check, settle_fields
from nanoloop.compared_runs import MEASURES, doubts, read_configurations, read_items
from nanoloop.comparisons import COLUMNS, COSTS, choose_measures, compare_configurations, compare_loops, means
from nanoloop.eval_plot import check_image, check_plotting, draw_means
from nanoloop.files import replace_file
from nanoloop.number_lists import split_list
from nanoloop.results import as_text
from nanoloop.tables import align
from nanoloop.uncertainty import load_scipy


@dataclass
class CompareConfig:
    tasks: str = ''  # names with commas between them, such as loss,core/*; '' = all but the parts of a task
    column: Choice(('', *MEASURES)) = ''  # what is compared; '' = the accuracy of a task, else its loss
    items: str = ''  # files that eval.py --items has written, with commas between them; '' = none
    csv: str = ''  # file of all rows that are printed; '' = none
    image: str = ''  # .png, .pdf or .svg of the means against loops and FLOPs; '' = none

    def __post_init__(self):
        """Raises UserError for a value out of its bounds."""
        settle_fields(self)


# -----------------------------------------------------------------------------
# tables


def show(value, form='.4f'):
    """Returns a number as a text, '' for None, ? for nan."""
    if value is None:
        return ''
    return format(value, form) if math.isfinite(value) else '?'


def show_range(values, form):
    """Returns the least and the largest of values as one text."""
    low, high = show(min(values), form), show(max(values), form)
    return low if low == high or '?' in (low, high) else f'{low} to {high}'


def interval(row):
    """Returns the interval of a comparison as a text."""
    return '' if row['low'] is None else f'{row["low"]:+.4f} to {row["high"]:+.4f}'


def describe(configurations, measures):
    """Returns the table of the configurations: what they are made of, and what their training has cost."""
    lines = [['configuration', 'runs', 'n', 'loops', 'steps', 'training tokens', 'training FLOPs']]
    for part in configurations:
        runs = ' '.join(run.name for run in part.runs)
        steps = dict.fromkeys(run.step(task) for run in part.runs for task in measures if task in run.rows)
        costs = [[value for task in measures for value in part.costs(task)[i]] for i in range(len(COSTS))]
        shown = [show_range(costs[0], ',.0f'), show_range(costs[1], '.4g')]
        lines.append([part.name, runs, str(len(part.runs)), str(part.n_loop), ', '.join(steps), *shown])
    return align(lines)


def table_of_means(rows):
    """Returns the table of the means over seeds."""
    lines = [['task', 'measure', 'configuration', 'loops', 'n', 'mean', 'sd', 'FLOPs/token']]
    for row in rows:
        values = [show(row['mean_first']), show(row['sd_first']), show(row['flops_per_token'], '.4g')]
        lines.append(
            [*(row[key] for key in ('task', 'measure', 'first', 'first_loops')), str(row['n_first'])]
        )
        lines[-1] += values
    return align(lines)


def tables_of_tests(rows):
    """Yields the lines of the comparisons of configurations: a table per pair and equality of costs."""
    key = lambda row: tuple(row[name] for name in ('first', 'second', *COSTS))  # noqa: E731
    for (first, second, tokens, flops), same in itertools.groupby(rows, key):
        yield ''
        yield f'{first} against {second}: {tokens} training tokens, {flops} training FLOPs'
        lines = [['task', 'measure', f'loops of {first}', f'loops of {second}', 'n', first, second]]
        lines[0] += ['difference', '95 % interval', 'p', 'p (Holm)', 'test']
        for row in same:
            lines.append([*(row[name] for name in ('task', 'measure', 'first_loops', 'second_loops'))])
            lines[-1] += [
                f'{row["n_first"]}, {row["n_second"]}',
                show(row['mean_first']),
                show(row['mean_second']),
            ]
            lines[-1] += [show(row['difference'], '+.4f'), interval(row), show(row['p'], '.2g')]
            lines[-1] += [show(row.get('p_holm'), '.2g'), row['method']]
        yield from align(lines)


def summary_of_tests(rows):
    """Yields lines on which pairs were compared at equal costs, and on the number of tests."""
    for cost, name in zip(COSTS, ('tokens', 'FLOPs'), strict=True):
        pairs = dict.fromkeys(f'{row["first"]} - {row["second"]}' for row in rows if row[cost] == 'equal')
        yield f'at equal training {name}: {", ".join(pairs) or "none of these"}'
    tested = [row for row in rows if row['p'] is not None]
    share = [row for row in tested if row['p_holm'] < 0.05]
    adjusted = (
        f', {len(share)} with p (Holm) below 0.05, which is adjusted for their number' if tested else ''
    )
    yield f'tests: {len(tested)}{adjusted}'


def table_of_loops(rows):
    """Returns the table of the comparisons of loops."""
    lines = [['run', 'task', 'measure', 'loops', 'first', 'second', 'difference', '95 % interval', 'by']]
    for row in rows:
        name = f'mean of {row["first"]}' if row['kind'] == 'loops_mean' else row['first']
        lines.append(
            [name, row['task'], row['measure'], f'{row["first_loops"]} against {row["second_loops"]}']
        )
        lines[-1] += [show(row.get('mean_first')), show(row.get('mean_second'))]
        known = row.get('difference') is not None
        lines[-1] += [show(row['difference'], '+.4f') if known else '', interval(row) if known else '']
        lines[-1].append(row['method'])
    return align(lines)


# -----------------------------------------------------------------------------
# the file of rows


def check_csv(path):
    """Raises UserError if a file cannot be written, or if it holds other things than rows."""
    check(path.parent.is_dir(), 'csv', str(path), 'a file in a folder that exists')
    head = ','.join(COLUMNS)
    own = not path.exists() or (path.is_file() and path.read_bytes()[: len(head)] == head.encode())
    check(own, 'csv', str(path), 'a new file, or one that this script has written')


def write_csv(path, rows):
    """Writes all rows."""
    with replace_file(path) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows({key: as_text(row.get(key)) for key in COLUMNS} for row in rows)


@command
def main(argv):
    flags = [arg for arg in argv if arg.startswith('-')]
    c = configure((CompareConfig,), flags, say=None)
    c.build(CompareConfig)
    names = [expand_home(arg) for arg in argv if arg not in flags]
    csv_file, items_files = c['csv'], split_list(c['items'])  # c.items is the method of a dict
    if csv_file:
        check_csv(Path(csv_file))
    if c.image:
        check_plotting()
        check_image(c.image)
    load_scipy()  # or it ends here

    configurations = read_configurations(names)
    measures = choose_measures(configurations, split_list(c.tasks), c.column)
    items = read_items(items_files, [run for part in configurations for run in part.runs])
    averages = means(configurations, measures)
    pairs = compare_configurations(configurations, measures)
    tasks = itertools.product(configurations, measures.items())
    loops = [row for part, task in tasks for row in compare_loops(part, *task, items)]

    for line in (*doubts(configurations), *describe(configurations, measures), '', *table_of_means(averages)):
        print(line)
    if len(configurations) > 1:
        for line in (*tables_of_tests(pairs), '', *summary_of_tests(pairs)):
            print(line)
    if loops:
        for line in ('', '1 loop against n, of one checkpoint:', *table_of_loops(loops)):
            print(line)
    if csv_file:
        write_csv(Path(csv_file), [*averages, *pairs, *loops])
        print(f'rows in {csv_file}')
    if c.image:
        draw_means(averages, c.image)
        print(f'drawn: {c.image}')


if __name__ == '__main__':
    main()
