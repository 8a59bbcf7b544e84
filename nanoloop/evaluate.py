"""
Validation: loss, perplexity and bits per byte over fixed windows, the same for any number of processes.
"""

import functools
import math

import torch

from nanoloop.checks import check
from nanoloop.parallel import reduce_sum


@torch.no_grad()
def evaluate(model, splits, c, m, token_bytes, stopped=lambda: False, tell=lambda doing, progress: None):
    """Returns {split: {loss, ppl, bpb}}, or None if stopped() became true. The model's mode is kept.

    The loss is that of the last loop, whatever the objective, in nats per target.

    splits: {name: Split}. c: the run's keys (eval_iters, batch_size, dataset). token_bytes: the
    number of bytes of every token id. Tokens with 0 bytes (special tokens) do not count in bits per byte.
    tell: called with what is being done and how far it is.
    """
    n = c.eval_iters * c.batch_size or len(splits['val'].eval_windows())
    bytes_of, training, result = torch.tensor(token_bytes, dtype=torch.float64), model.training, {}
    model.eval()
    try:
        for name, split in splits.items():
            progress = functools.partial(tell, f'evaluating the loss on {name}')
            windows, rest = split.eval_windows(n), (c.batch_size, m, bytes_of, stopped, progress)
            sums = sum_over_windows(model, split, windows, *rest)
            if sums is None:
                return None
            nll, tokens, nll_of_bytes, size = sums.tolist()
            check(tokens, 'dataset', c.dataset, f'targets that count in {name}, its mask leaves none')
            loss = nll / tokens
            bpb = nll_of_bytes / math.log(2) / size if size else math.nan
            result[name] = dict(loss=loss, ppl=math.exp(min(loss, 700)), bpb=bpb)
    finally:
        model.train(training)
    return result


def sum_over_windows(model, split, windows, batch_size, m, bytes_of, stopped, progress):
    """Returns the sums (-log p, targets, -log p of targets with bytes, their bytes) over all ranks, float64.

    None if stopped() became true. progress: called with how far it is, a text.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    for i in range(0, len(windows), batch_size * m.world):  # as many rounds on every rank
        progress(f': {i:,} of {len(windows):,} windows')
        if stopped():
            return None
        own = windows[i + m.rank * batch_size :][:batch_size]
        if not own:
            continue
        idx, targets = (torch.from_numpy(a) for a in split.read_windows(own, batch_size))  # (B, T) each
        with m.autocast():
            ce, _ = model.loss_table(m.to_device(idx), m.to_device(targets))
        ce, counted = ce[0].cpu().double(), targets != -1  # (B, T) each
        size = bytes_of[targets.clamp(min=0)] * counted
        sums += torch.stack((ce.sum(), counted.sum(), ce[size > 0].sum(), size.sum()))
    reduce_sum(m, sums)
    return sums
