"""
What a user can get wrong: the line that says so, and what a configuration of the model must fulfil.
"""

import math
from numbers import Real
from typing import get_args, get_type_hints

from tables import INJECT, POS, TABLES


class Mistake(ValueError):
    """What a user can get wrong: the scripts tell it in one line and end with status 2."""

    alike = True  # every rank makes it, the first one tells it


def check(holds, key, got, wanted):
    """Raises Mistake unless holds."""
    if not holds:
        raise Mistake(f'{key}={got!r}, expected {wanted}')


def typed(key, value, hint):
    """value as the annotated type, 1 promoted to float and 1e3 to int. Raises ValueError if it is neither."""
    accepted = get_args(hint) or (hint,)  # of int | None: both
    if type(value) in accepted:
        return value
    number = isinstance(value, Real) and not isinstance(value, bool)  # numpy's, too
    if float in accepted and number:
        return float(value)
    if int in accepted and number and float(value).is_integer():
        return int(value)
    names = ' or '.join(
        {'NoneType': 'None', 'bool': 'True or False'}.get(k.__name__, k.__name__) for k in accepted
    )
    raise Mistake(f'{key}={value!r}, expected {names}')


def check_least(config, least, *keys):
    """Raises Mistake for keys below least, infinite, or None where that is not the default."""
    for key in keys:
        value = getattr(config, key)
        fits = getattr(type(config), key) is None if value is None else least <= value < math.inf
        check(fits, key, value, f'at least {least}')


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
    """Raises Mistake for a value of a GPTConfig outside its table, and for one that would mean nothing."""
    for key, table in TABLES.items():
        check(getattr(c, key) in table, key, getattr(c, key), f'one of {", ".join(table)}')
    check_least(c, 1, 'block_size', 'vocab_size', 'n_head', 'n_kv_head', 'n_embd', 'n_block', 'n_loop')
    check_least(c, 1, 'bptt_k', 'n_hidden', 'window_size')
    check_least(c, 0, 'n_prelude', 'n_coda')
    D, G = c.n_embd // c.n_head, c.n_kv_head or c.n_head
    injection, (_, rotated) = INJECT[c.input_injection], POS[c.pos]
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
    ):
        check(holds, key, getattr(c, key), wanted)
    # fmt: on
