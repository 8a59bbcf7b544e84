"""
What a user can get wrong, and the line that says so.

A field of a configuration says in its annotation which values it takes:

    n_loop: Annotated[int, AtLeast(1)] = 4
    norm: Annotated[str, OneOf(NORM)] = 'rmsnorm'

This file needs no torch: neither does preparing data. model.py and this file work alone in another project.
"""

import math
from numbers import Real
from typing import Annotated, get_args, get_origin, get_type_hints


class UserError(ValueError):
    """Something a user got wrong: scripts print it as one line and end with status 2."""

    same_on_all_ranks = True  # every process of a run raises it, so that rank 0 alone prints it


def check(holds, key, got, wanted):
    """Raises UserError '{key}={got}, expected {wanted}' unless holds."""
    if not holds:
        raise UserError(f'{key}={got!r}, expected {wanted}')


# -----------------------------------------------------------------------------
# bounds, which stand in a field's annotation: holds(value) -> bool, and wanted, the text after "expected"


class AtLeast:
    """A finite number, not below `least`."""

    def __init__(self, least):
        self.least, self.wanted = least, f'at least {least}'

    def holds(self, value):
        return self.least <= value < math.inf


class Above:
    """A finite number above `limit`."""

    def __init__(self, limit):
        self.limit, self.wanted = limit, f'above {limit}'

    def holds(self, value):
        return self.limit < value < math.inf


class Below:
    """A number below `limit`."""

    def __init__(self, limit):
        self.limit, self.wanted = limit, f'below {limit}'

    def holds(self, value):
        return value < self.limit


class AtMost:
    """A number not above `most`."""

    def __init__(self, most):
        self.most, self.wanted = most, f'at most {most}'

    def holds(self, value):
        return value <= self.most


class OneOf:
    """A key of a table (a dict or a tuple of names). An empty name is printed as "nothing"."""

    def __init__(self, table):
        self.table = table

    def holds(self, value):
        return value in self.table

    @property
    def wanted(self):  # read when it is needed: a table may have got new entries
        return 'one of ' + ', '.join(name or 'nothing' for name in self.table)


def split_hint(hint):
    """Returns (types, bounds) of an annotation such as `Annotated[int, AtLeast(1)] | None`."""
    if get_origin(hint) is Annotated:
        inner, *bounds = get_args(hint)
        return split_hint(inner)[0], bounds
    parts = get_args(hint)  # of a union
    if not parts:
        return [hint], []
    split = [split_hint(part) for part in parts]
    return [t for types, _ in split for t in types], [b for _, bounds in split for b in bounds]


def typed(key, value, hint):
    """Returns value as one of hint's types: 1 becomes float, 1e3 and numpy's numbers become int where needed.

    Raises UserError if value has another type. Bounds are not looked at, see check_fields.
    """
    types, _ = split_hint(hint)
    if type(value) in types:
        return value
    number = isinstance(value, Real) and not isinstance(value, bool)  # numpy's numbers are Real, too
    if float in types and number:
        return float(value)
    if int in types and number and float(value).is_integer():
        return int(value)
    names = {'NoneType': 'None', 'bool': 'True or False'}
    raise UserError(
        f'{key}={value!r}, expected {" or ".join(names.get(t.__name__, t.__name__) for t in types)}'
    )


def convert_fields(config):
    """Converts every field of a dataclass instance to its annotated type, in place. Raises UserError."""
    for key, hint in get_type_hints(type(config), include_extras=True).items():
        setattr(config, key, typed(key, getattr(config, key), hint))


def check_fields(config):
    """Raises UserError for the first field of a dataclass instance whose value is out of its bounds."""
    for key, hint in get_type_hints(type(config), include_extras=True).items():
        types, bounds = split_hint(hint)
        value = getattr(config, key)
        if value is not None:
            wanted = ' and '.join(bound.wanted for bound in bounds) + ', or None' * (type(None) in types)
            check(all(bound.holds(value) for bound in bounds), key, value, wanted)


def check_least(config, least, *keys):
    """Raises Mistake for keys below least, infinite, or None where that is not the default."""
    for key in keys:
        value = getattr(config, key)
        fits = getattr(type(config), key) is None if value is None else least <= value < math.inf
        check(fits, key, value, f'at least {least}')
