"""
Decoding against recomputing, and what exits and speculation save.

    python tests/speed_of_decoding.py                                  a random model of 12 layers, 384 wide
    python tests/speed_of_decoding.py out-shakespeare-char-sampled-cpu    a trained one, at 8 loops

Greedy, one row, the ways taking turns; medians of several rounds.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from bench import recompute_stream
from data.dataset import Split, find_data, read_meta
from generate import Decoder, Exit, stream
from model import GPT, GPTConfig, load_checkpoint
from storage import find_checkpoint

LOOPS = 8


def seconds(tokens):
    """(seconds, list of the tokens)."""
    start = time.perf_counter()
    found = [token.tolist() for token in tokens]
    return time.perf_counter() - start, found


def against_recomputing(tokens=512, rounds=2):
    sizes = dict(
        n_prelude=2, n_block=2, n_coda=2, n_loop=4, n_embd=384, n_head=6, block_size=1024, vocab_size=65
    )
    torch.manual_seed(0)
    model = GPT(GPTConfig(**sizes)).eval()
    low = GPT(GPTConfig(**sizes)).eval()
    low.load_state_dict(model.state_dict())
    low.bfloat16()
    idx, times = torch.zeros(1, 1, dtype=torch.long), {}
    for _ in range(rounds):
        for name, tokens_of in (
            ('recomputing, float32', lambda: recompute_stream(model, idx, tokens)),
            ('cached, float32', lambda: stream(model, idx, tokens, temperature=0)),
            ('cached, bfloat16 weights', lambda: stream(low, idx, tokens, temperature=0)),
        ):
            with torch.no_grad():
                times.setdefault(name, []).append(seconds(tokens_of())[0])
    first = times['recomputing, float32']
    for name, found in times.items():
        ratios = [a / b for a, b in zip(first, found, strict=True)]
        rates = ', '.join(f'{tokens / x:.1f}' for x in found)
        print(f'{name:26} {rates} tokens/s, {statistics.median(ratios):.1f} times')


@torch.no_grad()
def losses(model, leaves, windows=64):
    """Validation loss and loops per token under each of leaves, by the rule of decoding."""
    c = model.config
    folder = find_data('shakespeare_char')
    split = Split(folder, read_meta(folder), 'val', c.block_size, c.vocab_size)
    x, y = (torch.from_numpy(a) for a in split.stack(split.fixed(windows), windows))
    for name, leave in leaves.items():
        nll = []
        for part, targets in zip(x.split(16), y.split(16), strict=True):
            decoder = Decoder(model, len(part), c.block_size, n_loop=LOOPS, leave=leave)
            nll.append(model.nll(decoder.advance(part).flatten(0, 1), targets.flatten()))
        nll = torch.cat(nll)
        yield name, nll.mean().item(), mean_loops(leave)


def mean_loops(leave):
    taken = leave.taken if leave else {LOOPS: 1}
    return sum(n * tokens for n, tokens in taken.items()) / sum(taken.values())


def of_a_trained_model(path, tokens=200, rounds=5):
    model, _ = load_checkpoint(find_checkpoint(path, path))
    model.eval()
    leaves = {'all loops': None}
    leaves |= {f'diff {t}': Exit('diff', t) for t in (0.03, 0.1, 0.2, 0.3)}
    leaves |= {f'kl {t}': Exit('kl', t) for t in (1e-4, 1e-3, 1e-2)}
    for name, loss, loops in losses(model, leaves):
        saved = 1 - loops / LOOPS
        print(f'{name:10} validation loss {loss:.4f}, loops {loops:.2f} of {LOOPS}, saved {saved:.0%}')
    idx, times, texts = torch.zeros(1, 1, dtype=torch.long), {}, {}
    leave = Exit('diff', 0.1)
    for _ in range(rounds):
        for name, options in {
            'all loops': dict(n_loop=LOOPS),
            'one loop': dict(n_loop=1),
            'diff 0.1': dict(n_loop=LOOPS, leave=leave),
            'speculate 4': dict(n_loop=LOOPS, speculate=4),
            'speculate 8': dict(n_loop=LOOPS, speculate=8),
        }.items():
            leave.taken.clear()
            taken, texts[name] = seconds(stream(model, idx, tokens, temperature=0, **options))
            times.setdefault(name, []).append(taken)
    t = {name: statistics.median(found) for name, found in times.items()}
    for name, found in t.items():
        print(f'{name:12} {tokens / found:6.1f} tokens/s, {t["all loops"] / found:.2f} times')
    seconds(stream(model, idx, tokens, temperature=0, n_loop=LOOPS, leave=leave))
    skipped = (LOOPS - mean_loops(leave)) * (t['all loops'] - t['one loop']) / (LOOPS - 1)
    print(f'diff 0.1: {(t["all loops"] - t["diff 0.1"]) / skipped:.0%} of the skipped time is saved')
    same = texts['speculate 4'] == texts['all loops'] == texts['speculate 8']
    print(f'speculation gives the same text: {same}')


if __name__ == '__main__':
    of_a_trained_model(sys.argv[1]) if sys.argv[1:] else against_recomputing()
