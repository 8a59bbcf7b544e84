"""
Keys that hold several numbers or names, as text: 1,2,4.

    loops: Numbers(int, 1) = '1,2,4,8'
"""

from typing import Annotated

from nanoloop.checks import UserError


def split_list(text):
    """Returns the parts of a text between commas, without blanks around them; [] for ''."""
    return [part.strip() for part in text.split(',')] if text else []


def read_numbers(text, kind=int):
    """Returns the numbers of a text such as 1,2,4, as a list. Raises ValueError if one is none."""
    return [kind(part) for part in split_list(text)]


class NumberList:
    """A text that is empty or lists different numbers of a kind, int or float, none below `least`."""

    def __init__(self, kind, least):
        self.kind, self.least = kind, least

    def holds(self, value, config):
        try:
            numbers = read_numbers(value.replace('_', '?'), self.kind)  # Python reads 1_0 as 10
        except ValueError:
            return False
        return len(set(numbers)) == len(numbers) and all(self.least <= x < float('inf') for x in numbers)

    def expected(self, config):
        example = '1,2,4' if self.kind is int else '0.1,0.05'
        return f'different numbers with commas between them, none below {self.least}, such as {example}'


def Numbers(kind, least):  # noqa: N802, it stands where a type stands
    """Returns the annotation of a text that lists numbers, see NumberList."""
    return Annotated[str, NumberList(kind, least)]


def choose_names(key, text, table):
    """Returns the entries of a table that a text names, {name: entry}. Raises UserError for another name."""
    names = split_list(text)
    unknown = [name for name in names if name not in table]
    if unknown or not names:
        raise UserError(f'{key}={text!r}, expected names of {", ".join(table)}, with commas between them')
    return {name: table[name] for name in names}
