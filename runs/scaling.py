"""
Measures how the time of a token in training depends on loops, context length, batch, and size of the data.

    python runs/scaling.py [--key=value ...]     keys of bench.py and train.py; 10 minutes on 2 CPU cores

It is the model of config/quickstart.py with a gradient through all loops, eager. The values of one axis take
turns. Prints a Markdown table for each axis. Where time is linear in the counted FLOPs, the column TFLOP/s is
flat. Writes the picture scaling.png into --out_dir: points are measured, lines are the counted FLOPs at the
best rate of the axis.

For the data, files without content (sparse) are made in a temporary folder. Processes of their own train on
them: the seconds from the start to the end of the first step, and ms per step after it.
"""

import contextlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import command, configure

# a Ctrl-C while the rest is imported is handled from here on
# isort: split
from bench import BenchConfig, Setting
from model import GPTConfig
from nanoloop import ROOT
from nanoloop.eval_plot import check_plotting
from nanoloop.machine import setup
from nanoloop.tokenizer import Bytes
from train import TrainConfig

MODEL = 'config/quickstart.py --bptt_k=None --vocab_size=256 --compile=False --steps=3 --warmup=1'.split()
TOKENS = 4096  # of a step with the longest context, and of every other on that axis
AXES = {  # key: (its values, a function of a value: other keys)
    'n_loop': ((1, 2, 4, 8, 16, 32), lambda n: []),
    'block_size': ((256, 512, 1024, 2048, 4096), lambda n: [f'--batch_size={TOKENS // n}']),
    'batch_size': ((1, 2, 4, 8, 16, 32, 64), lambda n: []),
}
DATA_BYTES = (10**6, 10**7, 10**8, 10**9, 10**10)
SHORT_RUN = (
    'config/quickstart.py --compile=False --max_iters=30 --eval_interval=30 --eval_iters=1 '
    '--eval_at_start=False --log_interval=1 --sample_tokens=0'
).split()


class Row(NamedTuple):
    """A measured value of an axis."""

    value: int
    ms: float  # per step, the median
    us: float  # per token
    flops: float  # per token
    rate: float  # TFLOP/s


def read_keys(argv):
    """Returns the keys of the model above, changed by argv. Raises UserError."""
    with contextlib.redirect_stdout(None):
        c = configure((BenchConfig, TrainConfig, GPTConfig), [*MODEL, *argv])
    for section in (BenchConfig, TrainConfig, GPTConfig):
        c.build(section)  # which checks its keys
    return c


def measure(key, values, others, argv):
    """Returns the Machine and a Row for each value of a key, measured in turns. others: see AXES."""
    settings = []
    for value in values:
        c = read_keys([*others(value), *argv, f'--{key}={value}'])
        m = setup(c)
        settings.append(Setting(c, m, str(value)))
    for _ in range(c.rounds):
        for setting in settings:
            setting.seconds.append(setting.run(setting.c.steps))
    rows = []
    for value, setting in zip(values, settings, strict=True):
        seconds = statistics.median(setting.seconds)
        flops = setting.flops / (len(setting.seconds) * setting.c.steps)  # of a token
        us = 1e6 * seconds / setting.tokens
        rows.append(Row(value, 1e3 * seconds, us, flops, flops / us / 1e6))
    return m, rows


def make_data(folder, n_bytes):
    """Writes a data set of bytes (vocabulary 256, uint16) whose files take no space."""
    folder.mkdir()
    splits = {}
    for split, n in dict(train=n_bytes // 2, val=100_000).items():
        with open(folder / f'{split}.bin', 'wb') as file:
            file.truncate(2 * n)
        splits[split] = dict(tokens=n, files=[dict(name=f'{split}.bin', tokens=n, sha256='')])
    meta = dict(vocab_size=256, max_id=0, dtype='uint16', tokenizer=Bytes().spec, token_bytes=[1] * 256)
    (folder / 'meta.json').write_text(json.dumps(meta | dict(splits=splits, source='zeros', made_from='')))


def train_on(folder, argv):
    """Trains some steps. Returns (seconds from the start to the end of the first step, ms per later step)."""
    flags = [*SHORT_RUN, f'--dataset={folder}', f'--out_dir={folder}/out', *argv]
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, '-u', str(ROOT / 'train.py'), *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    first, later = None, []
    for line in process.stdout:
        if found := re.match(r'iter (\d+): .*time ([\d.]+)ms', line):
            first = first or time.perf_counter() - start
            later.append(float(found[2]))
    if process.wait():
        sys.exit(process.returncode)
    return first, statistics.median(later[5:])


def measure_data(rounds, argv):
    """Returns {bytes: (seconds until the first step, ms per step)}, medians of rounds in turns."""
    figures = {n_bytes: [] for n_bytes in DATA_BYTES}
    for _ in range(rounds):
        for n_bytes, found in figures.items():
            with tempfile.TemporaryDirectory() as parent:
                make_data(Path(parent) / 'zeros', n_bytes)
                found.append(train_on(Path(parent) / 'zeros', argv))
    return {n: tuple(map(statistics.median, zip(*found, strict=True))) for n, found in figures.items()}


def draw(axes, data, path):
    """Draws a panel per axis: time of a token against the values."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(axes) + 1, figsize=(14, 3.4), layout='constrained')
    for panel, (key, rows) in zip(panels, axes.items(), strict=False):
        values, best = [row.value for row in rows], max(row.rate for row in rows)
        counted = [row.flops / best / 1e6 for row in rows]  # µs per token
        panel.loglog(values, [row.us for row in rows], 'o', label='measured')
        panel.loglog(values, counted, '-', label=f'FLOPs at {best:.3f} TFLOP/s')
        panel.set(xlabel=key, ylabel='µs per token', xticks=values, xticklabels=values)
        panel.minorticks_off()
        panel.set_ylim(bottom=min(row.us for row in rows) / 2)
        panel.legend(fontsize='small')
    first, later = zip(*data.values(), strict=True)
    panels[-1].loglog(list(data), later, 'o-', label='a step, ms')
    panels[-1].loglog(list(data), [1e3 * s for s in first], 's-', label='start to first step, ms')
    panels[-1].set(xlabel='bytes of train.bin', ylim=(10, 1e5))
    panels[-1].legend(fontsize='small')
    figure.savefig(path, dpi=130)


@command
def main(argv):
    check_plotting()
    c = read_keys(argv)
    path = Path(c.out_dir) / 'scaling.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    axes = {}
    for key, (values, others) in AXES.items():
        m, axes[key] = measure(key, values, others, argv)
        if len(axes) == 1:
            print(m.line)
        print(f'\n| {key} | ms per step | µs per token | MFLOP per token | TFLOP/s |\n|---|---|---|---|---|')
        for row in axes[key]:
            print(f'| {row.value} | {row.ms:.1f} | {row.us:.1f} | {row.flops / 1e6:.2f} | {row.rate:.4f} |')
    keys = [arg for arg in argv if arg.split('=')[0] in ('--device', '--dtype')]
    data = measure_data(min(3, c.rounds), keys)
    print('\n| bytes of train.bin | ms per step | s from the start to the end of step 0 |\n|---|---|---|')
    for n_bytes, (first, ms) in data.items():
        print(f'| {n_bytes:,} | {ms:.1f} | {first:.2f} |')
    draw(axes, data, path)
    print(f'\nwrote {path}')


if __name__ == '__main__':
    main()
