"""
The axes of a model's configuration, a table each: what the values of a key mean. A variant is an entry.

Shapes: B sequences, T positions, C = n_embd.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F


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
    return (c.n_embd**-0.5 if c.state_std is None else c.state_std) * x


class Injection(NamedTuple):
    """How the loop's state s comes into the next iteration."""

    enter: Callable  # (model, e, s) -> u, the input of the first block
    states: list  # of state_init that make sense
    module: Callable | None = None  # config -> model.inject, what enter has of weights of its own
    feed: Callable = lambda model, s: s  # what the blocks get of s, which take
    first: Callable | None = None  # (x, what they get, config) -> (x, source of queries) in the first block
    others: Callable | None = None  # the same in the other blocks
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
    'nanochat': lambda C, depth: dict(  # every block starts as the identity
        rest=normal(0.02), c_attn=uniform(C**-0.5), c_fc=uniform(C**-0.5), c_proj=nn.init.zeros_,
        wte=normal(1.0), lm_head=normal(0.001), inject=nn.init.eye_),
    'huginn': lambda C, depth: huginn(math.sqrt(2 / (5 * C)), depth),
}
# fmt: on
TABLES = dict(  # by the key of GPTConfig
    input_injection=INJECT, state_init=STATE, norm=NORM, norm_place=PLACE, pos=POS, mlp=ACT, init=INIT
)
