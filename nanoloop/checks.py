"""
Checks of configurations: every mistake of a user raises UserError with one line.

The annotation of a configuration's field says which values it takes:

    n_head: Annotated[int, AtLeast(1), Divides('n_embd')] = 12

and settle_fields(self) in __post_init__ applies it. This file needs no torch: neither does preparing data.
"""

import math
from numbers import Real
from typing import Annotated, get_args, get_origin, get_type_hints


class UserError(ValueError):
    """Something a user got wrong: scripts print it as one line and end with status 2."""

    same_on_all_ranks = True  # every process of a run raises it, so that rank 0 alone prints it


def check(holds, key, got, expected):
    """Raises UserError '{key}={got}, expected {expected}' unless holds."""
    if not holds:
        raise UserError(f'{key}={got!r}, expected {expected}')


def missing_package(what, extra, package):
    """Returns the UserError for a package that `what` needs. extra: the one of pyproject.toml that has it."""
    return UserError(f'{what} needs {package}: pip install -e ".[{extra}]"')


# -----------------------------------------------------------------------------
# bounds: holds(value, config) says whether a value is accepted, expected(config) which values are


class Bound:
    """A bound that is a number or the name of another field, whose value is then the bound."""

    def __init__(self, limit):
        self.limit = limit

    def value(self, config):
        return getattr(config, self.limit) if isinstance(self.limit, str) else self.limit

    def holds(self, value, config):
        return type(self).compare(value, self.value(config))

    def expected(self, config):
        other = f'{self.limit}=' if isinstance(self.limit, str) else ''
        return f'{self.words} {other}{self.value(config)}'


class AtLeast(Bound):
    """A finite number that is not below the limit."""

    words, compare = 'at least', lambda value, limit: limit <= value < math.inf


class Above(Bound):
    """A finite number above the limit."""

    words, compare = 'above', lambda value, limit: limit < value < math.inf


class Below(Bound):
    """A number below the limit."""

    words, compare = 'below', lambda value, limit: value < limit


class AtMost(Bound):
    """A number that is not above the limit."""

    words, compare = 'at most', lambda value, limit: value <= limit


class Divides(Bound):
    """A divisor of the limit."""

    words, compare = 'a divisor of', lambda value, limit: limit % value == 0


class Satisfies:
    """A value for which test(value) is true. words: what such a value is."""

    def __init__(self, words, test):
        self.words, self.test = words, test

    def holds(self, value, config):
        return self.test(value)

    def expected(self, config):
        return self.words


def Letters(letters):  # noqa: N802, it stands where a type stands
    """Returns the bound of a text that is not empty and has these letters only."""
    return Satisfies(f'letters {" and ".join(letters)}', lambda text: set() < set(text) <= set(letters))


class OneOf:
    """A key of a table (a dict or a tuple of names). The empty name is shown as ''.

    aliases: {another name: {field: value}}, the fields that the name stands for.

    An entry's attribute `options` names fields that only this entry uses. With another entry they must have
    their defaults.
    """

    def __init__(self, table, aliases=None):
        self.table, self.aliases = table, aliases or {}

    def holds(self, value, config):
        return value in self.table

    def expected(self, config):
        return f'one of {self.choices()}'

    def choices(self):  # read late: entries may be added to a table
        return ', '.join("''" if name == '' else str(name) for name in self.table)


class Derives:
    """A value that decides other fields: fields(value) returns {field: value}."""

    def __init__(self, fields):
        self.fields = fields

    def holds(self, value, config):
        return True


def Choice(table, aliases=None):  # noqa: N802, it stands where a type stands
    """Returns the annotation of a text that is a key of a table, see OneOf."""
    return Annotated[str, OneOf(table, aliases)]


Name = Annotated[str, Satisfies('a name or a path', lambda text: text != '')]
Count = Annotated[int, AtLeast(1)]
PowerOfTwo = Annotated[Count, Satisfies('a power of two', lambda n: n & (n - 1) == 0)]
Size = Annotated[int, AtLeast(0)]
Positive = Annotated[float, Above(0)]
NotNegative = Annotated[float, AtLeast(0)]
Share = Annotated[float, AtLeast(0), Below(1)]
Window = Annotated[Count, AtMost('block_size')]
Fraction = Annotated[float, Above(0), Below(1)]
StepsOrShare = Annotated[int | float, AtLeast(0)]  # below 1: a share of the run's steps

# -----------------------------------------------------------------------------
# types


def split_hint(hint):
    """Returns (types, bounds) of an annotation such as `Annotated[int, AtLeast(1)] | None`."""
    if get_origin(hint) is Annotated:
        inner, *bounds = get_args(hint)
        return split_hint(inner)[0], bounds
    parts = get_args(hint)  # of a union
    if not parts:
        return [hint], []
    split = [split_hint(part) for part in parts]
    return [t for types, _ in split for t in types], [bound for _, bounds in split for bound in bounds]


def find_table(hint):
    """Returns the OneOf of an annotation, None if it has none."""
    return next((bound for bound in split_hint(hint)[1] if isinstance(bound, OneOf)), None)


def hints_of(cls):
    """Returns {field: annotation} of a configuration's class, bounds included."""
    return get_type_hints(cls, include_extras=True)


def typed(key, value, hint):
    """Returns value as one of hint's types: 1 becomes 1.0 for float, 1e3 and numpy numbers become int.

    Raises UserError if value has another type. Bounds are checked by settle_fields.
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
    table, known = find_table(hint), ' or '.join(names.get(t.__name__, t.__name__) for t in types)
    expected = f'one of {table.choices()}' if table else known
    got = f'the {type(value).__name__} {value.__name__}' if hasattr(value, '__name__') else repr(value)
    raise UserError(f'{key}={got}, expected {expected}')


# -----------------------------------------------------------------------------
# a whole configuration


def settle_fields(config):
    """Converts the fields of a dataclass instance to their types, sets those that others decide, checks all.

    Raises UserError for the first field that has a wrong type, contradicts another, or is out of its bounds.
    """
    hints = hints_of(type(config))
    for key, hint in hints.items():
        setattr(config, key, typed(key, getattr(config, key), hint))
    for key, hint in hints.items():
        for bound in split_hint(hint)[1]:
            set_others(config, key, bound)
    for key, hint in hints.items():
        check_field(config, key, hint)


def set_others(config, key, bound):
    """Sets the fields that an alias of OneOf or a value of Derives stands for."""
    value = getattr(config, key)
    if isinstance(bound, OneOf) and value in bound.aliases:
        others = bound.aliases[value]
    elif isinstance(bound, Derives) and value is not None:
        check_field(config, key, hints_of(type(config))[key])
        others = bound.fields(value)
    else:
        return
    for other, decided in others.items():
        old = getattr(config, other)
        free = other == key or old in (getattr(type(config), other), decided)
        check(free, other, old, f'no value with {key}={value}, which makes it {decided!r}')
        setattr(config, other, decided)


def check_field(config, key, hint):
    """Raises UserError if the value of a field is out of its bounds."""
    types, bounds = split_hint(hint)
    value = getattr(config, key)
    check(type(value) is not int or abs(value) < 2**63, key, value, 'an integer of 64 bits')
    for bound in bounds if value is not None else ():
        if not bound.holds(value, config):
            # a limit that another field sets is shown alone, numbers together: at least 0 and below 1
            shown = [b for b in bounds if isinstance(getattr(b, 'limit', None), int | float)]
            shown = shown if bound in shown else [bound]
            expected = ' and '.join(b.expected(config) for b in shown) + ', or None' * (type(None) in types)
            raise UserError(f'{key}={value!r}, expected {expected}')
        if isinstance(bound, OneOf):
            check_options(config, key, bound)


def check_options(config, key, bound):
    """Raises UserError if an option of a table's entries is set while the chosen entry does not use it."""
    entries = bound.table if isinstance(bound.table, dict) else {}
    options = {option for entry in entries.values() for option in getattr(entry, 'options', ())}
    used = getattr(entries.get(getattr(config, key)), 'options', ())
    for option in sorted(options - set(used)):
        if not hasattr(type(config), option):
            raise RuntimeError(f'options of an entry of {key}: there is no key {option}')
        default, got = getattr(type(config), option), getattr(config, option)
        check(got == default, option, got, f'{default} with {key}={getattr(config, key)!r}')


# -----------------------------------------------------------------------------
# a model


def check_model(c, injection, position, init):
    """Raises UserError for values of a GPTConfig that mean nothing together.

    injection, position: the entries of model.py's tables that it chooses; init: the rules of its initial
    values.
    """
    head_width = c.n_embd // c.n_head
    truncated = c.bptt_k is not None and c.bptt_k < c.n_loop
    lost = f'with {c.input_injection} the prelude would get no gradient'
    # fmt: off
    for holds, key, expected in (
        (not position.rotary or head_width % 2 == 0, 'pos',
         f'learned or none: RoPE rotates pairs of channels, and a head has {head_width}'),
        (c.state_init in injection.states, 'state_init',
         f'{" or ".join(injection.states)} with {c.input_injection}'),
        (not (injection.needs_full_bptt and truncated), 'bptt_k',
         f'None or at least n_loop={c.n_loop}: {lost}'),
        (c.window_size is None or 'S' in c.window_pattern, 'window_size',
         'None without an S in window_pattern'),
        (init['wte'] is init['lm_head'] or not c.tie_weights, 'init',
         'another with tie_weights: its embedding and its head start at different scales'),
        (c.emb_scale == 1 or position.learned or c.n_gram > 1 or not c.norm_emb, 'emb_scale',
         '1 with norm_emb, which undoes it'),
        (c.n_gram > 1 or c.n_gram_rows == type(c).n_gram_rows, 'n_gram_rows',
         f'{type(c).n_gram_rows} with n_gram=1, which has no table'),
    ):
        check(holds, key, getattr(c, key), expected)
    # fmt: on


def check_call(c, position, injection, length, n_loop, loops, with_graph):
    """Raises UserError for a call of a model that is not possible.

    c: its GPTConfig; position, injection: its entry and module. length: tokens of a row; n_loop, loops: the
    number of loops, and the indices of those that are read. with_graph: it trains, and records a graph.
    """
    fits = length <= c.block_size or not position.learned
    check(fits, 'length', length, f'at most block_size={c.block_size} tokens')
    check(isinstance(n_loop, int) and n_loop >= 1, 'n_loop', n_loop, 'an int, at least 1')
    exist = len(loops) > 0 and all(-n_loop <= i < n_loop for i in loops)
    check(exist, 'loops', loops, f'indices of n_loop={n_loop} loops')
    lost = with_graph and injection.needs_full_bptt and n_loop > (c.bptt_k or n_loop)
    check(not lost, 'n_loop', n_loop, f'at most bptt_k={c.bptt_k}: the prelude would get no gradient')


def check_parts(model):
    """Tries the parts of a GPT's loop once. Raises RuntimeError, with the class, for a mistake of its author.

    i may be any number: a user can ask for more loops than config.n_loop. A part without reads_loop also gets
    one that it cannot read: to compare it raises, and what is computed from it has another shape.
    """
    n_loop, e = model.config.n_loop, model.lm_head.weight.new_zeros(1, 2, model.config.n_embd)  # (1, 2, C)
    unread = {True: (), False: (e.new_zeros(2, 1, 1, 1).long(),)}  # by reads_loop
    for base, part, *args in (
        ('LoopPart', model.start, e[0, :, 0].long()),  # positions (2,)
        *(('Injection', model.inject, e, i) for i in (0, n_loop, *unread[model.inject.reads_loop])),
        *(('LoopPart', model.update, e, i) for i in (0, n_loop, *unread[model.update.reads_loop])),
    ):
        check_settings(part, base)
        name, training = type(part).__name__, part.training
        of = f' with loop {args[-1]}' if type(args[-1]) is int else ' without reads_loop' * (len(args) > 1)
        call = f'{name}.forward{of}'
        try:
            result = part.eval()(e, *args)
        except Exception as error:  # of any kind: it is its author's code
            raise RuntimeError(f'{call}: {type(error).__name__}: {error}') from error
        part.train(training)
        none = result is None and part is model.start
        if not none and (getattr(result, 'shape', 0), getattr(result, 'dtype', 0)) != (e.shape, e.dtype):
            got = getattr(result, 'shape', result), getattr(result, 'dtype', None)
            raise RuntimeError(f"{call}: {got}, expected the state's shape {e.shape} and dtype {e.dtype}")


def check_settings(part, base):
    """Raises RuntimeError for an attribute of a part's class that its base class, given by name, lacks."""
    classes = type(part).__mro__
    n_own = next(n for n, cls in enumerate(classes) if cls.__name__ == base)
    own = [(cls.__name__, name, value) for cls in classes[:n_own] for name, value in vars(cls).items()]
    for cls, name, value in own:
        plain = not (name.startswith('_') or callable(value) or isinstance(value, property))
        if plain and not hasattr(classes[n_own], name):
            raise RuntimeError(f'{cls}.{name} has no meaning, see {base} in model.py')
        if plain and name in ('states', 'options') and isinstance(value, str):
            raise RuntimeError(f'{cls}.{name}={value!r} is a text, expected a tuple of texts')
