"""
Small tables of texts: read whole from JSON lines and parquet, and aligned for a terminal. Needs no torch.
"""

import json
import re
from pathlib import Path

from nanoloop.checks import UserError, check, missing_package
from nanoloop.tokenizer import read_text

HALF = re.compile(r'\\u[dD][89a-fA-F]')  # how JSON may write a half of a surrogate pair


def read_json_lines(path):
    """Yields (number, value) of the lines of a file that are not blank. Raises UserError for a bad line."""
    for number, line in enumerate(read_text(path).split('\n'), 1):  # not splitlines: a text may have U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f'{path}, line {number} is no JSON: {error}') from None
        if HALF.search(line) and not is_unicode(row):
            raise UserError(f'{path}, line {number}: expected texts, it has half of a surrogate pair')
        yield number, row


def read_jsonl(path):
    """Returns the objects of a file of JSON lines, blank lines left out. Raises UserError for a bad line."""
    rows = []
    for number, row in read_json_lines(path):
        if not isinstance(row, dict):
            got = json.dumps(row)[:40]
            raise UserError(f'{path}, line {number}: expected an object {{"name": value, ...}}, got {got}')
        rows.append(row)
    return rows


def is_unicode(value):
    """Returns whether all texts in a JSON value have a form in UTF-8: no tokenizer takes the others."""
    try:
        return bool(json.dumps(value, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        return False


def read_parquet(path):
    """Returns the rows of a parquet file, a dict each. Raises UserError if it cannot be read."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise missing_package('a parquet file', 'eval', 'datasets') from None  # which needs pyarrow
    try:
        return parquet.read_table(path).to_pylist()
    except (OSError, ArrowException) as error:
        raise UserError(f'{path} cannot be read: {" ".join(str(error).split())}') from None


READERS = {'.jsonl': read_jsonl, '.parquet': read_parquet}


def read_table(path, key):
    """Returns the rows of a file by the ending of its name. key: the flag that names the file."""
    suffix = Path(path).suffix
    check(suffix in READERS, key, str(path), f'a file {" or ".join(READERS)}')
    rows = READERS[suffix](path)
    check(rows, key, str(path), 'a file with rows, it has none')
    return rows


def align(lines):
    """Returns the lines of a table, texts with the head first, in columns. A blank column is left out."""
    used = [i for i, cells in enumerate(zip(*lines[1:], strict=True)) if any(cells)]
    widths = {i: max(len(line[i]) for line in lines) for i in used}
    return ['  '.join(line[i].ljust(widths[i]) for i in used).rstrip() for line in lines]
