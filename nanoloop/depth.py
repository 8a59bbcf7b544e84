"""
Continuous depth batching: rows of a batch that are at different loops, of different tokens.

A tick runs one loop for all rows. A row whose token exits leaves, gets its next token, and comes back with it
while the others loop on. So a token takes about as many ticks as the mean number of loops, not as many as the
deepest row of the batch, and the batch stays full.

Reference: continuous depth batching, arXiv:2608.09444.

Shapes: n rows in the loop, k rows that have left it; C as in model.py.
"""

import math

import torch

from nanoloop.onednn import onednn_for

# share of the rows that are out of the loop when coda, head and prelude run for them: for few rows these take
# nearly as long as for many
SHARE_TO_DRAW = 0.5
# layers outside of the loop per layer inside, up to which rows do not wait. With more they lose: prelude and
# coda run more often, for fewer rows each. Measured on a CPU only (runs/results.md)
MOST_OUTSIDE = 0.5
MOST_AHEAD = 64  # tokens that a row can be ahead of what has been yielded


class LoopBatch:
    """Rows of a Decoder with an early exit that are in the loop, with one token each.

    rows, positions, taken: lists of n: the rows, the positions of their tokens, and how many loops each has
    taken. Rows that entered last come first. exited: the same of rows that have left the loop, a list of
    tuples, until finish().
    """

    def __init__(self, decoder):
        self.decoder, self.rows, self.positions, self.taken = decoder, [], [], []
        self.e, self.s = None, None  # (n, 1, C) each; s: None before the first loop of a model without s_0
        self.memory = None  # of all rows but those that have just entered, see ExitInputs; None = of no row
        self.exited, self.states, self.head_inputs = [], [], []  # the last two: tensors (., 1, C)

    def enter(self, rows, tokens, warm):
        """Runs the prelude of the next token of k rows, and puts them into the loop.

        rows: a list of k rows that are not in the loop; tokens: (k,); warm: start from the rows' last states.
        """
        decoder = self.decoder
        if not self.rows:
            self.memory = None
        self.positions = [*(decoder.cache.lengths[row] for row in rows), *self.positions]
        index = decoder.cache.reserve(1, rows, compiled=decoder.compiles(rows))
        with onednn_for(len(rows)):
            e, s = decoder.run_prelude(tokens[:, None], index)  # (k, 1, C) each
        if warm:
            s = decoder.last_state[rows][:, None]  # (k, 1, C)
        self.e, self.s = (e, s) if not self.rows else (torch.cat((e, self.e)), torch.cat((s, self.s)))
        self.rows, self.taken = [*rows, *self.rows], [0] * len(rows) + self.taken

    def run_one_loop(self):
        """Runs the next loop of every row. Tokens that exit leave."""
        decoder, cache = self.decoder, self.decoder.cache
        with onednn_for(len(self.rows)):
            if len({*self.taken}) == 1:
                index = cache.next_index(self.rows, self.positions, compiled=decoder.compiles(self.rows))
                s, x = decoder.run_loop(self.e, self.s, index, self.taken[0])
            else:
                starts = [taken % cache.kv_budget * decoder.n_rows for taken in self.taken]
                rows = [start + row for start, row in zip(starts, self.rows, strict=True)]
                codas = cache.coda_of_loops if decoder.coda_in_loop else None
                index = cache.next_index(rows, self.positions)
                s, x = decoder.loop(self.e, self.s, index, cache.recur_of_loops, codas, None)
            exits, self.memory = self.apply_rule(s, x)
        self.s, self.taken = s, [taken + 1 for taken in self.taken]
        pairs = zip(exits, self.taken, strict=True)
        exits = [exit or taken == decoder.n_loop for exit, taken in pairs]
        if any(exits):
            self.leave(exits, x)

    def apply_rule(self, s, x):
        """Returns which rows exit by the rule, a list, and the rule's memory for the next loop.

        s: the states after the loop, x: the head's input or None, (n, 1, C) each.
        """
        decoder, device = self.decoder, s.device
        loops = torch.tensor(self.taken, device=device)[:, None]  # (n, 1)
        n_new = self.taken.count(0)
        mixed = self.memory is not None and n_new > 0  # new rows have no memory yet: a call of their own
        parts = [slice(0, n_new), slice(n_new, None)] if mixed else [slice(None)]
        results = []
        for part in parts:
            previous, now, head_input = (None if y is None else y[part] for y in (self.s, s, x))
            memory = None if mixed and not results else self.memory
            results.append(decoder.early_exit(decoder.model, loops[part], previous, now, head_input, memory))
        exits, memories = zip(*results, strict=True)
        memory = torch.cat(memories) if mixed else memories[0]
        return torch.cat(exits)[:, 0].tolist(), memory  # the host waits for the device here

    def leave(self, exits, x):
        """Takes out the rows whose token exits, a list of bools. x: the head's input (n, 1, C) or None."""
        gone = [j for j, exit in enumerate(exits) if exit]
        left = [j for j, exit in enumerate(exits) if not exit]
        self.exited += [(self.rows[j], self.positions[j], self.taken[j]) for j in gone]
        at = torch.tensor(gone, device=self.s.device)  # (k,)
        self.states.append(self.s[at])
        if x is not None:
            self.head_inputs.append(x[at])
        self.rows, self.positions, self.taken = (
            [y[j] for j in left] for y in (self.rows, self.positions, self.taken)
        )
        at = torch.tensor(left, dtype=torch.long, device=self.s.device)  # (n - k,)
        self.e, self.s, self.memory = (None if y is None else y[at] for y in (self.e, self.s, self.memory))

    def finish(self):
        """Finishes the tokens that have left the loop.

        Returns their rows, a rising list, their numbers of loops, a list, and the head's input (k, C).
        """
        decoder, cache = self.decoder, self.decoder.cache
        order = sorted(range(len(self.exited)), key=self.exited.__getitem__)
        rows, positions, taken = (list(y) for y in zip(*(self.exited[j] for j in order), strict=True))
        order, at, column, loops = (
            torch.tensor(y, device=cache.device) for y in (order, rows, positions, taken)
        )  # (k,) each
        s = torch.cat(self.states)[order]  # (k, 1, C)
        cache.copy_to_deeper_loops(at, column % cache.capacity, loops - 1, decoder.n_loop)
        if decoder.coda_in_loop:
            x = torch.cat(self.head_inputs)[order]  # (k, 1, C)
        else:
            with onednn_for(len(rows)):
                index = cache.next_index(rows, positions, compiled=decoder.compiles(rows))
                x = decoder.run_coda(s, index)  # (k, 1, C)
        if decoder.warm_start:
            decoder.last_state[at] = s[:, 0].to(decoder.last_state.dtype)
        self.exited, self.states, self.head_inputs = [], [], []
        return rows, taken, x[:, 0]


class RowsApart:
    """Generates the next tokens of every row. A row does not wait for the others, see the module docstring.

    decoder: one for which can_go_apart() is true. tokens: (B,), the last token of each row, not processed
    yet. limit: the most tokens that a row may have generated and not yielded.

    n_yielded: number of tokens that each row has given: `tokens`, and those that next_token has returned. The
    decoder's stats count these alone.
    """

    def __init__(self, decoder, sampler, tokens, limit):
        self.decoder, self.sampler, self.batch = decoder, sampler, LoopBatch(decoder)
        self.limit, self.starts = limit, list(decoder.cache.lengths)
        # the newest tokens of each row, (B, limit + 1): token t is in column t % (limit + 1)
        self.text = tokens[:, None].repeat(1, limit + 1)
        self.loops = [[0] * (limit + 1) for _ in tokens]  # how many loops each of them took, lists as `text`
        self.made, self.n_yielded = [1] * len(tokens), 1  # numbers of tokens
        self.enough = math.ceil(len(tokens) * SHARE_TO_DRAW)  # rows out of the loop that end the wait
        self.waiting = list(range(len(tokens)))  # rows that are not in the loop and have their next token

    def next_token(self, n_left):
        """Returns the next token of every row, (B,). n_left: how many are still asked for, with it."""
        most = self.n_yielded + min(n_left, self.limit)
        while min(self.made) <= self.n_yielded:
            ready = [row for row in self.waiting if self.made[row] < most]
            if not self.batch.rows or len(ready) + len(self.batch.exited) >= self.enough:
                self.draw_and_enter(most)
            else:
                self.batch.run_one_loop()
        column = self.n_yielded % self.text.size(1)
        token = self.text[:, column]  # (B,)
        self.decoder.stats.loops_taken.update(loops[column] for loops in self.loops)
        self.n_yielded += 1
        return token.clone()

    def draw_and_enter(self, most):
        """Draws the next tokens of rows that have left the loop. Rows with fewer than `most` enter it."""
        if self.batch.exited:
            rows, taken, x = self.batch.finish()
            columns = [self.made[row] % self.text.size(1) for row in rows]
            with onednn_for(len(rows)):
                self.text[rows, columns] = self.sampler.sample(x)
            for row, column, loops in zip(rows, columns, taken, strict=True):
                self.loops[row][column] = loops
                self.made[row] += 1
            self.waiting += rows
        ready = sorted(row for row in self.waiting if self.made[row] < most)
        if ready:
            tokens = self.text[ready, [(self.made[row] - 1) % self.text.size(1) for row in ready]]  # (k,)
            self.batch.enter(ready, tokens, self.decoder.warm_start)
            self.waiting = [row for row in self.waiting if row not in ready]

    def at_rest(self):
        """Returns whether no row is ahead of another, and none is in the loop."""
        return {*self.made} == {self.n_yielded} and len(self.waiting) == len(self.made)

    def yielded_lengths(self):
        """Returns the number of tokens of each row in the cache without those that have not been yielded."""
        return [start + self.n_yielded - 1 for start in self.starts]

    def drop(self):
        """Drops the tokens that have not been yielded from the cache."""
        for row, length in enumerate(self.yielded_lengths()):
            self.decoder.cache.truncate(row, length)


def can_go_apart(decoder):
    """Returns whether the rows of a Decoder need not wait for each other, and gain by it.

    There are several, with an early exit, on a CPU, without compiled steps, which are for all rows, and all
    loops compute the same: no part reads the loop's index, and the first loop has a state, too.
    """
    model, c, weight = decoder.model, decoder.model.config, decoder.model.lm_head.weight
    looped_coda = c.n_coda if decoder.coda_in_loop else 0
    n_inside, n_outside = c.n_block + looped_coda, c.n_prelude + c.n_coda - looped_coda  # layers
    gains = n_outside <= MOST_OUTSIDE * n_inside and weight.device.type == 'cpu' and not decoder.compile
    several = decoder.n_rows > 1 and decoder.early_exit is not None
    s_0 = model.start(
        weight.new_zeros(1, 1, c.n_embd), torch.zeros(1, dtype=torch.long, device=weight.device)
    )
    return gains and several and not decoder.reads_loop and s_0 is not None
