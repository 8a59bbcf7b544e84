"""
Measures early exits of several rows: in step, and without waiting for each other (nanoloop/depth.py).

    python tests/speed_of_depth.py [n_prelude,n_block,n_coda [n_loop [rows]]]

Random weights, 384 wide, greedy, CPU seconds of one thread, which another load hardly changes. A made-up rule
exits by a hash of the state, so that the numbers of loops are spread. The ways take turns; medians of 3.
"""

import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from model import GPT, GPTConfig
from nanoloop import depth
from nanoloop.decode import prepare_linears_
from nanoloop.generate import Generation
from nanoloop.machine import autocast

TOKENS, PROMPT, ROUNDS = 24, 64, 3
EARLY = {4: [0.6, 0.2, 0.1, 0.1], 8: [0.5, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05]}


class HashedExit:
    """Stands for an EarlyExit. shares: the share of tokens that takes 1, 2, ... loops."""

    rule = SimpleNamespace(needs_logits=False)

    def __init__(self, shares):
        left = [sum(shares[i:]) for i in range(len(shares))]
        self.chance = torch.tensor([share / rest for share, rest in zip(shares, left, strict=True)])

    def check_model(self, model, n_loop):
        pass

    def __call__(self, model, i, previous, s, x, memory):
        return (1000 * s[..., 0].float() + 0.618034 * i) % 1 < self.chance[i], None


def measure(model, idx, **options):
    """Returns the milliseconds of a token of every row, and the loops per token, after the first one."""
    generation = Generation(model, idx, temperature=0, max_tokens=PROMPT + TOKENS, **options)
    tokens = generation.stream(TOKENS)
    next(tokens)
    before, start = generation.stats.loops_taken.copy(), time.process_time()
    list(tokens)
    seconds, taken = time.process_time() - start, generation.stats.loops_taken - before
    return 1000 * seconds / (TOKENS - 1), sum(n * k for n, k in taken.items()) / taken.total()


def compare(model, rows, shares):
    """Returns a line: milliseconds, and the saved share of the skipped loops' time, in step and apart."""
    n_loop, early = model.config.n_loop, HashedExit(shares)
    idx = torch.randint(65, (rows, PROMPT), generator=torch.Generator().manual_seed(1))
    ways = dict(all={}, one=dict(n_loop=1), step=dict(early_exit=early, lockstep=True))
    ways['apart'] = dict(early_exit=early)
    times, loops = {name: [] for name in ways}, {}
    for counted in [False] + [True] * ROUNDS:
        for name, options in ways.items():
            ms, loops[name] = measure(model, idx, **options)
            if counted:
                times[name].append(ms)
    parts = []
    for name in ('step', 'apart'):
        skipped = (n_loop - loops[name]) / (n_loop - 1)
        rounds = zip(times['all'], times[name], times['one'], strict=True)
        saved = statistics.median((a - t) / ((a - one) * skipped) for a, t, one in rounds)
        parts.append(
            f'{name} {statistics.median(times[name]):6.1f} ms, {saved:4.0%} saved, {loops[name]:.2f} loops'
        )
    return f'all {statistics.median(times["all"]):6.1f} ms; ' + '; '.join(parts)


def main(layers='2,2,2', n_loop=4, rows=8):
    if n_loop not in EARLY:
        sys.exit(f'n_loop is {n_loop}, expected one of {", ".join(map(str, EARLY))}')
    torch.set_num_threads(1)
    depth.MOST_OUTSIDE = float('inf')  # every model goes apart
    sizes = dict(zip(('n_prelude', 'n_block', 'n_coda'), map(int, layers.split(',')), strict=True))
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        config = GPTConfig(
            n_embd=384, n_head=6, vocab_size=65, block_size=512, pos='rope', n_loop=n_loop, **sizes
        )
        model = GPT(config).eval()
        prepare_linears_(model, dtype)
        for name, shares in (('even', [1 / n_loop] * n_loop), ('early', EARLY[n_loop])):
            with autocast('cpu', dtype):
                print(f'{dtype}, {rows} rows, {name:5}: {compare(model, rows, shares)}', flush=True)


if __name__ == '__main__':
    main(*sys.argv[1:2], *map(int, sys.argv[2:]))
