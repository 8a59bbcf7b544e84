"""
The rows of tasks, from files of this machine or from the hub. Needs no torch.
"""

import csv
import io
import re
from pathlib import Path
from typing import NamedTuple

from nanoloop.checks import UserError, check
from nanoloop.hub import HubDocuments, reach_hub
from nanoloop.tables import READERS, read_table
from nanoloop.tokenizer import read_text

SPLITS = ('train', 'test')


class Unavailable(UserError):
    """A task cannot be asked here and now: its data is not there, or code may not be run."""


class Source(NamedTuple):
    """Where the rows of a task come from."""

    path: str  # the data set's name on the hub,
    config: str  # its configuration,
    column: str  # and a column of text
    splits: dict  # {split here: split of the hub}
    of_task: tuple = ()  # words of file names: files of a folder with one of them are taken alone,
    of_others: tuple = ()  # and files with one of these are not


def read_rows(source, option, value, split):
    """Yields (where, row) of a split: a row is a dict, `where` names its file and number for a message.

    option, value: a key, and the file or folder that it names; '' = the hub. A file is for either split.
    Of a folder those files are taken whose names have the split in them, such as test-00000.parquet or
    test/law_test.csv; if none has, those without the other split. Raises Unavailable if there is no such
    data, and UserError for a file that cannot be read.
    """
    known = ' or '.join(source.splits)
    check(split in source.splits, 'split', split, f'{known}: {source.path} has no other')
    if value:
        for path in find_files(source, option, Path(value).expanduser(), split):
            for number, row in enumerate(read_file(path, option), 1):
                yield f'{path}, row {number}', row
        return
    with reach_hub(source.path, option, f'a file or folder, {" or ".join(FORMATS)}'):
        documents = HubDocuments(source.path, source.column, name=source.config)
        rows = documents.open(source.splits[split])
    for number, row in enumerate(rows, 1):
        yield f'{source.path}, row {number}', row


def find_files(source, option, path, split):
    """Returns the files of a split that a path stands for, see read_rows."""
    check(path.exists(), option, str(path), 'a file or folder that exists')
    files = [path]
    if path.is_dir():
        found = (file for file in path.rglob('*') if file.suffix in FORMATS and file.is_file())
        files = sorted(file for file in found if not hidden(file.relative_to(path)))
        check(files, option, str(path), f'a folder with files {" or ".join(FORMATS)}')
    own = [file for file in files if words(file) & set(source.of_task)]
    files = own or [file for file in files if not words(file) & set(source.of_others)]
    if path.is_dir():
        named = [file for file in files if split in words(file.relative_to(path))]
        other = set(SPLITS) - {split}
        files = named or [file for file in files if not words(file.relative_to(path)) & other]
    if not files:
        what = ' '.join((*source.of_task[:1], split))
        hint = '; a single file, given by its own name, is for any split' if path.is_dir() else ''
        raise Unavailable(f'{option}={str(path)!r}, expected files with {what} in their names{hint}')
    return files


def hidden(path):
    """Returns whether a file, or a folder that it is in, is hidden."""
    return any(part.startswith('.') for part in path.parts)


def words(path):
    """Returns the words in the name of a file and in that of its folder, in small letters."""
    return set(re.split('[^a-z]+', '/'.join(path.parts[-2:]).lower()))


def read_file(path, key):
    """Returns the rows of a file, a dict each. key: the key that names it."""
    return read_questions_csv(path) if path.suffix == '.csv' else read_table(path, key)


FORMATS = (*READERS, '.csv')


def read_questions_csv(path):
    """Returns the rows of a CSV file of MMLU: question, choices, answer. A line of titles is left out."""
    try:
        lines = list(csv.reader(io.StringIO(read_text(path), newline=''), strict=True))
    except csv.Error as error:
        raise UserError(f'{path} is no CSV: {error}') from None
    lines = [line for line in lines if line]
    if lines and lines[0][0] == 'question':
        lines = lines[1:]
    for number, line in enumerate(lines, 1):
        if len(line) < 4:
            expected = 'a question, two choices or more, and the answer'
            raise UserError(f'{path}, row {number}: expected {expected}, got {len(line)} columns')
    check(lines, 'file', str(path), 'a file with rows, it has none')
    return [dict(question=line[0], choices=line[1:-1], answer=line[-1]) for line in lines]
