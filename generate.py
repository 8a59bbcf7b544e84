"""
Tokens from a model, one at a time.
"""

import math

import torch

from model import upcast


@torch.no_grad()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, n_loop=None, generator=None):
    """Yields the next token of every row of idx (B, T), as (B,), max_new_tokens times.

    Sees the last block_size tokens. temperature 0 takes the most likely token; top_k keeps the k most likely,
    top_p the fewest that make up that share of the probability. generator: on idx's device.
    """
    for _ in range(max_new_tokens):
        logits, _ = model(idx[:, -model.config.block_size :], n_loop=n_loop)
        token = choose(upcast(logits[:, -1]), temperature, top_k, top_p, generator)
        idx = torch.cat((idx, token[:, None]), dim=1)
        yield token


def choose(logits, temperature, top_k, top_p, generator):
    """One token per row of logits (B, V), as (B,); see stream."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # nothing overflows
    if top_k is not None:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None:
        p, place = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        beyond = p.cumsum(dim=-1) - p >= top_p  # the share of the more likely: the first token always stays
        logits = logits.masked_fill(beyond.scatter(-1, place, beyond), -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
