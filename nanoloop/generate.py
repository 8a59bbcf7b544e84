"""
Generates text as token ids: sampling, streaming, and going on after a text (a chat's next turn).

    ids = generate(model, idx, 100, temperature=0.8)         # idx: (B, T) -> (B, T + 100)

    generation = Generation(model, idx, temperature=0.8)
    for token in generation.stream(100):                     # (B,), one by one
        ...
    generation.extend(next_turn)                             # (B, T) ids; what is in the KV cache stays there
    for token in generation.stream(100):
        ...

Beyond block_size every layer sees the last block_size keys. With learned positions a row is started anew when
its block_size positions are used up, with its last block_size // 2 tokens and the new one.
"""

import collections
import math

import torch

from model import POS, upcast
from nanoloop.checks import check
from nanoloop.decode import Decoder, scatter_last
from nanoloop.depth import MOST_AHEAD, RowsApart, can_go_apart
from nanoloop.onednn import onednn_for
from nanoloop.speculation import check_speculation, draft_and_verify


class Sampler:
    """Draws tokens from a model's predictions.

    temperature: 0 = always the most likely token
    top_k: draw from the k most likely tokens; None = from all
    top_p: draw from the most likely tokens that together have this probability; None = from all
    generator: a torch.Generator on the model's device; None = the default one
    """

    def __init__(self, model, temperature=1.0, top_k=None, top_p=None, generator=None):
        self.model, self.top_k, self.top_p = model, top_k, top_p
        self.temperature = temperature if temperature > 1e-6 else 0  # float32 cannot divide by less
        self.generator = generator

    def probabilities(self, x):
        """Returns the probabilities (n, V) to draw from. x: (n, C), the head's input."""
        return self.distribution(self.model.logits(x))

    def distribution(self, logits):
        """Returns the probabilities (n, V) to draw from. logits: (n, V), the model's prediction."""
        logits = upcast(logits)
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.size(-1)).to(logits.dtype)
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / self.temperature  # nothing overflows
        if self.top_k is not None:
            smallest = logits.topk(min(self.top_k, logits.size(-1))).values[:, [-1]]  # (n, 1)
            logits = logits.masked_fill(logits < smallest, -math.inf)
        if self.top_p is not None:
            p, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)  # (n, V) each
            before = p.cumsum(dim=-1) - p  # the share of the more likely tokens; 0 for the first, which stays
            beyond = before >= self.top_p
            beyond[:, 0] = False  # also for a top_p that float32 rounds to 0
            logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -math.inf)
        return logits.softmax(dim=-1)

    def sample(self, x):
        """Returns a token for each row, (n,). x: (n, C), the head's input."""
        return self.choose(self.model.logits(x))

    def choose(self, logits):
        """Returns a token for each row, (n,). logits: (n, V), the model's prediction."""
        return logits.argmax(dim=-1) if self.temperature == 0 else self.draw(self.distribution(logits))

    def draw(self, p):
        """Returns a token for each row of the probabilities p (n, V), (n,)."""
        if self.temperature == 0:
            return p.argmax(dim=-1)
        return torch.multinomial(p, 1, generator=self.generator)[:, 0]


def tokens_in_view(length, block_size):
    """Returns how many last tokens of a row are in view with learned positions, see the module docstring."""
    half = block_size // 2
    return length if length <= block_size else half + 1 + (length - block_size - 1) % (block_size - half)


class Generation:
    """Rows of tokens that a model in eval mode continues, and that can be extended by tokens from elsewhere.

    idx: (B, T), the prompts
    lengths: number of tokens of each row of idx before the padding at its end, a list; None = all
    temperature, top_k, top_p, generator: see Sampler
    speculate: number of tokens that are drafted at once, with draft_loops loops, see speculation.py; 0 = none
    lockstep: draw the tokens of all rows together, also with an early exit; needed for replace
    options: max_tokens, n_loop, kv_budget, early_exit, warm_start, compile, see Decoder

    Nothing is computed before stream. stats: a Stats. Raises UserError for options that exclude each other.
    """

    @torch.inference_mode()
    def __init__(self, model, idx, lengths=None, temperature=1.0, top_k=None, top_p=None, generator=None,
                 speculate=0, draft_loops=1, lockstep=False, **options):  # fmt: skip
        check_speculation(model, len(idx), speculate, draft_loops, **options)
        self.sampler = Sampler(model, temperature, top_k, top_p, generator)
        self.speculate, self.draft_loops, self.lockstep = speculate, draft_loops, lockstep
        self.decoder = Decoder(model, len(idx), **options)
        self.stats = self.decoder.stats
        self.block_size, self.learned = model.config.block_size, POS[model.config.pos].learned
        # (B, C), what the head reads to predict each row's next token
        self.head_input = model.transformer.wte.weight.new_zeros(len(idx), model.config.n_embd)
        self.pending = [row[:0] for row in idx]  # the tokens of each row that are given but not processed yet
        self.newest = None  # (B,), the last generated token of each row, not processed yet
        self.apart = None  # RowsApart while rows are ahead of others
        warm_restart = self.learned and self.decoder.warm_start  # needs the last state of what is not dropped
        self.may_go_apart = not (lockstep or warm_restart) and can_go_apart(self.decoder)
        self.unyielded = collections.deque()  # generated tokens (B,) that stream has not yielded yet
        # with learned positions: the last tokens of each row up to the last prefill, and (B,) tokens after it
        self.view, self.recent = [row[:0] for row in idx], []
        self.extend(idx, lengths)

    @torch.inference_mode()
    def extend(self, idx, lengths=None):
        """Appends idx (B, T) to the rows, to be processed by the next stream. lengths: see Generation.

        Generated tokens that stream has not yielded yet are dropped.
        """
        lengths, T = [idx.size(1)] * len(idx) if lengths is None else lengths, idx.size(1)
        fits = len(lengths) == len(idx) and all(1 <= n <= T for n in lengths)
        check(len(idx) == len(self.pending), 'idx', tuple(idx.shape), f'{len(self.pending)} rows')
        check(fits, 'lengths', lengths, f'from 1 to the {T} tokens of idx')
        self.end_apart()
        if self.unyielded:  # the last of them is not in the cache, the others are
            n = len(self.unyielded) - 1
            self.decoder.cache.truncate(0, self.decoder.cache.lengths[0] - n)
            self.recent = self.recent[: len(self.recent) - n]
            self.unyielded.clear()
        elif self.newest is not None:
            self.pending = list(self.newest[:, None])
        self.newest = None
        new = [row[:n] for row, n in zip(idx, lengths, strict=True)]
        self.pending = [torch.cat(rows) for rows in zip(self.pending, new, strict=True)]

    @torch.inference_mode()
    def stream(self, max_new_tokens):
        """Yields the next token of every row, (B,), max_new_tokens times.

        It can be left early and called again, with the same text as without a break; where rows do not wait
        for each other (nanoloop/depth.py) drawn text can differ, greedy text does not. The tokens are made in
        inference mode: clone() them for a graph.
        """
        for n_left in range(max_new_tokens, 0, -1):
            if not self.unyielded:
                self.unyielded.extend(self.next_tokens(n_left))
            yield self.unyielded.popleft()

    def replace(self, tokens):
        """Puts other tokens (B,), a tool's result, in place of those that stream has yielded last."""
        check(not self.speculate, 'speculate', self.speculate, '0 where tokens are replaced')
        check(not self.may_go_apart, 'lockstep', False, 'True where tokens are replaced')
        self.newest = tokens

    def next_tokens(self, n_left):
        """Returns the next tokens, (B,) each: 1, or up to n_left with speculation."""
        if self.newest is None:
            self.prefill()
            tokens = [self.sampler.sample(self.head_input)]
        elif self.goes_apart(n_left):
            self.recent += [self.newest] if self.learned else []
            tokens = [self.apart.next_token(n_left)]
            if self.apart.at_rest():
                self.apart = None
        elif n := min(self.speculate, n_left, self.room()):
            usual = n == self.speculate  # fewer come rarely: at the end, or before a row restarts
            tokens = draft_and_verify(
                self.decoder, self.sampler, self.newest, n, self.draft_loops, compiled=usual
            )
            self.recent += [self.newest, *tokens[:-1]] if self.learned else []
        else:
            self.append(self.newest)
            with onednn_for(len(self.newest)):
                tokens = [self.sampler.sample(self.head_input)]
        self.newest = tokens[-1]
        return tokens

    def goes_apart(self, n_left):
        """Returns whether the rows take their next n_left tokens without waiting for each other.

        Learned positions must have room for them: rows that restart are computed together.
        """
        cache, apart = self.decoder.cache, self.apart
        lengths = cache.lengths if apart is None else apart.yielded_lengths()
        if not self.may_go_apart or (self.learned and max(lengths) + n_left > self.block_size):
            self.end_apart()
            return False
        if apart is None:
            limit = min(MOST_AHEAD, cache.chunk - 1)  # as many can be dropped, see KVCache.truncate
            self.apart = RowsApart(self.decoder, self.sampler, self.newest, limit)
        return True

    def end_apart(self):
        """Drops the tokens of rows that are ahead of what stream has yielded."""
        if self.apart is not None:
            self.apart.drop()
            self.apart = None

    def prefill(self):
        """Processes the pending tokens and sets head_input."""
        rows, self.pending = self.pending, [row[:0] for row in self.pending]
        if self.learned:
            self.move_recent_into_view()
            rows = [self.slide(row, new) for row, new in enumerate(rows)]
        lengths, start = [len(row) for row in rows], 0
        idx = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, longest)
        for chunk in idx.split(self.decoder.cache.chunk, dim=1):  # (B, T)
            counts = [min(max(n - start, 0), chunk.size(1)) for n in lengths]
            x = self.decoder.prefill(chunk, counts=counts)  # (B, T, C)
            scatter_last(self.head_input, range(len(rows)), x, counts)
            start += chunk.size(1)

    def append(self, token):
        """Processes a generated token of every row, (B,), and sets head_input."""
        cache, all_rows = self.decoder.cache, range(len(token))
        full = [row for row in all_rows if self.learned and cache.lengths[row] == self.block_size]
        if self.learned:
            self.recent.append(token)
        if not full:
            self.head_input = self.decoder.decode_one_token(token[:, None])[:, -1]
            return
        self.move_recent_into_view()
        idx = torch.stack([self.view[row][-(self.block_size // 2 + 1) :] for row in full])  # (n, half + 1)
        for row in full:
            cache.truncate(row, 0)
        self.head_input[full] = self.decoder.prefill(idx, full)[:, -1]
        others = [row for row in all_rows if row not in full]
        if others:
            self.head_input[others] = self.decoder.decode_one_token(token[others, None], others)[:, -1]

    def room(self):
        """Returns how many tokens can be processed at once before a row has to restart."""
        cache = self.decoder.cache
        return self.block_size - max(cache.lengths) if self.learned else cache.chunk

    def slide(self, row, new):
        """Appends new (T,) to a row's view. Returns the tokens to process: new, or more if it restarts.

        For learned positions. A row that restarts is emptied in the cache.
        """
        self.view[row] = text = torch.cat((self.view[row], new))[-self.block_size :]
        length = self.decoder.cache.lengths[row] + len(new)
        n_view = tokens_in_view(length, self.block_size)
        if n_view == length:
            return new
        self.decoder.cache.truncate(row, 0)
        return text[-n_view:]

    def move_recent_into_view(self):
        """Appends the recent tokens to each row's view, of which the last block_size tokens are enough."""
        if self.recent:
            new = torch.stack(self.recent, dim=1)  # (B, N)
            self.view = [torch.cat(rows)[-self.block_size :] for rows in zip(self.view, new, strict=True)]
            self.recent = []


def stream(model, idx, max_new_tokens, lengths=None, **options):
    """Returns an iterator over the next max_new_tokens tokens of every row of idx (B, T), (B,) each.

    lengths, options: see Generation.
    """
    max_tokens = max(lengths or [idx.size(1)]) + max_new_tokens
    generation = Generation(model, idx, lengths, max_tokens=max_tokens, **options)
    return generation.stream(max_new_tokens)


def generate(model, idx, max_new_tokens, **options):
    """Returns idx (B, T) with max_new_tokens tokens after it, (B, T + max_new_tokens).

    options: see Generation. For rows of unlike lengths use stream.
    """
    lengths, T = options.pop('lengths', None), idx.size(1)
    check(lengths is None or set(lengths) == {T}, 'lengths', lengths, f'None: all rows have {T} tokens')
    tokens = [token[:, None] for token in stream(model, idx, max_new_tokens, **options)]  # (B, 1) each
    return torch.cat((idx, *tokens), dim=1)
