"""
Decoding against recomputing, and what exits and speculation save.

    python tests/speed_of_decoding.py                                  a random model of 12 layers, 384 wide
    python tests/speed_of_decoding.py out-shakespeare-char-sampled-cpu    a trained one, at 8 loops

Greedy, one row, the ways taking turns; medians of several rounds.
"""

import copy
import functools
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from bench import recompute_stream
from model import GPT, GPTConfig
from nanoloop.checkpoint import load_checkpoint
from nanoloop.datasets import Split, find_data, read_meta
from nanoloop.generate import Decoder, Exit, lower, stream
from nanoloop.machine import autocast

LOOPS = 8


def medians(ways, rounds):
    """{name: ...} of ways, functions that yield tokens, taking turns: the median seconds, the median ratio of
    the first way's seconds and its own, the tokens. A first round is not counted."""
    times, texts = {name: [] for name in ways}, {}
    for _ in range(rounds + 1):
        for name, tokens_of in ways.items():
            start = time.perf_counter()
            texts[name] = [token.tolist() for token in tokens_of()]
            times[name].append(time.perf_counter() - start)
    first, *_ = times.values()
    ratios = {name: [a / b for a, b in zip(first, t, strict=True)] for name, t in times.items()}
    seconds, ratios = (
        {name: statistics.median(x[1:]) for name, x in found.items()} for found in (times, ratios)
    )
    return seconds, ratios, texts


@torch.no_grad()
def against_recomputing(tokens=512, rounds=3):
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_embd=384, n_head=6, vocab_size=65)).eval()
    low = copy.deepcopy(model)
    lower(low, torch.bfloat16)
    idx = torch.zeros(1, 1, dtype=torch.long)

    def sampled(model, dtype, **options):
        with autocast('cpu', dtype):
            yield from stream(model, idx, tokens, temperature=0, **options)

    ways = {'recomputing, float32': lambda: recompute_stream(model, idx, tokens)}
    for name, *args in (('float32', model, torch.float32), ('bfloat16 weights', low, torch.bfloat16)):
        ways[f'cached, {name}'] = functools.partial(sampled, *args)
        ways[f'compiled, {name}'] = functools.partial(sampled, *args, compile=True)
    times, ratios, _ = medians(ways, rounds)
    for name, t in times.items():
        print(f'{name:26} {tokens / t:6.1f} tokens/s, {ratios[name]:5.2f} times')


@torch.no_grad()
def loss(model, windows=64, pieces=(10**9,), **options):
    """(validation loss, loops per token) by the rule of decoding, pieces of so many tokens at a time."""
    c, leave = model.config, options.get('leave')
    folder = find_data('shakespeare_char')
    split = Split(folder, read_meta(folder), 'val', c.block_size, c.vocab_size)
    x, y = (torch.from_numpy(a) for a in split.read_windows(split.eval_windows(windows), windows))
    decoder = Decoder(model, windows, c.block_size, **options)
    read = torch.cat([decoder.advance(piece) for piece in x.split(*pieces, dim=1)], dim=1)
    return model.nll(read.flatten(0, 1), y.flatten()).mean().item(), (leave.mean() if leave else LOOPS)


def losses(model):
    settings = {'all loops': {}, 'kv_budget 4': dict(kv_budget=4), 'kv_budget 1': dict(kv_budget=1)}
    settings |= {f'diff {t}': dict(leave=Exit('diff', t)) for t in (0.03, 0.1, 0.2, 0.3)}
    settings |= {f'kl {t}': dict(leave=Exit('kl', t)) for t in (1e-4, 1e-3, 1e-2)}
    for name, options in settings.items():  # a prompt at once is exact with any budget
        found, loops = loss(model, n_loop=LOOPS, pieces=(1 if 'kv_budget' in options else 10**9,), **options)
        print(f'{name:11} validation loss {found:.5f}, loops {loops:.2f} of {LOOPS}')


def speeds(model, rows, tokens=120, rounds=5):
    """Exits and speculation against all loops and one, for so many rows."""
    dice = torch.Generator().manual_seed(0)
    idx = torch.randint(model.config.vocab_size, (rows, 8), generator=dice)
    leave = Exit('diff', 0.1)
    settings = {'all loops': {}, 'one loop': dict(n_loop=1), 'diff 0.1': dict(leave=leave)}
    if rows == 1:
        settings |= {f'speculate {k}': dict(speculate=k) for k in (4, 8)}
    ways = {
        name: functools.partial(
            stream, model, idx, tokens, temperature=0, **dict(dict(n_loop=LOOPS), **options)
        )
        for name, options in settings.items()
    }
    t, ratios, texts = medians(ways, rounds)
    for name in ways:
        print(f'{rows:2} rows, {name:12} {rows * tokens / t[name]:7.1f} tokens/s, {ratios[name]:.2f} times')
    skipped = (LOOPS - leave.mean()) * (t['all loops'] - t['one loop']) / (LOOPS - 1)
    saved = (t['all loops'] - t['diff 0.1']) / skipped
    print(f'{rows:2} rows, diff 0.1: {leave.mean():.2f} loops, {saved:.0%} of the skipped time is saved')
    if rows == 1:
        same = texts['speculate 4'] == texts['all loops'] == texts['speculate 8']
        print(f'speculation gives the same text: {same}')


def of_a_trained_model(path):
    model, _ = load_checkpoint(path)
    losses(model)
    for rows in (1, 8, 64):
        speeds(model, rows)


if __name__ == '__main__':
    of_a_trained_model(sys.argv[1]) if sys.argv[1:] else against_recomputing()
