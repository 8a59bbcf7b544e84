"""
What sampled loops cost beside their loops: time, and graphs to compile.

    python tests/speed_of_sampling.py [--key=value ...]      a few minutes on 2 CPU cores

100 steps with drawn loops (poisson, mean 4, at most 16) against the sum, over the same counts, of the median
step with that count throughout, in turns and compiled before. Then the same for a growing number of loops.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from bench import BenchConfig, Setting
from configurator import configure
from model import GPTConfig
from nanoloop.machine import setup
from nanoloop.objective import loops_at
from nanoloop.training_step import train_step
from train import TrainConfig

SIZES = '--n_loop=4 --bptt_k=None --compile=True --warmup=1 --vocab_size=256'.split()
WAYS = {'sampled': dict(loop_sampling='poisson', loop_max=16), 'growing': dict(loop_warmup=100)}
TURN = 10


def graphs():
    return torch._dynamo.utils.counters['stats']['unique_graphs']


def main(argv):
    c = configure((BenchConfig, TrainConfig, GPTConfig), ['config/quickstart.py', *SIZES, *argv], say=None)
    m = setup(c.build(TrainConfig) and c)
    side = Setting(c, m, 'this')

    def seconds(n_loop):
        start = time.perf_counter()
        train_step(side.training_loss, side.optimizers, side.scaler, side.batches, n_loop, c, m)
        return time.perf_counter() - start

    print(m.line)
    first, limit = graphs(), 0.0
    for name, keys in WAYS.items():
        c.update(loop_sampling='fixed', loop_max=None, loop_warmup=0) or c.update(keys)
        counts = [loops_at(step, c) for step in range(100)]
        for n_loop in sorted(set(counts)):
            seconds(n_loop)
        drawn, fixed = [], {n_loop: [] for n_loop in counts}
        for i in range(0, 100, TURN):
            drawn += [seconds(n_loop) for n_loop in counts[i : i + TURN]]
            for n_loop in sorted(set(counts[i : i + TURN])):
                fixed[n_loop] += [seconds(n_loop) for _ in range(4)][1:]
        whole, parts = sum(drawn), sum(statistics.median(fixed[n_loop]) for n_loop in counts)
        limit = max(limit, whole / parts)
        drawn = f'loops {min(counts)} to {max(counts)}, mean {statistics.mean(counts):.2f}'
        ratio = f'{whole:.2f} s against {parts:.2f} s: {whole / parts:.3f}'
        print(f'{name}: {drawn}; {ratio}; graphs {first}, at the end {graphs()}')
    sys.exit(0 if limit <= 1.05 and graphs() == first else 1)


if __name__ == '__main__':
    main(sys.argv[1:])
