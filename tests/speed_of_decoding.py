"""
Measures decoding: against recomputing everything, and what early exits and speculation save.

    python tests/speed_of_decoding.py                                  a random model of 12 layers, 384 wide
    python tests/speed_of_decoding.py out-shakespeare-char-sampled-cpu    a trained one, at 8 loops

Greedy; the ways take turns; medians of several rounds.
"""

import copy
import functools
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from model import GPT, GPTConfig
from nanoloop.bench_decode import recompute, time_decoding
from nanoloop.checkpoint import load_checkpoint
from nanoloop.datasets import Split, find_data, read_meta
from nanoloop.decode import Decoder, prepare_linears_
from nanoloop.early_exit import EarlyExit
from nanoloop.generate import generate, stream
from nanoloop.machine import autocast

LOOPS = 8


def against_recomputing(tokens=512, rounds=3):
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_embd=384, n_head=6, vocab_size=65)).eval()
    full, low = copy.deepcopy(model), copy.deepcopy(model)
    prepare_linears_(full, torch.float32)
    prepare_linears_(low, torch.bfloat16)
    idx = torch.zeros(1, 1, dtype=torch.long)

    def sampled(model, dtype, **options):
        with autocast('cpu', dtype):
            yield from stream(model, idx, tokens, temperature=0, **options)

    ways = {'recomputing, float32': lambda: recompute(model, idx, tokens)}
    for name, *args in (('float32', full, torch.float32), ('bfloat16 weights', low, torch.bfloat16)):
        ways[f'cached, {name}'] = functools.partial(sampled, *args)
        ways[f'compiled, {name}'] = functools.partial(sampled, *args, compile=True)
    seconds = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, tokens_of in ways.items():
            start = time.perf_counter()
            list(tokens_of())
            seconds[name].append(time.perf_counter() - start)
    first = seconds['recomputing, float32']
    for name, t in seconds.items():  # the first round is not counted
        ratio = statistics.median(a / b for a, b in zip(first[1:], t[1:], strict=True))
        print(f'{name:26} {tokens / statistics.median(t[1:]):6.1f} tokens/s, {ratio:5.2f} times')


@torch.no_grad()
def losses(model, windows=64):
    """Prints validation loss and loops per token by the rule of decoding."""
    c, folder = model.config, find_data('shakespeare_char')
    split = Split(folder, read_meta(folder), 'val', c.block_size, c.vocab_size)
    x, y = (torch.from_numpy(a) for a in split.read_windows(split.eval_windows(windows), windows))
    settings = {'all loops': {}, 'kv_budget 4': dict(kv_budget=4), 'kv_budget 1': dict(kv_budget=1)}
    settings |= {f'diff {t}': dict(early_exit=EarlyExit('diff', t)) for t in (0.03, 0.1, 0.2, 0.3)}
    settings |= {f'kl {t}': dict(early_exit=EarlyExit('kl', t)) for t in (1e-4, 1e-3, 1e-2)}
    for name, options in settings.items():
        decoder = Decoder(model, windows, c.block_size, n_loop=LOOPS, **options)
        size = 1 if 'kv_budget' in options else c.block_size  # a prompt at once is exact with any budget
        head_input = torch.cat([decoder.prefill(piece) for piece in x.split(size, dim=1)], dim=1)  # (B, T, C)
        loss = model.nll(head_input.flatten(0, 1), y.flatten()).mean()
        loops = decoder.stats.mean_loops
        print(f'{name:11} validation loss {loss:.5f}, loops {loops:.2f} of {LOOPS}')


def speeds(model, rows, tokens=120, rounds=5):
    """Prints the speed with exits and speculation, with all loops and with one."""
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(model.config.vocab_size, (rows, 8), generator=generator)
    exit = dict(early_exit=EarlyExit('diff', 0.1))
    ways = {'all loops': {}, 'one loop': dict(n_loop=1), 'diff 0.1': exit}
    if rows == 1:
        ways |= {f'speculate {k}': dict(speculate=k) for k in (4, 8)}
        ways |= {f'speculate {k}, diff 0.1': exit | dict(speculate=k) for k in (4, 8)}
    ways |= {f'{name}, compiled': options | dict(compile=True) for name, options in ways.items()}
    ways = {name: dict(n_loop=LOOPS) | options for name, options in ways.items()}
    timings = time_decoding(model, idx, tokens, ways, rounds)
    t = {name: statistics.median(timing.seconds) for name, timing in timings.items()}
    for name, seconds in t.items():
        times = t['all loops'] / seconds
        print(f'{rows:2} rows, {name:32} {rows * tokens / seconds:7.1f} tokens/s, {times:.2f} times')
    loops = timings['diff 0.1'].stats.mean_loops
    skipped = (LOOPS - loops) * (t['all loops'] - t['one loop']) / (LOOPS - 1)
    saved = (t['all loops'] - t['diff 0.1']) / skipped
    print(f'{rows:2} rows, diff 0.1: {loops:.2f} loops, {saved:.0%} of the skipped time is saved')
    if rows == 1:
        for names in (
            ('all loops', 'speculate 4', 'speculate 8'),
            ('diff 0.1', 'speculate 4, diff 0.1', 'speculate 8, diff 0.1, compiled'),
        ):
            plain, *drafted = (generate(model, idx, tokens, temperature=0, **ways[name]) for name in names)
            same = all(torch.equal(plain, ids) for ids in drafted)
            print(f'{", ".join(names)}: the same text: {same}')


def of_a_trained_model(name):
    model, _ = load_checkpoint(name)
    losses(model)
    for rows in (1, 8, 64):
        speeds(model, rows)


if __name__ == '__main__':
    of_a_trained_model(sys.argv[1]) if sys.argv[1:] else against_recomputing()
