"""
Draws what runs have logged: losses, and per loop what --diagnose found. Needs: pip install -e '.[plot]'

    python plot.py --out_dir=out-flt,out-lt --png=flt-lt.png
"""

import json
from dataclasses import dataclass
from pathlib import Path

from configurator import command, configure
from nanoloop.checks import UserError, check

PANELS = (  # title, a pattern of keys with {} for the loop, whether the axis is logarithmic
    ('loss by loop, nats', 'loss/loop_{:02d}', False),
    ('KL(last loop || loop), nats', 'kl/loop_{:02d}', True),
    ('norm of the state', 'hidden_norm/loop_{:02d}', True),
    ('change of the state', 'change/loop_{:02d}', True),
    ('gradient norm, outputs of the last block', 'grad_norm/block_{block:02d}/loop_{:02d}', True),
)


@dataclass
class PlotConfig:
    out_dir: str = 'out'  # folders of runs, separated by commas: a row of panels each
    png: str = ''  # the picture; nothing = log.png in the first folder


def read_log(folder):
    """The records of a run's log.jsonl. Raises ValueError if there are none."""
    path = Path(folder) / 'log.jsonl'
    check(path.exists(), 'out_dir', folder, 'the folder of a run with a log.jsonl')
    whole, _, _ = path.read_text().rpartition('\n')  # without a last line that was cut
    try:
        records = [json.loads(line) for line in whole.splitlines()]
    except ValueError:
        raise UserError(f'{path} is broken') from None
    check(records, 'out_dir', folder, 'a run that has logged something')
    return records


def series(records, key):
    """(steps, values) of a key."""
    found = [(record['iter'], record[key]) for record in records if record.get(key) is not None]
    return zip(*found, strict=True) if found else ((), ())


def draw_row(axes, records, name, colors):
    """Draws one run into a row of axes."""
    for key, label, style in (('train/loss', 'train', '-'), ('val/loss', 'val', 'o')):
        axes[0].plot(*series(records, key), style, label=label, markersize=4)
    axes[0].legend()
    axes[0].set(title=f'{name}: loss, nats')
    keys = {key for record in records for key in record}
    block = max(
        (int(key[16:18]) for key in keys if key.startswith('grad_norm/block_') and '/loop' in key), default=0
    )
    loops = [k for k in range(1000) if {f'hidden_norm/loop_{k:02d}', f'train/loss/loop_{k:02d}'} & keys]
    for axis, (title, pattern, log) in zip(axes[1:], PANELS, strict=True):
        for k in loops:
            key = pattern.format(k, block=block)
            steps, values = series(records, key if key in keys else f'train/{key}')
            if steps and (not log or max(values) > 0):
                axis.plot(steps, values, color=colors(k / max(1, len(loops) - 1)), label=f'loop {k}')
        axis.set(title=title, xlabel='step', yscale='log' if log else 'linear')
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
    columns = 1 + len(PANELS)
    figure, rows = pyplot.subplots(
        len(logs),
        columns,
        figsize=(4 * columns, 3.4 * len(logs)),
        squeeze=False,
        sharey='col',
        layout='constrained',
    )
    for axes, records, folder in zip(rows, logs, folders, strict=True):
        draw_row(axes, records, Path(folder).name, pyplot.get_cmap('viridis'))
    png = Path(c.png or Path(folders[0]) / 'log.png')
    check(png.suffix == '.png' and png.parent.is_dir(), 'png', c.png, 'a file of a folder that exists, .png')
    figure.savefig(png, dpi=80)
    print(f'drawn: {png}')


if __name__ == '__main__':
    main()
