"""
The cross-entropies of the scored tokens of texts: after several numbers of loops in one pass, or with an exit
policy.

Texts that begin alike, as the choices of a question do, go through the model as one row: the common beginning
once, behind it the ends side by side, each of which sees the beginning and itself. The results are those of
separate rows, up to rounding.

Shapes: n rows of T tokens; k scored tokens of a text, K of a batch; P numbers of loops; C, V as in model.py.
"""

import itertools
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from model import AttnInputs, rope_table, upcast
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


def common_prefix(sequences):
    """Returns how many ids all sequences have in common at their start."""
    columns = zip(*sequences, strict=False)
    return next((i for i, ids in enumerate(columns) if len(set(ids)) > 1), min(map(len, sequences)))


def pack(texts):
    """Returns the Row of some texts; of one text it is the text itself."""
    n = common_prefix([text.ids[:-1] for text in texts])
    ids, pos, branch = [texts[0].ids[:n]], [np.arange(n)], [np.zeros(n, dtype=int)]
    columns, targets, length = [], [], n
    for j, text in enumerate(texts, start=1):
        end = text.ids[n:-1]
        scored = np.arange(len(text.ids))[text.scored]  # (k,)
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


def pad(arrays, value, m):
    """Returns arrays of unlike lengths as one tensor (n, T) on the device, filled up with a value."""
    tensors = [torch.from_numpy(array) for array in arrays]
    return m.to_device(torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value))


def join(arrays, m):
    """Returns arrays, one behind the other, as a tensor (K,) on the device."""
    return m.to_device(torch.from_numpy(np.concatenate(arrays)))


def split_by_row(array, rows):
    """Returns the parts of an array (..., K) that belong to each row, a list."""
    return np.split(array, np.cumsum([len(row.targets) for row in rows])[:-1], axis=-1)


# -----------------------------------------------------------------------------
# all loops, exactly


@torch.inference_mode()
def losses_by_loops(model, groups, loops, m, batch_tokens, tell=lambda share: None):
    """Returns [(ces, predicted), each (P, k)] per text for numbers of loops, and how many tokens ran.

    ces: cross-entropies, float64. predicted: the most likely tokens. groups: lists of texts; those of a group
    share the computation of their common beginning. model: in eval mode. batch_tokens: the most tokens of a
    batch, padding included; a longer row is a batch of its own. tell: called with the share done.
    """
    rows, results = [pack(texts) for texts in groups], [None] * len(groups)
    for batch in batches([len(row.idx) for row in rows], batch_tokens):
        chosen = [rows[i] for i in batch]
        scored = score_rows(model, chosen, loops, m)
        for i, *arrays in zip(batch, *(split_by_row(x, chosen) for x in scored), strict=True):
            cuts = np.cumsum(rows[i].counts)[:-1]
            results[i] = zip(*(np.split(x, cuts, axis=1) for x in arrays), strict=True)
        tell(sum(result is not None for result in results) / len(results))
    return [*itertools.chain(*results)], sum(len(row.idx) for row in rows)


def score_rows(model, rows, loops, m):
    """Returns the cross-entropies (P, K) of a batch of rows, float64, and the most likely tokens (P, K)."""
    idx = pad([row.idx for row in rows], 0, m)  # (n, T)
    if any(row.branch.any() for row in rows):
        pos = pad([row.pos for row in rows], 0, m)  # (n, T)
        branch = pad([row.branch for row in rows], PADDING, m)  # (n, T)
        attn_inputs = branched_attn_inputs(model, pos, branch)
        earlier = earlier_tokens(idx, pos, branch, model.config.n_gram)
    else:
        pos = torch.arange(idx.size(1), device=idx.device)  # (T,)
        attn_inputs, earlier = model.attn_inputs(pos), None
    # (K,), where scored tokens are predicted, in the flattened batch
    places = join([i * idx.size(1) + row.columns for i, row in enumerate(rows)], m)
    targets = join([row.targets for row in rows], m)  # (K,)
    ces, tops = {}, {}
    with m.autocast():
        for n, s in states_after(model, model.embed(idx, pos, earlier), pos, attn_inputs, loops):
            x = model.run_coda(s, attn_inputs).flatten(0, 1)[places]  # (K, C)
            ces[n], tops[n] = read_head(model, x, targets)
    return tuple(np.stack([x[n] for n in loops]) for x in (ces, tops))


def states_after(model, x, pos, attn_inputs, loops):
    """Yields (n, the state (n_rows, T, C) after n loops) for the given numbers of loops, in rising order.

    x: what model.embed returned, (n_rows, T, C).
    """
    e = model.apply_blocks(model.transformer.prelude, x, attn_inputs)
    s = model.start(e, pos)
    for n in range(1, max(loops) + 1):
        s = model.iterate(e, s, n - 1, attn_inputs)
        if n in loops:
            yield n, s


def earlier_tokens(idx, pos, branch, n_gram):
    """Returns the n_gram - 1 tokens before each in its text, see GPT.embed. All are (n, T)."""
    earlier, columns = [], torch.arange(idx.size(1), device=idx.device)  # columns: (T,)
    for k in range(1, n_gram):
        # k columns before it is a token of its branch; else it is in the common beginning, column = position
        near = F.pad(branch, (k, 0), value=PADDING)[:, : len(columns)] == branch  # (n, T)
        source = torch.where(near, columns - k, pos - k)  # (n, T)
        earlier.append(torch.where(source < 0, -1, idx.gather(1, source.clamp(min=0))))
    return earlier


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
    for part, wanted in zip(*(rows.split(model.head_chunk) for rows in (x, targets)), strict=True):
        logits = upcast(model.logits(part))  # (n, V)
        ces.append(F.cross_entropy(logits, wanted, reduction='none'))
        tops.append(logits.argmax(dim=-1))
    return torch.cat(ces).cpu().double().numpy(), torch.cat(tops).cpu().numpy()


# -----------------------------------------------------------------------------
# a policy, as the decoder applies it


@torch.inference_mode()
def losses_by_policy(model, texts, policy, m, batch_tokens, tell=lambda share: None):
    """Returns [(ces, predicted), each (1, k)] per text, and how many tokens took how many loops, a Counter.

    With a kv_budget below n_loop the tokens before a text's first scored one are read at once, as a prompt,
    and the others one by one, as when they are generated. Otherwise a text is read at once. tell: called with
    the share done.
    """
    one_by_one = (policy.kv_budget or policy.n_loop) < policy.n_loop
    rows, results, loops_taken = [pack([text]) for text in texts], [None] * len(texts), Counter()
    for batch in batches([len(row.idx) for row in rows], batch_tokens):
        chosen = [rows[i] for i in batch]
        lengths = [len(row.idx) for row in chosen]
        prompts = lengths
        if one_by_one:
            prompts = [int(row.columns.min(initial=len(row.idx))) for row in chosen]
        with m.autocast():
            x, stats = read_rows(model, pad([row.idx for row in chosen], 0, m), lengths, prompts, policy)
            places = join([i * x.size(1) + row.columns for i, row in enumerate(chosen)], m)  # (K,)
            targets = join([row.targets for row in chosen], m)  # (K,)
            scored = read_head(model, x.flatten(0, 1)[places], targets)
        loops_taken += stats.loops_taken
        for i, ce, top in zip(batch, *(split_by_row(x, chosen) for x in scored), strict=True):
            results[i] = ce[None], top[None]
        tell(sum(result is not None for result in results) / len(results))
    return results, loops_taken


def read_rows(model, idx, lengths, prompts, policy):
    """Returns the head's inputs (n, T, C) of rows idx (n, T) of these lengths, and the decoder's Stats.

    prompts: how many tokens of each row are read at once.
    """
    options = dict(n_loop=policy.n_loop, kv_budget=policy.kv_budget, early_exit=policy.early_exit)
    decoder = Decoder(model, *idx.shape, **options)
    x = model.transformer.wte.weight.new_zeros(*idx.shape, model.config.n_embd)  # (n, T, C)
    start = 0
    for chunk in idx[:, : max(prompts)].split(decoder.cache.chunk, dim=1):
        counts = [min(max(n - start, 0), chunk.size(1)) for n in prompts]
        end = start + chunk.size(1)
        x[:, start:end] = decoder.prefill(chunk, counts=counts)
        start = end
    for step in range(max(n - prompt for n, prompt in zip(lengths, prompts, strict=True))):
        some = [i for i, n in enumerate(lengths) if prompts[i] + step < n]
        columns = [prompts[i] + step for i in some]
        x[some, columns] = decoder.prefill(idx[some, columns][:, None], some)[:, 0]
    return x, decoder.stats
