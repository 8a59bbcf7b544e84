"""
The cross-entropies of the scored tokens of texts: after several numbers of loops in one pass, or with an exit
policy.

Texts that begin alike, as the choices of a question do, go through the model as one row: the common beginning
once, behind it the ends side by side, each of which sees the beginning and itself. The results are those of
separate rows, up to rounding.

Shapes: n rows of T tokens; k scored tokens of a text, K of a batch; P numbers of loops; C, V as in model.py.
"""

import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from model import HEAD_CHUNK, AttnInputs, rope_table, upcast
from nanoloop.decode import Decoder

PADDING = -1  # branch of padding


class Row(NamedTuple):
    """Texts with a common beginning, packed. The last token of a text is no input, only a target."""

    idx: np.ndarray  # (T,) token ids
    pos: np.ndarray  # (T,) positions in their texts
    branch: np.ndarray  # (T,) 0 = the common beginning, j = the end of text j, from 1 on
    columns: np.ndarray  # (K,) where scored tokens are predicted, text after text
    targets: np.ndarray  # (K,) the scored tokens
    counts: list  # how many scored tokens each text has


def scored_positions(text):
    """Returns the indices of a Text's scored tokens, (k,)."""
    return np.arange(len(text.ids))[text.scored]


def common_beginning(texts):
    """Returns how many tokens all texts begin with, their last ones aside."""
    shortest = min(len(text.ids) for text in texts) - 1
    first, *others = (np.asarray(text.ids[:shortest]) for text in texts)
    same = [np.ones(shortest + 1, dtype=bool), *(np.append(first == other, False) for other in others)]
    return int(np.append(np.logical_and.reduce(same)[:shortest], False).argmin())


def pack(texts):
    """Returns the Row of some texts; of one text it is the text itself."""
    n = common_beginning(texts) if len(texts) > 1 else len(texts[0].ids) - 1
    ids, pos, branch = [texts[0].ids[:n]], [np.arange(n)], [np.zeros(n, dtype=int)]
    columns, targets, length = [], [], n
    for j, text in enumerate(texts, start=1):
        end = text.ids[n:-1]
        scored = scored_positions(text)
        before = scored - 1  # the inputs that predict them
        columns.append(np.where(before < n, before, before - n + length))
        targets.append(np.asarray(text.ids)[scored])
        ids.append(end)
        pos.append(np.arange(n, n + len(end)))
        branch.append(np.full(len(end), j))
        length += len(end)
    counts = [len(part) for part in targets]
    arrays = (np.concatenate(parts).astype(np.int64) for parts in (ids, pos, branch, columns, targets))
    return Row(*arrays, counts)


def batches(lengths, batch_tokens):
    """Yields lists of indices of lengths (n,): together at most batch_tokens, padding included, or one."""
    batch = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def pad(arrays, value):
    """Returns arrays of unlike lengths as one tensor (n, T), filled up with a value."""
    tensors = [torch.from_numpy(array) for array in arrays]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


# -----------------------------------------------------------------------------
# all loops, exactly


@torch.inference_mode()
def losses_by_loops(model, groups, loops, m, batch_tokens):
    """Returns [(ces, predicted), each (P, k)] per text for numbers of loops, and how many tokens ran.

    ces: cross-entropies, float64. predicted: the most likely tokens. groups: lists of texts; those of a group
    share the computation of their common beginning. model: in eval mode. batch_tokens: the most tokens of a
    batch, padding included; a longer row is a batch of its own.
    """
    rows, results = [pack(texts) for texts in groups], [None] * len(groups)
    for batch in batches([len(row.idx) for row in rows], batch_tokens):
        chosen = [rows[i] for i in batch]
        scored = score_rows(model, chosen, loops, m)
        ends = np.cumsum([len(row.targets) for row in chosen])[:-1]
        for i, *arrays in zip(batch, *(np.split(x, ends, axis=1) for x in scored), strict=True):
            cuts = np.cumsum(rows[i].counts)[:-1]
            results[i] = zip(*(np.split(x, cuts, axis=1) for x in arrays), strict=True)
    return [*itertools.chain(*results)], sum(len(row.idx) for row in rows)


def score_rows(model, rows, loops, m):
    """Returns the cross-entropies (P, K) of a batch of rows, float64, and the most likely tokens (P, K)."""
    idx = m.to_device(pad([row.idx for row in rows], 0))  # (n, T)
    if any(row.branch.any() for row in rows):
        pos = m.to_device(pad([row.pos for row in rows], 0))  # (n, T)
        branch = m.to_device(pad([row.branch for row in rows], PADDING))  # (n, T)
        attn_inputs = branched_attn_inputs(model, pos, branch)
    else:
        pos = torch.arange(idx.size(1), device=idx.device)  # (T,)
        attn_inputs = model.attn_inputs(pos)
    places = [i * idx.size(1) + row.columns for i, row in enumerate(rows)]
    places = m.to_device(torch.from_numpy(np.concatenate(places)))  # (K,), in the flattened batch
    targets = m.to_device(torch.from_numpy(np.concatenate([row.targets for row in rows])))  # (K,)
    ces, tops = {}, {}
    with m.autocast():
        for n, s in states_after(model, idx, pos, attn_inputs, loops):
            x = model.run_coda(s, attn_inputs).flatten(0, 1)[places]  # (K, C)
            ces[n], tops[n] = read_head(model, x, targets)
    return tuple(np.stack([x[n] for n in loops]) for x in (ces, tops))


def states_after(model, idx, pos, attn_inputs, loops):
    """Yields (n, the state (n_rows, T, C) after n loops) for the given numbers of loops, in rising order."""
    e = model.apply_blocks(model.transformer.prelude, model.embed(idx, pos), attn_inputs)
    s = model.start(e, pos)
    for n in range(1, max(loops) + 1):
        s = model.iterate(e, s, n - 1, attn_inputs)
        if n in loops:
            yield n, s


def branched_attn_inputs(model, pos, branch):
    """Returns the AttnInputs of rows whose tokens see the beginning and their own branch. (n, T) each."""
    c, rope = model.config, None
    if model.rope_width:
        rope = tuple(x[:, None] for x in rope_table(pos, model.rope_width, c.rope_base))  # (n, 1, T, D / 2)
    distance = pos[:, :, None] - pos[:, None]  # (n, T, T), of query and key
    visible = (branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])
    mask = visible & (distance >= 0) & (distance < c.block_size)
    window_mask = mask & (distance <= model.window)
    return AttnInputs(rope, mask[:, None], window_mask[:, None])


def read_head(model, x, targets):
    """Returns -log p(targets) and the most likely tokens for the head's inputs x (K, C). Arrays (K,)."""
    ces, tops = [], []
    n = max(1, HEAD_CHUNK // model.config.vocab_size)
    for part, wanted in zip(x.split(n), targets.split(n), strict=True):
        logits = upcast(model.logits(part))  # (n, V)
        ces.append(F.cross_entropy(logits, wanted, reduction='none'))
        tops.append(logits.argmax(dim=-1))
    return torch.cat(ces).cpu().double().numpy(), torch.cat(tops).cpu().numpy()


# -----------------------------------------------------------------------------
# a policy, as the decoder applies it


@torch.inference_mode()
def losses_by_policy(model, texts, policy, m, batch_tokens):
    """Returns [(ces, predicted), each (1, k)] per text, and how many tokens took how many loops, a Counter.

    With a kv_budget below n_loop the tokens before a text's first scored one are read at once, as a prompt,
    and the others one by one, as when they are generated. Otherwise a text is read at once.
    """
    one_by_one = (policy.kv_budget or policy.n_loop) < policy.n_loop
    rows, results, loops_taken = [pack([text]) for text in texts], [None] * len(texts), None
    for batch in batches([len(row.idx) for row in rows], batch_tokens):
        chosen = [rows[i] for i in batch]
        prompts = [
            int(row.columns.min(initial=len(row.idx))) if one_by_one else len(row.idx) for row in chosen
        ]
        with m.autocast():
            x, stats = read_rows(
                model, [m.to_device(torch.from_numpy(row.idx)) for row in chosen], prompts, policy
            )
            x = torch.cat(
                [
                    part[m.to_device(torch.from_numpy(row.columns))]
                    for part, row in zip(x, chosen, strict=True)
                ]
            )
            targets = m.to_device(torch.from_numpy(np.concatenate([row.targets for row in chosen])))  # (K,)
            ces, tops = read_head(model, x, targets)
        loops_taken = stats.loops_taken if loops_taken is None else loops_taken + stats.loops_taken
        ends = np.cumsum([len(row.targets) for row in chosen])[:-1]
        for i, ce, top in zip(batch, np.split(ces, ends), np.split(tops, ends), strict=True):
            results[i] = ce[None], top[None]
    return results, loops_taken


def read_rows(model, rows, prompts, policy):
    """Returns the head's inputs (T, C) of every row, a tensor (T,), and the decoder's Stats.

    prompts: how many tokens of each row are read at once.
    """
    longest = max(map(len, rows))
    options = dict(n_loop=policy.n_loop, kv_budget=policy.kv_budget, early_exit=policy.early_exit)
    decoder = Decoder(model, len(rows), longest, **options)
    idx = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (n, T)
    x = model.lm_head.weight.new_zeros(*idx.shape, model.config.n_embd)  # (n, T, C)
    start = 0
    for chunk in idx[:, : max(prompts)].split(decoder.cache.chunk, dim=1):
        counts = [min(max(n - start, 0), chunk.size(1)) for n in prompts]
        end = start + chunk.size(1)
        x[:, start:end] = decoder.prefill(chunk, counts=counts)
        start = end
    for step in range(max(len(row) - n for row, n in zip(rows, prompts, strict=True))):
        some = [i for i, row in enumerate(rows) if prompts[i] + step < len(row)]
        columns = [prompts[i] + step for i in some]
        x[some, columns] = decoder.prefill(idx[some, columns][:, None], some)[:, 0]
    return [part[: len(row)] for part, row in zip(x, rows, strict=True)], decoder.stats
