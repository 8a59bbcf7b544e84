"""
Keys from the command line, and the machine a script runs on.

    python train.py config/a.py config/b.py --key=value   files are executed in order, then flags are applied

A script's keys are the fields of its dataclasses: name, type, default, and the comment that --help prints.
A config file is Python that assigns some of them; it sees all values so far, but no flag: those come last.
include('other.py') in it takes over the keys of a file beside it.
"""

import ast
import contextlib
import difflib
import functools
import inspect
import os
import re
import signal
import sys
import types
from pathlib import Path
from typing import get_type_hints

from nanoloop import RANK, ROOT
from nanoloop.checks import UserError, check, typed

RENAMED = {'n_layer': ('n_prelude', 'n_block', 'n_coda')}  # nanoGPT's keys that are others here


class Config(dict):
    """The value of every key, also as attributes; given: the keys that were set by a file or a flag."""

    given = frozenset()
    __getattr__ = dict.__getitem__

    def build(self, cls):
        """cls(**its keys), the values it settled on written back. Raises ValueError if cls refuses them."""
        built = cls(**{key: self[key] for key in get_type_hints(cls)})
        for key in (
            self.given & get_type_hints(cls).keys()
        ):  # not replaced without a word, but that name for two
            settled = getattr(built, key)
            check(self[key] in (settled, 'inject_random'), key, self[key], f'{settled!r} with the other keys')
        self.update(vars(built))
        return built


def configure(defaults, argv, out=None):
    """The Config of a script: defaults (dataclasses), changed by the files and flags in argv.

    Raises ValueError for a name that is no key, a value of another type, and a file that does not run. Prints
    what was changed to out (None: stdout).
    """
    out = out if RANK == 0 else open(os.devnull, 'w')
    hints = {key: hint for cls in defaults for key, hint in get_type_hints(cls).items()}
    config = Config((key, getattr(cls, key)) for cls in defaults for key in get_type_hints(cls))
    if {'--help', '-h'} & set(argv):
        print(help_text(defaults))
        sys.exit(0)
    given = set()
    for arg in argv:
        if not arg.startswith('-'):
            path = find_file(arg)
            print(f'Overriding config with {arg}:', file=out)
            for key, value in run_file(path, config, hints).items():
                config[key] = typed(f'{arg}: {key}', value, hints[key])
                given.add(key)
                print(f'    {key} = {config[key]!r}', file=out)
        else:
            key, equals, text = arg.removeprefix('--').partition('=')
            wanted = f'--{key if key in hints else "key"}=value (with the equals sign) or a config file'
            check(equals and arg.startswith('--'), 'argument', arg, wanted)
            check_key(key, hints, '')
            config[key] = parse(key, text, hints[key])
            given.add(key)
            print(f'Overriding: {key} = {config[key]!r}', file=out)
    config.given = frozenset(given)
    return config


def find_file(name):
    """A config file, looked up from the working directory, then from the repository."""
    for path in (Path(name), ROOT / name):
        if path.is_file():
            return path
    meant = next((path for path in (f'{name}.py', f'config/{name}.py') if (ROOT / path).is_file()), None)
    hint = f'did you mean {meant}?' if meant else 'flags look like --key=value'
    raise UserError(f'there is no config file {name} ({hint})')


class Assigned(dict):
    """The locals of a config file: note what is assigned, and pass it on to the globals."""

    def __init__(self, names):
        self.names = names

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.names[key] = value


def run_file(path, config, hints):
    """The keys that a config file assigns. It is executed with every key's value so far as its globals."""
    names = dict(config, __file__=str(path))
    assigned = Assigned(names)

    def include(name):
        exec(compile((path.parent / name).read_text(), path.parent / name, 'exec'), names, assigned)

    names['include'] = include
    try:
        exec(compile(path.read_text(), path, 'exec'), names, assigned)
    except Exception as error:
        frames = inspect.getinnerframes(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = lines[-1] if lines else getattr(error, 'lineno', '?')
        raise UserError(f'{path}, line {line}: {type(error).__name__}: {error}') from None
    helpers = types.ModuleType | types.FunctionType | types.BuiltinFunctionType | type
    found = {key: names[key] for key in assigned if key[:1] != '_' and not isinstance(names[key], helpers)}
    for key in found:
        check_key(key, hints, f'{path}: ')
    return found


def check_key(key, hints, where):
    if key not in hints:
        close = RENAMED.get(key) or difflib.get_close_matches(key, hints, n=1)
        hint = f', did you mean {" or ".join(map(repr, close))}?' if close else ', see --help'
        raise UserError(f'{where}unknown key {key!r}{hint}')


def parse(key, text, hint):
    """A flag's value: a Python literal of the key's type, or where str is accepted the text itself."""
    if hint is not str:
        literal = {'true': 'True', 'false': 'False'}.get(text, text).strip()
        with contextlib.suppress(ValueError, SyntaxError):
            return typed(key, ast.literal_eval(literal), hint)
    return typed(key, text, hint)


def help_text(defaults):
    """Every key with its default and comment, in the order and sections of the source."""
    lines = [inspect.getmodule(defaults[0]).__doc__]
    for cls in defaults:
        for line in inspect.getsource(cls).splitlines():
            field = re.match(r'    (\w+): [^=]+ = (.+?)(?:  # (.*))?$', line)
            if field and field[1] in get_type_hints(cls):
                lines.append(f'  --{field[1]}={field[2]}'.ljust(40) + f'  {field[3] or ""}')
            elif line.startswith('    # '):
                lines.append(line[6:])
    return '\n'.join(lines)


def command(main):
    """Makes main(argv) exit with 0, 1 if the machine failed, or 2 for a user's mistake, told in one line."""

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(sys.argv[1:] if argv is None else list(argv))
        except UserError as error:
            failure, status, told = error, 2, RANK == 0 or not error.same_on_all_ranks
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        except BrokenPipeError:  # python sample.py | head
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(128 + signal.SIGPIPE)
        except (OSError, RuntimeError, MemoryError) as error:  # torch's CPU out of memory has no class
            memory = type(error).__name__ == 'OutOfMemoryError' or "can't allocate memory" in str(error)
            if isinstance(error, RuntimeError) and not memory:
                raise
            failure, status, told = error, 1, True
        if told:
            script = Path(inspect.getfile(main)).name
            print(
                f'{script}: {" ".join(str(failure).split()) or "out of memory"}', file=sys.stderr, flush=True
            )
        sys.exit(status)

    return wrapped


def print_line(text):
    """Prints, and goes on without stdout when its reader is gone, as tee is after a Ctrl-C."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
