"""
Draws the rows of an eval.csv: quality against loops, and against FLOPs per token.
"""

from nanoloop.checks import missing_package

MEASURES = dict(
    accuracy='accuracy', loss='loss, nats per token', ppl='perplexity', centered='centered accuracy'
)


def check_plotting():
    """Raises UserError if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise missing_package('plotting', 'plot', 'matplotlib') from None


def measure_of(rows):
    """Returns the column that says most of a task's rows: the first of MEASURES that all have, else None."""
    return next((column for column in MEASURES if all(row[column] for row in rows)), None)


def draw_results(results):
    """Draws all rows of a Results into a .png beside the csv. Returns its path.

    A panel per measure and axis: a line per task over the numbers of loops, in a band of one standard error
    to each side, and a point per exit policy or budget, at its mean number of loops.
    """
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    last = max(int(row['step']) for row in results.rows)
    rows = [row for row in results.rows if int(row['step']) == last]
    tasks = {
        task: [row for row in rows if row['task'] == task]
        for task in dict.fromkeys(row['task'] for row in rows)
    }
    measures = {task: measure_of(part) for task, part in tasks.items()}
    loops = sorted({int(row['loops']) for row in rows})
    shown = [column for column in MEASURES if column in measures.values()]
    size = (9.6, 3.6 * len(shown))  # inches
    figure, axes = pyplot.subplots(
        len(shown), 2, figsize=size, squeeze=False, layout='constrained', sharey='row'
    )
    colors = pyplot.get_cmap('tab10')
    for number, (task, part) in enumerate(tasks.items()):
        if measures[task] is None:
            continue
        for axis, x in zip(axes[shown.index(measures[task])], ('mean_loops', 'flops_per_token'), strict=True):
            draw_task(axis, part, x, measures[task], task, colors(number % 10))
    for pair, column in zip(axes, shown, strict=True):
        pair[0].set(ylabel=MEASURES[column], xlabel='loops per token', xscale='log')
        pair[0].xaxis.set_minor_locator(pyplot.NullLocator())
        pair[0].set_xticks(loops, loops)
        pair[1].set(xlabel='FLOPs per token', xscale='log')
        handles = pair[0].get_legend_handles_labels()  # beside the panels: CORE has 22 tasks
        pair[1].legend(*handles, fontsize='x-small', loc='upper left', bbox_to_anchor=(1.02, 1))
    path = results.path.with_suffix('.png')
    figure.savefig(path, dpi=150)
    return path


def draw_task(axis, rows, x, column, task, color):
    """Draws the rows of a task: a line for all loops, points for policies."""
    plain = sorted((row for row in rows if not row['policy']), key=lambda row: float(row[x]))
    xs, ys = ([float(row[key]) for row in plain] for key in (x, column))
    axis.plot(xs, ys, 'o-', color=color, markersize=4, label=task)
    errors = [float(row.get(f'{column}_se') or 'nan') for row in plain]
    if any(error == error for error in errors):
        low, high = ([y + sign * error for y, error in zip(ys, errors, strict=True)] for sign in (-1, 1))
        axis.fill_between(xs, low, high, color=color, alpha=0.2, linewidth=0)
    policies = [row for row in rows if row['policy']]
    for marker, kind in (('^', 'exit'), ('s', 'kv_budget')):
        chosen = [row for row in policies if row['policy'].startswith(kind)]
        points = [[float(row[key]) for row in chosen] for key in (x, column)]
        if chosen:
            axis.plot(
                *points, marker, color=color, markersize=6, markerfacecolor='none', label=f'{task}, {kind}'
            )
