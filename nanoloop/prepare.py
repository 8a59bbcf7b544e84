"""
Writes data sets: data/NAME/*.bin and meta.json, whole or not at all.
"""

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import shutil
import sys
import urllib.request
from argparse import ArgumentParser
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from nanoloop.checks import UserError
from nanoloop.datasets import DTYPES
from nanoloop.tokenizer import Tiktoken, read_text

SHARD_TOKENS = 10**8


GROUP = 8192  # documents between two saves of a preparation


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
            raise UserError(f'{self.folder} is being prepared by another process') from None
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
        raise UserError(f'{paths[0]}: there is no text to learn from')
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


def fetch(url, path):
    """Downloads url to path, whole or not at all, unless it is there. Returns path."""
    if not path.exists():
        try:
            with urllib.request.urlopen(url, timeout=60) as answer, open(f'{path}.tmp', 'wb') as file:
                shutil.copyfileobj(answer, file)
                if file.tell() != int(answer.headers.get('Content-Length', file.tell())):
                    raise OSError('the connection ended early')
        except OSError as error:
            raise UserError(f'{url} cannot be downloaded ({error}): give the file with --input') from None
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
        raise UserError(f'{error.name} is missing: pip install -e ".[data]"') from None
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
        raise UserError(f'no document was held out for validation: take more than {sum(done.values())}')
    writer.finish()


def encode(name, text):
    """A worker's part: tiktoken keeps the encoding after the first call."""
    import tiktoken

    return tiktoken.get_encoding(name).encode_ordinary(text)
