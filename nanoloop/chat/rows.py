"""
Rows of a KV cache that serve texts of their own, which come and go: a server's answers, a chat's turns.

A row keeps its tokens after its text has ended. A later text computes only what is new in it: the ids beyond
those that it has in common with the row. Every token's result is that of a row that reads the text from its
beginning (nanoloop/decode.py), up to rounding.

    rows = Rows(model, n_rows=8, n_loop=4)
    row = rows.take(ids)                # the free row that knows most of ids
    x, loops = rows.read(row, ids)      # (1, C), what the head reads to predict the next token; its loops
    x, loops = rows.append([row, other], [token, other_token])   # (2, C), [loops, loops]
    rows.release(row)
"""

import torch

from model import POS
from nanoloop.decode import Decoder
from nanoloop.generate import tokens_in_view


def common_prefix(a, b):
    """Returns how many ids two lists have in common at their beginnings."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


class Rows:
    """A Decoder whose rows are independent.

    n_loop: None = the model's. early_exit: an EarlyExit; None = every token takes n_loop loops. max_tokens:
    most tokens of a text, None = any number.
    Raises UserError for a model that the exit does not fit.

    ids: the tokens of each row that are in the cache, lists. n_computed: number of tokens computed so far.
    """

    def __init__(self, model, n_rows, n_loop=None, early_exit=None, max_tokens=None):
        self.decoder = Decoder(model, n_rows, max_tokens, n_loop, early_exit=early_exit)
        self.device = model.lm_head.weight.device
        self.block_size, self.learned = model.config.block_size, POS[model.config.pos].learned
        self.ids = [[] for _ in range(n_rows)]
        self.free = list(range(n_rows))  # the row that was released first comes first
        self.n_computed = 0

    def take(self, ids):
        """Returns a free row, which is then taken until release(row).

        It is the one that has most of the text ids, unless more than that would be lost of what it has.
        """
        known = [self.n_known(row, ids) for row in self.free]
        fits = [n > len(self.ids[row]) - n for n, row in zip(known, self.free, strict=True)]
        best = max(range(len(known)), key=lambda i: known[i] if fits[i] else -1)
        return self.free.pop(best if fits[best] else 0)

    def release(self, row):
        """Makes a row free again. It keeps its tokens until another text needs the row."""
        self.free.append(row)

    def start_of_view(self, length):
        """Returns the first of a text's `length` tokens that is in the cache when the last one is.

        With learned positions a text starts anew when block_size positions are used up, see generate.py.
        """
        return length - tokens_in_view(length, self.block_size) if self.learned else 0

    def n_known(self, row, ids):
        """Returns how many of the first tokens of ids a row has already. The last one is always computed."""
        old, cache = self.ids[row], self.decoder.cache
        start, n = self.start_of_view(len(ids)), common_prefix(old, ids[:-1])
        n_dropped = len(old) - n
        if n <= start or start != self.start_of_view(len(old)):
            return 0
        kept = len(old) - start <= cache.capacity or n_dropped < cache.chunk  # see KVCache.truncate
        return n if kept else 0

    @torch.inference_mode()
    def read(self, row, ids):
        """Computes a text, a list of at least one id, in a row, as far as the row's cache does not have it.

        Returns the head's input (1, C) for the token after it, and the number of loops of its last token.
        """
        n, start, cache = self.n_known(row, ids), self.start_of_view(len(ids)), self.decoder.cache
        self.forget(row, n)  # an exception below leaves the row without what is not complete
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
        lengths = [len(self.ids[row]) for row in rows]
        restart = [self.start_of_view(n) != self.start_of_view(n + 1) for n in lengths]
        x, loops = [None] * len(rows), [0] * len(rows)
        for i in (i for i, restarts in enumerate(restart) if restarts):
            x[i], loops[i] = self.read(rows[i], [*self.ids[rows[i]], tokens[i]])
        others = sorted((row, i) for i, row in enumerate(rows) if not restart[i])  # neighbours: no copies
        if others:
            chosen, known = [row for row, _ in others], [self.ids[row] for row, _ in others]
            idx = torch.tensor([[tokens[i]] for _, i in others], device=self.device)  # (n, 1)
            for row in chosen:
                self.forget(row, 0)  # an exception below leaves the row empty
            head_input = self.decoder.decode_one_token(idx, chosen)[:, -1]  # (n, C)
            taken = last_loops(self.decoder.loops, len(chosen))
            for k, (row, i) in enumerate(others):
                x[i], loops[i], self.ids[row] = head_input[k : k + 1], taken[k], known[k]
                self.ids[row].append(tokens[i])
            self.n_computed += len(chosen)
        return torch.cat(x), loops

    def forget(self, row, n):
        """Drops a row's tokens behind the first n."""
        self.ids[row] = self.ids[row][:n]


def last_loops(loops, n):
    """Returns the number of loops of the last token of each of n rows, a list. loops: see Decoder."""
    return [loops] * n if isinstance(loops, int) else loops[:, -1].tolist()
