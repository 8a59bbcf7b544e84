"""
What the scripts below data/ share: how they read their flags and a user's texts, sets of the hub, and the
download of a text.
"""

import contextlib
import difflib
import os
import re
import shutil
import urllib.request
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from nanoloop.checks import UserError, check
from nanoloop.files import lock_folder, replace_file
from nanoloop.hub import HubDocuments, local_documents, write_hub
from nanoloop.prepare import SHARD_TOKENS
from nanoloop.text_files import TABLE_FILE, find_texts
from nanoloop.tokenizer import choose_tokenizer, read_text


def expanded(text):
    """Returns the path that a flag gives, ~ included."""
    return Path(text).expanduser()


TOKENIZER = 'byte, char, an encoding of tiktoken such as gpt2, or a tokenizer.json'

# arguments of ArgumentParser.add_argument, by the name of the flag
VAL_SHARE = dict(type=float, metavar='X', help='share of the text for validation, default: 0.1')
HUB_VAL_SHARE = VAL_SHARE | dict(help='share of the documents for validation, default: 0.0005, more of few')
SPECIAL = dict(action='store_true', help='a special token written in the text, as <|endoftext|>, becomes one')
TEXT_FLAGS = {
    'input': dict(type=expanded, metavar='FILE', help='the text, if it is here already'),
    'val_share': VAL_SHARE | dict(default=0.1),
}
COLUMN = dict(metavar='NAME', help='the column of a table that holds the text, default: text')
MAX_DOCUMENTS = dict(type=int, metavar='N', help='documents to read of each split, default: all')
TABLE_FLAGS = {
    'column': COLUMN,
    'processes': dict(type=int, metavar='N', help='processes that encode, default: one per core'),
    'max_documents': MAX_DOCUMENTS,
    'shard_tokens': dict(
        type=int, metavar='N', default=SHARD_TOKENS, help=f'tokens per file, default: {SHARD_TOKENS:,}'
    ),
}
FILE_FLAGS = {  # a user's own texts or tables
    'input': dict(type=expanded, required=True, nargs='+', metavar='PATH', help='files, or folders of them'),
    'pattern': dict(default='*', help='of a folder, only the files of this pattern, say *.md'),
}
HUB_FLAGS = {
    'input': dict(nargs='+', metavar='PATH', help='parquet, JSON or CSV files to read instead, as one split'),
    'tokenizer': dict(default='gpt2', metavar='NAME', help=f'{TOKENIZER}; default: gpt2'),
    'special_tokens': SPECIAL,
    'val_share': HUB_VAL_SHARE,
    'streaming': dict(action='store_true', help='read over the network, keep no copy on this disk'),
    **TABLE_FLAGS,
}


class Parser(ArgumentParser):
    """An ArgumentParser whose errors are one line, as those of the other scripts."""

    def error(self, message):
        raise UserError(f'{message} (see --help)')


def parse(argv, doc, flags):
    """Returns the values of `flags` in argv. --help prints doc, the script's docstring, and the flags."""
    parser = Parser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    for name, options in flags.items():
        parser.add_argument(f'--{name}', **options)
    check_names(argv, [*flags, 'help'])
    return parser.parse_args(argv)


def check_names(argv, names):
    """Raises UserError for a flag without a name that is known, before the parser misses a required one."""
    for argument in argv:
        flag = re.match(r'--?([A-Za-z][\w-]*)', argument)
        if not flag or argument == '-h' or any(f'--{name}'.startswith(flag[0]) for name in names):
            continue
        close = difflib.get_close_matches(flag[1].replace('-', '_'), names, 1)
        hint = f', did you mean --{close[0]}?' if close else ''
        raise UserError(f'unrecognised option {flag[0]}{hint} (see --help)')


def name_folder(script, name):
    """Returns the folder data/NAME for a script data/*/prepare.py.

    Raises UserError if the folder belongs to another script, or is none of data/.
    """
    own = Path(script).resolve().parent
    data = own.parent
    place = (data / name).resolve()
    free = place == own or not (place / 'prepare.py').exists()
    check(free, 'name', name, f'another: that set is made by {os.path.relpath(place / "prepare.py")}')
    inside = '..' not in Path(name).parts and place not in (data, *data.parents)
    check(inside, 'name', name, 'a name, for the folder data/NAME')
    return data / name


def are_tables(args, of_tables=('max_documents',)):
    """Returns whether the flags name tables of documents, and not texts.

    of_tables: the flags for tables only. Raises UserError for a flag that does not go with the files.
    """
    tables = bool(args.column) or all(TABLE_FILE.fullmatch(path.name) for path in args.input)
    if tables:
        check(args.pattern == '*', 'pattern', args.pattern, 'none: tables are given as --input DIR/*.jsonl')
    for key in () if tables else of_tables:
        check(getattr(args, key) is None, key, getattr(args, key), 'none: the files are no tables')
    return tables


def read_documents(args, say, leave_out=None):
    """Returns an iterator of the texts that the flags name: whole files, or documents of tables.

    leave_out: a path that is none of them. say: called with a line about each folder. Raises UserError for
    files that are missing or cannot be read, those of tables when they are reached.
    """
    if are_tables(args):
        options = dict(max_documents=args.max_documents, say=say)
        return local_documents(args.input, args.column or 'text', **options).texts(['train'])
    paths = [text for path in args.input for text in find_texts(path, args.pattern, say=say)]
    own = leave_out and leave_out.resolve()
    return (read_text(path) for path in dict.fromkeys(paths) if path.resolve() != own)


def prepare_hub(argv, doc, folder, path, splits, say, eot=True, **load):
    """Prepares a set of the hub with the flags in argv; interrupted, the same command goes on.

    doc: the script's docstring. path, load: of HubDocuments. splits, eot, say: of write_hub.
    """
    args = parse(argv, f'{doc}\nInterrupted, the same command goes on.', HUB_FLAGS)
    if args.input:
        prepare_tables(args, folder, args.input, say, eot)
        return
    options = dict(streaming=args.streaming, max_documents=args.max_documents)
    documents = HubDocuments(path, args.column or 'text', **options, **load)
    write_documents(args, folder, documents, splits, say, eot)


def prepare_tables(args, folder, paths, say, eot=True):
    """Prepares a set from the tables in paths. args: the values of TABLE_FLAGS and the other flags."""
    streaming = getattr(args, 'streaming', False)
    options = dict(streaming=streaming, max_documents=args.max_documents, say=say)
    documents = local_documents(paths, args.column or 'text', **options)
    write_documents(args, folder, documents, {'train': 'train'}, say, eot)


def write_documents(args, folder, documents, splits, say, eot):
    """Writes a set of documents as the flags say."""
    options = {key: getattr(args, key) for key in ('val_share', 'processes', 'shard_tokens')}
    tokenizer = choose_tokenizer(args.tokenizer, lambda: documents.texts(splits))
    write_hub(
        folder,
        documents,
        splits,
        tokenizer=tokenizer,
        eot=eot,
        special=args.special_tokens,
        say=say,
        **options,
    )


def fetch(url, path, say, flag='input'):
    """Downloads url to path unless it is there. Returns path. Raises UserError if it cannot be downloaded.

    say: called with a line if another process is downloading it; this one waits. flag: names a copy instead.
    """
    if path.exists():
        return path
    options = dict(say=say, name='.download.lock')  # a preparation of the folder has a lock of its own
    try:
        lock = lock_folder(path.parent, 'a second download', **options)
    except BlockingIOError:
        say(f'{path} is being downloaded by another process, waiting for it')
        lock = lock_folder(path.parent, 'a second download', wait=True, **options)
    with lock or contextlib.nullcontext():
        if path.exists():
            return path
        try:
            with urllib.request.urlopen(url, timeout=60) as answer, replace_file(path, 'wb') as file:
                shutil.copyfileobj(answer, file)
                if file.tell() != int(answer.headers.get('Content-Length', file.tell())):
                    raise OSError('the connection ended early')
        except OSError as error:
            raise UserError(f'{url} cannot be downloaded ({error}): give the file with --{flag}') from None
    return path
