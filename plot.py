"""
Draws what runs have logged: losses, loss against loops, losses with the numbers of loops of --eval_loops, and
per loop what --diagnose measures.

    python plot.py --out_dir=out-flt,out-lt --image=flt-lt.png
    python plot.py --out_dir=a-seed1+a-seed2+a-seed3,b-seed1+b-seed2 --image=a-b.pdf

Runs joined by + are drawn as one line, their mean, in a band from the lowest to the highest. Only panels for
which something was logged are drawn. Needs: pip install -e ".[plot]"
"""

import itertools
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # ours come first, also with python -P
from configurator import command, configure

# a Ctrl-C while the rest is imported is handled from here on
# isort: split
import numpy as np

from nanoloop.checks import check, missing_package
from nanoloop.eval_plot import check_image
from nanoloop.run_logs import check_same_data, loops_logged, loss_by_loops, read_run, series


class Panel(NamedTuple):
    """A panel with a line per loop, of one run."""

    title: str  # what the y axis shows, with its unit
    key: str  # log key as a pattern: {} is the loop, {block} the last recurrent block
    logarithmic: bool


PANELS = (
    Panel('loss by loop, nats', 'loss/loop_{:02d}', False),
    Panel('KL(last loop || loop), nats', 'kl/loop_{:02d}', True),
    Panel("norm of the last block's output", 'hidden_norm/loop_{:02d}', True),
    Panel('relative change of the state', 'change/loop_{:02d}', True),
    Panel('gradient norm, outputs of the last block', 'grad_norm/block_{block:02d}/loop_{:02d}', True),
)


@dataclass
class PlotConfig:
    out_dir: str = 'out'  # folders of runs: , between lines to compare, + between seeds of one line
    image: str = ''  # .png, .pdf or .svg; '' = log.png, of several runs comparison.png, in the first folder


def draw_group(axis, curves, color, style, label):
    """Draws the mean of curves, {x: y} each, and their band, where at least one has a value."""
    xs = sorted(set().union(*curves))
    if not xs:
        return
    ys = [[curve[x] for curve in curves if x in curve] for x in xs]
    axis.plot(xs, [np.mean(values) for values in ys], style, color=color, label=label, markersize=4)
    if len(curves) > 1:
        lowest, highest = ([limit(values) for values in ys] for limit in (min, max))
        axis.fill_between(xs, lowest, highest, color=color, alpha=0.2, linewidth=0)


def name_group(runs):
    """Returns the name of runs that are drawn as their mean."""
    return ' + '.join(dict.fromkeys(run.name for run in runs))


def comparisons(groups):
    """Returns the panels that show all groups: (y label, x label, [(group, curves, style, label)])."""
    names = [name_group(runs) for runs in groups]
    evaluations = [record for runs in groups for run in runs for record in run.evaluations]
    datasets = list(dict.fromkeys(record.get('dataset') for record in evaluations))
    losses, loops = [], []
    for i, (name, runs) in enumerate(zip(names, groups, strict=True)):
        losses.append((i, [series(run.records, 'train/loss') for run in runs], '-', f'{name}, train'))
        losses.append((i, [series(run.records, 'val/loss') for run in runs], 'o--', f'{name}, val'))
        for dataset, style in zip(datasets, itertools.cycle(('o-', 's--', '^:')), strict=False):
            label = f'{name} on {dataset}' if len(datasets) > 1 else name
            loops.append((i, [loss_by_loops(run, dataset) for run in runs], style, label))
    panels = [('loss, nats per token', 'step', losses), ('validation loss, nats per token', 'loops', loops)]
    return [panel for panel in panels if any(any(curves) for _, curves, _, _ in panel[2])]


def depth_panels(groups):
    """Returns a panel for each group that has used --eval_loops: (name, {number of loops: curves}).

    curves: {step: validation loss} of each run.
    """
    panels = []
    for runs in groups:
        loops = loops_logged([record for run in runs for record in run.records])
        lines = {n: [series(run.records, f'val/loss@{n}') for run in runs] for n in loops}
        panels.append((name_group(runs), {n: curves for n, curves in lines.items() if any(curves)}))
    return [(name, lines) for name, lines in panels if lines]


def loop_panels(run):
    """Returns the panels of PANELS that a run has logged: [(panel, {loop: {step: value}})]."""
    keys = {key for record in run.records for key in record}
    blocks = [int(m[1]) for key in keys if (m := re.fullmatch(r'grad_norm/block_(\d+)/loop_\d+', key))]
    loops = sorted({int(m[1]) for key in keys if (m := re.fullmatch(r'(?:\w+/)*loop_(\d+)', key))})
    found = []
    for panel in PANELS:
        lines = {}
        for loop in loops:
            key = panel.key.format(loop, block=max(blocks, default=0))
            line = series(run.records, key if key in keys else f'train/{key}')
            if panel.logarithmic:
                line = {step: value for step, value in line.items() if value > 0}
            if line:
                lines[loop] = line
        if lines:
            found.append((panel, lines))
    return found


def draw_comparison(axis, panel, colors):
    """Draws a panel of comparisons(); all curves of a group have its color."""
    y_label, x_label, parts = panel
    for group, curves, style, label in parts:
        draw_group(axis, curves, colors(group % 10), style, label)
    axis.set(ylabel=y_label, xlabel=x_label)
    axis.legend(fontsize='small')


def draw_depths(axes, panels, colors):
    """Draws the panels of depth_panels(), with the same colors and limits in all."""
    depths = sorted({n for _, lines in panels for n in lines})
    curves = [curve for _, lines in panels for of_runs in lines.values() for curve in of_runs]
    # an untrained model's loss is high, and the same for all numbers of loops: it is cut off
    losses = [loss for curve in curves for step, loss in curve.items() if step > 0]
    for axis, (name, lines) in zip(axes, panels, strict=True):
        for n, of_runs in lines.items():
            label = f'val, {n} loop{"s" * (n > 1)}'
            draw_group(axis, of_runs, colors(depths.index(n) / len(depths)), 'o-', label)
        axis.set(title=name, xlabel='step', ylabel='validation loss, nats per token')
        if losses:
            margin = 0.05 * (max(losses) - min(losses)) or 0.01
            axis.set_ylim(min(losses) - margin, max(losses) + margin)
        axis.legend(fontsize='small')


def draw_loops(axis, name, panel, lines, colors):
    """Draws a panel of loop_panels()."""
    for loop, line in lines.items():
        color = colors(loop / max(1, *lines))
        axis.plot(list(line), list(line.values()), color=color, label=f'loop {loop}')
    axis.set(title=name, xlabel='step', yscale='log' if panel.logarithmic else 'linear')
    axis.set_ylabel(panel.title, fontsize='small')


def draw(pyplot, groups, image):
    """Draws all panels: a row about the groups, and a row for each run that logged its loops.

    Returns whether a run has logged its loops, and whether one has evaluations with other numbers of loops.
    """
    comparing, depths = comparisons(groups), depth_panels(groups)
    runs = [(run, panels) for group in groups for run in group if (panels := loop_panels(run))]
    n_columns = max([len(comparing) + len(depths), *(len(panels) for _, panels in runs)])
    size = (4.2 * n_columns, 3.4 * (1 + len(runs)))  # inches
    grid = dict(figsize=size, squeeze=False, layout='constrained')
    figure, rows = pyplot.subplots(1 + len(runs), n_columns, **grid)
    for axis, panel in zip(rows[0], comparing, strict=False):
        draw_comparison(axis, panel, pyplot.get_cmap('tab10'))
    draw_depths(rows[0][len(comparing) :][: len(depths)], depths, pyplot.get_cmap('viridis'))
    for row, (run, panels) in zip(rows[1:], runs, strict=True):
        for axis, (panel, lines) in zip(row, panels, strict=False):
            draw_loops(axis, run.name, panel, lines, pyplot.get_cmap('viridis'))
        row[0].legend(fontsize='small')
    for axis in rows.flat:
        axis.set_visible(axis.has_data())
    figure.savefig(image, dpi=200)
    return bool(runs), len(comparing) > 1


@command
def main(argv):
    c = configure((PlotConfig,), argv)
    try:
        import matplotlib
    except ImportError:
        raise missing_package('plotting', 'plot', 'matplotlib') from None
    matplotlib.use('Agg')
    from matplotlib import pyplot

    names = [group.split('+') for group in c.out_dir.split(',')]
    check(all(map(all, names)), 'out_dir', c.out_dir, 'the name of a folder before and after each , and +')
    for group in names:
        if len(group) > 1:
            check_same_data(group)
    groups = [[read_run(folder) for folder in group] for group in names]
    image = Path(c.image or Path(names[0][0], 'log.png' if len(sum(names, [])) == 1 else 'comparison.png'))
    check_image(image)
    with_loops, with_evaluations = draw(pyplot, groups, image)
    if not with_loops:
        print('for what happens loop by loop: train.py --diagnose=100')
    if not with_evaluations:
        evaluate = f'train.py --out_dir={names[0][0]} --init_from=resume --eval_only=True'
        print(f'for the loss against loops: {evaluate} --eval_loops=1,2,4,8')
    print(f'drawn: {image}')


if __name__ == '__main__':
    main()
