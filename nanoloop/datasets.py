"""
Reads data sets: their meta.json and the windows of a split.
"""

import contextlib
import json
import os
import pickle
from pathlib import Path

import numpy as np

from nanoloop import ROOT
from nanoloop.checks import UserError
from nanoloop.tokenizer import make_tokenizer

DATA = ROOT / 'data'


DTYPES = {'uint16': np.dtype('<u2'), 'uint32': np.dtype('<u4')}


def find_data(dataset):
    """The folder of a data set: data/NAME, or a path if it has a slash."""
    return Path(dataset) if os.sep in dataset else DATA / dataset


def read_meta(folder):
    """meta.json of a data set, or what replaces it in nanoGPT folders. Raises ValueError with what to run."""
    folder = Path(folder)
    script = folder / 'prepare.py'
    if folder.is_file():
        raise UserError(
            f'dataset={str(folder)!r} is a file, run: python data/text/prepare.py --input {folder}'
        )
    if not folder.is_dir():
        known = {path.parent.name for name in ('prepare.py', 'meta.json') for path in DATA.glob(f'*/{name}')}
        known = ', '.join(sorted(known))
        raise UserError(
            f'dataset={folder.name!r}: there is no folder {folder}, prepared or known are {known}'
        )
    if (folder / 'meta.json').exists():
        try:
            meta = json.loads((folder / 'meta.json').read_text())
            missing = {'vocab_size', 'dtype', 'tokenizer', 'splits'} - set(meta)
        except ValueError as error:
            raise UserError(f'{folder}/meta.json is broken ({error}): prepare the data again') from None
        if missing:
            raise UserError(f'{folder}/meta.json has no {", ".join(sorted(missing))}: prepare the data again')
        return complete(folder, meta)
    if not (folder / 'train.bin').exists():
        how = (
            f'python {os.path.relpath(script)}'
            if script.exists()
            else 'python data/text/prepare.py --input TEXT'
        )
        raise UserError(f'the data set {folder.name} is not prepared, run: {how}')
    return nanogpt_meta(folder)


class PlainUnpickler(pickle.Unpickler):
    """Reads nanoGPT's meta.pkl, which holds plain values: a pickle naming a class or function is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'{module}.{name} is not a plain value')


def nanogpt_meta(folder):
    """A meta.json for nanoGPT's folders: from meta.pkl, or GPT-2's encoding where there is none."""
    gpt2 = dict(kind='tiktoken', name='gpt2')
    meta = dict(dtype='uint16', source='nanoGPT', tokenizer=gpt2, vocab_size=50257)
    if (folder / 'meta.pkl').exists():
        try:
            with open(folder / 'meta.pkl', 'rb') as file:
                old = PlainUnpickler(file).load()
            chars = [old['itos'][i] for i in range(old['vocab_size'])]
        except (pickle.UnpicklingError, KeyError, TypeError, EOFError) as error:
            broken = f'{folder}/meta.pkl is not what nanoGPT writes ({error})'
            raise UserError(f'{broken}: prepare the data again') from None
        meta.update(tokenizer=dict(kind='char', chars=chars), vocab_size=len(chars))
    meta['splits'] = {}
    for split in ('train', 'val'):
        if (path := folder / f'{split}.bin').exists():
            tokens = path.stat().st_size // 2
            meta['splits'][split] = dict(tokens=tokens, files=[dict(name=path.name, tokens=tokens)])
    return complete(folder, meta)


def complete(folder, meta):
    """meta with what can be found out of the files: token_bytes and, by scanning them once, max_id."""
    if 'token_bytes' not in meta:
        meta['token_bytes'] = [0] * meta['vocab_size']  # no bits per byte where the tokenizer cannot be had
        with contextlib.suppress(OSError, ValueError):
            meta['token_bytes'] = make_tokenizer(meta['tokenizer']).token_bytes
    if 'max_id' in meta:
        return meta
    files = [folder / file['name'] for split in meta['splits'].values() for file in split['files']]
    stamp = [[path.stat().st_size, path.stat().st_mtime_ns] for path in files if path.exists()]
    scan = folder / 'max_id.json'
    with contextlib.suppress(OSError, ValueError, KeyError):
        old = json.loads(scan.read_text())
        if old['stamp'] == stamp:
            return dict(meta, max_id=old['max_id'])
    dtype = DTYPES[meta['dtype']]
    blocks = (block for path in files if path.exists() for block in read_blocks(path, dtype))
    meta['max_id'] = max((int(block.max()) for block in blocks), default=0)
    with contextlib.suppress(OSError):  # a folder that cannot be written is scanned again
        scan.write_text(json.dumps(dict(max_id=meta['max_id'], stamp=stamp)))
    return meta


def read_blocks(path, dtype, count=2**24):
    with open(path, 'rb') as file:
        while len(block := np.fromfile(file, dtype, count)):
            yield block


class Split:
    """The windows of one split: block_size tokens and the tokens that follow them.

    Raises ValueError for files that are missing or not as long as meta.json says, a split too short for one
    window, and ids that are not below vocab_size.
    """

    def __init__(self, folder, meta, name, block_size, vocab_size):
        if name not in meta['splits']:
            splits = ', '.join(meta['splits'])
            raise UserError(f'the data set {Path(folder).name} has no {name} split, only {splits}')
        self.T, self.vocab_size = block_size, vocab_size
        self.dtype = DTYPES[meta['dtype']]
        self.files = [Path(folder) / file['name'] for file in meta['splits'][name]['files']]
        self.tokens = np.array([file['tokens'] for file in meta['splits'][name]['files']])
        self.masks = [path.with_suffix('.mask') for path in self.files]
        self.masked = any(path.exists() for path in self.masks)
        for path, tokens in zip(self.files, self.tokens, strict=True):
            self.expect_size(path, tokens * self.dtype.itemsize)
        for path, tokens in zip(self.masks if self.masked else (), self.tokens, strict=self.masked):
            self.expect_size(path, tokens)
        row = meta.get('row_len')
        if row and block_size != row - 1:
            raise UserError(f'block_size={block_size}, expected {row - 1}: the data is rows of {row} tokens')
        if self.tokens.max() <= block_size:
            fits = f'{self.tokens.max()} tokens, a window needs block_size + 1'
            raise UserError(f'block_size={block_size} is too long for {self.files[0]}: it has {fits}')
        self.check_ids(meta['max_id'], Path(folder).name)
        self.step, self.stride = row or 1, row or block_size  # between windows, of training and of evaluation
        self.starts = np.maximum(0, (self.tokens - block_size - 1) // self.step + 1)  # for training, per file

    def expect_size(self, path, size):
        found = path.stat().st_size if path.exists() else 'no'
        if found != size:
            raise UserError(f'{path} has {found} bytes, meta.json says {size}: prepare the data again')

    def check_ids(self, largest, where, same_on_all_ranks=True):
        if largest >= self.vocab_size:
            mistake = UserError(
                f'vocab_size={self.vocab_size}, expected at least {largest + 1}: {where} has the id {largest}'
            )
            mistake.same_on_all_ranks = same_on_all_ranks
            raise mistake

    def window(self, file, start):
        """Inputs and targets, each (T,) int64; past the file's end and where its mask is 0 targets are -1."""
        offset = start * self.dtype.itemsize
        ids = np.fromfile(self.files[file], self.dtype, self.T + 1, offset=offset).astype(np.int64)
        self.check_ids(
            ids.max(), self.files[file], same_on_all_ranks=False
        )  # perhaps only this rank draws it
        x, y = np.zeros(self.T, np.int64), np.full(self.T, -1)
        n = len(ids) - 1
        x[:n], y[:n] = ids[:-1], ids[1:]
        if self.masked:
            y[:n][np.fromfile(self.masks[file], np.uint8, n, offset=start + 1) == 0] = -1
        return x, y

    def draw(self, rng, n):
        """n windows drawn from all of the split by a numpy Generator, as inputs and targets (n, T)."""
        ends = np.cumsum(self.starts)
        picks = rng.integers(ends[-1], size=n)
        files = np.searchsorted(ends, picks, side='right')
        starts = (picks - ends[files] + self.starts[files]) * self.step
        return self.stack(zip(files, starts, strict=True), n)

    def fixed(self, n=None):
        """(file, start) of the windows for evaluation: end to end through the split, or n evenly spread."""
        counts = np.maximum(0, -((1 - self.tokens) // self.stride))  # with one target at least
        ends = np.cumsum(counts)
        n = ends[-1] if n is None else min(n, ends[-1])
        picks = np.arange(n) * ends[-1] // max(1, n)
        files = np.searchsorted(ends, picks, side='right')
        starts = (picks - ends[files] + counts[files]) * self.stride
        return list(zip(files.tolist(), starts.tolist(), strict=True))

    def stack(self, windows, n):
        """The windows as (n, T) inputs and targets, filled up with targets -1."""
        xs, ys = np.zeros((n, self.T), np.int64), np.full((n, self.T), -1)
        for i, (file, start) in enumerate(windows):
            xs[i], ys[i] = self.window(file, start)
        return xs, ys
