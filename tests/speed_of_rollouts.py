"""
Measures rollouts against sampling one sequence at a time without a cache: the same greedy tokens, in turns.

    python tests/speed_of_rollouts.py

Random weights, 2 + 2x4 + 2 layers, 128 wide; 16 answers of 64 tokens to prompts of 64.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from model import GPT, GPTConfig
from nanoloop.rollout import roll_out

N_ROWS, N_PROMPT, N_NEW, ROUNDS = 16, 64, 64, 5


def seconds(function):
    """Returns the result of a function, and how long it took."""
    start = time.monotonic()
    return function(), time.monotonic() - start


def main():
    torch.manual_seed(0)
    sizes = dict(n_prelude=2, n_block=2, n_coda=2, n_loop=4, n_embd=128, n_head=4)
    model = GPT(GPTConfig(**sizes, block_size=256, vocab_size=256)).eval()
    prompts = torch.randint(256, (N_ROWS, N_PROMPT))
    together = lambda: roll_out(model, prompts.tolist(), N_NEW, temperature=0).ids  # noqa: E731
    alone = lambda: torch.cat([model.generate(row[None], N_NEW, temperature=0) for row in prompts])  # noqa: E731
    ratios = []
    for round_ in range(ROUNDS + 1):
        (ids, fast), (expected, slow) = seconds(together), seconds(alone)
        assert torch.equal(ids, expected)
        if round_:  # the first one is not counted
            ratios.append(slow / fast)
            print(f'rollouts {fast:.2f} s, one by one without a cache {slow:.2f} s: {slow / fast:.1f} times')
    print(f'median of {ROUNDS}: {statistics.median(ratios):.1f} times')


if __name__ == '__main__':
    main()
