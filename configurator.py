"""
The keys of a script: set by config files and flags, listed by --help. Also: how a script ends.

    python train.py config/a.py config/b.py --key=value     applied from left to right

The fields of a script's dataclasses are its keys; a field's comment is what --help says about the key:

    norm: Choice(NORM) = 'rmsnorm'  # normalisation layer

A config file is Python that assigns keys. It can read the value that every key has so far, and
include('other.py') runs the file other.py beside it. Names that begin with _ are its own.

The values are in one place, the Config, which is a dict; the dataclasses only validate them and derive some
from others (Config.build). This file needs no torch: neither does preparing data.
"""

import ast
import atexit
import contextlib
import difflib
import functools
import gc
import inspect
import os
import re
import sys
import traceback
import types
from pathlib import Path

from nanoloop import MAIN, RANK, ROOT
from nanoloop.checks import UserError, check, find_table, hints_of, split_hint, typed
from nanoloop.helptext import help_text
from nanoloop.signals import end_at_interrupt, raise_at_interrupt

if MAIN.parent in (ROOT, ROOT / 'runs') or MAIN.parents[1:2] == (ROOT / 'data',):
    end_at_interrupt()  # until its main() runs: importing torch takes seconds
    # torch makes a million objects that stay. Garbage collection need not look at all of them every few
    # hundred new ones, nor at the end: saves a second of every run
    gc.set_threshold(50_000)
    atexit.register(gc.freeze)

TOOLS = types.ModuleType | types.FunctionType | types.BuiltinFunctionType | type  # a config file's own things
# keys in which ~ is the home folder
PATHS = ('out_dir', 'dataset', 'init_from', 'image', 'to', 'lens_html', 'csv', 'items')
SECRETS = ('token',)  # keys whose values are not printed
CONTROL = {chr(i): chr(0x2400 + i) for i in range(32)} | {'\x7f': '\u2421'}  # their pictures in Unicode
# keys of nanoGPT and of earlier versions that have another name here
RENAMED = {'n_layer': ('n_prelude', 'n_block', 'n_coda'), 'png': ('image',)}


class Config(dict):
    """The value of every key, also as attributes: config.n_loop is config['n_loop'].

    given: the keys that a file or a flag has set, even if to their default.
    """

    given = frozenset()
    __getattr__ = dict.__getitem__

    def build(self, cls):
        """Builds the dataclass cls from its keys and copies the values that it derives back into this dict.

        Raises UserError if cls refuses a value, and if it changes a key that was given: what a user sets is
        never replaced silently. An alias is replaced (see OneOf), because it only stands for other values.
        """
        hints = hints_of(cls)
        built = cls(**{key: self[key] for key in hints})
        for key, hint in hints.items():
            table = find_table(hint)
            if key in self.given and not (table and self[key] in table.aliases):
                derived = getattr(built, key)
                check(self[key] == derived, key, self[key], f'{derived!r} with the other keys')
        self.update(vars(built))
        return built


def configure(classes, argv, say=print):
    """Returns the Config of a script: the defaults of its dataclasses, changed by argv's files and flags.

    say: called with the changes, on rank 0; None = nobody is told. With --help it prints the keys and exits.
    Raises UserError for an unknown key, for a value of a wrong type, and for a config file that does not run.
    """
    if {'--help', '-h'} & set(argv):
        print(help_text(classes))
        sys.exit(0)
    hints = {key: hint for cls in classes for key, hint in hints_of(cls).items()}
    config = Config((key, getattr(cls, key)) for cls in classes for key in hints_of(cls))
    lines = []
    for arg in argv:
        if arg.startswith('-'):
            changes, start = read_flag(arg, hints), 'Overriding: '
        else:
            lines.append(f'Overriding config with {arg}:')
            changes, start = read_file(arg, config, hints), '    '
        for key in changes.keys() & set(PATHS):
            changes[key] = expand_home(changes[key])
        lines += [f'{start}{key} = {shown(key, value)}' for key, value in changes.items()]
        config.update(changes)
        config.given |= frozenset(changes)
    if lines and RANK == 0 and say:
        say('\n'.join(lines))
    return config


def shown(key, value):
    """Returns a value as it is told: a long one is cut, a secret is not told."""
    text = '(given)' if key in SECRETS else repr(value)
    return text if len(text) <= 200 else f'{text[:200]}...'


def expand_home(paths):
    """Returns a text with ~ replaced in all its paths: '~/a', 'ouro:~/a', and '~/a+~/b,~/c' of plot.py."""
    return ''.join(map(os.path.expanduser, re.split('([:+,])', paths)))


def check_key(key, hints, where='', otherwise='see --help'):
    """Raises UserError if there is no such key. It names the key that is most like it, else `otherwise`."""
    if key not in hints:
        close = RENAMED.get(key) or difflib.get_close_matches(key, hints, n=1, cutoff=0.7)
        hint = f'did you mean {" or ".join(map(repr, close))}?' if close else otherwise
        raise UserError(f'{where}unknown key {key!r}, {hint}')


# -----------------------------------------------------------------------------
# flags and config files


def read_flag(arg, hints):
    """Returns {key: value} of an argument --key=value.

    The value is a Python literal of the key's type, or the text itself if the key takes text.
    """
    key, equals, text = arg.removeprefix('--').partition('=')
    form = f'--{key if key in hints else "key"}=value'
    check(equals and arg.startswith('--'), 'argument', arg, f'{form} (with the equals sign) or a config file')
    check_key(key, hints)
    if split_hint(hints[key])[0] != [str]:  # a key that takes text only reads 123 as '123'
        literal = {'true': 'True', 'false': 'False'}.get(text, text).strip()
        with contextlib.suppress(ValueError, SyntaxError, TypeError):
            return {key: typed(key, ast.literal_eval(literal), hints[key])}
    return {key: typed(key, text, hints[key])}


def read_file(arg, config, hints):
    """Returns {key: value} of what a config file assigns. config: the values that the file can read."""
    values, places = run_file(find_file(arg), config)
    for key in values:
        own = f'see --help; a name of your own begins with _, as in _{key}'
        check_key(key, hints, f'{places[key]}: ', own)
    return {key: typed(f'{places[key]}: {key}', value, hints[key]) for key, value in values.items()}


def find_file(name):
    """Returns the path of a config file, relative to the working directory or else to the repository."""
    for path in (Path(name).expanduser(), ROOT / name):
        if path.is_file():
            return path
    recipes = {path.stem: f'config/{path.name}' for path in (ROOT / 'config').glob('*.py')}
    similar = [recipes[stem] for stem in difflib.get_close_matches(Path(name).stem, recipes, n=1)]
    meant = [f'--{name}'] if re.match(r'\w+=', name) else similar
    hint = f'did you mean {meant[0]}?' if meant else 'flags look like --key=value'
    raise UserError(f'there is no config file {name} ({hint})')


class Assignments(dict):
    """The names that a config file assigns, which also become global: its functions can read them.

    places: {name: the file and line of its last assignment}, a text.
    """

    def __init__(self, global_names):
        self.global_names, self.places = global_names, {}

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        self.global_names[name] = value
        frame = sys._getframe(1)  # of the config file
        self.places[name] = f'{frame.f_code.co_filename}, line {frame.f_lineno}'


def run_file(path, config):
    """Runs a config file, in which every key is a name.

    Returns what it sets, {name: value}, and where, {name: file and line}.
    """
    names = dict(config, __file__=str(path))
    assigned = Assignments(names)

    def run(file):
        # bytes: Python itself knows byte order marks and declared encodings
        exec(compile(file.read_bytes(), str(file), 'exec'), names, assigned)

    names['include'] = lambda name: run(path.parent / name)
    try:
        run(path)
    except Exception as error:  # a config file can raise anything
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        # a SyntaxError has a line, but no frame
        line = lines[-1] if lines else getattr(error, 'lineno', None) or '?'
        reason = error.msg if isinstance(error, SyntaxError) else error  # whose text names the line again
        raise UserError(f'{path}, line {line}: {type(error).__name__}: {reason}') from None
    own = {name for name in assigned if name.startswith('_') or isinstance(names[name], TOOLS)}
    values = {name: names[name] for name in assigned if name in config or name not in own}
    return values, assigned.places


# -----------------------------------------------------------------------------
# how a script prints and ends


def command(main, parallel=False):
    """Decorates a script's main(argv), which then ends the process with an exit status.

    0: done. 1: the machine failed, for example a full disk. 2: the user got something wrong. 1 and 2 print
    the reason in one line. 130: Ctrl-C. 141: the reader of stdout has ended. Other exceptions are errors of
    the program and keep their traceback.

    parallel: several processes run the script together. What all of them get wrong is printed by rank 0 only.
    """
    script = Path(inspect.getfile(main)).name
    prepare_streams()

    def fail(error, status):
        print_error(f'{script}: {" ".join(str(error).split()) or "out of memory"}')
        try:
            sys.stdout.flush()
        except OSError:
            discard(sys.stdout)
        sys.exit(status)

    @functools.wraps(main)
    def run(argv=None):
        try:
            try:
                raise_at_interrupt()
                return main(sys.argv[1:] if argv is None else list(argv))
            finally:
                if not isinstance(sys.exc_info()[1], Exception):
                    flush_stdout()
        except UserError as error:
            if RANK == 0 or not (parallel and error.same_on_all_ranks):
                fail(error, 2)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)  # 128 + SIGINT, as a shell reports it
        except BrokenPipeError:  # the reader of stdout has ended: python sample.py | head
            discard(sys.stdout)
            sys.exit(141)  # 128 + SIGPIPE
        except (OSError, MemoryError) as error:
            fail(error, 1)
        except RuntimeError as error:  # torch has no class for a CPU that runs out of memory
            if type(error).__name__ != 'OutOfMemoryError' and "can't allocate memory" not in str(error):
                raise
            fail(error, 1)

    return run


def prepare_streams():
    """Makes stdout and stderr streams on which printing either works or raises OSError."""
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:  # it was closed (>&-), and print(file=None) would take the other one
            setattr(sys, name, open(os.open(os.devnull, os.O_RDONLY), 'w'))
        if hasattr(stream := getattr(sys, name), 'reconfigure'):
            stream.reconfigure(errors='replace')  # a character that the terminal lacks is no reason to end


def flush_stdout():
    """Writes what was printed. Python itself does it too late to say in a line what failed."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard(sys.stdout)
        raise OSError(f'stdout cannot be written: {error.strerror}') from None


def printable(text):
    """Returns a text without control characters, which would move the cursor, if stdout is a terminal."""
    if not sys.stdout.isatty():
        return text
    return re.sub('[\x00-\x08\x0b-\x1f\x7f-\x9f]', lambda found: CONTROL.get(found[0], '\ufffd'), text)


def print_line(text):
    """Prints a line of a run, which goes on without stdout if that cannot be written any more.

    The terminal may be gone, the reader (tee, at a Ctrl-C) may have ended, the disk behind it may be full.
    """
    try:
        print(text, flush=True)
    except OSError:
        discard(sys.stdout)


def print_error(text):
    """Prints a line on stderr, if that can be written."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def discard(stream):
    """Discards what is printed to a stream from now on. Python flushes stdout and stderr when it ends."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
