"""
Finds the texts among a user's files, and decides which part of them is for validation. Needs no torch.
"""

import codecs
import functools
import hashlib
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from nanoloop.checks import UserError, check
from nanoloop.tokenizer import text_encoding

BLOCK_BYTES = 2**20  # read at a time
FEW_FILES = 16  # all 2**16 sets of so many files are tried
CONTROL = bytes(set(range(32)) - set(b'\b\t\n\v\f\r\x1b'))  # characters that a text does not have
CONTROL_CHARS = re.compile('[\\0-\\x08\\x0e-\\x1f\\x7f-\\x84\\x86-\\x9f]')
UNMARKED, TABLE, OF_SET = 'UTF-16 without a byte order mark', 'table', 'of a data set'  # kinds of files
NOUNS = 'text', TABLE, 'broken link'  # kinds that have a plural
TABLE_FILE = re.compile(r'.+\.(parquet|jsonl|jsonl\.gz)')
COLUMN_HINT = '; --column=NAME takes the tables instead'
OWN_FILE = re.compile(
    r'\w+?(_\d{5})?\.(bin|mask)|meta\.(json|pkl)|max_id\.json|prepare\.py|(\.download)?\.lock|.*\.tmp'
)


def find_texts(path, pattern='*', data_folder=None, any_bytes=False, say=None):
    """Returns the paths of the texts that a path stands for: itself, or files below a folder, sorted.

    Of a folder, hidden, binary and empty files and those of data sets are left out; say is called with a line
    that counts them. pattern: only these files of the folder. data_folder: where the data set will be.
    any_bytes: what is not UTF-8 is taken as it is, and say is called with a line about it. Raises UserError
    for a path without a text, and for one that is not UTF-8.
    """
    path = Path(path).expanduser()
    if path.is_file():
        kinds = {path: kind_of_content(path)}
        if kinds[path] in ('binary', UNMARKED) and not any_bytes:
            kind = 'a binary file' if kinds[path] == 'binary' else UNMARKED
            raise UserError(f'--input {path} is {kind}, expected a text in UTF-8')
    elif path.is_dir():
        has_shards.cache_clear()
        kinds = {file: kind_of_file(file, path, data_folder) for file in files_below(path, pattern)}
    else:
        raise UserError(f'--input {path}: there is no such file or folder')
    kept = ('text', 'not UTF-8') if path.is_dir() else tuple(kinds.values())
    tables = [file for file, kind in kinds.items() if kind == TABLE and kind not in kept]
    texts = [file for file, kind in kinds.items() if kind in kept]
    left_out = count_kinds(path, {file: kind for file, kind in kinds.items() if kind not in kept})
    if not texts:
        others = {file: f'not named {pattern}' for file in files_below(path, '*') if file not in kinds}
        others = {file: 'hidden' if is_hidden(file, path) else kind for file, kind in others.items()}
        left_out = count_kinds(path, others | kinds) or 'nothing'
        hint = COLUMN_HINT if tables else ''
        raise UserError(f'--input {path}: there is no text {pattern} in it; left out: {left_out}{hint}')
    if left_out and say:
        say(f'{path}: {count(len(texts), "text")}; left out: {left_out}{tables and COLUMN_HINT or ""}')
    others = [file for file in texts if kinds[file] in ('binary', 'not UTF-8', UNMARKED)]
    if others and not any_bytes:
        raise UserError(
            f'--input: {others[0]} is not UTF-8: save it so; '
            'data/text/prepare.py --tokenizer=byte takes its bytes as they are'
        )
    if others and say:
        say(f'{others[0]}{f" and {len(others) - 1:,} more" * (len(others) > 1)}: not UTF-8, taken as bytes')
    return texts


def files_below(folder, pattern):
    """Returns the files of a pattern below a folder, and the links to nothing, sorted."""
    check(pattern, 'pattern', pattern, 'names below the folder, such as *.md')
    try:
        return [file for file in sorted(folder.rglob(pattern)) if file.is_file() or is_broken_link(file)]
    except (ValueError, NotImplementedError):  # a whole path
        raise UserError(f'pattern={pattern!r}, expected names below the folder, such as *.md') from None


def count(n, noun):
    """Returns a number with its noun, in the plural unless it is 1."""
    return f'{n:,} {noun}{"s" * (n != 1)}'


def count_kinds(folder, kinds):
    """Returns a text that counts {path: kind}, with an example of each kind, such as `2 hidden (.git/x)`."""
    examples = {kind: path for path, kind in reversed(kinds.items())}
    counts = sorted(Counter(kinds.values()).items())
    words = {kind: count(n, kind) if kind in NOUNS else f'{n:,} {kind}' for kind, n in counts}
    return ', '.join(f'{words[kind]} ({os.path.relpath(examples[kind], folder)})' for kind in words)


def is_broken_link(path):
    """Returns whether a path is a link to nothing."""
    return path.is_symlink() and not path.exists()


def is_hidden(path, folder):
    """Returns whether a file, or a folder between it and `folder`, is hidden or a cache of Python."""
    return any(part[0] == '.' or part == '__pycache__' for part in path.relative_to(folder).parts)


def kind_of_file(path, folder, data_folder=None):
    """Returns 'text', 'not UTF-8', or why a file below a folder is no text."""
    if is_of_data_set(path, data_folder):
        return OF_SET
    if is_hidden(path, folder):
        return 'hidden'
    if is_broken_link(path):
        return 'broken link'
    return TABLE if TABLE_FILE.fullmatch(path.name) else kind_of_content(path)


def is_of_data_set(path, data_folder=None):
    """Returns whether a file was written by a preparation: into data_folder, or into another data set."""
    if path.parent.name == 'unfinished' and (path.parent / 'state.json').exists():
        return True
    folders = [path.parent.parent] if path.parent.name == 'unfinished' else [path.parent]
    own = data_folder is not None and Path(data_folder).resolve() == folders[0].resolve()
    known = own or has_shards(folders[0])
    return known and (path.parent != folders[0] or OWN_FILE.fullmatch(path.name) is not None)


@functools.cache  # asked for every file of the folder
def has_shards(folder):
    """Returns whether a folder has token files."""
    return any(folder.glob('train*.bin'))


def kind_of_content(path):
    """Returns what is in a file: 'text', 'empty', 'not UTF-8', 'binary' or UNMARKED.

    A binary file has NUL characters, or is in no known encoding and has other control characters.
    """
    with open(path, 'rb') as file:
        start = file.peek(4)
        encoding = text_encoding(start)
        wide = not encoding.startswith('utf-8')  # a character takes two or four bytes, some are 0
        decoder = codecs.getincrementaldecoder(encoding)()
        valid, control, block = True, False, start
        while block:
            block = file.read(BLOCK_BYTES)
            try:
                text = decoder.decode(block, final=not block) if valid else ''
            except UnicodeDecodeError:
                text, valid = '', False
            if '\0' in text or (not wide and 0 in block) or (wide and not valid):
                return UNMARKED if looks_like_utf16(start) else 'binary'
            control = control or len(block.translate(None, CONTROL)) < len(block)
    if not start:
        return 'empty'
    return 'text' if valid else 'binary' if control else 'not UTF-8'


def looks_like_utf16(start):
    """Returns whether a file's first bytes are like a western text in UTF-16: every second one is 0.

    So are those of token ids below 256; read as a text they nearly always have control characters.
    """
    zeros = [part.count(0) / max(1, len(part)) for part in (start[::2], start[1::2])]
    text = start.decode('utf-16-be' if zeros[0] > zeros[1] else 'utf-16-le', 'ignore')
    return len(start) >= 16 and max(zeros) > 0.5 and min(zeros) < 0.02 and not CONTROL_CHARS.search(text)


# -----------------------------------------------------------------------------
# the validation split


def hash_fraction(name):
    """Returns a number in [0, 1) that looks random and depends on the name alone."""
    digest = hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()
    return int(digest[:12], 16) / 16**12


def hold_out(paths, share, say=None):
    """Returns {path: its part, above 0 and at most 1, that is for validation}: the end of the file.

    They are those of hold_out_by_name, unless whole files of other sizes are closer to `share` of the bytes
    by more than a tenth of it. say: called with a line if whole files are farther off than that.
    """
    sizes, parts = {path: path.stat().st_size for path in paths}, hold_out_by_name(paths, share)
    total = sum(sizes.values())
    held = sum(sizes[path] * part for path, part in parts.items()) / total
    if abs(held - share) > share / 10:
        top = common_folder(paths)
        by_name = sorted(sizes, key=lambda path: hash_fraction(relative_name(path, top)))
        chosen = closest_files(by_name, sizes, share * total)
        closest = sum(sizes[path] for path in chosen) / total
        if closest < 1 and abs(closest - share) < abs(held - share):
            parts, held = dict.fromkeys(chosen, 1.0), closest
    if say and abs(held - share) > share / 10:
        say(f'asked for {100 * share:.3g} %, val has {100 * held:.3g} %: whole files are held out')
    return parts


def closest_files(paths, sizes, target):
    """Returns files whose sizes add up to about `target`: not all of them and at least one.

    Of at most FEW_FILES the sum is the closest there is. Of more, files are taken in their order while they
    fit; then one more is, if that comes closer.
    """
    if len(paths) <= FEW_FILES:
        sums = np.zeros(1)  # of the files whose bits are set in the index
        for path in paths:
            sums = np.append(sums, sums + sizes[path])
        best = 1 + int(np.abs(sums[1:-1] - target).argmin())
        return [path for i, path in enumerate(paths) if best >> i & 1]
    chosen, rest = [], target
    for path in paths:
        if sizes[path] <= rest:
            chosen.append(path)
            rest -= sizes[path]
    others = [path for path in paths if path not in set(chosen)]
    next_one = min(others, key=sizes.get)
    return [*chosen, next_one] if abs(rest - sizes[next_one]) < rest else chosen


def common_folder(paths):
    """Returns the folder that all files are below."""
    return os.path.commonpath([os.path.abspath(path.parent) for path in paths])


def relative_name(path, top):
    """Returns the name of a file below a folder, wherever that lies."""
    return os.path.relpath(os.path.abspath(path), top)


def hold_out_by_name(paths, share):
    """Returns {path: its part, above 0 and at most 1, that is for validation}: the end of the file.

    Files are chosen whole, by their names, wherever the folder of all of them lies. Where the sizes of the
    files do not allow between half and twice `share` of the bytes, the ends of the largest do.
    """
    sizes = {path: path.stat().st_size for path in paths}
    total, top = sum(sizes.values()), common_folder(paths)
    parts, held, most = {}, 0.0, min(2 * share, (1 + share) / 2)
    for path, size in sizes.items():
        if hash_fraction(relative_name(path, top)) < share and held + size / total <= most:
            parts[path], held = 1.0, held + size / total
    for path in sorted(sizes.keys() - parts.keys(), key=lambda path: (-sizes[path], path)):
        if held >= share / 2:
            break
        part = sizes[path] / total
        parts[path] = min(1.0, (share - held) / part)
        held += part * parts[path]
    return parts
