"""
What a user can get wrong, and the line that says so. It needs no torch: nor does preparing data.
"""

import math
from numbers import Real
from typing import get_args


class UserError(ValueError):
    """What a user can get wrong: the scripts tell it in one line and end with status 2."""

    same_on_all_ranks = True  # every rank makes it, the first one tells it


def check(holds, key, got, wanted):
    """Raises UserError unless holds."""
    if not holds:
        raise UserError(f'{key}={got!r}, expected {wanted}')


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
    raise UserError(f'{key}={value!r}, expected {names}')


def check_least(config, least, *keys):
    """Raises UserError for keys below least, infinite, or None where that is not the default."""
    for key in keys:
        value = getattr(config, key)
        fits = getattr(type(config), key) is None if value is None else least <= value < math.inf
        check(fits, key, value, f'at least {least}')
