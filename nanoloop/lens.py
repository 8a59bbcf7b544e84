"""
What a looped model would say after every loop: coda and head read the state of each.

    losses = loss_by_loop(model, idx, targets)             # (R,) nats per target
    tokens, p = top_predictions(model, idx, k=3)           # (R, B, 3) each: the next token of each row

Shapes: B rows of T tokens, R loops.
"""

import torch

from model import upcast


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

    idx: (B, T) token ids. n_loop: None = the model's. Returns (R, B, k) each, the most likely first.
    """
    states, attn_inputs = model.loop_states(idx, n_loop, every_loop(model, n_loop))
    logits = [upcast(model.logits(model.run_coda(s, attn_inputs)[:, -1])) for s in states]  # (B, V) each
    p, tokens = torch.stack(logits).softmax(dim=-1).topk(k)
    return tokens, p


def every_loop(model, n_loop):
    return range(model.config.n_loop if n_loop is None else n_loop)
