"""
Tokens from a model, one at a time, with keys and values kept.

A Decoder has one slot of keys and values per executed block, so that what it computes is what a whole forward
pass computes at that position, whatever the number of loops. kv_budget = m lets iteration i share the slots
of iteration i mod m: m = n_loop is exact, less is an approximation, with m / n_loop of the loop's memory.

With an Exit every token leaves the loop by itself; its slots of deeper loops get its last keys and values.
What a token does depends on those before it alone: a prompt is processed as if token by token (with slots of
their own for all iterations).

Beyond block_size: with learned positions, when the window is full, the last block_size // 2 tokens and the
new one are processed anew; otherwise every layer sees the last block_size keys.
"""

import collections
import contextlib
import functools
import math
from typing import NamedTuple

import torch

from model import AttnInputs, rope_table, upcast
from nanoloop.checks import check

CHUNK = 512  # tokens of a prompt that are processed at once
FEW = 2  # tokens at once, see few_tokens
SPAN = 32  # a compiled step sees a multiple of so many tokens


def lower(model, dtype):
    """Keeps the weights of a model's matrix products in dtype, which autocast then need not cast for every
    token: it can only be sampled from. What autocast leaves in float32 stays."""
    if dtype != torch.float32:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach())  # not the embedding's
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module is not model.exit_gate:
                module.to(dtype)


@contextlib.contextmanager
def few_tokens(n):
    """Without oneDNN if n is small: a CPU's products of one bfloat16 token are then 1.5 times as fast."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = before and n > FEW
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


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
    stayed = (1 - model.exit_probability(s)) * (1.0 if stayed is None else stayed)
    return stayed, stayed


EXIT = {'kl': kl, 'diff': diff, 'gate': gate}


class Exit:
    """When a token leaves the loop: after at least `least` loops, where its statistic of EXIT is below the
    threshold (kl, diff), or its probability to have left, by the gate, at least that (Ouro's Q-exit)."""

    def __init__(self, rule, threshold, least=1):
        self.rule, self.threshold, self.least, self.reads = EXIT[rule], threshold, least, rule == 'kl'
        self.taken = collections.Counter()  # {loops: tokens that took so many}

    def mean(self):
        """Loops per token."""
        return sum(loops * n for loops, n in self.taken.items()) / self.taken.total()

    def __call__(self, model, i, before, s, read, memory):
        """(which of the tokens leave after loop i, (n, T); the rule's memory)."""
        value, memory = self.rule(model, before, s, read, memory)
        if i + 1 < self.least or (self.rule is gate and self.threshold >= 1):  # a gate may round to 1 itself
            return torch.zeros_like(value, dtype=torch.bool), memory
        return 1 - value >= self.threshold if self.rule is gate else value < self.threshold, memory


# -----------------------------------------------------------------------------
# keys and values


class Place(NamedTuple):
    """Where tokens go in the slots and what they see there."""

    pos: torch.Tensor  # (T,) or (n, T), their positions
    rows: torch.Tensor | None  # (n,) of the decoder's rows, None = all
    at: slice | torch.Tensor  # their columns in the slots, (n, T); a slice: the same for all rows
    context: AttnInputs

    @property
    def seen(self):
        """How many of the slots' columns are in sight."""
        return self.at.stop if isinstance(self.at, slice) else self.context.mask.size(-1)


def keep(slot, place, *new):
    """Puts new keys and values (n, G, T, D) into the slot's (size, G, columns, D), returns all in sight."""
    if isinstance(place.at, slice):
        for kept, x in zip(slot, new, strict=True):
            kept[:, :, place.at] = x
        return [kept[:, :, : place.seen] for kept in slot]
    rows = torch.arange(len(place.at), device=place.at.device) if place.rows is None else place.rows
    for kept, x in zip(slot, new, strict=True):
        kept[rows[:, None], :, place.at] = x.transpose(1, 2).to(kept.dtype)
    found = [kept[:, :, : place.seen] for kept in slot]
    return found if place.rows is None else [x[place.rows] for x in found]


def put_last(kept, rows, x, counts):
    """Row by row the last of x's (n, T, C) first counts goes to kept[rows], where there are any."""
    some = [i for i, count in enumerate(counts) if count]
    kept[[rows[i] for i in some]] = x[some, [counts[i] - 1 for i in some]].to(kept.dtype)


def moved_to_the_front(left):
    """The indices that take from (n, T, ...) the rows in which left (n, T) is true somewhere, there first."""
    count = left.sum(dim=1)
    rows = count.nonzero()[:, 0]
    order = left[rows].int().argsort(dim=1, descending=True, stable=True)
    return rows[:, None], order[:, : count.max()]


class Decoder:
    """Runs a model over rows of tokens, piece by piece.

    size: rows; total: the most tokens that a row will have; leave: an Exit, or None: every token takes n_loop
    loops; warm_start: the loop of a token after the prompt starts from its predecessor's last state, an
    approximation (Huginn's continuous thought); compile: the step of single tokens is compiled, once.
    lengths: the tokens of every row so far. loops: how many every token of the last piece took, (n, T), or
    an int.
    """

    def __init__(self, model, size, total, n_loop=None, kv_budget=None, leave=None, warm_start=False,
                 compile=False):  # fmt: skip
        c, self.model, self.size, self.lengths = model.config, model, size, [0] * size
        self.n_loop = self.loops = c.n_loop if n_loop is None else n_loop
        self.budget = self.n_loop if kv_budget is None else kv_budget
        self.leave, self.warm_start, self.compile = leave, warm_start, compile
        check(self.n_loop >= 1, 'n_loop', n_loop, 'at least 1')
        check(1 <= self.budget <= self.n_loop, 'kv_budget', kv_budget, f'from 1 to n_loop={self.n_loop}')
        if leave is not None:
            gated = leave.rule is not gate or model.exit_gate is not None
            check(gated, 'exit', 'gate', 'kl or diff: the model has no exit gate')
            check(leave.least <= self.n_loop, 'min_loops', leave.least, f'at most n_loop={self.n_loop}')
            check(not compile, 'compile', compile, 'False with an exit')
        self.windowed = any(block.windowed for block in model.blocks())
        self.capacity = min(total, c.block_size + (0 if c.pos == 'learned' else CHUNK - 1))
        codas = self.budget if leave is not None and leave.reads else 1  # a loop that is read out has its own
        sections = [c.n_prelude] + [c.n_block] * self.budget + [c.n_coda] * codas
        weight, G = model.lm_head.weight, c.n_kv_head or c.n_head
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        zeros = functools.partial(torch.zeros, dtype=dtype, device=weight.device)
        # by position modulo the capacity; the last column takes what nobody will see
        shape, n = (size, G, self.capacity + 1, c.n_embd // c.n_head), sum(sections)
        if compile:  # of views of one tensor it would copy all at every write to one
            self.all = [(zeros(shape), zeros(shape)) for _ in range(n)]
        else:
            self.k, self.v = zeros(n, *shape), zeros(n, *shape)
            self.all = list(zip(self.k, self.v, strict=True))
        slots = iter(self.all)
        self.prelude, *self.recur = ([next(slots) for _ in range(n)] for n in sections[: self.budget + 1])
        self.coda = [[next(slots) for _ in range(n)] for n in sections[self.budget + 1 :]]
        self.last = model.transformer.wte.weight.new_zeros(size, c.n_embd)  # of warm_start: every row's state

    def bytes(self):
        """Bytes of all slots."""
        return sum(x.nbytes for slot in self.all for x in slot)

    def place(self, T, rows=None, counts=None, compiled=False):
        """The Place of the next T tokens of rows, of which counts are real, both lists, None = all; it adds
        them to lengths. compiled: for a step that is."""
        device, who = self.model.lm_head.weight.device, range(self.size) if rows is None else rows
        starts, steps = [self.lengths[row] for row in who], torch.arange(T, device=device)
        for i, row in enumerate(who):
            self.lengths[row] += counts[i] if counts else T
        start, end = starts[0], max(starts) + T
        if rows is None and counts is None and len({*starts}) == 1 and end <= self.capacity and not compiled:
            pos = start + steps
            return Place(pos, None, slice(start, end), self.context(pos, end, plain=T in (1, end)))
        pos = torch.tensor(starts, device=device)[:, None] + steps
        real = steps < torch.tensor(counts, device=device)[:, None] if counts else None
        rows = rows if rows is None else torch.tensor(rows, device=device)
        if not compiled:
            return self.aim(rows, pos, real, min(end, self.capacity))
        place = self.aim(rows, pos, real, min(math.ceil(end / SPAN) * SPAN, self.capacity))
        for mask in place.context[1:]:
            torch._dynamo.maybe_mark_dynamic(mask, 3)  # one graph serves all lengths
        return place

    def aim(self, rows, pos, real, seen):
        """The Place of tokens of rows at pos (n, T); what is not real (n, T) is dropped."""
        at = pos % self.capacity
        at = at if real is None else at.masked_fill(~real, self.capacity)
        return Place(pos, rows, at, self.context(pos, seen))

    def context(self, pos, seen, plain=False):
        """The AttnInputs of tokens at pos (T,) or (n, T) that look at the first columns; plain: at all."""
        c, rope = self.model.config, None
        if self.model.rope_width:
            rope = rope_table(pos, self.model.rope_width, c.rope_base)
            rope = rope if pos.dim() == 1 else tuple(x[:, None] for x in rope)  # for all heads
        if plain and seen <= min(c.block_size, self.model.window + 1 if self.windowed else seen):
            return AttnInputs(rope, None, None)
        pos = pos[:, None] if pos.dim() == 1 else pos[:, None, :, None]
        back = (pos - torch.arange(seen, device=pos.device)) % self.capacity
        full = (back <= pos) & (back < c.block_size)
        return AttnInputs(rope, full, full & (back <= self.model.window) if self.windowed else full)

    def slots(self, group, place):
        """What the blocks of a group call with their keys and values."""
        return [functools.partial(keep, slot, place) for slot in group]

    def advance(self, idx, rows=None, counts=None, new=False):
        """(n, T, C), what the head reads after the next tokens idx (n, T) of rows, a list, None = of all.

        counts: how many of each row of idx are real, the others fill it up, a list; None = all. new: it is
        one after the prompt, whose loop may start warm and whose step may be compiled.
        """
        n, T = idx.shape
        rows = None if rows == list(range(self.size)) else rows
        counts = None if counts is not None and min(counts) == T else counts
        compiled = self.compile and new and rows is None
        place = self.place(T, rows, counts, compiled)
        s = (self.last if rows is None else self.last[rows])[:, None] if new and self.warm_start else None
        step = self.step if compiled else self.pass_through
        with few_tokens(n * T):
            if self.leave is not None:
                s, x = self.leave_by_themselves(idx, place, s, counts)
            else:
                s, x = step(idx, place, s)
        if self.warm_start:
            put_last(self.last, rows or range(self.size), s, counts or [T] * n)
        return x

    @functools.cached_property
    def step(self):
        """pass_through of single tokens, compiled."""
        return torch.compile(self.pass_through, options={'cpp_wrapper': self.last.device.type == 'cpu'})

    def pass_through(self, idx, place, s=None):
        """(the last state, what the head reads) of tokens idx (n, T), of which all take all loops from s."""
        e, start = self.enter(idx, place)
        s = self.loop(e, start if s is None else s, place, 0, self.n_loop)
        return s, self.finish(s, place)

    def enter(self, idx, place):
        """(e, s_0) of tokens idx (n, T)."""
        x, m = self.model.embed(idx, place.pos), self.model
        e = m.apply_blocks(m.transformer.prelude, x, place.context, caches=self.slots(self.prelude, place))
        return e, m.start(e, place.pos)

    def loop(self, e, s, place, start, stop):
        """s after the iterations from start to stop."""
        for i in range(start, stop):
            s = self.model.iterate(e, s, i, place.context, self.slots(self.recur[i % self.budget], place))
        return s

    def finish(self, s, place, i=0):
        """What the head reads of s, after loop i if each is read out."""
        return self.model.run_coda(s, place.context, self.slots(self.coda[i % len(self.coda)], place))

    def leave_by_themselves(self, idx, place, s, counts):
        """pass_through, where every token leaves by self.leave; those that are left move together."""
        leave, (n, T), device, here = self.leave, idx.shape, idx.device, place
        e, start = self.enter(idx, place)
        s, memory = start if s is None else s, None
        who = torch.arange(self.size, device=device) if place.rows is None else place.rows
        pos, steps = place.pos.expand(n, T), torch.arange(T, device=device).expand(n, T)
        left, moving = torch.ones_like(pos, dtype=torch.bool), sum(counts) if counts else n * T
        if counts is not None:
            left = steps < torch.tensor(counts, device=device)[:, None]
        grid = torch.arange(n, device=device)[:, None].expand(n, T), steps  # which of idx are still moving
        final, self.loops = torch.zeros_like(e), torch.zeros_like(pos)
        out = torch.zeros_like(e) if leave.reads else None
        for i in range(self.n_loop):
            before, s = s, self.loop(e, s, here, i, i + 1)
            x = self.finish(s, here, i) if leave.reads else s
            gone, memory = leave(self.model, i, before, s, x, memory)
            gone = left & gone if i < self.n_loop - 1 else left
            at = gone.nonzero(as_tuple=True)
            if not len(at[0]):
                continue
            done = tuple(x[at] for x in grid)
            final[done], self.loops[done] = s[at], i + 1
            if leave.reads:
                out[done] = x[at]
            leave.taken[i + 1] += len(at[0])
            self.fill(who[done[0]], pos[done] % self.capacity, i)
            moving -= len(at[0])
            if not moving:
                break
            left = left & ~gone
            take = moved_to_the_front(left)
            e, s, left, *grid = (x[take] for x in (e, s, left, *grid))
            memory = memory if memory is None else memory[take]
            here = self.aim(who[grid[0][:, 0]], pos[tuple(grid)], left, place.seen)
        return final, self.finish(final, place) if out is None else out

    def fill(self, rows, at, i):
        """The slots of the loops after i get, of tokens at (rows, at), what loop i has computed last."""
        c, mine = self.model.config, i % self.budget
        later = {j % self.budget for j in range(i + 1, self.n_loop)} - {mine}
        sections = [(c.n_prelude, c.n_block), (c.n_prelude + self.budget * c.n_block, c.n_coda)]
        for start, width in sections[: 1 + (len(self.coda) > 1)] if later else ():
            for x in (self.k, self.v):
                groups = x[start : start + self.budget * width].unflatten(0, (self.budget, width))
                latest = groups[mine, :, rows, :, at]  # (tokens, blocks, G, D)
                groups[torch.tensor([*later], device=at.device)[:, None], :, rows, :, at] = latest


def window(length, block_size):
    """How many of a row's tokens are in sight with learned positions, by the rule of the file's head."""
    half = block_size // 2
    return length if length <= block_size else half + 1 + (length - block_size - 1) % (block_size - half)


class Sequences:
    """Rows of tokens that grow at their ends, under a Decoder and the rule for what is beyond block_size.

    idx: (B, T); lengths: how many of each row are its prompt, a list, the others fill it up; None = all.
    more: tokens that will follow. read: (B, C), what the head reads at the last token of each row.
    """

    def __init__(self, model, idx, lengths, more, **options):
        self.block_size, self.learned = model.config.block_size, model.config.pos == 'learned'
        lengths, T = [idx.size(1)] * len(idx) if lengths is None else lengths, idx.size(1)
        check(all(1 <= n <= T for n in lengths), 'lengths', lengths, f'from 1 to the {T} tokens of idx')
        self.decoder = Decoder(model, len(idx), max(lengths) + more, **options)
        self.kept = idx
        if self.learned:
            self.kept = [row[n - window(n, self.block_size) : n] for row, n in zip(idx, lengths, strict=True)]
            lengths = [len(row) for row in self.kept]
            idx = torch.nn.utils.rnn.pad_sequence(self.kept, batch_first=True)
        self.new = collections.deque(maxlen=self.block_size // 2 + 1)  # what may be processed anew
        self.read = model.transformer.wte.weight.new_zeros(len(idx), model.config.n_embd)
        for a in range(0, max(lengths), CHUNK):
            piece = idx[:, a : min(a + CHUNK, max(lengths))]
            counts = [min(max(n - a, 0), piece.size(1)) for n in lengths]
            put_last(self.read, range(len(idx)), self.decoder.advance(piece, counts=counts), counts)

    def room(self):
        """How many tokens fit in before something is processed anew."""
        return self.block_size - max(self.decoder.lengths) if self.learned else CHUNK

    def append(self, token):
        """The next token of every row, (B,)."""
        d, all_rows = self.decoder, range(len(token))
        self.new.append(token)
        full = [row for row in all_rows if self.learned and d.lengths[row] == self.block_size]
        if not full:
            self.read = d.advance(token[:, None], new=True)[:, -1]
            return
        for row in full:
            d.lengths[row] = 0
        others = [row for row in all_rows if row not in full]
        for rows, n, new in (full, self.new.maxlen, False), (others, 1, True):
            if rows:
                idx = torch.stack([self.tail(row, n) for row in rows])
                self.read[rows] = d.advance(idx, rows, new=new)[:, -1]

    def tail(self, row, n):
        """A row's last n tokens."""
        new = torch.stack([*self.new])[:, row]
        return torch.cat((self.kept[row], new))[-n:]


# -----------------------------------------------------------------------------
# tokens


class Sampler:
    """Draws from a model's predictions. temperature 0 takes the most likely token; top_k keeps the k most
    likely, top_p the fewest that make up that share of the probability. generator: on the model's device."""

    def __init__(self, model, temperature=1.0, top_k=None, top_p=None, generator=None):
        self.model, self.top_k, self.top_p = model, top_k, top_p
        self.temperature = temperature if temperature > 1e-6 else 0  # float32 cannot divide by less
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

    def sample(self, x):
        """The next token of each row, (n,), given what the head reads, x (n, C)."""
        return self.model.logits(x).argmax(dim=-1) if self.temperature == 0 else self.draw(self.predict(x))

    def draw(self, p):
        """A token for each row of p (n, V), (n,)."""
        if self.temperature == 0:
            return p.argmax(dim=-1)
        return torch.multinomial(p, 1, generator=self.generator)[:, 0]

    def verify(self, p, q, drafts):
        """(drafts (n,), drawn from q (n, V), until the first that p (n, V) refuses, then what p has instead;
        how many of the drafts were kept).

        A draft stays with probability min(1, p / q), else one is drawn from max(0, p - q): that makes
        them draws from p. Source: arXiv:2211.17192.
        """
        chance = torch.rand(len(drafts), device=p.device, dtype=p.dtype, generator=self.generator)
        at = drafts[:, None]
        kept = chance * q.gather(1, at)[:, 0] < p.gather(1, at)[:, 0]
        first = int(kept.int().cumprod(0).sum())
        if first == len(drafts):
            return drafts, first
        rest = (p[first] - q[first]).clamp(min=0)
        rest = rest if rest.any() else p[first]  # they differ in rounding only
        return torch.cat((drafts[:first], self.draw(rest[None]))), first


@torch.inference_mode()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None, lengths=None,
           speculate=0, draft_loops=1, info=None, **options):  # fmt: skip
    """Yields the next token of every row of idx (B, T), as (B,), max_new_tokens times.

    temperature, top_k, top_p, generator: see Sampler. lengths: how many of each row of idx are its prompt, a
    list, the others fill it up; None = all. speculate: of one row, so many tokens are drafted with
    draft_loops loops and then verified by all; what comes out stays the same. options: of Decoder. info: a
    Counter that is told cache_bytes, and of speculation how many were drafted and kept. The tokens are
    made in inference mode: clone() them for a graph. Raises ValueError for what does not go together.
    """
    if max_new_tokens < 1:
        return
    if speculate:
        n_loop, budget = options.get('n_loop') or model.config.n_loop, options.get('kv_budget')
        check(speculate > 0, 'speculate', speculate, 'at least 0')
        check(len(idx) == 1, 'speculate', speculate, '0 for several rows')
        check(n_loop > 1, 'speculate', speculate, '0 with n_loop=1, where there is nothing to save')
        check(options.get('leave') is None, 'speculate', speculate, '0 with an exit')
        check(budget in (None, n_loop), 'speculate', speculate, f'0 with kv_budget={budget}')
        check(not options.get('warm_start'), 'speculate', speculate, '0 with warm_start')
        check(not options.get('compile'), 'compile', True, f'False with speculate={speculate}')
        check(1 <= draft_loops < n_loop, 'draft_loops', draft_loops, f'at least 1, below n_loop={n_loop}')
    rows = Sequences(model, idx, lengths, max_new_tokens, **options)
    info = collections.Counter() if info is None else info
    info['cache_bytes'] = rows.decoder.bytes()
    sampler, left = Sampler(model, temperature, top_k, top_p, generator), max_new_tokens - 1
    token = sampler.sample(rows.read)
    yield token
    while left:
        n = min(speculate, left, rows.room()) if speculate else 0
        if n:
            tokens, kept = speculation(rows, token, n, draft_loops, sampler)
            info.update(drafted=n, kept=kept)
        else:
            rows.append(token)
            with few_tokens(len(idx)):
                tokens = [sampler.sample(rows.read)]
        yield from tokens
        token, left = tokens[-1], left - len(tokens)


def speculation(rows, token, n, draft_loops, sampler):
    """(the tokens after token (1,), 1 to n of them, each (1,), drafted with draft_loops and verified by all;
    how many of them are drafts).

    The prelude and the first loops of the draft are those of the verification and not computed again.
    """
    d, (start,), drafts = rows.decoder, rows.decoder.lengths, [token]
    entered, states, guesses = [], [], []
    for _ in range(n):
        with few_tokens(1):
            place = d.place(1)
            e, s = d.enter(drafts[-1][:, None], place)
            s = d.loop(e, s, place, 0, draft_loops)
            q = sampler.predict(d.finish(s, place)[:, -1])
        drafts.append(sampler.draw(q))
        entered, states, guesses = [*entered, e], [*states, s], [*guesses, q]
    d.lengths = [start]
    place = d.place(n)
    s = d.loop(torch.cat(entered, dim=1), torch.cat(states, dim=1), place, draft_loops, d.n_loop)
    p = sampler.predict(d.finish(s, place)[0])
    tokens, kept = sampler.verify(p, torch.cat(guesses), torch.cat(drafts[1:]))
    d.lengths = [start + len(tokens)]
    tokens = list(tokens[:, None])
    rows.new.extend([token, *tokens[:-1]])
    return tokens, kept


@torch.no_grad()
def generate(model, idx, max_new_tokens, **options):
    """Returns idx (B, T) with max_new_tokens tokens after each row. options: as of stream."""
    tokens = stream(model, idx, max_new_tokens, **options)
    return torch.cat((idx, *(token[:, None] for token in tokens)), dim=1)
