"""
Draws what runs have logged: losses, and per loop what --diagnose measures. Needs: pip install -e '.[plot]'

    python plot.py --out_dir=out-flt,out-lt --png=flt-lt.png
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from configurator import command, configure
from nanoloop.checks import UserError, check

PANELS = (  # title, log key as a pattern with {} for the loop, whether the axis is logarithmic
    ('loss by loop, nats', 'loss/loop_{:02d}', False),
    ('KL(last loop || loop), nats', 'kl/loop_{:02d}', True),
    ("norm of the last block's output", 'hidden_norm/loop_{:02d}', True),
    ('change of the state', 'change/loop_{:02d}', True),
    ('gradient norm, outputs of the last block', 'grad_norm/block_{block:02d}/loop_{:02d}', True),
)


@dataclass
class PlotConfig:
    out_dir: str = 'out'  # folders of runs, separated by commas; each gets a row of panels
    png: str = ''  # image file to write; '' = log.png in the first folder


def read_log(folder):
    """Returns the records of a run's log.jsonl, dicts. Raises UserError if there are none."""
    path = Path(folder) / 'log.jsonl'
    check(path.exists(), 'out_dir', folder, 'the folder of a run with a log.jsonl')
    complete_lines, _, _ = path.read_text().rpartition('\n')  # the last line of a killed run may be cut
    try:
        records = [json.loads(line) for line in complete_lines.splitlines()]
    except ValueError:
        raise UserError(f'{path} is broken') from None
    check(records, 'out_dir', folder, 'a run that has logged something')
    return records


def series(records, key):
    """Returns (steps, values) of a key, from the records that have a value for it."""
    points = [(record['iter'], record[key]) for record in records if record.get(key) is not None]
    return zip(*points, strict=True) if points else ((), ())


def numbers(keys, pattern):
    """Returns the sorted numbers that the group of a regular expression has in the keys that it matches."""
    return sorted({int(match[1]) for key in keys if (match := re.fullmatch(pattern, key))})


def draw_run(axes, records, name, colors):
    """Draws one run into a row of axes: its losses, then a panel of PANELS each with a line per loop."""
    for key, label, style in (('train/loss', 'train', '-'), ('val/loss', 'val', 'o')):
        axes[0].plot(*series(records, key), style, label=label, markersize=4)
    axes[0].legend()
    axes[0].set(title=f'{name}: loss, nats')
    keys = {key for record in records for key in record}
    loops = numbers(keys, r'(?:hidden_norm|train/loss)/loop_(\d+)')
    last_block = max(numbers(keys, r'grad_norm/block_(\d+)/loop_\d+'), default=0)
    for axis, (title, pattern, logarithmic) in zip(axes[1:], PANELS, strict=True):
        for loop in loops:
            key = pattern.format(loop, block=last_block)
            steps, values = series(records, key if key in keys else f'train/{key}')
            if steps and (not logarithmic or max(values) > 0):
                color = colors(loop / max(1, len(loops) - 1))
                axis.plot(steps, values, color=color, label=f'loop {loop}')
        axis.set(title=title, xlabel='step', yscale='log' if logarithmic else 'linear')
    if loops:
        axes[1].legend(fontsize='small')


@command
def main(argv):
    c = configure((PlotConfig,), argv)
    try:
        import matplotlib
    except ImportError:
        raise UserError('plotting needs matplotlib: pip install matplotlib') from None
    matplotlib.use('Agg')
    from matplotlib import pyplot

    folders = c.out_dir.split(',')
    logs = [read_log(folder) for folder in folders]
    png = Path(c.png or Path(folders[0]) / 'log.png')
    check(png.suffix == '.png' and png.parent.is_dir(), 'png', c.png, 'a .png file in a folder that exists')
    columns = 1 + len(PANELS)
    size = (4 * columns, 3.4 * len(logs))  # inches
    grid = dict(figsize=size, squeeze=False, sharey='col', layout='constrained')
    figure, rows = pyplot.subplots(len(logs), columns, **grid)
    for axes, records, folder in zip(rows, logs, folders, strict=True):
        draw_run(axes, records, Path(folder).name, pyplot.get_cmap('viridis'))
    figure.savefig(png, dpi=80)
    print(f'drawn: {png}')


if __name__ == '__main__':
    main()
