"""
Comparisons of configurations, and of the numbers of loops of one checkpoint. Each is a dict of COLUMNS.
"""

import fnmatch
import itertools
import math
import statistics

from nanoloop.checks import check
from nanoloop.compared_runs import MEASURES, as_point, check_same_measure, pair_items
from nanoloop.eval_plot import measure_of
from nanoloop.uncertainty import holm, mean_difference, paired_bootstrap, unpaired, welch

EQUAL = 0.01  # costs that differ by at most this share are equal
COSTS = ('training_tokens', 'training_flops')
# kind: mean (of a configuration, in first), configurations, loops (of a run), or loops_mean (over its seeds)
COLUMNS = ('kind', 'task', 'measure', 'first', 'first_loops', 'second', 'second_loops')
COLUMNS += ('n_first', 'mean_first', 'sd_first', 'n_second', 'mean_second', 'sd_second')
COLUMNS += ('difference', 'low', 'high', 'p', 'p_holm', 'method', *COSTS, 'flops_per_token')


def choose_measures(configurations, patterns, column):
    """Returns {task: measure} of the tasks that all configurations have. Raises UserError if that is nothing.

    patterns: names of tasks, with * for any letters; [] = all but the parts of a task. column: of MEASURES,
    '' = the accuracy, else the loss.
    """
    own = {part.name: part.tasks for part in configurations}
    common = [task for task in configurations[0].tasks if all(task in tasks for tasks in own.values())]
    having = '; '.join(f'{name} has {", ".join(tasks)}' for name, tasks in own.items())
    check(common, 'runs', ' '.join(own), f'a task that all have: {having}')
    for pattern in patterns:
        check(fnmatch.filter(common, pattern), 'tasks', pattern, f'some of {", ".join(common)}')
    chosen = [task for task in common if any(fnmatch.fnmatch(task, pattern) for pattern in patterns)]
    chosen = chosen or [task for task in common if '/' not in task] or common
    measures = {}
    for task in chosen:
        rows = [row for part in configurations for same in part.points(task).values() for row in same]
        if column:
            measure = column if all(row[column] for row in rows) else None
        else:
            measure = measure_of(rows)
        if measure in MEASURES:
            check_same_measure(configurations, task, measure)
            measures[task] = measure
    check(measures, 'column', column, f'one that all rows of {", ".join(chosen)} have')
    return measures


def summarise(values, which):
    """Returns the columns of a mean over seeds. which: first or second."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {f'n_{which}': len(values), f'mean_{which}': statistics.fmean(values), f'sd_{which}': deviation}


def columns_of(difference):
    """Returns the columns of a Difference, None for what it does not have."""
    numbers = dict(difference=difference.value, low=difference.low, high=difference.high, p=difference.p)
    known = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
    return dict(known, method=difference.method)


# -----------------------------------------------------------------------------
# configurations


def means(configurations, measures):
    """Returns the mean of every configuration, for each task, number of loops and policy."""
    found = []
    for (task, measure), part in itertools.product(measures.items(), configurations):
        costs = dict(zip(COSTS, map(statistics.fmean, part.costs(task)), strict=True))
        for point, rows in sorted(part.points(task).items()):
            flops = [float(row['flops_per_token'] or 'nan') for row in rows]
            head = dict(kind='mean', task=task, measure=measure, first=part.name, first_loops=as_point(point))
            head |= costs | dict(flops_per_token=statistics.fmean(flops))
            found.append(head | summarise([float(row[measure]) for row in rows], 'first'))
    return found


def compare_configurations(configurations, measures):
    """Returns the Welch's t-tests of all pairs of configurations, with p values adjusted for their number."""
    found = []
    for pair, (task, measure) in itertools.product(
        itertools.combinations(configurations, 2), measures.items()
    ):
        costs = zip(*(part.costs(task) for part in pair), strict=True)
        equal = dict(zip(COSTS, itertools.starmap(compare_costs, costs), strict=True))
        for points in pairs_of_points(*pair, task):
            first, second = (
                [float(row[measure]) for row in part.points(task)[point]]
                for part, point in zip(pair, points, strict=True)
            )
            head = dict(kind='configurations', task=task, measure=measure, first=pair[0].name)
            head |= dict(
                second=pair[1].name, first_loops=as_point(points[0]), second_loops=as_point(points[1])
            )
            head |= equal | summarise(first, 'first') | summarise(second, 'second')
            found.append(head | columns_of(welch(first, second)))
    tested = [row for row in found if row['p'] is not None]
    for row, p in zip(tested, holm([row['p'] for row in tested]), strict=True):
        row['p_holm'] = p
    return found


def compare_costs(first, second):
    """Returns equal, unequal or unknown for a cost of the runs of two configurations."""
    values = (*first, *second)
    if not all(map(math.isfinite, values)):
        return 'unknown'
    return 'equal' if max(values) - min(values) <= EQUAL * max(values) else 'unequal'


def pairs_of_points(first, second, task):
    """Returns the points at which two configurations are compared: each one's own, then all that both have.

    A model that is made for one loop is compared at one loop only.
    """
    points = [part.points(task) for part in (first, second)]
    own = tuple(own_point(part, rows) for part, rows in zip((first, second), points, strict=True))
    single = 1 in (first.n_loop, second.n_loop)
    common = [point for point in sorted(points[0]) if point in points[1]]
    pairs = [(point, point) for point in common if not single or point == (1, '')]
    return list(dict.fromkeys([own] * (None not in own) + pairs))


def own_point(model, points):
    """Returns the point at which a model is at its own: all loops that it is made for, else the most.

    model: a Run or a Configuration. None if all points are of early exits or small caches.
    """
    plain = [loops for loops, policy in points if not policy]
    return (model.n_loop if model.n_loop in plain else max(plain), '') if plain else None


# -----------------------------------------------------------------------------
# loops


def compare_loops(configuration, task, measure, items):
    """Returns the comparisons of the loops of each run of a configuration, then their means over runs.

    The first one is 1 loop against the loops that the model is made for. Next are these against all others.
    items: see compared_runs.read_items.
    """
    found, differences = [], {}
    head = dict(kind='loops', task=task, measure=measure)
    for run in configuration.runs:
        rows = run.rows.get(task, {})
        own = own_point(run, rows)
        if own is None:
            continue
        names = dict(first=run.name, second=run.name)
        one, others = (1, ''), [(own, point) for point in sorted(rows) if point not in (own, (1, ''))]
        if own != one and one not in rows:
            method = f'not measured with 1 loop: eval.py --loops=1,{own[0]}'
            found.append(
                dict(head, **names, first_loops=as_point(one), second_loops=as_point(own), method=method)
            )
        for pair in [(one, own)] * (own != one and one in rows) + others:
            row = compare_points(run, task, measure, pair, items)
            differences.setdefault(pair, []).append(row['difference'])
            found.append(dict(head, **names, **row))
    for pair, values in differences.items():
        if len(values) > 1:
            names = dict(kind='loops_mean', first=configuration.name, second=configuration.name)
            row = dict(first_loops=as_point(pair[0]), second_loops=as_point(pair[1]), n_first=len(values))
            found.append(head | names | row | columns_of(mean_difference(values)))
    return found


def compare_points(run, task, measure, points, items):
    """Returns the columns of the comparison of two points of a run: paired over items, if there are any."""
    rows = [run.rows[task][point] for point in points]
    first, second = (float(row[measure]) for row in rows)
    pairs = pair_items(run, task, measure, points, items)
    if pairs:
        difference = paired_bootstrap(pairs)
    else:
        errors = [float(row.get(f'{measure}_se') or 'nan') for row in rows]
        difference = unpaired(second - first, errors)
    names = dict(first_loops=as_point(points[0]), second_loops=as_point(points[1]))
    return names | dict(mean_first=first, mean_second=second) | columns_of(difference)
