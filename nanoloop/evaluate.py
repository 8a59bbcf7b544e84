"""
Validation: loss, perplexity and bits per byte over fixed windows, the same for any number of processes, and
the loss after other numbers of loops.
"""

import functools
import math

import torch

from nanoloop.checks import check
from nanoloop.number_lists import read_numbers
from nanoloop.parallel import reduce_sum


@torch.no_grad()
def evaluate(model, splits, c, m, token_bytes, stopped=lambda: False, tell=lambda doing, progress: None):
    """Returns {split: {loss, ppl, bpb}}, or None if stopped() became true. The model's mode is kept.

    The loss is that of the last loop, whatever the objective, in nats per target. `val` also has loss@n for
    the numbers of loops n in c.eval_loops, of the same windows.

    splits: {name: Split}. c: the run's keys (eval_iters, eval_loops, batch_size, dataset). token_bytes: the
    number of bytes of every token id. Tokens with 0 bytes (special tokens) do not count in bits per byte.
    tell: called with what is being done and how far it is.
    """
    n = c.eval_iters * c.batch_size or len(splits['val'].eval_windows())
    loops_of = dict(val=read_numbers(c.eval_loops))
    bytes_of, training, result = torch.tensor(token_bytes, dtype=torch.float64), model.training, {}
    model.eval()
    try:
        for name, split in splits.items():
            progress = functools.partial(tell, f'evaluating the loss on {name}')
            windows, rest = split.eval_windows(n), (c.batch_size, m, bytes_of, stopped, progress)
            loops = loops_of.get(name, [])
            sums = sum_over_windows(model, split, windows, loops, *rest)
            if sums is None:
                return None
            (nll, tokens, nll_of_bytes, size), nll_at = (x.tolist() for x in sums)
            check(tokens, 'dataset', c.dataset, f'targets that count in {name}, its mask leaves none')
            loss = nll / tokens
            bpb = nll_of_bytes / math.log(2) / size if size else math.nan
            result[name] = dict(loss=loss, ppl=math.exp(min(loss, 700)), bpb=bpb)
            result[name] |= {f'loss@{n_loop}': x / tokens for n_loop, x in zip(loops, nll_at, strict=True)}
    finally:
        model.train(training)
    return result


def sum_over_windows(model, split, windows, loops, batch_size, m, bytes_of, stopped, progress):
    """Returns sums over all ranks: (-log p, targets, -log p of targets with bytes, their bytes), and -log p
    after each of the numbers of loops, (n,). float64.

    None if stopped() became true. progress: called with how far it is, a text.
    """
    n_loop = model.config.n_loop
    read = sorted({n_loop, *loops})  # numbers of loops: one pass of the most has the states of all
    indices = [n - 1 for n in read]
    sums, nll_at = (torch.zeros(n, dtype=torch.float64) for n in (4, len(loops)))
    for i in range(0, len(windows), batch_size * m.world):  # as many rounds on every rank
        progress(f': {i:,} of {len(windows):,} windows')
        if stopped():
            return None
        own = windows[i + m.rank * batch_size :][:batch_size]
        if not own:
            continue
        idx, targets = (torch.from_numpy(a) for a in split.read_windows(own, batch_size))  # (B, T) each
        with m.autocast():
            table, _ = model.loss_table(m.to_device(idx), m.to_device(targets), read[-1], indices)
        ce_at = dict(zip(read, table.cpu().double(), strict=True))  # (B, T) each
        ce, counted = ce_at[n_loop], targets != -1  # (B, T) each
        size = bytes_of[targets.clamp(min=0)] * counted
        sums += torch.stack((ce.sum(), counted.sum(), ce[size > 0].sum(), size.sum()))
        nll_at += torch.tensor([ce_at[n].sum() for n in loops], dtype=torch.float64)
    # one by one: how a longer tensor is summed over ranks may depend on its length
    return reduce_sum(m, sums), reduce_sum(m, nll_at)
