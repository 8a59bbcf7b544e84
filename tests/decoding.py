"""What test_decode.py and test_generate.py share: tiny models, and the logits that decoding must give."""

import functools
import itertools
import math
from typing import NamedTuple

import torch
from helpers import EXIT, randomize

from model import GPT, POS, GPTConfig, attend
from nanoloop.generate import tokens_in_view

SIZES = dict(block_size=12, vocab_size=23, n_head=2, n_embd=12, n_prelude=1, n_block=2, n_coda=1, n_loop=2)
SIZES.update(n_gram=3, n_gram_rows=16)  # tokens depend on the two before them, wherever these are stored
IDX = torch.randint(23, (3, 40), generator=torch.Generator().manual_seed(0))


def make(double=True, **keys):
    model = randomize(GPT(GPTConfig(**SIZES | keys))).eval()
    return model.double() if double else model


def gated(**keys):
    """A model with an exit gate that is not sure."""
    model = make(**dict(exit_gate=True, n_loop=5, pos='rope') | keys)
    model.exit_gate.bias.data.zero_()
    return model


def confident(**keys):
    """A model whose loops change little, so that drafts are right now and then."""
    sizes = dict(double=False, n_loop=4, pos='rope', norm_loop=False, n_prelude=0, n_block=1, n_coda=0)
    model = make(**sizes | keys)
    for name, p in model.named_parameters():
        p.data *= 0.3 if 'recur' in name and p.dim() > 1 else 1
    return model


def padded(lengths, fill=7):
    """Rows that begin with so many tokens of IDX each."""
    idx = torch.full((len(lengths), max(lengths)), fill)
    for row, n, tokens in zip(idx, lengths, IDX, strict=True):
        row[:n] = tokens[:n]
    return idx


class Expected(NamedTuple):
    logits: torch.Tensor  # (T, V) after every token
    loops: list  # that every token took
    values: list  # for every token the exit rule's statistic after each loop but the last


def expected(model, row, **options):
    """The logits after every token of a row (T,), from what is in view of each. options: of one_view."""
    c, starts = model.config, [0] * len(row)  # the first token in view of each
    if POS[c.pos].learned:
        starts = [t - tokens_in_view(t, c.block_size) for t in range(1, len(row) + 1)]
    parts = []
    for start in sorted(set(starts)):
        first = starts.index(start)
        end = first + starts.count(start)
        part = one_view(model, row[start:end], **options)
        parts.append([x[first - start :] for x in part])
    logits, *others = zip(*parts, strict=True)
    return Expected(torch.cat(logits), *(sum(lists, []) for lists in others))


def one_view(model, row, n_loop=None, **options):
    """expected, for a row whose first token is always in view: a whole forward pass, or token_by_token."""
    if options:
        return token_by_token(model, row, n_loop or model.config.n_loop, **options)
    (s,), attn_inputs = model.loop_states(row[None], n_loop)
    return Expected(model.logits(model.run_coda(s, attn_inputs))[0], [], [])


def token_by_token(model, row, n_loop, rule=None, threshold=None, budget=None, warm=math.inf):
    """Exits and shared caches, written out with a dictionary of keys and values.

    rule: of EXIT; threshold: None = no token exits; budget: loops with a cache of their own; warm: the first
    token whose loop starts from the last state of the token before it.
    """
    cached, logits, loops, values, s, budget = {}, [], [], [], None, budget or n_loop
    c, m, equation = model.config, model.transformer, EXIT[rule] if rule else None
    coda_in_loop = rule is not None and equation.reads_logits

    def stores(blocks, *part):  # one function per block
        return [functools.partial(store, (*part, j)) for j in range(len(blocks))]

    def store(name, q, k, v, mask, dropout):
        cached.setdefault(name, {})[t] = k, v
        in_view = [cached[name][u] for u in range(max(0, t + 1 - c.block_size), t + 1)]
        k, v = (torch.cat(parts, dim=2) for parts in zip(*in_view, strict=True))
        return attend(q, k, v, mask, dropout)

    for t, token in enumerate(row):
        pos = torch.tensor([t])
        inputs = model.attn_inputs(pos)
        text = torch.cat((torch.full((c.n_gram - 1,), -1), row))  # -1: there is no token
        before = [text[t + c.n_gram - 1 - k].view(1, 1) for k in range(1, c.n_gram)]
        x = model.embed(token.view(1, 1), pos, before)
        e = model.apply_blocks(m.prelude, x, inputs, None, stores(m.prelude, 0))
        s, p, g = model.start(e, pos) if t < warm else s, [], []
        values.append([])
        for i in range(n_loop):
            before, s = s, model.iterate(e, s, i, inputs, stores(m.recur, 1, i % budget))
            if coda_in_loop:
                x = model.run_coda(s, inputs, stores(m.coda, 2, i % budget))
                p.append(model.logits(x)[0, 0].softmax(-1))
            if rule and i < n_loop - 1:
                g.append(model.exit_probability(s)[0, 0] if model.exit_gate else torch.tensor(0.0))
                states = (None if before is None else before[0, 0]), s[0, 0]
                value = equation.statistic(*states, torch.stack(p) if p else None, torch.stack(g)).item()
                values[-1].append(value)
                exits = value >= (threshold or 0) if equation.above else value < (threshold or 0)
                if exits and threshold is not None:
                    break
        for later in range(i + 1, n_loop):
            for name in [name for name in cached if len(name) == 3 and name[1] == i % budget]:
                cached.setdefault((name[0], later % budget, name[2]), {})[t] = cached[name][t]
        if not coda_in_loop:
            x = model.run_coda(s, inputs, stores(m.coda, 3))
        logits.append(model.logits(x)[0, 0])
        loops.append(i + 1)
    return Expected(torch.stack(logits), loops, values)


def dividing_threshold(model, rule, row, **options):
    """A threshold of the rule at which the row's tokens take unlike numbers of loops: between its values."""
    tokens, above = expected(model, row, rule=rule, **options).values, EXIT[rule].above

    def alike(threshold):  # how little the loops differ: fewer numbers, the tokens of the most common one
        exits = ([(x >= threshold) if above else (x < threshold) for x in values] for values in tokens)
        loops = [(*crossed, True).index(True) for crossed in exits]
        return -len({*loops}), max(map(loops.count, loops))

    values = sorted(itertools.chain(*tokens))
    return min(((a + b) / 2 for a, b in itertools.pairwise(values)), key=alike)
