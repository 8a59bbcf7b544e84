"""
Tokens that leave the loop one by one, by an early exit: pieces of a prompt, a generated token, drafts.

After every loop the tokens that are still running are compacted into a smaller batch. The cache of the deeper
loops gets copies of the last keys and values of a token that has left.

Shapes: n rows of T tokens; C as in model.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from nanoloop.kv_cache import CacheIndex


class ActiveTokens(NamedTuple):
    """Tokens that go through the loop together, n rows of T columns."""

    e: torch.Tensor  # (n, T, C), the prelude's output
    s: torch.Tensor | None  # (n, T, C), the state; None before the first loop if there is no s_0
    memory: torch.Tensor | None  # (n, T, ...), see ExitInputs
    running: torch.Tensor  # (n, T), False: the token has exited, or is padding
    row: torch.Tensor  # (n, T), the token's row in idx
    column: torch.Tensor  # (n, T), the token's column in idx

    def select(self, index):
        """Returns the tokens at an index of (n, T)."""
        return ActiveTokens(*(x if x is None else x[index] for x in self))


def compaction_index(running):
    """Returns the index that drops rows without a running token and moves running tokens to the front.

    running: (n, T). The index is a pair, (n', 1) and (n', T').
    """
    n_running = running.sum(dim=1)  # (n,)
    rows = n_running.nonzero()[:, 0]
    columns = running[rows].int().argsort(dim=1, descending=True, stable=True)
    return rows[:, None], columns[:, : n_running.max()]  # the host waits for the device here


@dataclass
class TokensInLoop:
    """Tokens (n, T) that run through the loop of a Decoder, and leave it by its early exit."""

    decoder: object  # the Decoder
    index: CacheIndex  # of all the tokens
    pos: torch.Tensor  # (n, T), their positions
    cache_row: torch.Tensor  # (n, T), their rows of the cache
    state: torch.Tensor  # (n, T, C), the last state of the tokens that have left
    loops: torch.Tensor  # (n, T), how many loops each of these took, 0 while it runs
    head_input: torch.Tensor | None  # (n, T, C), of the same tokens; None = the coda runs at the end only
    active: ActiveTokens | None  # the tokens that are still running; None = no token
    n_running: int  # number of tokens that are still running
    active_index: CacheIndex = None  # of the active tokens
    newest_x: torch.Tensor | None = None  # head's input after the newest loop, of the tokens that ran it

    def __post_init__(self):
        self.active_index = self.active_index or self.index

    def set_active(self, active):
        """Lets only `active` run on, n_running tokens and padding."""
        self.active, self.active_index = active, self.index
        if self.n_running < self.loops.numel():
            pos = self.pos[active.row, active.column]  # (n', T')
            rows = self.cache_row[active.row[:, 0], 0]  # (n',)
            self.active_index = self.decoder.cache.index(rows, pos, active.running, self.index.visible)

    def run(self, start, stop):
        """Runs loops start to stop - 1, counted from 0. After the decoder's last loop every token leaves."""
        for i in range(start, stop):
            if not self.active:
                break
            self.run_one_loop(i)

    def run_one_loop(self, i):
        """Runs loop i of the tokens that are still running. Tokens that exit leave."""
        decoder, active = self.decoder, self.active
        s, x = decoder.run_loop(active.e, active.s, self.active_index, i)  # x: (n, T, C) or None
        exits, memory = decoder.early_exit(decoder.model, i, active.s, s, x, active.memory)  # exits: (n, T)
        exits = active.running & exits if i < decoder.n_loop - 1 else active.running
        self.active, self.newest_x = active._replace(s=s, memory=memory), x
        active = self.active
        at = exits.nonzero(as_tuple=True)  # two (N,); the host waits for the device here
        n_gone = len(at[0])
        if not n_gone:
            return
        origin = active.row[at], active.column[at]
        self.state[origin], self.loops[origin] = s[at], i + 1
        if x is not None:
            self.head_input[origin] = x[at]
        columns = self.pos[origin] % decoder.cache.capacity  # (N,)
        last = torch.full_like(columns, i)  # (N,)
        decoder.cache.copy_to_deeper_loops(self.cache_row[origin], columns, last, decoder.n_loop)
        decoder.stats.loops_taken[i + 1] += n_gone
        self.n_running -= n_gone
        self.active = None
        if self.n_running:
            active = active._replace(running=active.running & ~exits)
            self.set_active(active.select(compaction_index(active.running)))

    def draft(self):
        """Returns the head's input (1, 1, C) of a single token after its last loop, left or not."""
        if self.head_input is None:
            return self.decoder.run_coda(self.active.s if self.active else self.state, self.index)
        return self.newest_x

    def finish(self):
        """Returns the last states and the head's inputs of all tokens, (n, T, C) each. All have left."""
        if self.head_input is not None:
            return self.state, self.head_input
        return self.state, self.decoder.run_coda(self.state, self.index)


def start_tokens(decoder, idx, index, s=None, counts=None):
    """Runs the prelude of tokens idx (n, T). Returns them as TokensInLoop, before the first loop.

    index: their CacheIndex; s: the state to start from, (n, T, C), None = s_0; counts: see Decoder.prefill
    """
    (n, T), device = idx.shape, idx.device
    e, s_0 = decoder.run_prelude(idx, index)
    row = torch.arange(n, device=device)[:, None].expand(n, T)
    column = torch.arange(T, device=device).expand(n, T)
    running, n_running = torch.ones(n, T, dtype=torch.bool, device=device), n * T
    if counts is not None:
        running, n_running = column < torch.tensor(counts, device=device)[:, None], sum(counts)
    return TokensInLoop(
        decoder,
        index,
        pos=index.pos.expand(n, T),
        cache_row=index.cache_rows(row),
        state=torch.zeros_like(e),
        loops=torch.zeros_like(column),
        head_input=torch.zeros_like(e) if decoder.coda_in_loop else None,
        active=ActiveTokens(e, s_0 if s is None else s, None, running, row, column),
        n_running=n_running,
    )


def join_tokens(parts, index):
    """Returns single tokens of one row, which have run the same loops so far, side by side.

    parts: a list of T TokensInLoop of one token each; index: the CacheIndex of all.
    """
    names = ('pos', 'cache_row', 'state', 'loops', 'head_input')
    fields = {name: [getattr(part, name) for part in parts] for name in names}  # (1, 1, ...) each
    fields = {name: None if x[0] is None else torch.cat(x, dim=1) for name, x in fields.items()}
    columns = [j for j, part in enumerate(parts) if part.active]
    joined = TokensInLoop(parts[0].decoder, index, **fields, active=None, n_running=len(columns))
    if columns:
        running = zip(*(parts[j].active for j in columns), strict=True)
        active = ActiveTokens(*(None if x[0] is None else torch.cat(x, dim=1) for x in running))
        column = torch.tensor([columns], device=index.pos.device)  # (1, T')
        joined.set_active(active._replace(column=column))
    return joined
