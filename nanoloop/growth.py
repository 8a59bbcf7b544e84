"""
New rows of embedding and head for tokens that are added to a checkpoint's tokenizer.

A new row is the mean of the rows of the old tokens, plus noise that tells the new tokens apart. The head so
gives every new token about the mean of the old tokens' logits, with which it takes less probability than an
average token (Jensen's inequality), however many there are. Old rows stay, and with them the logits of old
tokens. Rows that only padded the vocabulary and become tokens start like that, too.
Reference: J. Hewitt, Initializing new word embeddings for pretrained language models (2021).
"""

from typing import NamedTuple

import torch

from nanoloop.added_tokens import extends, split_spec
from nanoloop.checks import check
from nanoloop.randomness import random_generator
from nanoloop.tokenizer import make_tokenizer

EMBEDDING, HEAD = 'transformer.wte.weight', 'lm_head.weight'
# the noise's deviation, in deviations of the old rows: about a hundredth of the distance of two of them
NOISE = 0.02


class Growth(NamedTuple):
    """Which rows start anew: those of the ids from first to end, and all that the old model does not have."""

    first: int
    end: int
    size: int  # rows of the new model
    seed: int  # of the noise

    def __str__(self):
        ids = f'ids {self.first} to {self.end - 1}'
        return f'{self.end - self.first} new tokens ({ids}) that start as the mean of the old ones'


def plan_growth(old, new, rows, seed, vocab_size=None):
    """Returns the Growth from one tokenizer to another, both as specs, None if it adds no tokens to the old.

    rows: of the old model. vocab_size: rows of the new model, None = as few as it needs. Raises UserError if
    these are too few.
    """
    if old == new or not extends(new, old):
        return None
    end = len(make_tokenizer(new).token_bytes)
    first = end - len(split_spec(new)[1]) + len(split_spec(old)[1])
    if rows < first:
        return None
    size = max(rows, end) if vocab_size is None else vocab_size
    check(size >= max(rows, end), 'vocab_size', size, f'at least {max(rows, end)}: {rows} rows, {end} tokens')
    return Growth(first, end, size, seed)


def grow_rows(weights, growth, tied):
    """Returns {name: tensor} of a model with the new rows. tied: embedding and head are one matrix."""
    generator = random_generator(growth.seed, 0, stream='growth')
    weights = dict(weights)
    for name in (EMBEDDING,) if tied else (EMBEDDING, HEAD):
        weights[name] = with_new_rows(weights[name], growth, generator)
    if tied:
        weights[HEAD] = weights[EMBEDDING]
    return weights


def with_new_rows(old, growth, generator):
    """Returns a matrix (V, C) with new rows, (size, C)."""
    first, end, size, _ = growth
    tokens = old[:first].float()  # (first, C); the rows behind them belong to no token
    mean = tokens.mean(dim=0)  # (C,)
    deviation = (tokens - mean).square().mean().sqrt()
    noise = torch.from_numpy(generator.standard_normal((size - first, old.size(1)))).float()
    new = (mean + NOISE * deviation * noise).to(old.dtype)  # (size - first, C)
    new[end - first : len(old) - first] = old[end:]  # still padding
    return torch.cat([old[:first], new])
