"""
A data set is a folder data/NAME with token files and meta.json. Here are its tokenizers, writer and reader.

    train.bin, val.bin    token ids, little-endian uint16 or uint32; large sets: shards train_00000.bin, ...
    train.mask, val.mask  optional, one uint8 per token: 1 = this token is a target that counts
    meta.json             vocab_size, max_id, dtype, tokenizer, token_bytes (per id, special tokens 0),
                          row_len (optional: rows of so many tokens), splits (files, tokens, sha256), source

A set is written into data/NAME/unfinished and moved into place when whole, meta.json last, so that a broken
preparation is never taken for a finished one. nanoGPT's folders (meta.pkl or no meta) can be read, too.
"""

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import urllib.request
from argparse import ArgumentParser
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from checks import Mistake

ROOT = Path(__file__).resolve().parent
SHARD_TOKENS = 10**8
DTYPES = {'uint16': np.dtype('<u2'), 'uint32': np.dtype('<u4')}
GROUP = 8192  # documents between two saves of a preparation

# -----------------------------------------------------------------------------
# tokenizers: rebuilt from the plain dict that meta.json and every checkpoint hold


class Characters:
    """One id per character, {'kind': 'char', 'chars': [...]}."""

    def __init__(self, chars):
        chars = list(chars)
        self.dict = dict(kind='char', chars=chars)
        self.token_bytes = [len(char.encode()) for char in chars]
        self.ids = {char: i for i, char in enumerate(chars)}
        self.start = self.ids.get('\n', 0)

    def encode(self, text):
        unknown = sorted(set(text) - set(self.ids))
        if unknown:
            raise Mistake(f'characters that the tokenizer does not know: {" ".join(map(repr, unknown[:20]))}')
        return [self.ids[char] for char in text]

    def decode_bytes(self, ids):
        return ''.join(
            self.dict['chars'][i] if i < len(self.ids) else '\N{REPLACEMENT CHARACTER}' for i in ids
        ).encode()


class Bytes:
    """The 256 bytes of UTF-8, {'kind': 'byte'}."""

    dict = dict(kind='byte')
    token_bytes = [1] * 256
    start = ord('\n')

    def encode(self, text):
        return list(text.encode('utf-8', 'surrogateescape'))  # any file, not only UTF-8

    def decode_bytes(self, ids):
        return b''.join(bytes([i]) if i < 256 else b'?' for i in ids)


class Tiktoken:
    """A byte-pair encoding of the tiktoken library, {'kind': 'tiktoken', 'name': 'gpt2'}."""

    def __init__(self, name):
        try:
            import tiktoken
        except ImportError:
            raise Mistake(f'the {name} tokenizer needs tiktoken: pip install tiktoken') from None
        try:
            self.bpe = tiktoken.get_encoding(name)
        except OSError as error:
            offline = f'without a network, TIKTOKEN_CACHE_DIR=FOLDER names a copy of its files ({error})'
            raise Mistake(f'the {name} tokenizer cannot be downloaded; {offline}') from None
        self.dict = dict(kind='tiktoken', name=name)
        self.start = self.bpe.eot_token
        special = {self.bpe.encode_single_token(text) for text in self.bpe.special_tokens_set}
        sizes = (0 if i in special else self.size(i) for i in range(self.bpe.n_vocab))
        self.token_bytes = list(sizes)

    def size(self, token):
        try:
            return len(self.bpe.decode_single_token_bytes(token))
        except KeyError:  # some encodings have holes
            return 0

    def encode(self, text):
        return self.bpe.encode(text, allowed_special='all')

    def decode_bytes(self, ids):
        known = [i if i < self.bpe.n_vocab and self.size(i) else None for i in ids]  # models pad vocabularies
        return b''.join(b'?' if i is None else self.bpe.decode_single_token_bytes(i) for i in known)


TOKENIZERS = {'char': Characters, 'byte': Bytes, 'tiktoken': Tiktoken}


def make_tokenizer(plain):
    """A plain dict's tokenizer, with encode(text), decode_bytes(ids), token_bytes per id, and a start id."""
    options = {key: value for key, value in plain.items() if key != 'kind'}
    return TOKENIZERS[plain['kind']](**options)


# -----------------------------------------------------------------------------
# writing


class Writer:
    """Writes the token files of data/NAME: add() appends to a split, finish() moves the whole set into place.

    save(done) makes what was added durable; a new Writer for the same source and tokenizer goes on from
    there, and done says how many of the source's documents that were.
    """

    def __init__(self, folder, tokenizer, source, shard_tokens=SHARD_TOKENS, anew=False):
        self.folder, self.part = Path(folder), Path(folder) / 'unfinished'
        self.tokenizer, self.shard_tokens = tokenizer, shard_tokens
        self.dtype_name = 'uint16' if len(tokenizer.token_bytes) <= 2**16 else 'uint32'
        self.dtype = DTYPES[self.dtype_name]
        self.state = dict(source=source, tokenizer=tokenizer.dict, done=0, max_id=0, splits={})
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / '.lock', 'w')
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Mistake(f'{self.folder} is being prepared by another process') from None
        if anew:
            shutil.rmtree(self.part, ignore_errors=True)
        with contextlib.suppress(OSError, ValueError, KeyError):
            state = json.loads((self.part / 'state.json').read_text())
            if (state['source'], state['tokenizer']) == (source, tokenizer.dict):
                self.state = state
        self.part.mkdir(parents=True, exist_ok=True)
        self.files = {}
        for split, shards in self.state['splits'].items():  # forget what was added after the last save
            self.files[split] = open(self.shard(split, len(shards) - 1), 'r+b')
            self.files[split].truncate(shards[-1] * self.dtype.itemsize)
            self.files[split].seek(0, io.SEEK_END)

    @property
    def done(self):
        return self.state['done']

    def shard(self, split, i):
        return self.part / f'{split}_{i:05d}.bin'

    def add(self, split, ids):
        """Appends one document's token ids (a sequence of integers), whole, to the split's last shard."""
        ids = np.asarray(ids, dtype=self.dtype)
        shards = self.state['splits'].setdefault(split, [])
        if not shards or shards[-1] >= self.shard_tokens:
            if shards:
                self.sync(self.files[split]).close()
            self.files[split] = open(self.shard(split, len(shards)), 'wb')
            shards.append(0)
        self.files[split].write(ids.tobytes())
        shards[-1] += len(ids)
        self.state['max_id'] = max(self.state['max_id'], int(ids.max(initial=0)))

    def sync(self, file):
        file.flush()
        os.fsync(file.fileno())
        return file

    def write_json(self, path, value):
        """Replaces path at once: a reader finds the old text or the new one."""
        with open(f'{path}.tmp', 'w') as file:
            json.dump(value, file)
            self.sync(file)
        os.replace(f'{path}.tmp', path)

    def save(self, done):
        for file in self.files.values():
            self.sync(file)
        self.write_json(self.part / 'state.json', dict(self.state, done=done))
        self.state['done'] = done

    def finish(self, **more):
        """Moves the files into place and writes meta.json last; more: further keys for it."""
        self.save(self.done)
        splits, moves = {}, []
        for split, shards in self.state['splits'].items():
            self.files.pop(split).close()
            several = len(shards) > 1
            names = [f'{split}_{i:05d}.bin' if several else f'{split}.bin' for i in range(len(shards))]
            moves += [(self.shard(split, i), self.folder / name) for i, name in enumerate(names)]
            files = [
                dict(name=name, tokens=tokens, sha256=sha256(self.shard(split, i)))
                for i, (name, tokens) in enumerate(zip(names, shards, strict=True))
            ]
            splits[split] = dict(tokens=sum(shards), files=files)
        (self.part / 'state.json').unlink()  # from here on an interrupted preparation begins anew
        (self.folder / 'meta.json').unlink(missing_ok=True)  # the old set ends, the new begins with its own
        for old, new in moves:
            os.replace(old, new)
        meta = dict(
            vocab_size=len(self.tokenizer.token_bytes),
            max_id=self.state['max_id'],
            dtype=self.dtype_name,
            tokenizer=self.tokenizer.dict,
            token_bytes=self.tokenizer.token_bytes,
            splits=splits,
            source=self.state['source'],
        )
        self.write_json(self.folder / 'meta.json', dict(meta, **more))
        shutil.rmtree(self.part)
        self.lock.close()
        for split, values in splits.items():
            print(
                f'{self.folder.name}: {split} has {values["tokens"]:,} tokens ({self.tokenizer.dict["kind"]})'
            )


def sha256(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def write_text(folder, paths, tokenizer, source, share=0.1, **more):
    """Prepares a data set from text files. A single file is cut, its last share is for validation; of
    several, whole files are held out by their names, and the tokenizer's start token ends each."""
    if sum(path.stat().st_size for path in paths if path.exists()) < 2:
        raise Mistake(f'{paths[0]}: there is no text to learn from')
    writer = Writer(folder, tokenizer, source, anew=True)
    top = os.path.commonpath([path.parent for path in paths])
    names = {path: os.path.relpath(path, top) for path in paths}
    held_out = {p for p in paths if digest(names[p]) < share} or {min(paths, key=lambda p: digest(names[p]))}
    for path in paths:
        text = read_text(path, errors='surrogateescape' if tokenizer.dict['kind'] == 'byte' else 'strict')
        if len(paths) == 1:
            n = int(len(text) * (1 - share))
            parts = [('train', text[:n]), ('val', text[n:])]
        else:
            parts = [('val' if path in held_out else 'train', text)]
        for split, part in parts:
            for piece in pieces(part):
                writer.add(split, tokenizer.encode(piece))
            if len(paths) > 1:
                writer.add(split, [tokenizer.start])
    writer.finish(**more)


def digest(name):
    """A number in [0, 1) that looks random and depends on name alone."""
    return int(hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:12], 16) / 16**12


def read_text(path, errors='strict'):
    """The text of a UTF-8 file, its line ends kept. Raises ValueError if it is not UTF-8 or not there."""
    try:
        return Path(path).read_bytes().decode('utf-8', errors)
    except OSError as error:
        raise Mistake(f'{str(path)!r} cannot be read: {error.strerror}') from None
    except UnicodeDecodeError as error:
        where = f'{error.reason} at byte {error.start}'
        raise Mistake(f'{path} is not UTF-8 ({where}); only prepare.py --tokenizer=byte takes it') from None


def fetch(url, path):
    """Downloads url to path, whole or not at all, unless it is there. Returns path."""
    if not path.exists():
        try:
            with urllib.request.urlopen(url, timeout=60) as answer, open(f'{path}.tmp', 'wb') as file:
                shutil.copyfileobj(answer, file)
                if file.tell() != int(answer.headers.get('Content-Length', file.tell())):
                    raise OSError('the connection ended early')
        except OSError as error:
            raise Mistake(f'{url} cannot be downloaded ({error}): give the file with --input') from None
        os.replace(f'{path}.tmp', path)
    return path


def pieces(text, size=2**22):
    """text in pieces of about size characters, cut after a newline, so that encoding needs little memory."""
    start = 0
    while start < len(text):
        end = text.find('\n', start + size) + 1 or len(text)
        yield text[start:end]
        start = end


def write_hub(folder, path, splits, column='text', end=True, share=0.0005, argv=None, **load):
    """The main program of a data set of the Hugging Face hub: downloads, tokenises, goes on if interrupted.

    path, load: of datasets.load_dataset, parquet-backed sets only. splits: {theirs: ours}; where ours has no
    val, a share of the documents is held out by number. end: an end-of-text token follows every document.
    """
    parser = ArgumentParser(description=f'Prepares {path} in {Path(folder).name}/ (interrupted, it goes on).')
    add = parser.add_argument
    add('--input', nargs='*', help='local parquet files to read instead (for one split)')
    add('--processes', type=int, default=os.cpu_count(), help='tokenising processes')
    add('--streaming', action='store_true', help='read over the network, keep no copy on this disk')
    add('--tokenizer', default='gpt2', help='an encoding of tiktoken')
    add('--max_documents', type=int, help='stop after so many')
    add('--shard_tokens', type=int, default=SHARD_TOKENS, help='tokens per file')
    args = parser.parse_args(argv)
    try:
        from datasets import load_dataset
        from tqdm import tqdm
    except ImportError as error:
        raise Mistake(f'{error.name} is missing: pip install -e ".[data]"') from None
    tokenizer = Tiktoken(args.tokenizer)
    if args.input:
        path, load, splits = 'parquet', dict(data_files=args.input), {'train': 'train'}
    writer = Writer(folder, tokenizer, dict(path=path, **load), args.shard_tokens)
    encode_here = functools.partial(encode, args.tokenizer)
    done = dict(writer.done or {})
    with get_context('spawn').Pool(args.processes) as pool:
        for theirs, ours in splits.items():
            rows = load_dataset(path, split=theirs, streaming=args.streaming, **load)
            first = done.setdefault(theirs, 0)
            total = None if args.streaming else len(rows)
            texts = iter(row[column] for row in rows.skip(first))
            with tqdm(desc=f'{theirs}', initial=first, total=total, unit=' documents') as bar:
                while group := list(
                    islice(texts, max(0, min(GROUP, (args.max_documents or sys.maxsize) - done[theirs])))
                ):
                    for ids in pool.imap(encode_here, group, chunksize=32):
                        held_out = 'val' not in splits.values() and digest(str(done[theirs])) < share
                        split = 'val' if held_out else ours
                        writer.add(split, [*ids, tokenizer.start] if end else ids)
                        done[theirs] += 1
                    writer.save(dict(done))
                    bar.update(len(group))
    if 'val' not in writer.state['splits']:
        raise Mistake(f'no document was held out for validation: take more than {sum(done.values())}')
    writer.finish()


def encode(name, text):
    """A worker's part: tiktoken keeps the encoding after the first call."""
    import tiktoken

    return tiktoken.get_encoding(name).encode_ordinary(text)


# -----------------------------------------------------------------------------
# reading


def find_data(dataset):
    """The folder of a data set: data/NAME, or a path if it has a slash."""
    return Path(dataset) if os.sep in dataset else ROOT / dataset


def read_meta(folder):
    """meta.json of a data set, or what replaces it in nanoGPT folders. Raises ValueError with what to run."""
    folder = Path(folder)
    script = folder / 'prepare.py'
    if folder.is_file():
        raise Mistake(f'dataset={str(folder)!r} is a file, run: python data/text/prepare.py --input {folder}')
    if not folder.is_dir():
        known = {path.parent.name for name in ('prepare.py', 'meta.json') for path in ROOT.glob(f'*/{name}')}
        known = ', '.join(sorted(known))
        raise Mistake(f'dataset={folder.name!r}: there is no folder {folder}, prepared or known are {known}')
    if (folder / 'meta.json').exists():
        try:
            meta = json.loads((folder / 'meta.json').read_text())
            missing = {'vocab_size', 'dtype', 'tokenizer', 'splits'} - set(meta)
        except ValueError as error:
            raise Mistake(f'{folder}/meta.json is broken ({error}): prepare the data again') from None
        if missing:
            raise Mistake(f'{folder}/meta.json has no {", ".join(sorted(missing))}: prepare the data again')
        return complete(folder, meta)
    if not (folder / 'train.bin').exists():
        how = (
            f'python {os.path.relpath(script)}'
            if script.exists()
            else 'python data/text/prepare.py --input TEXT'
        )
        raise Mistake(f'the data set {folder.name} is not prepared, run: {how}')
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
            raise Mistake(f'{broken}: prepare the data again') from None
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
            raise Mistake(f'the data set {Path(folder).name} has no {name} split, only {splits}')
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
            raise Mistake(f'block_size={block_size}, expected {row - 1}: the data is rows of {row} tokens')
        if self.tokens.max() <= block_size:
            fits = f'{self.tokens.max()} tokens, a window needs block_size + 1'
            raise Mistake(f'block_size={block_size} is too long for {self.files[0]}: it has {fits}')
        self.check_ids(meta['max_id'], Path(folder).name)
        self.step, self.stride = row or 1, row or block_size  # between windows, of training and of evaluation
        self.starts = np.maximum(0, (self.tokens - block_size - 1) // self.step + 1)  # for training, per file

    def expect_size(self, path, size):
        found = path.stat().st_size if path.exists() else 'no'
        if found != size:
            raise Mistake(f'{path} has {found} bytes, meta.json says {size}: prepare the data again')

    def check_ids(self, largest, where, alike=True):
        if largest >= self.vocab_size:
            mistake = Mistake(
                f'vocab_size={self.vocab_size}, expected at least {largest + 1}: {where} has the id {largest}'
            )
            mistake.alike = alike
            raise mistake

    def window(self, file, start):
        """Inputs and targets, each (T,) int64; past the file's end and where its mask is 0 targets are -1."""
        offset = start * self.dtype.itemsize
        ids = np.fromfile(self.files[file], self.dtype, self.T + 1, offset=offset).astype(np.int64)
        self.check_ids(ids.max(), self.files[file], alike=False)  # perhaps only this rank draws it
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
