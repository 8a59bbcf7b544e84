"""
Writes data sets from documents in tables: of the Hugging Face hub, or in parquet, JSON and CSV files. Several
processes encode them. Needs no torch.
"""

import contextlib
import functools
import glob
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from pathlib import Path

import numpy as np

from nanoloop.checks import UserError, check, missing_package
from nanoloop.prepare import SHARD_TOKENS, Writer, check_space
from nanoloop.text_files import OF_SET, count, count_kinds, hash_fraction, kind_of_file
from nanoloop.tokenizer import make_tokenizer

DOCUMENTS_PER_SAVE = 8192  # an interruption loses the work on as many documents at most
VAL_SHARE = 0.0005  # of the documents is held out,
VAL_DOCUMENTS = 50  # or of a small set so many, at most a tenth
FEW_DOCUMENTS = 10**5  # so many are sorted, to hold out an exact number of them

FORMATS = {'.parquet': 'parquet', '.jsonl': 'json', '.json': 'json', '.csv': 'csv'}  # of load_dataset
FORMATS |= {f'{suffix}.gz': 'json' for suffix in ('.jsonl', '.json')}
TEXT_HINT = '; a text is for data/text/prepare.py --input, without --column'


class HubDocuments:
    """The documents of a data set that datasets.load_dataset reads.

    path, load: its arguments. column: the column that holds the text. streaming: read over the network, keep
    no copy. max_documents: most documents to read from each split; None = all. files: what load reads from
    this machine, if it does.
    """

    def __init__(self, path, column='text', streaming=False, max_documents=None, files=(), **load):
        check(max_documents is None or max_documents >= 1, 'max_documents', max_documents, 'at least 1')
        try:
            import datasets
        except ImportError as error:
            raise missing_package('a table of documents', 'data', error.name) from None
        self.column, self.streaming, self.max_documents = column, streaming, max_documents
        self.source = dict(path=path, **load)  # what decides the documents, for meta.json
        self.name = ', '.join(map(str, files)) or ' '.join([path, *map(str, load.values())])
        stats = [(str(file), file.stat()) for file in files]
        self.made_from = dict(column=column, max_documents=max_documents)
        self.made_from['files'] = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        self.load = functools.partial(datasets.load_dataset, path, streaming=streaming, **load)
        if files:  # its lines on a broken file say no more than ours; those on a download stay
            datasets.logging.set_verbosity(datasets.logging.CRITICAL)
            datasets.disable_progress_bars()
        self.rows = {}  # the rows of each split that was opened

    def open(self, split):
        """Returns the rows of a split. Raises UserError if there is no such data set, file or column."""
        if split in self.rows:
            return self.rows[split]
        with self.reading():
            rows = self.load(split=split)
        columns = rows.column_names or [self.column]  # unknown until the first row in some streams
        check(self.column in columns, 'column', self.column, f'one of {", ".join(columns)}')
        kind = getattr((rows.features or {}).get(self.column), 'dtype', 'string')
        check('string' in kind or kind == 'null', 'column', self.column, f'a column of text, it has {kind}')
        self.rows[split] = rows
        return rows

    def read(self, split, first):
        """Returns an iterator of a split's documents from number `first` on, and their number if known."""
        rows, most = self.open(split), self.max_documents
        total = None if self.streaming else min(len(rows), most or len(rows))
        last = None if most is None else max(0, most - first)
        return islice(self.column_of(rows.skip(first)), last), total

    def column_of(self, rows):
        """Yields the documents of rows; a stream finds only then what is wrong with them."""
        with self.reading():
            yield from (row[self.column] for row in rows)

    @contextlib.contextmanager
    def reading(self):
        """Turns what the library raises into a UserError, which has all that its own lines would tell."""
        try:
            yield
        except Exception as error:  # datasets raises many types for a file that is none of its kind
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise  # the network or the disk
            reason = ' '.join(str(error.__cause__ or error).split())[:300] or 'it has no rows'
            raise UserError(f'{self.name} cannot be read: {reason}') from None

    def texts(self, splits):
        """Yields all documents of several splits."""
        for split in splits:
            yield from filter(None, self.read(split, 0)[0])

    def size(self, splits):
        """Returns about the bytes of the text, 0 if they are not known."""
        if self.streaming or self.max_documents:
            return 0
        return sum(self.open(split).select_columns(self.column).data.nbytes for split in splits)


@contextlib.contextmanager
def reach_hub(path, key, expected):
    """Raises UserError for the data set `path` of the hub if the network fails inside the block.

    key, expected: the flag that names a copy, and what that is.
    """
    try:
        yield
    except OSError as error:
        reason = ' '.join(str(error).split())[:200]
        raise UserError(
            f'{path} cannot be reached ({reason}): without a network, --{key}=FILE names a copy, {expected}'
        ) from None


def table_format(path):
    """Returns the format of a table's file by its name, None for another file."""
    suffixes = Path(path).suffixes
    return FORMATS.get(''.join(suffixes[-2:])) or FORMATS.get(''.join(suffixes[-1:]))


def local_documents(paths, column='text', say=None, **options):
    """Returns the HubDocuments in files of this machine: parquet, JSON (lines or a list) or CSV.

    paths: files, folders of them, or patterns such as `data/*.parquet`. say: called with a line that counts
    the other files of a folder. options: see HubDocuments. Raises UserError for a path without such files,
    files of several formats, and a parquet file without the column.
    """
    files = [file for path in paths for file in find_tables(os.path.expanduser(path), say)]
    formats = sorted({table_format(file) for file in files})
    check(len(formats) == 1, 'input', formats, 'files of one format')
    load = dict(data_files=[glob.escape(str(file)) for file in files])
    if formats == ['parquet']:
        load['columns'] = [column]  # other columns may differ from file to file
        for file in files:
            check_parquet(file, column)
    return HubDocuments(formats[0], column, files=files, **load, **options)


def find_tables(path, say=None):
    """Returns the files of tables that a path or pattern stands for, sorted.

    Of a folder other files are left out; say is called with a line that counts them.
    """
    paths = [Path(path)] if os.path.exists(path) else [Path(name) for name in sorted(glob.glob(path))]
    if not paths:
        raise UserError(f'--input {path}: there is no such file or folder')
    files, known = [], ', '.join(FORMATS)
    for found in paths:
        if not found.is_dir():
            check(table_format(found), 'input', str(found), f'a table, {known}{TEXT_HINT}')
            files.append(found)
            continue
        inside = [file for file in sorted(found.rglob('*')) if file.is_file()]
        kinds = {file: 'hidden' if file.name[0] == '_' else kind_of_file(file, found) for file in inside}
        tables = [file for file in inside if table_format(file) and kinds[file] not in ('hidden', OF_SET)]
        left_out = count_kinds(found, {file: kinds[file] for file in inside if file not in set(tables)})
        if not tables:
            left_out = f'; left out: {left_out or "nothing"}'
            raise UserError(f'--input {path}: there is no table in it, {known}{left_out}{TEXT_HINT}')
        if left_out and say:
            say(f'{found}: {count(len(tables), "table")}; left out: {left_out}')
        files += tables
    return files


def check_parquet(file, column):
    """Raises UserError unless a parquet file has the column."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise missing_package('a parquet file', 'data', 'datasets') from None  # which needs pyarrow
    try:
        columns = parquet.read_schema(file).names
    except (OSError, ArrowException) as error:
        raise UserError(f'{file} cannot be read: {error}') from None
    check(column in columns, 'column', column, f'one of {", ".join(columns)}, which {file} has (--column)')


# -----------------------------------------------------------------------------
# processes that encode

_worker = {}  # of such a process: its tokenizer, and what it does with it


def start_pool(processes, tokenizer, eot, special):
    """Returns the processes that encode, an executor."""
    work = tokenizer.spec, [tokenizer.eot_token] if eot else [], special
    spawn = multiprocessing.get_context('spawn')
    return ProcessPoolExecutor(processes or os.cpu_count(), spawn, start_worker, work)


def start_worker(spec, end, special):
    """Begins a process that encodes. It has a group of its own, so that no Ctrl-C interrupts it half way."""
    os.setpgrp()
    threading.Thread(target=end_with_parent, daemon=True).start()
    _worker.update(tokenizer=make_tokenizer(spec), end=end, special=special)


def end_with_parent():
    """Ends this process as soon as the one that started it has ended, however that was."""
    multiprocessing.parent_process().join()
    os._exit(1)


def encode_document(text):
    """Returns (the ids of a text and those of its end, ''), or (None, why it cannot be encoded)."""
    try:
        ids = _worker['tokenizer'].encode(text, _worker['special'])
    except UserError as error:
        return None, str(error)
    return np.array(ids + _worker['end'], np.uint32), ''


# -----------------------------------------------------------------------------
# from documents to a data set


def write_hub(
    folder,
    documents,
    splits,
    *,
    tokenizer,
    eot=True,
    special=False,
    val_share=None,
    processes=None,
    shard_tokens=SHARD_TOKENS,
    say=None,
):
    """Prepares a data set from HubDocuments. Interrupted, it goes on from the last save when called again.

    splits: {split of the documents: split here}. If none here is 'val', about val_share of the documents are
    held out; None = 1 in 2,000, more of small sets. eot: the end-of-text token follows every document.
    special: special tokens may be written in a document. processes: number of processes that encode; None =
    one per core. say: called with a line about what is done; None = also no progress bar.
    """
    for key, value in dict(processes=processes, shard_tokens=shard_tokens).items():
        check(value is None or value >= 1, key, value, 'at least 1')
    fits = val_share is None or 0 < val_share < 1
    check(fits, 'val_share', val_share, 'a number above 0 and below 1')
    has_val = 'val' in splits.values()
    check(not (has_val and val_share), 'val_share', val_share, 'none: the set has a validation split')
    for split in splits:
        documents.open(split)
    made_from = dict(documents.made_from, eot=eot, special=special, val_share=val_share)
    made_from.update(splits=splits, shard_tokens=shard_tokens)
    writer = Writer(folder, tokenizer, documents.source, shard_tokens, made_from=made_from, say=say)
    if writer.done_by_another:
        return
    bytes_per_token = max(1, np.mean(tokenizer.token_bytes))
    check_space(folder, documents.size(splits) / bytes_per_token * writer.dtype.itemsize)
    pool = start_pool(processes, tokenizer, eot, special)
    try:
        for split, our_split in splits.items():
            add_documents(writer, pool, documents, split, our_split, val_share, has_val, say)
    except BrokenProcessPool:
        raise OSError(
            'a process that encodes has ended, perhaps for want of memory: the same command goes on from '
            f'document {sum_documents(writer):,}, and needs less memory with fewer --processes'
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    finish(writer, say)


def add_documents(writer, pool, documents, split, our_split, val_share, has_val, say):
    """Adds the documents of a split that are not yet in the data set."""
    from tqdm import tqdm  # datasets needs it, too

    done = dict(writer.done or {})
    first = done.setdefault(split, 0)
    texts, total = documents.read(split, first)
    if total is None and first == 0:  # a stream: it may be a short one
        start = list(islice(texts, DOCUMENTS_PER_SAVE))
        total = len(start) if len(start) < DOCUMENTS_PER_SAVE else documents.max_documents
        texts = chain(start, texts)
    totals = done.setdefault('totals', {})  # saved: a later part of a stream has to be divided alike
    total = totals.setdefault(split, total)
    held_out = (lambda i: False) if has_val else choose_documents(val_share, total)
    with tqdm(desc=split, initial=first, total=total, unit=' documents', disable=not say) as bar:
        while group := list(islice(texts, DOCUMENTS_PER_SAVE)):  # the pool does not run ahead of the group
            kinds = {type(text).__name__ for text in group} - {'str', 'NoneType'}
            check(not kinds, 'column', documents.column, f'a column of text, it has {" ".join(kinds)}')
            encoded = pool.map(encode_document, (text or '' for text in group), chunksize=32)
            for text, (ids, error) in zip(group, encoded, strict=True):
                if error and say:
                    say(f'document {done[split]:,} of {split} is left out: {error}')
                if text is None or error:
                    done['left out'] = done.get('left out', 0) + 1
                else:
                    writer.add('val' if held_out(done[split]) else our_split, ids)
                done[split] += 1
            writer.save(dict(done))
            advance(bar, done[split])


def advance(bar, n):
    """Draws a progress bar at n, and never again if that fails: its terminal may be gone."""
    try:
        bar.update(n - bar.n)
    except OSError:
        bar.disable = True


def choose_documents(share, total):
    """Returns a function of a document's number: whether it is held out.

    share: of the documents; None = VAL_SHARE, more of a small set. total: the number of documents, None if it
    is not known. The numbers with the smallest hashes are held out: of few documents exactly the share, at
    least one and not all.
    """
    if share is None:
        share = VAL_SHARE if total is None else max(VAL_SHARE, min(0.1, VAL_DOCUMENTS / max(1, total)))
    if total is None or total > FEW_DOCUMENTS:
        return lambda i: hash_fraction(str(i)) < share
    count = max(1, min(total - 1, round(share * total)))
    chosen = set(sorted(range(total), key=lambda i: hash_fraction(str(i)))[:count])
    return lambda i: i in chosen


def sum_documents(writer):
    """Returns the number of documents that are done, those left out among them."""
    return sum(n for name, n in (writer.done or {}).items() if name not in ('left out', 'totals'))


def finish(writer, say):
    """Finishes a data set if it has both splits, and says what was left out."""
    splits, n = writer.state['splits'], sum_documents(writer)
    left_out = (writer.done or {}).get('left out', 0)
    if left_out and say:
        say(f'{left_out:,} of {n:,} documents are left out: they are empty (null) or cannot be encoded')
    for split in ('train', 'val'):
        if not sum(splits.get(split, ())):
            raise UserError(f'{split} would be empty with {n:,} documents: take more, or another --val_share')
    writer.finish(say)
