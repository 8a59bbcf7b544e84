"""
The axes of a model's configuration, a table each: what the values of a key mean. A variant is an entry. Then
the rules that a configuration must fulfil.

Shapes: B sequences, T positions, C = n_embd.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, get_type_hints

import torch
import torch.nn as nn
from torch.nn import functional as F

from nanoloop.checks import check, check_least, typed


def unit(x, config):
    """RMSNorm without weight."""
    return F.rms_norm(x, x.shape[-1:], eps=config.norm_eps or 1e-6)


def swiglu(x):
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def noise(model, e, pos):
    """N(0, state_std^2): in training from the default generator, else from one fixed table read by position,
    so that evaluation repeats and a row does not depend on its batch."""
    c = model.config
    x = torch.randn_like(e) if model.training else model.noise[pos % c.block_size].expand_as(e)
    return (c.state_std or c.n_embd**-0.5) * x


class Injection(NamedTuple):
    """How the loop's state s comes into the next iteration."""

    enter: Callable  # (model, e, s) -> u, the input of the first block
    states: list  # of state_init that make sense
    module: Callable | None = None  # config -> model.inject, what enter has of weights of its own
    feed: Callable = lambda model, s: s  # what of s is given to the blocks that have a first or others
    first: Callable | None = None  # of the first block: (x, what is given, config) -> (x, source of queries)
    others: Callable | None = None  # the same of the other blocks
    alone: bool = False  # e enters through s_0 alone: truncated, it would get no gradient


def concat(model, e, s):
    """W [e; s]; the first half of W's columns is for e."""
    return model.inject(torch.cat((e, s), dim=-1)).to(e.dtype)  # autocast must not lower the stream


def matrix(config):
    return nn.Linear(2 * config.n_embd, config.n_embd, bias=config.bias)


def query(x, s, config):
    return x, s


def normed(model, s):
    return s if s is None else unit(s, model.config)


def residual(x, s, config):
    return unit(x + s, config), None


# fmt: off
NORM = {
    'layernorm': lambda c: nn.LayerNorm(c.n_embd, eps=c.norm_eps or 1e-5, bias=c.bias),
    'rmsnorm': lambda c: nn.RMSNorm(c.n_embd, eps=c.norm_eps or 1e-6),
    'rmsnorm_fixed': lambda c: nn.RMSNorm(c.n_embd, eps=c.norm_eps or 1e-6, elementwise_affine=False),
}
PLACE = {  # which of pre, post and out in x = out(x + post(f(pre(x)))) are norms
    'pre': (True, False, False), 'branch': (True, True, False),
    'around': (True, False, True), 'post': (False, False, True),
}
POS = {'learned': (True, False), 'rope': (False, True), 'none': (False, False)}  # wpe added; q, k rotated
ACT = {  # the MLP's activation, the parts of c_fc it takes, the hidden width by C
    'gelu': (F.gelu, 1, lambda C: 4 * C),
    'gelu_tanh': (functools.partial(F.gelu, approximate='tanh'), 1, lambda C: 4 * C),  # of GPT-2's weights
    'relu2': (lambda x: F.relu(x).square(), 1, lambda C: 4 * C),
    'swiglu': (swiglu, 2, lambda C: math.ceil(C / 24) * 64),  # 8/3 C, in 64s
}
STATE = {  # s_0
    'prelude': lambda model, e, pos: e,
    'random': noise,
    'zero': lambda model, e, pos: torch.zeros_like(e),
    'none': lambda model, e, pos: None,  # the first iteration runs plainly on e
}
INJECT = {
    'passthrough': Injection(lambda model, e, s: s, ['prelude'], alone=True),
    'inject': Injection(concat, ['prelude', 'random', 'zero'], matrix),
    'add': Injection(lambda model, e, s: unit(e + s, model.config), ['prelude', 'random', 'zero', 'none']),
    'query_first': Injection(lambda model, e, s: e, ['none', 'prelude', 'random'], feed=normed, first=query),
    'query_all': Injection(
        lambda model, e, s: e, ['none', 'prelude', 'random'], feed=normed, first=query, others=query),
    'residual_all': Injection(lambda model, e, s: e, [*STATE], first=residual, others=residual),
}
# fmt: on


def normal(std):
    return functools.partial(nn.init.normal_, std=std)


def uniform(std):
    return functools.partial(nn.init.uniform_, a=-math.sqrt(3) * std, b=math.sqrt(3) * std)


def truncated(std):
    return functools.partial(nn.init.trunc_normal_, std=std, a=-3 * std, b=3 * std)


def huginn(std, depth):
    """Huginn's: what adds to the residual, and swiglu's up, scaled down by the executed layers."""
    return dict(rest=truncated(std)) | dict.fromkeys(('c_proj', 'up'), truncated(std / math.sqrt(2 * depth)))


# fmt: off
INIT = {  # how the weights of each part start, by C and the executed layers; inject as [I 0] is u = e
    'gpt2': lambda C, depth: dict(
        rest=normal(0.02), c_proj=normal(0.02 / math.sqrt(2 * depth)), inject=nn.init.eye_),
    'nanochat': lambda C, depth: dict(  # with norm_place pre every block starts as the identity
        rest=normal(0.02), c_attn=uniform(C**-0.5), c_fc=uniform(C**-0.5), c_proj=nn.init.zeros_,
        wte=normal(1.0), lm_head=normal(0.001), inject=nn.init.eye_),
    'huginn': lambda C, depth: huginn(math.sqrt(2 / (5 * C)), depth),
}
# fmt: on
TABLES = dict(  # by the key of GPTConfig
    input_injection=INJECT, state_init=STATE, norm=NORM, norm_place=PLACE, pos=POS, mlp=ACT, init=INIT
)

# -----------------------------------------------------------------------------
# what a configuration must fulfil


def resolve(c):
    """Gives a GPTConfig's values their types, and those that size and nanoLOOP's inject_random stand for."""
    for key, hint in get_type_hints(type(c)).items():
        setattr(c, key, typed(key, getattr(c, key), hint))
    if c.input_injection == 'inject_random':
        check(c.state_init in ('prelude', 'random'), 'state_init', c.state_init, 'random')
        c.input_injection, c.state_init = 'inject', 'random'
    if c.size is not None:
        check(c.size >= 1, 'size', c.size, 'at least 1')
        heads = math.ceil(c.size / 2)
        for key, value in dict(n_embd=128 * heads, n_head=heads).items():
            mine, wanted = getattr(c, key), f'no value with size={c.size}, which makes it {value}'
            check(mine in (getattr(type(c), key), value), key, mine, wanted)
            setattr(c, key, value)


def check_config(c):
    """Resolves a GPTConfig. Raises UserError for a value outside its table, or one that means nothing."""
    resolve(c)
    for key, table in TABLES.items():
        check(getattr(c, key) in table, key, getattr(c, key), f'one of {", ".join(table)}')
    check_least(c, 1, 'block_size', 'vocab_size', 'n_head', 'n_kv_head', 'n_embd', 'n_block', 'n_loop')
    check_least(c, 1, 'bptt_k', 'n_hidden', 'window_size')
    check_least(c, 0, 'n_prelude', 'n_coda')
    D, G = c.n_embd // c.n_head, c.n_kv_head or c.n_head
    injection, (learned, rotated) = INJECT[c.input_injection], POS[c.pos]
    truncated = c.bptt_k is not None and c.bptt_k < c.n_loop
    # fmt: off
    for holds, key, wanted in (
        (0 <= c.dropout < 1, 'dropout', 'at least 0 and below 1'),
        (c.norm_eps is None or 0 < c.norm_eps < 1, 'norm_eps', 'above 0 and below 1'),
        (c.n_embd % c.n_head == 0, 'n_head', f'a divisor of n_embd={c.n_embd}'),
        (c.n_head % G == 0, 'n_kv_head', f'a divisor of n_head={c.n_head}'),
        (not rotated or D % 2 == 0, 'pos', f'learned or none: rope rotates pairs, a head is {D} wide'),
        (0 < c.rope_base < math.inf, 'rope_base', 'above 0'),
        (rotated or c.rope_base == type(c).rope_base, 'rope_base', f'no value with pos={c.pos!r}'),
        (c.state_init in injection.states, 'state_init',
         f'{" or ".join(injection.states)} with {c.input_injection}'),
        (c.state_std is None or 0 < c.state_std < math.inf, 'state_std', 'above 0, or None'),
        (c.state_std is None or c.state_init == 'random', 'state_std',
         f'None with state_init={c.state_init!r}'),
        (not (injection.alone and truncated), 'bptt_k',
         f'None or at least n_loop={c.n_loop}: with {c.input_injection} the prelude would get no gradient'),
        (c.window_pattern and not {*c.window_pattern} - {*'LS'}, 'window_pattern', 'letters L and S'),
        ((c.window_size or 1) <= c.block_size, 'window_size', f'at most block_size={c.block_size}'),
        (c.window_size is None or 'S' in c.window_pattern, 'window_size',
         'None without an S in window_pattern'),
        (c.init != 'nanochat' or not c.tie_weights, 'init',
         'another with tie_weights: the embedding of nanochat is 1,000 times as large as its head'),
        (c.softcap is None or 0 < c.softcap < math.inf, 'softcap', 'above 0, or None'),
        (0 < c.emb_scale < math.inf, 'emb_scale', 'above 0'),
        (c.emb_scale == 1 or learned or not c.norm_emb, 'emb_scale', '1 with norm_emb, which takes it away'),
    ):
        check(holds, key, getattr(c, key), wanted)
    # fmt: on
