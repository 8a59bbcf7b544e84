"""
The KV cache of a looped model: keys and values of every executed block, so that no token is computed twice.

A layer's cache is a pair (keys, values), each (n_rows, G, columns, D). A token at position p is in column
p % capacity. Column `capacity` is for padding, and is never read.

There is a layer for every executed block, n_prelude + n_loop n_block + n_coda in all. With kv_budget = m
loop i uses the layers of loop i mod m. m = n_loop is exact. A smaller m is an approximation, which needs
m / n_loop of the loop's memory.

Every layer sees the last block_size keys. Learned positions end at block_size: the caller then
empties the row and starts it anew, see nanoloop/generate.py.

Shapes: n rows of T tokens each, S visible columns; G, D as in model.py.
"""

import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch.utils.dlpack import from_dlpack, to_dlpack

from model import POS, AttnInputs, attend, rope_table
from nanoloop.checks import check
from nanoloop.machine import keep_address, lazy_zeros, to_device

PREFILL_CHUNK = 512  # most tokens of a row that are processed at once beyond block_size
LENGTH_STEP = 32  # a compiled step sees a multiple of this many columns, so that few lengths occur
MOST_LENGTHS = 8  # that occur on a GPU, where each length is a CUDA graph of its own


class CacheIndex(NamedTuple):
    """Positions, cache rows and columns of T tokens of n rows, with their attention inputs."""

    pos: torch.Tensor  # (T,) or (n, T) positions
    rows: slice | torch.Tensor  # (n,) rows of the cache; a slice if they are neighbours
    columns: slice | torch.Tensor  # a slice if they are the same in all rows, else (n, T)
    attn_inputs: AttnInputs
    heads: torch.Tensor | None = None  # (n G T,) where cache_update writes, see head_index; None = at slices
    runs: list | None = None  # of slices that make up rows, where they are read run by run; None = at once
    compiled: bool = False  # whether the tokens go through compiled steps

    @property
    def visible(self):
        """Returns S: the tokens see columns 0 to S - 1, where the mask allows it."""
        return self.columns.stop if isinstance(self.columns, slice) else self.attn_inputs.mask.size(-1)

    def cache_rows(self, row):
        """Returns the rows of the cache of rows 0 to n - 1 of the batch, given as a tensor."""
        return row + self.rows.start if isinstance(self.rows, slice) else self.rows[row]


def even_runs(rows):
    """Returns a list of different rows as slices of rising, evenly spaced ones.

    [2, 3, 5, 4, 7, 10] gives 2:4 (rows 2 and 3), 5:6 and 4:11:3. Rows at random take half as many slices.
    """
    runs, i = [], 0
    while i < len(rows):
        j, step = i + 1, 1
        if j < len(rows) and rows[j] > rows[i]:
            step = rows[j] - rows[i]
            while j < len(rows) and rows[j] - rows[j - 1] == step:
                j += 1
        runs.append(slice(rows[i], rows[j - 1] + 1, step))
        i = j
    return runs


def head_index(rows, columns, n_heads, n_columns):
    """Returns where keys at rows (n,) and columns (n, T) are in a layer that is seen as (..., D), (n G T,).

    n_heads, n_columns: of the cache. torch copies whole vectors (D,) several times as fast as it writes
    to two indexed dimensions.
    """
    head = torch.arange(n_heads, device=columns.device)[:, None]  # (G, 1)
    return ((rows[:, None, None] * n_heads + head) * n_columns + columns[:, None]).flatten()


def as_own_tensor(x):
    """Returns a tensor of its own at the memory of x, a part of a larger one.

    torch.compile does not know that the two belong together. A compiled step that writes to views of one
    tensor would copy all of them.
    """
    return from_dlpack(to_dlpack(x))


def cache_update(layer, index, k, v):
    """Writes k, v (n, G, T, D) into a layer's cache."""
    keys, values = layer  # (n_rows, G, columns, D) each
    if index.heads is None:
        keys[index.rows, :, index.columns], values[index.rows, :, index.columns] = k, v
        return
    for x, new in zip(layer, (k, v), strict=True):
        x.view(-1, x.size(-1)).index_copy_(0, index.heads, new.reshape(-1, x.size(-1)).to(x.dtype))


def cached_attention(layer, index, q, k, v, mask, dropout):
    """Writes k, v (n, G, T, D) into a layer's cache and attends to all that is in sight. See model.attend.

    Rows apart are attended to run by run: each run is a view of the cache, and nothing is copied.
    """
    cache_update(layer, index, k, v)
    keys, values = (x[:, :, : index.visible] for x in layer)  # (n_rows, G, S, D) each
    if index.runs is None:
        return attend(q, keys[index.rows], values[index.rows], mask, dropout)
    sizes = [len(range(run.start, run.stop, run.step)) for run in index.runs]
    pieces = zip(index.runs, q.split(sizes), mask.split(sizes), strict=True)
    return torch.cat([attend(q, keys[run], values[run], mask, dropout) for run, q, mask in pieces])


def layer_caches(layers, index):
    """Returns a function for each layer that attends with its cache, as GPT.apply_blocks takes them."""
    return [functools.partial(cached_attention, layer, index) for layer in layers]


class KVCache:
    """Keys and values of n_rows rows of tokens, and how many tokens each row has.

    max_tokens: the most tokens that a row will have, None = any number; kv_budget: number of loops with
    layers of their own; n_codas: 1, or kv_budget if the coda runs after every loop; compiled: compiled steps
    write to it.

    prelude, recur[i], coda[i]: lists of layers. tokens: (n_rows, columns), the ids, for n-grams; no
    rows with n_gram = 1. lengths: the number of tokens in each row, a list. chunk: the most tokens of a row
    that can be written at once.
    """

    def __init__(self, model, n_rows, max_tokens, kv_budget, n_codas, compiled=False):
        c, weight, self.model = model.config, model.lm_head.weight, model
        self.device, self.lengths, self.kv_budget = weight.device, [0] * n_rows, kv_budget
        self.max_tokens = math.inf if max_tokens is None else max_tokens
        self.chunk = PREFILL_CHUNK
        # a chunk's first token still sees block_size keys, and n_gram - 1 earlier ids, after the whole chunk
        # has been written
        self.capacity = min(self.max_tokens, c.block_size + (0 if POS[c.pos].learned else self.chunk - 1))
        self.windowed = any(block.windowed for block in model.blocks())

        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        first_coda = c.n_prelude + c.n_block * kv_budget  # among the layers
        n_layers = first_coda + c.n_coda * n_codas
        columns = self.capacity + 1
        if compiled:  # a multiple of 8: each layer begins at a multiple of 16 bytes, as compiled steps assume
            columns = math.ceil(columns / 8) * 8
        self.keys_shape = c.n_kv_head or c.n_head, columns  # of a row
        shape = (n_layers, n_rows, *self.keys_shape, c.n_embd // c.n_head)
        self.keys, self.values = (lazy_zeros(shape, dtype, weight.device) for _ in range(2))
        self.layers = list(zip(self.keys, self.values, strict=True))
        shape = (n_rows if c.n_gram > 1 else 0, columns)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=weight.device)
        if compiled:
            self.layers = [tuple(map(as_own_tensor, layer)) for layer in self.layers]
            for x in (*itertools.chain(*self.layers), self.tokens):
                keep_address(x)
        # the layers of a block's loops are neighbours
        recur, coda = self.layers[c.n_prelude : first_coda], self.layers[first_coda:]
        self.prelude = self.layers[: c.n_prelude]
        self.recur = [recur[i::kv_budget] for i in range(kv_budget)]
        self.coda = [coda[i::n_codas] for i in range(n_codas)]
        self.recur_of_loops = self.join_loops(c.n_prelude, c.n_block, kv_budget)
        self.coda_of_loops = self.join_loops(first_coda, c.n_coda, n_codas)

    def join_loops(self, first, n_blocks, n_loops):
        """Returns for each of n_blocks blocks its layers of all loops as one, with n_loops * n_rows rows.

        It is a view: row i * n_rows + row is row `row` of loop i. first: the first block's first layer.
        """
        starts = [first + block * n_loops for block in range(n_blocks)]
        both = (self.keys, self.values)
        return [tuple(x[start : start + n_loops].flatten(0, 1) for x in both) for start in starts]

    def copy_rows(self, old):
        """Takes over the rows of another cache, which has fewer, as the first ones."""
        n = len(old.lengths)
        self.keys[:, :n], self.values[:, :n] = old.keys, old.values
        self.tokens[:n], self.lengths[:n] = old.tokens, old.lengths

    def bytes(self):
        """Returns the size of all keys and values."""
        return sum(x.nbytes for layer in self.layers for x in layer)

    def truncate(self, row, length):
        """Drops all tokens of a row but the first `length`.

        Of a row that is longer than block_size at most chunk - 1 tokens can be dropped, or all.
        """
        self.lengths[row] = length

    def reserve(self, T, rows=None, counts=None, compiled=False):
        """Lengthens rows by the next T tokens and returns the CacheIndex of these.

        rows: a list of n rows, None = all; counts: how many of the T tokens of each row are real, a list,
        None = all; compiled: the index is for a compiled step. Raises UserError if a row gets longer than
        max_tokens.
        """
        listed = list(range(len(self.lengths))) if rows is None else rows
        starts = [self.lengths[row] for row in listed]
        ends = [start + n for start, n in zip(starts, counts or [T] * len(starts), strict=True)]
        if max(ends) > self.max_tokens:
            check(False, 'max_tokens', self.max_tokens, f'at least the {max(ends)} tokens of a row')
        for row, end in zip(listed, ends, strict=True):
            self.lengths[row] = end
        return self.next_index(listed, starts, T, counts, compiled)

    def next_index(self, listed, starts, T=1, counts=None, compiled=False):
        """Returns the CacheIndex of T tokens of each of n rows, from positions starts on.

        listed, starts: lists of n; T, counts, compiled: see reserve. Rows may be those of recur_of_loops.
        """
        steps, end = torch.arange(T, device=self.device), max(starts) + T  # steps: (T,)
        assert end <= self.capacity or T <= self.chunk
        rows = slice(listed[0], listed[-1] + 1)
        if listed != list(range(rows.start, rows.stop)):
            rows = to_device(torch.tensor(listed), self.device)  # (n,)
        aligned = isinstance(rows, slice) and counts is None and len(set(starts)) == 1
        if aligned and end <= self.capacity and not compiled:
            pos = starts[0] + steps  # (T,)
            attn_inputs = self.attn_inputs(pos, end, all_visible=T in (1, end))
            return CacheIndex(pos, rows, slice(starts[0], end), attn_inputs)
        pos = to_device(torch.tensor(starts), self.device)[:, None] + steps  # (n, T)
        real = None
        if counts is not None:
            real = steps < to_device(torch.tensor(counts), self.device)[:, None]  # (n, T)
            pos = pos.masked_fill(~real, 0)  # padding may lie beyond the learned positions
        if not compiled:
            return self.index(rows, pos, real, min(end, self.capacity))
        index = self.index(rows, pos, real, self.compiled_length(end))
        for mask in (index.attn_inputs.mask, index.attn_inputs.window_mask):
            torch._dynamo.maybe_mark_dynamic(mask, 3)  # one graph serves all lengths
        return index._replace(compiled=True)

    def compiled_length(self, end):
        """Returns how many columns a compiled step sees of the first `end`: few different numbers."""
        step = LENGTH_STEP
        if self.device.type != 'cpu':
            step *= math.ceil(self.capacity / (MOST_LENGTHS * LENGTH_STEP))
        return min(math.ceil(end / step) * step, self.capacity)

    def index(self, rows, pos, real, visible):
        """Returns the CacheIndex of tokens of rows (n,) at pos (n, T) that see the first `visible` columns.

        rows: a slice or a tensor. real: (n, T), False = padding; None = all are real.
        """
        columns = pos % self.capacity
        if real is not None:
            columns = columns.masked_fill(~real, self.capacity)
        runs = None
        if self.device.type == 'cpu' and not isinstance(rows, slice):  # a GPU copies faster than it launches
            runs = even_runs(rows.tolist())
        of_rows = rows
        if isinstance(rows, slice):
            of_rows = torch.arange(rows.start, rows.stop, device=pos.device)
        heads = head_index(of_rows, columns, *self.keys_shape)
        return CacheIndex(pos, rows, columns, self.attn_inputs(pos, visible), heads, runs)

    def attn_inputs(self, pos, visible, all_visible=False):
        """Returns the AttnInputs of tokens at pos (T,) or (n, T) that see the first `visible` columns.

        all_visible: plain causal attention needs no mask: either T = 1 and every column holds an earlier
        token, or the columns are the T tokens themselves.
        """
        c, window, rope = self.model.config, self.model.window, None
        if self.model.rope_width:
            rope = rope_table(pos, self.model.rope_width, c.rope_base)  # (T, D / 2) or (n, T, D / 2) each
            rope = rope if pos.dim() == 1 else tuple(x[:, None] for x in rope)  # (n, 1, T, D / 2): all heads
        if all_visible and visible <= min(c.block_size, window + 1 if self.windowed else visible):
            return AttnInputs(rope, None, None)
        pos = pos[:, None] if pos.dim() == 1 else pos[:, None, :, None]  # (T, 1) or (n, 1, T, 1)
        # how many tokens ago each column was written; more than pos: its token is of the future
        distance = (pos - torch.arange(visible, device=pos.device)) % self.capacity  # (..., T, S)
        mask = (distance <= pos) & (distance < c.block_size)
        return AttnInputs(rope, mask, mask & (distance <= window) if self.windowed else mask)

    def earlier_tokens(self, idx, index):
        """Stores tokens idx (n, T). Returns the n_gram - 1 tokens before each, see GPT.embed."""
        n_gram, pos = self.model.config.n_gram, index.pos  # pos: (T,) or (n, T)
        if n_gram == 1:
            return None
        rows = index.cache_rows(torch.arange(len(idx), device=self.device)[:, None])  # (n, 1)
        self.tokens[rows, pos if isinstance(index.columns, slice) else index.columns] = idx
        steps = range(1, n_gram)
        return [torch.where(pos < k, -1, self.tokens[rows, (pos - k) % self.capacity]) for k in steps]

    def copy_to_deeper_loops(self, rows, columns, last, n_loop):
        """Copies what the last loop of tokens computed to the loops after it.

        rows, columns: (N,), where the tokens are; last: (N,), each token's last loop, from 0 on.
        """
        budget, n_rows = self.kv_budget, len(self.lengths)
        loops = torch.arange(budget, device=columns.device)[:, None]  # (kv_budget, 1)
        later = (loops - last) % budget  # (kv_budget, N), how many loops after the last one
        loop, token = ((later > 0) & (later < n_loop - last)).nonzero(as_tuple=True)  # (M,) each
        if not len(token):
            return
        source, target = (last % budget * n_rows + rows)[token], loop * n_rows + rows[token]  # (M,) each
        columns = columns[token, None]  # (M, 1)
        source, target = (head_index(y, columns, *self.keys_shape) for y in (source, target))  # (M G,)
        of_loops = self.recur_of_loops + (self.coda_of_loops if len(self.coda) > 1 else [])
        for x in itertools.chain(*of_loops):  # (kv_budget * n_rows, G, columns, D)
            x = x.view(-1, x.size(-1))
            x.index_copy_(0, target, x.index_select(0, source))
