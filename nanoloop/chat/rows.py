"""
Rows of a KV cache that serve texts of their own, which come and go: a server's answers, a chat's turns.

A row keeps its tokens after its text has ended. A later text computes only what is new in it: the ids beyond
those that it has in common with the row. Every token's result is that of a row that reads the text from its
beginning (nanoloop/decode.py), up to rounding.

    rows = Rows(model, max_rows=8, n_loop=4)
    row = rows.take(ids)                # a free row, if there is one with the beginning of ids
    x, loops = rows.read(row, ids)      # (1, C), what the head reads to predict the next token; its loops
    x, loops = rows.append([row, other], [token, other_token])   # (2, C), [loops, loops]
    rows.release(row)
"""

import functools

import torch

from model import POS
from nanoloop.decode import Decoder
from nanoloop.generate import tokens_in_view


def common_prefix(a, b):
    """Returns how many ids two lists have in common at their beginnings."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


class Rows:
    """A Decoder whose rows are independent. It grows when all of its rows are needed.

    max_rows: most rows. n_rows: rows at first; None = one, but all on a CPU, where an unused row takes no
    memory. n_loop: None = the model's. early_exit: an EarlyExit; None = every token takes n_loop
    loops. max_tokens: most tokens of a text, None = any number. Raises UserError for a model that the exit
    does not fit.

    ids: the tokens of each row that are in the cache, lists. n_computed: number of tokens computed so far.
    """

    def __init__(self, model, max_rows, n_loop=None, early_exit=None, max_tokens=None, n_rows=None):
        self.make_decoder = functools.partial(
            Decoder, model, max_tokens=max_tokens, n_loop=n_loop, early_exit=early_exit
        )
        self.device, self.max_rows = model.lm_head.weight.device, max_rows
        n_rows = n_rows or (max_rows if self.device.type == 'cpu' else 1)  # see lazy_zeros
        self.decoder = self.make_decoder(n_rows=n_rows)
        self.block_size, self.learned = model.config.block_size, POS[model.config.pos].learned
        self.ids = [[] for _ in range(n_rows)]
        self.n_prompt = [0] * n_rows  # tokens of each row before its newest answer
        self.free = [*range(n_rows)]  # the row that was released first comes first
        self.n_computed = 0

    def take(self, ids):
        """Returns a free row for a text, which is then taken until release(row).

        It is the row with the longest common beginning. A row that would lose more of its conversation than
        it saves is not used; then it is a row without tokens, else the one that was free for longest.
        """
        saved = {row: self.n_known(row, ids) for row in self.free}
        useful = [row for row in self.free if saved[row] > max(0, self.n_prompt[row] - saved[row])]
        if useful:
            row = max(useful, key=saved.get)
        else:
            if all(self.ids[row] for row in self.free) and len(self.ids) < self.max_rows:
                self.grow(min(2 * len(self.ids), self.max_rows))
            row = next((row for row in self.free if not self.ids[row]), self.free[0])
        self.free.remove(row)
        self.n_prompt[row] = len(ids)
        return row

    @torch.inference_mode()
    def grow(self, n_rows):
        """Makes the cache one of n_rows rows. What the rows have is copied."""
        old, self.decoder = self.decoder.cache, self.make_decoder(n_rows=n_rows)
        n_old = len(old.lengths)
        self.decoder.cache.copy_rows(old)
        self.free += range(n_old, n_rows)
        self.ids += [[] for _ in range(n_old, n_rows)]
        self.n_prompt += [0] * (n_rows - n_old)

    def release(self, row):
        """Makes a row free again. It keeps its tokens until another text needs the row."""
        self.free.append(row)

    def start_of_view(self, length):
        """Returns the index of the first token that the cache has of a text of `length` tokens.

        With learned positions a text starts anew when block_size positions are used up, see generate.py.
        """
        return length - tokens_in_view(length, self.block_size) if self.learned else 0

    def n_known(self, row, ids):
        """Returns how many of the first tokens of ids a row has already. The last one is always computed.

        It is 0 if the row has begun anew, or overwritten its first tokens, since then.
        """
        old, start = self.ids[row], self.start_of_view(len(ids))
        n = common_prefix(old, ids[:-1])
        whole = start == self.start_of_view(len(old)) and len(old) - start <= self.decoder.cache.capacity
        return n if whole and n > start else 0

    @torch.inference_mode()
    def read(self, row, ids):
        """Computes a text, a list of at least one id, in a row, as far as the row's cache does not have it.

        Returns the head's input (1, C) for the token after it, and the number of loops of its last token.
        """
        n, start, cache = self.n_known(row, ids), self.start_of_view(len(ids)), self.decoder.cache
        self.ids[row] = []  # an exception below leaves the row empty
        cache.truncate(row, max(n - start, 0))
        new = torch.tensor([ids[max(n, start) :]], device=self.device)  # (1, T)
        for piece in new.split(cache.chunk, dim=1):
            x = self.decoder.prefill(piece, [row])  # (1, T, C)
        self.n_computed += new.size(1)
        self.ids[row] = list(ids)
        return x[:, -1], last_loops(self.decoder.loops, 1)[0]

    @torch.inference_mode()
    def append(self, rows, tokens):
        """Computes a next token of each of n rows, in one batch. rows, tokens: lists of n.

        Returns the head's input (n, C) for the tokens after them, and their numbers of loops, a list.
        """
        results, together = {}, []  # results: {row: (head's input (1, C), loops)}
        for row, token in sorted(zip(rows, tokens, strict=True)):  # rows that are neighbours need no copies
            length = len(self.ids[row])
            if self.start_of_view(length) != self.start_of_view(length + 1):
                results[row] = self.read(row, [*self.ids[row], token])
            else:
                together.append((row, token))
        if together:
            results |= self.append_together(*zip(*together, strict=True))
        x, loops = zip(*(results[row] for row in rows), strict=True)
        return torch.cat(x), list(loops)

    def append_together(self, rows, tokens):
        """Computes a next token of rows of which none starts anew. Returns {row: (head's input, loops)}."""
        idx = torch.tensor(tokens, device=self.device)[:, None]  # (n, 1)
        before = [self.ids[row] for row in rows]
        for row in rows:
            self.ids[row] = []  # an exception below leaves the row empty
        x = self.decoder.decode_one_token(idx, list(rows))[:, -1]  # (n, C)
        self.n_computed += len(rows)
        for row, ids, token in zip(rows, before, tokens, strict=True):
            ids.append(token)
            self.ids[row] = ids
        return dict(
            zip(rows, zip(x.split(1), last_loops(self.decoder.loops, len(rows)), strict=True), strict=True)
        )


def last_loops(loops, n):
    """Returns the number of loops of the last token of each of n rows, a list. loops: see Decoder."""
    return [loops] * n if isinstance(loops, int) else loops[:, -1].tolist()
