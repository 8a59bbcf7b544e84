"""
Peak memory of a training step by supervised loops, truncated loops and recomputation, as ratios.

    python tests/memory_of_loops.py          about 5 minutes on 2 CPU cores; on a GPU its allocator is asked

Every figure is of a fresh process, after its first steps: the peak above what was resident before the step,
on a CPU from VmHWM after a reset through /proc/self/clear_refs.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SIZES = '--n_embd=384 --n_head=3 --block_size=512 --batch_size=4 --vocab_size=50304'
MODELS = {
    'FLT': 'config/train_flt.py --n_block=2 --gradient_accumulation_steps=1',
    'nanoLOOP': 'config/train_gpt2_looped.py --n_prelude=1 --n_coda=1 --gradient_accumulation_steps=1',
}
RATIOS = (  # what, its flags, those it is compared with, the most that is promised
    ('STEP / END, 12 loops', '--objective=step --n_loop=12 --bptt_k=None', '--n_loop=12 --bptt_k=None', 1.15),
    ('32 loops / 4, bptt_k 2', '--n_loop=32 --bptt_k=2', '--n_loop=4 --bptt_k=2', 1.1),
    (
        'recompute / plain, 12 loops',
        '--n_loop=12 --bptt_k=None --recompute=True',
        '--n_loop=12 --bptt_k=None',
        0.5,
    ),
)


def resident(key):
    line = next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def measure(argv):
    """Bytes that a training step takes at its peak."""
    import torch

    from bench import BenchConfig, Setting
    from configurator import configure
    from model import GPTConfig
    from nanoloop.machine import setup
    from train import TrainConfig

    c = configure((BenchConfig, TrainConfig, GPTConfig), argv, say=None)
    c.build(TrainConfig)
    m = setup(c)
    side = Setting(c, m, 'this')  # a few steps
    if m.kind == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side.run(1)
        return torch.cuda.max_memory_allocated() - before
    Path('/proc/self/clear_refs').write_text('5')
    before = resident('VmRSS')
    side.run(1)
    return resident('VmHWM') - before


def peak(flags):
    env = dict(os.environ, MALLOC_ARENA_MAX='1', MALLOC_MMAP_THRESHOLD_='65536')
    command = [sys.executable, __file__, *flags.split(), *SIZES.split(), '--warmup=1', '--compile=False']
    return int(
        subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.split()[-1]
    )


def main():
    worst = 0.0
    for (name, flags), (what, one, other, most) in itertools.product(MODELS.items(), RATIOS):
        a, b = peak(f'{flags} {one}'), peak(f'{flags} {other}')
        worst = max(worst, a / b / most)
        print(
            f'{name:10} {what:30} {a / 2**20:6,.0f} / {b / 2**20:6,.0f} MiB = {a / b:.3f}, at most {most}',
            flush=True,
        )
    sys.exit(0 if worst <= 1 else 1)


if __name__ == '__main__':
    print(measure(sys.argv[1:])) if sys.argv[1:] else main()
