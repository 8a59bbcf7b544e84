"""
Draws quality against loops and against FLOPs per token: the rows of an eval.csv, or means over seeds.
"""

import math
import re
from pathlib import Path

from nanoloop.checks import check, missing_package

FORMATS = ('.png', '.pdf', '.svg')
MEASURES = dict(
    accuracy='accuracy', loss='loss, nats per token', ppl='perplexity', centered='centered accuracy'
)


def check_plotting():
    """Raises UserError if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise missing_package('plotting', 'plot', 'matplotlib') from None


def check_image(path):
    """Raises UserError unless a picture can be written to a file of this name."""
    fits = Path(path).suffix in FORMATS and Path(path).parent.is_dir()
    check(fits, 'image', str(path), f'a file in a folder that exists, {", ".join(FORMATS)}')


def measure_of(rows):
    """Returns the column that says most of a task's rows: the first of MEASURES that all have, else None."""
    return next((column for column in MEASURES if all(row[column] for row in rows)), None)


def draw_results(results):
    """Draws all rows of a Results into a .png beside the csv. Returns its path.

    A panel per measure and axis: a line per task over the numbers of loops, in a band of one standard error
    to each side, and a point per exit policy or budget, at its mean number of loops.
    """
    last = max(int(row['step']) for row in results.rows)
    rows = [row for row in results.rows if int(row['step']) == last]
    tasks = {
        task: [row for row in rows if row['task'] == task]
        for task in dict.fromkeys(row['task'] for row in rows)
    }
    measures = {task: measure_of(part) for task, part in tasks.items()}
    shown = [column for column in MEASURES if column in measures.values()]
    figure, axes, colors = make_panels(len(shown))
    for number, (task, part) in enumerate(tasks.items()):
        if measures[task] is None:
            continue
        for axis, x in zip(axes[shown.index(measures[task])], ('mean_loops', 'flops_per_token'), strict=True):
            draw_task(axis, part, x, measures[task], task, colors(number % 10))
    for pair, column in zip(axes, shown, strict=True):
        label_panels(pair, MEASURES[column], {int(row['loops']) for row in rows})
    path = results.path.with_suffix('.png')
    figure.savefig(path, dpi=150)
    return path


def draw_means(rows, path):
    """Draws the means of configurations over seeds into a file.

    rows: those of comparisons.means. A pair of panels per task and measure: a line per configuration over
    the numbers of loops, in a band of one standard deviation over seeds to each side. Policies are left out.
    """
    points = [(re.fullmatch(r'(\d+) loops?', row['first_loops']), row) for row in rows]
    rows = [row | dict(loops=int(found[1])) for found, row in points if found]
    shown, names = (
        list(dict.fromkeys(map(key, rows)))
        for key in (lambda row: (row['task'], row['measure']), lambda row: row['first'])
    )
    figure, axes, colors = make_panels(len(shown))
    for pair, (task, measure) in zip(axes, shown, strict=True):
        for number, name in enumerate(names):
            panel = (row for row in rows if (row['task'], row['measure']) == (task, measure))
            same = [row for row in panel if row['first'] == name]
            means, errors = ([row[key] for row in same] for key in ('mean_first', 'sd_first'))
            for axis, x in zip(pair, ('loops', 'flops_per_token'), strict=True):
                xs = [row[x] for row in same]
                draw_line(axis, xs, means, errors, colors(number % 10), f'{name} (n = {same[0]["n_first"]})')
        part = (row for row in rows if row['task'] == task)
        label = MEASURES[measure] if task == measure else f'{task}: {MEASURES[measure]}'
        label_panels(pair, label, {row['loops'] for row in part})
    figure.savefig(path, dpi=150)


def make_panels(n):
    """Returns a figure with n rows of two panels, the panels (n, 2), and a function: number to color."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    size = (9.6, 3.6 * n)  # inches
    figure, axes = pyplot.subplots(n, 2, figsize=size, squeeze=False, layout='constrained', sharey='row')
    return figure, axes, pyplot.get_cmap('tab10')


def label_panels(pair, label, loops):
    """Labels the axes of two panels, over loops and over FLOPs. loops: the numbers that were measured."""
    from matplotlib.ticker import EngFormatter, LogLocator

    pair[0].set(ylabel=label, xlabel='loops per token', xscale='log')
    pair[0].minorticks_off()
    pair[0].set_xticks(sorted(loops), sorted(loops))
    pair[1].set_xlabel('FLOPs per token')
    low, high = pair[1].dataLim.intervalx
    if high > 2.5 * low > 0:  # has two of the ticks below; low is 0 where FLOPs are missing
        pair[1].set_xscale('log')
        pair[1].minorticks_off()
        pair[1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    pair[1].xaxis.set_major_formatter(EngFormatter())  # 5 M
    handles = pair[0].get_legend_handles_labels()  # beside the panels: CORE has 22 tasks
    pair[1].legend(*handles, fontsize='x-small', loc='upper left', bbox_to_anchor=(1.02, 1))


def draw_line(axis, xs, ys, errors, color, label):
    """Draws a line in a band of `errors` to each side; None or nan = no band there."""
    axis.plot(xs, ys, 'o-', color=color, markersize=4, label=label)
    errors = [math.nan if error is None else error for error in errors]
    if not all(map(math.isnan, errors)):
        low, high = ([y + sign * error for y, error in zip(ys, errors, strict=True)] for sign in (-1, 1))
        axis.fill_between(xs, low, high, color=color, alpha=0.2, linewidth=0)


def draw_task(axis, rows, x, column, task, color):
    """Draws the rows of a task: a line for all loops, points for policies."""
    plain = sorted((row for row in rows if not row['policy']), key=lambda row: float(row[x]))
    xs, ys = ([float(row[key]) for row in plain] for key in (x, column))
    draw_line(axis, xs, ys, [float(row.get(f'{column}_se') or 'nan') for row in plain], color, task)
    policies = [row for row in rows if row['policy']]
    for marker, kind in (('^', 'exit'), ('s', 'kv_budget')):
        chosen = [row for row in policies if row['policy'].startswith(kind)]
        points = [[float(row[key]) for row in chosen] for key in (x, column)]
        if chosen:
            axis.plot(
                *points, marker, color=color, markersize=6, markerfacecolor='none', label=f'{task}, {kind}'
            )
