"""
Tokens from a model, one at a time, with keys and values kept.

A Decoder has one slot of keys and values per executed block, so that what it computes is what a whole forward
pass computes at that position, whatever the number of loops. kv_budget = m lets iteration i share the slots
of iteration i mod m: m = n_loop is exact, less is an approximation, with m / n_loop of the loop's memory.

With an Exit every token leaves the loop by itself; its slots of deeper loops get its last keys and values.
What a token does depends on those before it alone: a prompt is processed as if token by token.

Beyond block_size: with learned positions, when the window is full, the last block_size // 2 tokens are
processed anew; otherwise every layer sees the last block_size keys.
"""

import math
from collections import Counter

import torch

from model import Context, check, rotary, upcast

CHUNK = 512  # tokens of a prompt that are processed at once


# -----------------------------------------------------------------------------
# exits


def kl(model, before, s, read, p):
    """KL(last loop's prediction || this one's), the first's against the uniform one; log p is passed on."""
    q = upcast(model.logits(read)).log_softmax(dim=-1)
    p = torch.full_like(q, -math.log(q.size(-1))) if p is None else p
    return (p.exp() * (p - q)).sum(dim=-1), q


def diff(model, before, s, read, memory):
    """|s - before| / |s|."""
    moved = s if before is None else s - before
    return upcast(moved).norm(dim=-1) / upcast(s).norm(dim=-1), memory


def gate(model, before, s, read, stayed):
    """The probability, by the exit gate, to go on until here and further, which is passed on."""
    stayed = (1 - model.halt(s)) * (1.0 if stayed is None else stayed)
    return stayed, stayed


EXIT = {'kl': kl, 'diff': diff, 'gate': gate}


class Exit:
    """When a token leaves the loop: after at least `least` loops, where its statistic of EXIT is below the
    threshold (kl, diff), or its probability to have left, by the gate, at least that (Ouro's Q-exit)."""

    def __init__(self, rule, threshold, least=1):
        self.rule, self.threshold, self.least, self.reads = EXIT[rule], threshold, least, rule == 'kl'
        self.taken = Counter()  # {loops: tokens that took so many}

    def __call__(self, model, i, before, s, read, memory):
        """(which of the tokens leave after loop i, (n, T); the rule's memory)."""
        value, memory = self.rule(model, before, s, read, memory)
        if self.rule is gate:  # a threshold of 1 is no exit, also where the gate is sure in float32
            value, threshold = 1 - value, self.threshold if self.threshold < 1 else math.inf
            return (value >= threshold) & (i + 1 >= self.least), memory
        return (value < self.threshold) & (i + 1 >= self.least), memory


# -----------------------------------------------------------------------------
# keys and values


class Slot:
    """The keys and values of one executed block: views of the decoder's, set when the first ones come."""

    def __init__(self, decoder):
        self.decoder, self.k, self.v = decoder, None, None

    def __call__(self, k, v):
        """Keeps k and v (n, G, T, D) of the decoder's current tokens, returns all that they may see."""
        d = self.decoder
        if self.k is None:
            d.allocate(k, v)
        if d.at is None:
            start, end = d.span
            self.k[:, :, start:end], self.v[:, :, start:end] = k, v
            return self.k[:, :, :end], self.v[:, :, :end]
        rows, at = d.at
        self.k[rows, :, at], self.v[rows, :, at] = k.transpose(1, 2), v.transpose(1, 2)
        mine = slice(None) if d.rows is None else d.rows
        return self.k[mine, :, : d.span[1]], self.v[mine, :, : d.span[1]]


class Decoder:
    """Runs a model over rows of tokens, piece by piece.

    size: rows; total: the most tokens that a row will have; leave: an Exit, or None: every token takes n_loop
    loops; warm_start: a single token's loop starts from its predecessor's last state, an approximation
    (Huginn's continuous thought). lengths: the tokens of every row so far, an int while they are equal, else
    (size,). loops: how many every token of the last piece took, (n, T), or an int.
    """

    def __init__(self, model, size, total, n_loop=None, kv_budget=None, leave=None, warm_start=False):
        c, self.model, self.size, self.lengths = model.config, model, size, 0
        self.n_loop = self.loops = c.n_loop if n_loop is None else n_loop
        self.budget = self.n_loop if kv_budget is None else kv_budget
        check(self.n_loop >= 1, 'n_loop', n_loop, 'at least 1')
        check(1 <= self.budget <= self.n_loop, 'kv_budget', kv_budget, f'from 1 to n_loop={self.n_loop}')
        self.leave = leave
        gated = leave is None or leave.rule is not gate or model.exit_gate is not None
        check(gated, 'exit', 'gate', 'kl or diff: the model has no exit gate')
        check(leave is None or leave.least <= self.n_loop, 'min_loops', leave and leave.least,
              f'at most n_loop={self.n_loop}')  # fmt: skip
        self.learned = model.transformer.wpe is not None
        self.capacity = min(total, c.block_size if self.learned else c.block_size + CHUNK - 1)
        codas = self.budget if leave is not None and leave.reads else 1  # a loop that is read out has its own
        groups = [c.n_prelude] + [c.n_block] * self.budget + [c.n_coda] * codas
        self.groups = [[Slot(self) for _ in range(n)] for n in groups]
        self.prelude, self.recur, self.coda = (
            self.groups[0],
            self.groups[1 : 1 + self.budget],
            self.groups[-codas:],
        )
        self.rows = self.at = self.span = self.k = self.v = None
        self.warm_start, self.last = warm_start, None  # (size, C), the last state of every row

    def allocate(self, k, v):
        """Room for keys and values like k and v (n, G, T, D): (slots, size, G, capacity + 1, D) each, by the
        position modulo the capacity; the last column takes what nobody will see."""
        slots = [slot for group in self.groups for slot in group]
        self.k, self.v = (
            x.new_zeros(len(slots), self.size, x.size(1), self.capacity + 1, x.size(3)) for x in (k, v)
        )
        for slot, ours_k, ours_v in zip(slots, self.k, self.v, strict=True):
            slot.k, slot.v = ours_k, ours_v

    def bytes(self):
        """Bytes of all slots."""
        return 0 if self.k is None else self.k.nbytes + self.v.nbytes

    def place(self, T, rows, lengths):
        """Sets where the next T tokens of rows go, lengths (n,) of them real. Returns pos and the Context."""
        device, cap = self.model.lm_head.weight.device, self.capacity
        even, self.rows = isinstance(self.lengths, int) and rows is None and lengths is None, rows
        steps = torch.arange(T, device=device)
        if even:
            start, self.lengths = self.lengths, self.lengths + T
            self.span, self.at = (start, self.lengths), None
            if self.lengths <= cap:
                return start + steps, self.context(start + steps, plain=True)
        elif isinstance(self.lengths, int):
            self.lengths = torch.full((self.size,), self.lengths, device=device)
        who = torch.arange(self.size, device=device) if rows is None else rows
        pos = start + steps.expand(len(who), T) if even else self.lengths[who, None] + steps
        if not even:
            self.lengths[who] += T if lengths is None else lengths
        real = None if lengths is None else steps < lengths[:, None]
        self.aim(who, pos, real)
        return pos, self.context(pos, plain=False)

    def aim(self, who, pos, real):
        """Makes the slots take tokens of rows who (n,) at pos (n, T); what is not real (n, T) is dropped."""
        index = pos % self.capacity
        index = index if real is None else index.masked_fill(~real, self.capacity)
        self.at, self.span = (who[:, None], index), (0, self.capacity)

    def context(self, pos, plain):
        """The Context of tokens at pos (T,) or (n, T), of which the slots show the keys up to span's end."""
        model, S, T = self.model, self.span[1], pos.size(-1)
        rope = rotary(pos, model.rope_width, model.config.rope_base) if model.rope_width else None
        if pos.dim() == 2 and rope is not None:
            rope = tuple(x[:, None] for x in rope)  # for all heads
        windowed = any(block.windowed for block in model.blocks())
        if plain and T in (1, S) and S <= model.config.block_size and not (windowed and S > model.window + 1):
            return Context(rope, None, None)
        reach = pos[..., None] if pos.dim() == 1 else pos[:, None, :, None]
        back = (reach - torch.arange(S, device=pos.device)) % self.capacity
        full = (back <= reach) & (back < model.config.block_size)
        return Context(rope, full, full & (back <= model.window) if windowed else full)

    def advance(self, idx, rows=None, lengths=None):
        """(n, T, C), what the head reads after the next tokens idx (n, T) of rows (n,), None = of all.

        lengths: (n,) of idx that are real, the others fill it up; None = all.
        """
        e, s, pos, context = self.enter(idx, rows, lengths)
        if self.warm_start and self.last is not None and idx.size(1) == 1:
            s = (self.last if rows is None else self.last[rows])[:, None]
        if self.leave is not None:
            s, read, context = self.loop_unevenly(e, s, pos, context, lengths)
        else:
            s, read = self.loop(e, s, context, 0, self.n_loop), None
        if self.warm_start:
            self.note(s, rows, lengths)
        return self.finish(s, context) if read is None else read

    def note(self, s, rows, lengths):
        """Notes the last state of rows, of s (n, T, C) with lengths (n,) real tokens."""
        who = torch.arange(self.size, device=s.device) if rows is None else rows
        real = torch.full_like(who, s.size(1)) if lengths is None else lengths
        if self.last is None:
            self.last = s.new_zeros(self.size, s.size(2))
        some = real > 0
        self.last[who[some]] = s[some, real[some] - 1]

    def enter(self, idx, rows=None, lengths=None):
        """(e, s_0, pos, context) of the next tokens, see advance."""
        pos, context = self.place(idx.size(1), rows, lengths)
        x = self.model.embed(idx, pos)
        e = self.model.run(self.model.transformer.prelude, x, context, slots=self.prelude)
        return e, self.model.start(self.model, e, pos), pos, context

    def loop(self, e, s, context, start, stop):
        """s after the iterations from start to stop."""
        for i in range(start, stop):
            s = self.model.iterate(e, s, context, self.recur[i % self.budget])
        return s

    def finish(self, s, context):
        """What the head reads of s."""
        return self.model.readout(s, context, self.coda[0])

    def loop_unevenly(self, e, s, pos, context, lengths):
        """The loops of advance, where every token leaves by self.leave; those that are left move together.

        Returns every token's last state, what the head reads of it if self.leave reads, and the Context.
        """
        model, leave, device = self.model, self.leave, e.device
        n, T = e.shape[:2]
        who = torch.arange(n, device=device)
        everyone = torch.arange(self.size, device=device) if self.rows is None else self.rows
        pos = pos.expand(n, T)
        real = torch.ones(n, T, dtype=torch.bool, device=device)
        if lengths is not None:
            real = torch.arange(T, device=device) < lengths[:, None]
        self.loops = torch.zeros(n, T, dtype=torch.long, device=device)
        last, out = torch.zeros_like(e), torch.zeros_like(e) if leave.reads else None
        whole = self.at, self.span, self.rows, context
        grid, memory = (who[:, None].expand(n, T), torch.arange(T, device=device).expand(n, T)), None
        for i in range(self.n_loop):
            before, s = s, model.iterate(e, s, context, self.recur[i % self.budget])
            read = model.readout(s, context, self.coda[i % self.budget]) if leave.reads else s
            gone, memory = leave(model, i, before, s, read, memory)
            gone = gone | (i == self.n_loop - 1)
            if not gone.any():
                continue
            done = tuple(x[gone & real] for x in grid)
            last[done], self.loops[done] = s[gone & real], i + 1
            if leave.reads:
                out[done] = read[gone & real]
            leave.taken[i + 1] += len(done[0])
            left = real & ~gone
            if i < self.n_loop - 1:
                self.fill(everyone[done[0]], pos[done] % self.capacity, i)
            if not left.any():
                break
            # the tokens that are left, row by row moved to the front
            counts = left.sum(dim=1)
            rows = counts.nonzero()[:, 0]
            columns = left[rows].int().argsort(dim=1, descending=True, stable=True)[:, : counts.max()]
            take = rows[:, None], columns
            real = left[take]
            e, s, grid = e[take], s[take], tuple(x[take] for x in grid)
            memory = memory if memory is None else memory[take]
            here = everyone[grid[0][:, 0]]
            self.rows = here
            self.aim(here, pos[grid], real)
            context = self.context(pos[grid], plain=False)
        self.at, self.span, self.rows, context = whole
        return last, out, context

    def fill(self, rows, at, i):
        """The slots of the loops after i get, of tokens at (rows, at), what loop i has computed last."""
        first, n, m = len(self.prelude), self.model.config.n_block, len(self.coda[0])
        sections = [(first, n), (first + self.budget * n, m)] if len(self.coda) > 1 else [(first, n)]
        later = sorted({j % self.budget for j in range(i + 1, self.n_loop)} - {i % self.budget})
        for start, width in sections if later else ():
            for x in (self.k, self.v):
                groups = x[start : start + self.budget * width].unflatten(0, (self.budget, width))
                latest = groups[i % self.budget, :, rows, :, at]  # (tokens, blocks, G, D)
                groups[later[0] : later[-1] + 1, :, rows, :, at] = latest[:, None]


def window(length, block_size):
    """How many of a row's tokens are in sight with learned positions, by the rule of the file's head."""
    half = block_size // 2
    return length if length <= block_size else half + 1 + (length - block_size - 1) % (block_size - half)


class Sequences:
    """Rows of tokens that grow at their ends, under a Decoder and the rule for what is beyond block_size.

    idx: (B, T), lengths: (B,) of them real, the others fill it up; None = all. more: tokens that will follow.
    """

    def __init__(self, model, idx, lengths, more, **options):
        self.model, self.block_size = model, model.config.block_size
        self.learned = model.transformer.wpe is not None
        if lengths is not None and (lengths == idx.size(1)).all():
            lengths = None
        self.decoder = Decoder(model, len(idx), idx.size(1) + more, **options)
        self.recent = None
        if self.learned:  # what is left of a prompt, and what may be processed anew
            sizes = [idx.size(1)] * len(idx) if lengths is None else lengths.tolist()
            kept = [row[:n][n - window(n, self.block_size) :] for row, n in zip(idx, sizes, strict=True)]
            sizes = [len(row) for row in kept]
            self.recent = idx.new_zeros(len(idx), self.block_size)
            for row, tokens in zip(self.recent, kept, strict=True):
                row[: len(tokens)] = tokens
            idx = self.recent[:, : max(sizes)]
            lengths = None if len(set(sizes)) == 1 else torch.tensor(sizes, device=idx.device)
        self.read = self.start(idx, lengths)  # (B, C), what the head reads at the last token of each row

    def start(self, idx, lengths):
        """Processes the prompts in chunks."""
        found = None
        for a in range(0, idx.size(1), CHUNK):
            piece = idx[:, a : a + CHUNK]
            if lengths is None:
                found = self.decoder.advance(piece)[:, -1]
                continue
            real = (lengths - a).clamp(0, piece.size(1))
            x = self.decoder.advance(piece, lengths=real)
            ends = x[torch.arange(len(x), device=x.device), (real - 1).clamp(min=0)]
            found = ends if found is None else torch.where((real > 0)[:, None], ends, found)
        return found

    def room(self):
        """How many tokens fit in before something is processed anew."""
        return self.block_size - self.decoder.lengths if self.learned else CHUNK

    def append(self, token):
        """The next token of every row, (B,)."""
        d = self.decoder
        if not self.learned:
            self.read = d.advance(token[:, None])[:, -1]
            return
        even = isinstance(d.lengths, int)
        full = d.lengths == self.block_size
        if even and not full:
            self.recent[:, d.lengths] = token
            self.read = d.advance(token[:, None])[:, -1]
            return
        half = self.block_size // 2
        if even:
            d.lengths = 0
            self.recent[:, :half] = self.recent[:, self.block_size - half :].clone()
            self.recent[:, half] = token
            self.read = d.advance(self.recent[:, : half + 1])[:, -1]
            return
        self.read = torch.empty_like(self.read)
        for rows in (full.nonzero()[:, 0], (~full).nonzero()[:, 0]):
            if not len(rows):
                continue
            if full[rows[0]]:
                d.lengths[rows] = 0
                self.recent[rows, :half] = self.recent[rows, self.block_size - half :]
                self.recent[rows, half] = token[rows]
                idx = self.recent[rows, : half + 1]
            else:
                self.recent[rows, d.lengths[rows]] = token[rows]
                idx = token[rows, None]
            self.read[rows] = d.advance(idx, rows=rows)[:, -1]


# -----------------------------------------------------------------------------
# tokens


class Sampler:
    """Draws from a model's predictions. temperature 0 takes the most likely token; top_k keeps the k most
    likely, top_p the fewest that make up that share of the probability. generator: on the model's device."""

    def __init__(self, model, temperature=1.0, top_k=None, top_p=None, generator=None):
        self.model, self.temperature, self.top_k, self.top_p = model, temperature, top_k, top_p
        self.generator = generator

    def predict(self, x):
        """Probabilities (n, V), given what the head reads, x (n, C)."""
        logits = upcast(self.model.logits(x))
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.size(-1)).to(logits.dtype)
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / self.temperature  # nothing overflows
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.size(-1))).values[:, [-1]]
            logits = logits.masked_fill(logits < least, -math.inf)
        if self.top_p is not None:
            p, place = logits.softmax(dim=-1).sort(dim=-1, descending=True)
            beyond = p.cumsum(dim=-1) - p >= self.top_p  # of the more likely: the first token always stays
            logits = logits.masked_fill(beyond.scatter(-1, place, beyond), -math.inf)
        return logits.softmax(dim=-1)

    def draw(self, p):
        """A token for each row of p (n, V), (n,)."""
        if self.temperature == 0:
            return p.argmax(dim=-1)
        return torch.multinomial(p, 1, generator=self.generator)[:, 0]

    def verify(self, p, q, drafts):
        """Drafts (n,), drawn from q (n, V), until the first that p (n, V) refuses, then what p has instead.

        A draft stays with probability min(1, p / q), else one is drawn from max(0, p - q): that makes
        them draws from p. Source: arXiv:2211.17192.
        """
        chance = torch.rand(len(drafts), device=p.device, dtype=p.dtype, generator=self.generator)
        at = drafts[:, None]
        kept = chance * q.gather(1, at)[:, 0] < p.gather(1, at)[:, 0]
        first = int(kept.int().cumprod(0).sum())
        if first == len(drafts):
            return drafts
        return torch.cat((drafts[:first], self.draw((p[first] - q[first]).clamp(min=0)[None])))


@torch.no_grad()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None, lengths=None,
           speculate=0, draft_loops=1, info=None, **options):  # fmt: skip
    """Yields the next token of every row of idx (B, T), as (B,), max_new_tokens times.

    temperature, top_k, top_p, generator: see Sampler. lengths: (B,) of idx that are the prompts, the others
    fill it up; None = all. speculate: of one row, so many tokens are drafted with draft_loops loops and then
    verified by all; what comes out stays the same. options: of Decoder. info: a dict
    that is told the bytes of the cache. Raises ValueError for what does not go together.
    """
    if max_new_tokens < 1:
        return
    rows = Sequences(model, idx, lengths, max_new_tokens, **options)
    d = rows.decoder
    if speculate:
        check(len(idx) == 1, 'speculate', speculate, '0 for several rows')
        check(d.leave is None, 'speculate', speculate, '0 with an exit')
        check(d.budget == d.n_loop, 'speculate', speculate, f'0 with kv_budget={d.budget}')
        check(not d.warm_start, 'speculate', speculate, '0 with warm_start')
        check(1 <= draft_loops < d.n_loop, 'draft_loops', draft_loops, f'at least 1, below n_loop={d.n_loop}')
    if info is not None:
        info['cache_bytes'] = d.bytes()
    sampler, left = Sampler(model, temperature, top_k, top_p, generator), max_new_tokens - 1
    token = sampler.draw(sampler.predict(rows.read))
    yield token
    while left:
        n = min(speculate, left, rows.room()) if speculate else 0
        if n:
            tokens = speculation(rows, token, n, draft_loops, sampler)
        else:
            rows.append(token)
            tokens = [sampler.draw(sampler.predict(rows.read))]
        yield from tokens
        token, left = tokens[-1], left - len(tokens)


def speculation(rows, token, n, draft_loops, sampler):
    """The tokens after token (1,), 1 to n of them, each (1,): drafted with draft_loops, verified by all.

    The prelude and the first loops of the draft are those of the verification and not computed again.
    """
    d, start, drafts = rows.decoder, rows.decoder.lengths, [token]
    entered, states, guesses = [], [], []
    for _ in range(n):
        e, s, _, context = d.enter(drafts[-1][:, None])
        s = d.loop(e, s, context, 0, draft_loops)
        q = sampler.predict(d.finish(s, context)[:, -1])
        drafts.append(sampler.draw(q))
        entered, states, guesses = [*entered, e], [*states, s], [*guesses, q]
    d.lengths = start
    _, context = d.place(n, None, None)
    s = d.loop(torch.cat(entered, dim=1), torch.cat(states, dim=1), context, draft_loops, d.n_loop)
    p = sampler.predict(d.finish(s, context)[0])
    tokens = sampler.verify(p, torch.cat(guesses), torch.cat(drafts[1:]))
    d.lengths = start + len(tokens)
    if rows.learned:
        rows.recent[0, start : start + len(tokens)] = torch.cat((token, tokens[:-1]))
    return list(tokens[:, None])
