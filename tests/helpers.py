"""What several test files use: sizes of a tiny run, random weights, and a transformer written out by hand."""

import itertools
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from model import GPTConfig
from nanoloop.checks import OneOf, hints_of, split_hint

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    '--n_embd=16 --n_head=2 --block_size=8 --n_prelude=1 --n_block=1 --n_coda=1 --n_loop=2 --batch_size=4 '
    '--device=cpu --dtype=float32 --compile=False --max_iters=12 --eval_interval=4 --eval_iters=2 '
    '--learning_rate=1e-2 --warmup_iters=2 --sample_tokens=0'
).split()


def randomize(model, seed=0):
    """Random weights everywhere: zero biases, unit norms and [I 0] of an initialised model hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.copy_(0.2 * noise if p.dim() > 1 else 1 + 0.1 * noise)
    return model


def pairwise(**factors):
    """Returns combinations {name: value} in which any two values of different factors meet at least once.

    factors: {name: values}. It takes about as many combinations as the two longest factors have pairs.
    """
    names, factors = list(factors), {name: list(values) for name, values in factors.items()}
    missing = {
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(range(len(factors[a])), range(len(factors[b])))
    }
    dice, combinations = random.Random(0), []

    def pairs(choice):
        return {(a, choice[a], b, choice[b]) for a, b in itertools.combinations(names, 2)}

    while missing:
        a, x, b, y = min(missing)
        candidates = [
            {name: dice.randrange(len(factors[name])) for name in names} | {a: x, b: y} for _ in range(30)
        ]
        best = max(candidates, key=lambda choice: len(pairs(choice) & missing))
        missing -= pairs(best)
        combinations.append({name: factors[name][i] for name, i in best.items()})
    return combinations


def script(name, *argv, **environment):
    """Starts a script as a user does, its output in .stdout."""
    env = dict(os.environ, OMP_NUM_THREADS='1', **environment)
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([sys.executable, str(ROOT / name), *argv], env=env, cwd=ROOT, **pipe)


def read_log(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / 'log.jsonl').read_text().splitlines()]


def load(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Whether two checkpoints' values are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def rms(x, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def turn(x, base):
    """x (B, T, D) with its two halves rotated as real and imaginary parts; the tables are in float32."""
    T, D = x.shape[-2:]
    angle = torch.arange(T)[:, None] * base ** (-torch.arange(0, D, 2).float() / D)
    turned = torch.complex(x[..., : D // 2], x[..., D // 2 :])
    turned = turned * torch.complex(angle.cos().to(x.dtype), angle.sin().to(x.dtype))
    return torch.cat((turned.real, turned.imag), dim=-1)


def softmax_attention(q, k, v, window=None):
    """One head, (B, T, D): every query sees itself and the keys before it, window of them if there is one."""
    T, D = q.shape[-2:]
    scores = q @ k.transpose(1, 2) / math.sqrt(D)
    behind = torch.arange(T)[:, None] - torch.arange(T)
    hidden = (behind < 0) | (behind > (T if window is None else window))
    scores = scores.masked_fill(hidden, -math.inf)
    return torch.exp(scores - scores.logsumexp(-1, keepdim=True)) @ v


# -----------------------------------------------------------------------------
# the equations, written out: a new entry of a table of model.py needs its own here


class Equations(dict):
    """The equations of a table's entries, by name."""

    def __missing__(self, name):
        raise AssertionError(f'{name}: write its equation in tests/helpers.py, see EQUATIONS and EXIT there')


NORM_PLACE = Equations(pre=('pre',), branch=('pre', 'post'), around=('pre', 'out'), post=('out',))
NORM = Equations(  # of x, eps, and the norm's weights {name: tensor}
    layernorm=lambda x, eps, w: rms(x - x.mean(-1, keepdim=True), eps) * w['weight'] + w.get('bias', 0.0),
    rmsnorm=lambda x, eps, w: rms(x, eps) * w['weight'],
    rmsnorm_fixed=lambda x, eps, w: rms(x, eps),
)
INJECT = Equations(  # u of e, s, the loop i, the injection's weights {name: tensor} and the weightless norm
    passthrough=lambda e, s, i, w, norm: s,
    inject=lambda e, s, i, w, norm: torch.cat((e, s), dim=-1) @ w['weight'].T + w.get('bias', 0.0),
    add=lambda e, s, i, w, norm: norm(e + s),
    gated=lambda e, s, i, w, norm: s + (e - s) / (1 + torch.exp(-w['gate'])),
    query_first=lambda e, s, i, w, norm: e,
    query_all=lambda e, s, i, w, norm: e,
    residual_all=lambda e, s, i, w, norm: e,
)
UPDATE = (
    Equations(  # the new state of the old one s, the output y, loop i, the update's weights, update_alpha
        replace=lambda s, y, i, w, alpha: y,
        gate=lambda s, y, i, w, alpha: y + (s - y) / (1 + torch.exp(-w['gate'])),
        damp=lambda s, y, i, w, alpha: (1 - alpha) * s + alpha * y,
    )
)
MLP_ACT = Equations(
    gelu=F.gelu,
    gelu_tanh=lambda x: F.gelu(x, approximate='tanh'),
    relu2=lambda x: x.clamp(min=0) ** 2,
    swiglu=lambda x: (
        x[..., : x.size(-1) // 2].sigmoid() * x[..., : x.size(-1) // 2] * x[..., x.size(-1) // 2 :]
    ),
)


class ExitEquation(NamedTuple):
    """The equation of an exit rule of nanoloop/early_exit.py.

    statistic: a function of a token's state before the loop and after it, (C,) each, the former may be None;
    its predictions p (i + 1, V) and its gate probabilities g (i + 1,) after loops 0 to i. p is None unless
    the rule reads logits.
    """

    statistic: Callable
    above: bool = False
    reads_logits: bool = False


def kl(p, q):
    return (p * (p / q).log()).sum()


EXIT = Equations(
    kl=ExitEquation(
        lambda before, s, p, g: kl(p[-2] if len(p) > 1 else torch.full_like(p[0], 1 / len(p[0])), p[-1]),
        reads_logits=True,
    ),
    diff=ExitEquation(lambda before, s, p, g: (s - (0 if before is None else before)).norm() / s.norm()),
    gate=ExitEquation(lambda before, s, p, g: 1 - (1 - g).prod(), above=True),
)
STATE = Equations(  # s_0 of e and standard normal noise of its shape; std: state_std
    prelude=lambda e, noise, std: e,
    random=lambda e, noise, std: std * noise,
    zero=lambda e, noise, std: 0 * e,
    none=lambda e, noise, std: None,
)
POS = dict(learned=('wpe',), rope=('rope',), none=())
QUERIES = dict(
    query_first=lambda j: j == 0, query_all=lambda j: True
)  # which blocks take them from the state
RESIDUALS = dict(residual_all=lambda j: True)  # which blocks first add the state and norm the sum
EQUATIONS = dict(
    input_injection=INJECT, state_init=STATE, state_update=UPDATE, norm=NORM, norm_place=NORM_PLACE
)
EQUATIONS.update(pos=POS, mlp=MLP_ACT)
# {key of GPTConfig: its table in model.py}
TABLES = {
    key: bound.table
    for key, hint in hints_of(GPTConfig).items()
    for bound in split_hint(hint)[1]
    if isinstance(bound, OneOf)
}


def by_hand(weights, c, idx, n_loop=None, cut=None, until='logits'):
    """Logits (B, T, V) of a state dict, the equations written out, or until='state' the loop's last state.

    cut: detach the state before that loop.
    """
    eps = c.norm_eps or (1e-5 if c.norm == 'layernorm' else 1e-6)
    small = c.norm_eps or 1e-6

    def norm(x, name, there=True):
        if not there:
            return x
        return NORM[c.norm](x, eps, part(name + '.'))

    def part(prefix):
        return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}

    def linear(x, name):
        return x @ weights[name + '.weight'].T + weights.get(name + '.bias', 0.0)

    def attention(x, name, source, window):
        H, G, D = c.n_head, c.n_kv_head or c.n_head, c.n_embd // c.n_head
        q = linear(x if source is None else source, name)[..., : H * D]
        k, v = linear(x, name)[..., H * D :].split(G * D, dim=-1)
        out = []
        for h in range(H):
            g = h // (H // G)
            one = [q[..., h * D : (h + 1) * D], k[..., g * D : (g + 1) * D]]
            if 'rope' in POS[c.pos]:
                one = [turn(y, c.rope_base) for y in one]
            if c.qk_norm:
                one = [rms(y, small) for y in one]
            out.append(softmax_attention(*one, v[..., g * D : (g + 1) * D], window))
        return torch.cat(out, dim=-1)

    def block(x, name, s=None, takes=None):
        letter = c.window_pattern[order.index(name) % len(c.window_pattern)]
        window = (c.window_size or c.block_size // 2) if letter == 'S' else None
        pre, out, post = (site in NORM_PLACE[c.norm_place] for site in ('pre', 'out', 'post'))
        source = None
        if takes == 'query':
            source = rms(s, small)
        if takes == 'residual':
            x = rms(x + s, small)
        y = attention(norm(x, name + 'ln_1', pre), name + 'attn.c_attn', source, window)
        y = c.res_scale * norm(linear(y, name + 'attn.c_proj'), name + 'post_1', post)
        x = norm(x + y, name + 'out_1', out)
        y = linear(
            MLP_ACT[c.mlp](linear(norm(x, name + 'ln_2', pre), name + 'mlp.c_fc')), name + 'mlp.c_proj'
        )
        return norm(x + c.res_scale * norm(y, name + 'post_2', post), name + 'out_2', out)

    sizes = dict(prelude=c.n_prelude, recur=c.n_block, coda=c.n_coda)
    order = [f'transformer.{section}.{i}.' for section, n in sizes.items() for i in range(n)]
    x = c.emb_scale * weights['transformer.wte.weight'][idx]
    for b, t in itertools.product(range(len(idx)), range(idx.size(1))):
        row = idx[b, t].item()
        for before in range(1, c.n_gram):
            token = idx[b, t - before].item() if t >= before else -1
            row = (row * (round(0.618034 * c.n_gram_rows) | 1) + token + 1) % c.n_gram_rows
            x[b, t] += weights['transformer.ngrams.weight'][row]
    if 'wpe' in POS[c.pos]:
        x = x + weights['transformer.wpe.weight'][: idx.size(1)]
    e = norm(x, 'transformer.norm_emb', c.norm_emb)
    for i in range(c.n_prelude):
        e = block(e, f'transformer.prelude.{i}.')
    generator = torch.Generator().manual_seed(0)
    noise = torch.stack([torch.randn(c.n_embd, generator=generator) for _ in range(c.block_size)]).to(e.dtype)
    noise = noise[torch.arange(idx.size(1)) % c.block_size].expand_as(e)
    s = STATE[c.state_init](e, noise, c.state_std or c.n_embd**-0.5)
    for i in range(n_loop or c.n_loop):
        s = s.detach() if i == cut else s
        u, takes = e, [None] * c.n_block
        if s is not None:
            u = INJECT[c.input_injection](e, s, i, part('inject.'), lambda x: rms(x, small))
            for table, name in ((QUERIES, 'query'), (RESIDUALS, 'residual')):
                chosen = table.get(c.input_injection, lambda j: False)
                takes = [name if chosen(j) else old for j, old in enumerate(takes)]
        for j in range(c.n_block):
            u = block(u, f'transformer.recur.{j}.', s, takes[j])
        y = norm(u, 'norm_recur', c.norm_loop)
        s = UPDATE[c.state_update](y if s is None else s, y, i, part('update.'), c.update_alpha)
    if until == 'state':
        return s
    for i in range(c.n_coda):
        s = block(s, f'transformer.coda.{i}.')
    logits = norm(s, 'transformer.ln_f', c.norm_final) @ weights['lm_head.weight'].T
    return logits if c.softcap is None else c.softcap * torch.tanh(logits / c.softcap)
