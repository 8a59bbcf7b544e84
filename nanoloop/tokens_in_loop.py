"""
Tokens that leave the loop one by one, by an early exit: pieces of a prompt, a generated token, drafts.

After every loop the tokens that are still running are compacted into a smaller batch. The cache of the deeper
loops gets copies of the last keys and values of a token that has left.

Shapes: n rows of T tokens; C as in model.py.
"""

from typing import NamedTuple

import torch


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


class TokensInLoop:
    """Tokens idx (n, T) that run through the loop, and leave it by the early exit of a Decoder.

    index: their CacheIndex; s: the state to start from, (n, T, C), None = s_0; counts: see Decoder.prefill

    state: (n, T, C), the last state of the tokens that have left; loops: (n, T), how many loops each of them
    took, 0 while it runs; head_input: (n, T, C), if the coda runs after every loop, else None. active: the
    ActiveTokens that are still running, None = no token; newest_x: their head's input after the last loop.
    """

    def __init__(self, decoder, idx, index, s=None, counts=None):
        (n, T), device, self.decoder, self.index = idx.shape, idx.device, decoder, index
        e, s_0 = decoder.run_prelude(idx, index)
        row = torch.arange(n, device=device)[:, None].expand(n, T)
        column = torch.arange(T, device=device).expand(n, T)
        running = torch.ones(n, T, dtype=torch.bool, device=device)
        if counts is not None:
            running = column < torch.tensor(counts, device=device)[:, None]
        self.active = ActiveTokens(e, s_0 if s is None else s, None, running, row, column)
        self.active_index, self.n_running = index, idx.numel() if counts is None else sum(counts)
        self.state, self.loops = torch.zeros_like(e), torch.zeros_like(column)
        self.head_input, self.newest_x = torch.zeros_like(e) if decoder.coda_in_loop else None, None
        self.pos = index.pos.expand(idx.shape)  # (n, T)
        self.cache_row = index.cache_rows(row)  # (n, T)

    @classmethod
    def join(cls, parts, index):
        """Returns single tokens of one row, which have taken the same loops so far, side by side.

        parts: a list of T TokensInLoop of one token each; index: the CacheIndex of all.
        """
        joined = cls.__new__(cls)
        joined.decoder, joined.index = parts[0].decoder, index
        for name in ('state', 'loops', 'head_input', 'pos', 'cache_row'):
            fields = [getattr(part, name) for part in parts]  # (1, 1, ...) each
            setattr(joined, name, None if fields[0] is None else torch.cat(fields, dim=1))
        running = [j for j, part in enumerate(parts) if part.active]
        joined.n_running, joined.active = len(running), None
        if running:
            fields = zip(*(parts[j].active for j in running), strict=True)
            active = ActiveTokens(*(None if x[0] is None else torch.cat(x, dim=1) for x in fields))
            column = torch.tensor([running], device=index.pos.device)  # (1, T')
            joined.set_active(active._replace(column=column), all_run=len(running) == len(parts))
        return joined

    def set_active(self, active, all_run=False):
        """Lets `active` run on. all_run: it is all tokens, in their order."""
        self.active, self.active_index = active, self.index
        if not all_run:
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
        return self.newest_x if self.active else self.head_input

    def finish(self):
        """Returns the last states and the head's inputs of all tokens, (n, T, C) each. All have left."""
        if self.head_input is not None:
            return self.state, self.head_input
        return self.state, self.decoder.run_coda(self.state, self.index)
