"""
What a looped model would say after every loop: coda and head read the state of each.

    losses = loss_by_loop(model, idx, targets)             # (R,) nats per target
    tokens, p = top_predictions(model, idx, k=3)           # (R, B, 3) each: the next token of each row
    lens = predictions_by_loop(model, idx, k=5)            # the same at every position, see Lens

Shapes: B rows of T tokens, R loops.
"""

import itertools
from typing import NamedTuple

import torch

from model import POS, upcast
from nanoloop.decode import Decoder
from nanoloop.early_exit import EXIT, EarlyExit, ExitInputs, diff
from nanoloop.generate import tokens_in_view
from nanoloop.onednn import onednn_for


@torch.no_grad()
def loss_by_loop(model, idx, targets, n_loop=None):
    """Returns the mean cross-entropy in nats after each of n_loop loops, (R,).

    idx, targets: (B, T) token ids, targets of -1 do not count. n_loop: None = the model's.
    """
    ce, _ = model.loss_table(idx, targets, n_loop, every_loop(model, n_loop))  # (R, B, T)
    return ce.sum(dim=(1, 2)) / (targets != -1).sum()


@torch.no_grad()
def top_predictions(model, idx, n_loop=None, k=5):
    """Returns the k most likely next tokens of each row after each loop, and their probabilities.

    idx: (B, T) token ids. n_loop: None = the model's. Returns (R, B, k) each, the most likely first. A k
    beyond the vocabulary means all of it.
    """
    states, attn_inputs = model.loop_states(idx, n_loop, every_loop(model, n_loop))
    best = [most_likely(model, model.run_coda(s, attn_inputs)[:, -1], k) for s in states]
    tokens, p = map(torch.stack, zip(*best, strict=True))
    return tokens, p


def every_loop(model, n_loop):
    return range(model.config.n_loop if n_loop is None else n_loop)


def most_likely(model, x, k):
    """Returns the k most likely tokens and their probabilities, (..., k) each. x: (..., C), the head's input.

    The logits of model.head_chunk tokens exist at once.
    """
    V = model.config.vocab_size
    chunks = x.flatten(0, -2).split(model.head_chunk)  # (N, C) each
    best = [upcast(model.logits(chunk)).softmax(dim=-1).topk(min(k, V)) for chunk in chunks]
    p, tokens = (torch.cat(parts).unflatten(0, x.shape[:-1]) for parts in zip(*best, strict=True))
    return tokens, p


# -----------------------------------------------------------------------------
# every position of a text


class Lens(NamedTuple):
    """What a model predicts at every position after each loop. Loops are counted from 1.

    Every token takes all loops, but for `exits`: there the earlier tokens have left early, too.
    """

    tokens: torch.Tensor  # (R, B, T, k), the k most likely next tokens, the most likely first
    p: torch.Tensor  # (R, B, T, k), their probabilities
    change: torch.Tensor  # (R, B, T), |s_i - s_{i-1}| / |s_i|, how far the state still moves; 1 without s_0
    kept: torch.Tensor  # (B, T), the loop that first makes the last loop's prediction and from which it stays
    exits: torch.Tensor | None  # (B, T), the loop after which the early exit leaves; None without one


@torch.no_grad()
def predictions_by_loop(model, idx, n_loop=None, k=5, early_exit=None, say=None):
    """Returns the Lens of idx (B, T).

    n_loop: None = the model's. k: number of predictions, see top_predictions. early_exit: an EarlyExit; None
    = no exits. Beyond block_size a layer sees the last block_size keys. With learned positions the model
    starts anew there, as in nanoloop/generate.py, and say is called with a line that tells it.
    """
    T, c = idx.size(1), model.config
    in_view = [tokens_in_view(t, c.block_size) if POS[c.pos].learned else t for t in range(1, T + 1)]
    if say and in_view[-1] < T:
        say(
            f'{T:,} tokens are more than block_size={c.block_size} learned positions: beyond them a token is '
            f'predicted from {c.block_size // 2 + 1} to {c.block_size} tokens, as when a text is sampled'
        )
    parts = []
    for start, group in itertools.groupby(range(T), lambda t: t + 1 - in_view[t]):
        positions = list(group)
        view, old = idx[:, start : positions[-1] + 1], positions[0] - start
        part = list(read_view(model, view, n_loop, k))
        if early_exit is not None:
            part.append(exit_loops(model, view, early_exit, n_loop)[None])  # (1, B, T)
        parts.append([x[:, :, old:] for x in part])
    tokens, p, change, *exits = (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
    same = tokens[..., 0] == tokens[-1, ..., 0]  # (R, B, T)
    kept = len(tokens) + 1 - same.flip(0).int().cumprod(dim=0).sum(dim=0)
    return Lens(tokens, p, change, kept, exits[0][0] if exits else None)


def read_view(model, idx, n_loop, k):
    """Returns tokens, p and change, see Lens, for idx (B, T), all in view."""
    # a rule that reads the prediction gives the decoder a coda after every loop; at `never` no token exits
    name, rule = next(entry for entry in EXIT.items() if entry[1].needs_logits)
    never = EarlyExit(name, rule.never)
    decoder = Decoder(model, *idx.shape, n_loop, early_exit=never)
    pieces = []
    for piece in idx.split(decoder.cache.chunk, dim=1):
        index, loops = decoder.cache.reserve(piece.size(1)), []
        with onednn_for(piece.numel()):
            e, s = decoder.run_prelude(piece, index)
            for i in range(decoder.n_loop):
                previous, (s, x) = s, decoder.run_loop(e, s, index, i)  # (B, T, C) each
                change, _ = diff(ExitInputs(previous, s, None, None, None))  # (B, T)
                loops.append((*most_likely(model, x, k), change))
        pieces.append([torch.stack(x) for x in zip(*loops, strict=True)])
    return [torch.cat(x, dim=2) for x in zip(*pieces, strict=True)]


@torch.no_grad()
def exit_loops(model, idx, early_exit, n_loop=None):
    """Returns how many loops the decoder gives each token of idx (B, T) with an EarlyExit, (B, T)."""
    decoder, loops = Decoder(model, *idx.shape, n_loop, early_exit=early_exit), []
    for piece in idx.split(decoder.cache.chunk, dim=1):
        decoder.prefill(piece)
        loops.append(decoder.loops)
    return torch.cat(loops, dim=1)
