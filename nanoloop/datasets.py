"""
Reads data sets. A data set is a folder, data/NAME, with token files and meta.json:

    train.bin, val.bin    token ids, little-endian uint16 or uint32; large sets: shards train_00000.bin, ...
    train.mask, val.mask  optional, a byte per token: 1 = this token is a target that counts, 0 = it is not
    meta.json             vocab_size, max_id (the largest id there is), dtype, tokenizer (its spec),
                          token_bytes (per id, 0 for special tokens), source, row_len (optional: the tokens
                          are rows of this length), splits: per split its tokens and files, per file its name,
                          tokens, sha256 and, if it has a mask, mask_sha256; made_from: a hash of the text and
                          of the settings of its preparation

nanoGPT's folders, with meta.pkl or without any meta, are read, too. nanoloop/prepare.py writes data sets.
A name of nanoloop/generated.py, such as mano:10, is a data set without files.
"""

import contextlib
import difflib
import hashlib
import json
import math
import os
import re
import resource
from pathlib import Path

import numpy as np

from nanoloop import ROOT
from nanoloop.checks import UserError, check
from nanoloop.files import hash_json, sha256
from nanoloop.generated import GENERATED, Generated, GeneratedSplit, find_generated
from nanoloop.nanogpt_data import nanogpt_meta
from nanoloop.tokenizer import make_tokenizer

DATA = ROOT / 'data'
DTYPES = {'uint16': np.dtype('<u2'), 'uint32': np.dtype('<u4')}
SPARE_FILES = 128  # a run opens further files: libraries, logs, a compiler's
SCAN_TOKENS = 2**24  # tokens read at a time when a file is searched for its largest id
MOVING = 'unfinished/moving'  # exists while new files replace old ones: if it stays, they are mixed

# -----------------------------------------------------------------------------
# meta.json


def find_data(dataset):
    """Returns the folder of a data set: data/NAME for a name, the path itself for one with a slash.

    For a name of nanoloop/generated.py it returns the Generated, which the functions below take as a folder.
    Raises UserError for a wrong size of one, and if there is a folder of that name, too.
    """
    if os.sep in dataset:
        return Path(dataset)
    folder, generated = DATA / dataset, find_generated(dataset)
    expected = generated and f'{generated.name} for the generated task, or {folder} for the folder'
    check(not (generated and folder.is_dir()), 'dataset', dataset, expected)
    return generated or folder


def read_meta(folder):
    """Returns meta.json of a data set as a dict, complete even for old sets and nanoGPT's folders.

    Raises UserError with the command that prepares the data if there is no whole data set.
    """
    if isinstance(folder, Generated):
        return folder.meta()
    folder = Path(folder)
    if folder.is_file():
        command = f'python data/text/prepare.py --input {folder}'
        raise UserError(f'dataset={str(folder)!r} is a file, run: {command}')
    if not folder.is_dir():
        names = {path.parent.name for file in ('prepare.py', 'meta.json') for path in DATA.glob(f'*/{file}')}
        close = difflib.get_close_matches(folder.name, names, n=1)
        known = ', '.join([*sorted(names), *(f'{name}:N' for name in GENERATED)])
        hint = f'did you mean {close[0]!r}?' if close else f'expected one of {known}'
        raise UserError(f'dataset={folder.name!r}: there is no folder {folder}, {hint}')
    if (folder / 'meta.json').exists():
        meta = read_meta_json(folder / 'meta.json')
    elif (folder / 'train.bin').exists() and not (folder / MOVING).exists():
        meta = nanogpt_meta(folder)
    else:
        script = folder / 'prepare.py'
        script = os.path.relpath(script) if script.exists() else 'data/text/prepare.py --input TEXT'
        state = 'not prepared, run'
        if (folder / 'unfinished').exists():
            state = 'only half prepared: wait for its prepare.py, or run that again, perhaps'
        raise UserError(f'the data set {folder.name} is {state}: python {script}')
    if 'token_bytes' not in meta:
        meta['token_bytes'] = [0] * meta['vocab_size']  # without its tokenizer there are no bits per byte
        with contextlib.suppress(OSError, UserError):
            meta['token_bytes'] = make_tokenizer(meta['tokenizer']).token_bytes
    missing = meta['vocab_size'] - len(meta['token_bytes'])
    meta['token_bytes'] += [0] * missing  # a padded vocabulary of nanoGPT has more ids than symbols
    if 'max_id' not in meta:
        meta['max_id'] = find_max_id(folder, meta)
    return meta


def read_meta_json(path):
    """Returns the dict in a meta.json. Raises UserError if it is broken or has too few keys."""
    try:
        meta = json.loads(path.read_bytes())
        missing = {'vocab_size', 'dtype', 'tokenizer', 'splits'} - set(meta)
    except ValueError as error:
        raise UserError(f'{path} is broken ({error}): prepare the data again') from None
    if missing:
        raise UserError(f'{path} has no {", ".join(sorted(missing))}: prepare the data again')
    return meta


def find_max_id(folder, meta):
    """Returns the largest token id in a data set's files, which max_id.json keeps for the next time."""
    paths = [folder / file['name'] for split in meta['splits'].values() for file in split['files']]
    paths = [path for path in paths if path.exists()]
    stamp = [[path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    with contextlib.suppress(OSError, ValueError, KeyError):
        saved = json.loads((folder / 'max_id.json').read_text())
        if saved['stamp'] == stamp:
            return saved['max_id']
    max_id = 0
    for path in paths:
        with open(path, 'rb') as file:
            while len(ids := np.fromfile(file, DTYPES[meta['dtype']], SCAN_TOKENS)):
                max_id = max(max_id, int(ids.max()))
    with contextlib.suppress(OSError):  # a folder that cannot be written is searched again
        (folder / 'max_id.json').write_text(json.dumps(dict(max_id=max_id, stamp=stamp)))
    return max_id


def identify(folder, meta):
    """Returns {source, sha256} of a data set. Sets of the same sha256 have the same tokens and masks.

    Of files of nanoGPT, which have no hashes, only the sizes and the ends are compared.
    """
    content = []
    for split, values in meta['splits'].items():
        for file in values['files']:
            tokens = file.get('sha256') or hash_ends(folder / file['name'])
            content.append([split, file['tokens'], tokens, file.get('mask_sha256')])
    return dict(source=meta.get('source'), sha256=hash_json(content))


def describe(folder, meta):
    """Returns the line that a run says about its data set."""
    if isinstance(folder, Generated):
        return folder.describe()
    sizes = ' and '.join(f'{meta["splits"][name]["tokens"]:,} ({name})' for name in ('train', 'val'))
    return f'data set {folder.name}: {sizes} tokens of kind {meta["tokenizer"]["kind"]}'


def name_source(source):
    """Returns the words for a data set's source, a JSON value of its meta.json."""
    if isinstance(source, dict) and isinstance(source.get('data_files'), list):
        names = [os.path.basename(re.sub(r'\[([*?[])\]', r'\1', str(file))) for file in source['data_files']]
        return f'{", ".join(names[:3])}{f" and {len(names) - 3:,} more" * (len(names) > 3)}'
    if isinstance(source, dict | list):
        return ' '.join(map(str, source.values() if isinstance(source, dict) else source))
    return str(source or 'another program')


def hash_ends(path, size=2**20):
    """Returns the SHA-256 of a file's first and last `size` bytes: files of nanoGPT come without a hash."""
    with open(path, 'rb') as file:
        digest = hashlib.sha256(file.read(size))
        file.seek(max(0, path.stat().st_size - size))
        digest.update(file.read(size))
    return digest.hexdigest()


# -----------------------------------------------------------------------------
# the windows of a split


def ceil_div(a, b):
    """Returns a / b, rounded up to an integer."""
    return -(-a // b)


def allow_open_files(n):
    """Raises this process's limit of open files by n. Raises UserError if that is not allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = math.inf if hard == resource.RLIM_INFINITY else hard
    is_open = len(os.listdir('/dev/fd')) - 1 if os.path.isdir('/dev/fd') else 64  # -1: this listing
    least = n + is_open
    if soft == resource.RLIM_INFINITY or least + SPARE_FILES <= soft:
        return
    for limit in (min(least + SPARE_FILES, highest), least) if least <= highest else ():
        # the kernel's own limit may be lower than an infinite hard one, as on macOS
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
            return
    if least > soft:
        most = soft if hard == resource.RLIM_INFINITY else hard
        files = f'the data set has {n} files, {is_open} others are open'
        raise UserError(f'{files}, and this process may open {most}: see `ulimit -n`')


def open_split(folder, *arguments):
    """Returns the Split of a folder, or the GeneratedSplit of a Generated. arguments: see Split."""
    if isinstance(folder, Generated):
        return GeneratedSplit(folder, *arguments)
    return Split(folder, *arguments)


class Split:
    """The windows of one split. A window has T + 1 tokens: T = block_size inputs; targets are shifted by one.

    vocab_size: of the model; every id must be below it. Raises UserError for files that are missing or not
    as long as meta.json says, a split too short for one window, and ids that are too large.

    The files stay open, so that a data set that is prepared anew does not change a run that is reading it.
    """

    def __init__(self, folder, meta, name, block_size, vocab_size):
        folder = Path(folder)
        if name not in meta['splits']:
            splits = ', '.join(meta['splits'])
            raise UserError(f'the data set {folder.name} has no {name} split, only {splits}')
        files = meta['splits'][name]['files']
        self.block_size, self.vocab_size = block_size, vocab_size
        self.dtype = DTYPES[meta['dtype']]
        self.files = [folder / file['name'] for file in files]
        self.tokens = np.array([file['tokens'] for file in files])  # of each file
        self.masks = [path.with_suffix('.mask') for path in self.files]
        self.masked = any('mask_sha256' in file for file in files) or any(
            mask.exists() for mask in self.masks
        )
        sizes = dict(zip(self.files, self.tokens * self.dtype.itemsize, strict=True))
        if self.masked:
            sizes |= dict(zip(self.masks, self.tokens, strict=True))
        allow_open_files(len(sizes))
        self.open_files = {path: self.open(path, size) for path, size in sizes.items()}
        self.written = {path: os.fstat(file.fileno()).st_mtime_ns for path, file in self.open_files.items()}
        row_len = meta.get('row_len')
        if row_len and block_size != row_len - 1:
            raise UserError(
                f'block_size={block_size}, expected {row_len - 1}: the data is rows of {row_len} tokens'
            )
        if self.tokens.max() <= block_size:
            raise UserError(
                f'block_size={block_size} is too long for {self.files[0]}: '
                f'it has {self.tokens.max()} tokens, a window needs block_size + 1'
            )
        self.check_ids(meta['max_id'], folder.name)
        hashes = [file.get('sha256') for file in files] + [file.get('mask_sha256') for file in files]
        self.hashes = dict(zip(self.files + self.masks, hashes, strict=True))
        # training windows start at any token, evaluation windows end to end; rows are taken whole in both
        self.train_step, self.eval_step = row_len or 1, row_len or block_size
        self.train_windows = np.maximum(0, (self.tokens - block_size - 1) // self.train_step + 1)  # per file

    def open(self, path, size):
        """Opens a file. Raises UserError unless it has `size` bytes."""
        with contextlib.suppress(FileNotFoundError):
            file = open(path, 'rb', buffering=0)
            if (actual := os.fstat(file.fileno()).st_size) == size:
                return file
            file.close()
            raise UserError(f'{path} has {actual} bytes, meta.json says {size}: prepare the data again')
        raise UserError(f'{path} is missing, meta.json names it: prepare the data again')

    def check_ids(self, largest, source, same_on_all_ranks=True):
        """Raises UserError if the largest id of a source is not below vocab_size."""
        if largest >= self.vocab_size:
            error = UserError(
                f'vocab_size={self.vocab_size}, expected at least {largest + 1}: '
                f'{source} has the id {largest}'
            )
            error.same_on_all_ranks = same_on_all_ranks
            raise error

    def locate(self, numbers, windows, step):
        """Returns the (file, start) of windows given by number, counted through the files.

        windows: how many each file has; step: tokens between the starts of two of them.
        """
        ends = np.cumsum(windows)
        files = np.searchsorted(ends, numbers, side='right')
        starts = (numbers - (ends - windows)[files]) * step
        return list(zip(files.tolist(), starts.tolist(), strict=True))

    def draw(self, rng, n):
        """Draws n training windows with a numpy Generator. Returns inputs and targets, each (n, T) int64."""
        return self.read_train_windows(rng.integers(self.train_windows.sum(), size=n), n)

    def read_train_windows(self, numbers, n):
        """Reads training windows given by number. Returns as read_windows."""
        return self.read_windows(self.locate(numbers, self.train_windows, self.train_step), n)

    def eval_windows(self, n=None):
        """Returns the (file, start) of the evaluation windows: all, end to end, or n of them evenly spread.

        A file's last window may be shorter than T, but has at least one target.
        """
        windows = np.maximum(0, ceil_div(self.tokens - 1, self.eval_step))  # per file
        total = windows.sum()
        n = total if n is None else min(n, total)
        return self.locate(np.arange(n) * total // max(1, n), windows, self.eval_step)

    def read_windows(self, windows, n):
        """Reads windows given as (file, start). Returns inputs and targets, each (n, T) int64.

        Rows past the last window have inputs 0 and targets -1.
        """
        inputs = np.zeros((n, self.block_size), np.int64)
        targets = np.full((n, self.block_size), -1)
        for row, (file, start) in enumerate(windows):
            inputs[row], targets[row] = self.read_window(file, start)
        return inputs, targets

    def read_window(self, file, start):
        """Reads one window. Returns inputs and targets, each (T,) int64.

        Targets are -1 where the mask is 0, and past the end of the file.
        """
        T = self.block_size
        n = min(T + 1, self.tokens[file] - start)  # fewer at the end of the file
        ids = self.read_file(self.files[file], self.dtype, start, n).astype(np.int64)  # (n,)
        self.check_ids(ids.max(), self.files[file], same_on_all_ranks=False)  # other ranks read other windows
        inputs, targets = np.zeros(T, np.int64), np.full(T, -1)
        inputs[: n - 1], targets[: n - 1] = ids[:-1], ids[1:]
        if self.masked:  # targets[i] is token start + i + 1, and so is its place in the mask
            counts = self.read_file(self.masks[file], np.dtype(np.uint8), start + 1, n - 1)
            targets[: n - 1][counts == 0] = -1
        return inputs, targets

    def read_file(self, path, dtype, start, n):
        """Returns the n values from number `start` on of an open file.

        Raises UserError if its content has changed since it was opened.
        """
        number, size = self.open_files[path].fileno(), n * dtype.itemsize
        while True:
            data = os.pread(number, size, start * dtype.itemsize)
            written = os.fstat(number).st_mtime_ns
            if written == self.written[path] and len(data) == size:
                break
            if self.hashes[path] is None or sha256(number) != self.hashes[path]:
                error = UserError(f'{path} has changed while it was read, and a run keeps to its data')
                error.same_on_all_ranks = False
                raise error
            self.written[path] = written  # the same content was written over it: read again
        return np.frombuffer(data, dtype)
