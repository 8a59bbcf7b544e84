"""
Writes data sets, whole or not at all: the format is described in nanoloop/datasets.py. Needs no torch.

    Writer        for token ids and masks, given document by document
    write_text    for text files; nanoloop/hub.py is for documents of the Hugging Face hub and in tables
"""

import contextlib
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np

from nanoloop.checks import UserError, check
from nanoloop.datasets import DTYPES, MOVING, name_source
from nanoloop.files import hash_json, lock_folder, sha256, sync, sync_folder, write_json
from nanoloop.nanogpt_data import nanogpt_files
from nanoloop.text_files import hold_out
from nanoloop.tokenizer import read_text

SHARD_TOKENS = 10**8
FEW_TOKENS = 1024  # a smaller split limits block_size as one is likely to choose it
NEW_META = 'meta.new'  # in unfinished/: meta.json of the set that is about to move
SHARD_NAME = re.compile(r'[^/]+\.bin')
PIECE_CHARS = 2**22  # text encoded at a time, so that a large file needs little memory


class Writer:
    """Writes a data set: add() appends documents to splits, finish() moves the whole set into its folder.

    Until then all files are in folder/unfinished. save(done) makes what was added durable; after an
    interruption, a new Writer for the same source, tokenizer and made_from goes on from there; its `done` is
    the value given to that save. resume=False starts from nothing.

    source: a JSON value for meta.json that says where the text is from. made_from: a JSON value that changes
    with the text and with every setting; meta.json has its hash. A shard gets no further document once it has
    shard_tokens tokens.
    say: called with a line if the preparation that was interrupted was another, or if another process
    prepares the folder. Then this one waits; if the other has made the same set, done_by_another is True and
    there is nothing left to do. Without say a folder in use raises UserError.
    """

    def __init__(
        self, folder, tokenizer, source, shard_tokens=SHARD_TOKENS, resume=True, made_from=None, say=None
    ):
        self.folder, self.unfinished = Path(folder), Path(folder) / 'unfinished'
        self.tokenizer, self.shard_tokens = tokenizer, shard_tokens
        self.dtype_name = 'uint16' if len(tokenizer.token_bytes) <= 2**16 else 'uint32'
        self.dtype = DTYPES[self.dtype_name]
        self.files = {}  # (split, suffix): the open file of the split's last shard
        # splits: the tokens in each shard of a split; masked: the splits that have masks
        self.state = dict(source=source, tokenizer=hash_json(tokenizer.spec), made_from=hash_json(made_from))
        self.state.update(done=0, max_id=0, splits={}, masked=[])
        self.folder.mkdir(parents=True, exist_ok=True)
        self.done_by_another = self.take_lock(say) and self.is_prepared()
        if self.done_by_another:
            say(f'{self.folder} was prepared by the other process')
            self.release_lock()
            return
        if say and (old := self.name_earlier()):
            say(f'{self.folder} holds {old}, which will be replaced')
        mixed = (self.folder / MOVING).exists()  # until this set is finished, the files there are of two sets
        if not resume:
            shutil.rmtree(self.unfinished, ignore_errors=True)
        self.unfinished.mkdir(parents=True, exist_ok=True)
        if mixed:
            (self.folder / MOVING).touch()
        self.load_state(say)

    def take_lock(self, say):
        """Locks the folder. Returns whether it had to wait for another process."""
        against = 'a second preparation'
        try:
            self.lock = lock_folder(self.folder, against, say)
            return False
        except BlockingIOError:
            text = f'{self.folder} is being prepared by another process'
        if say is None:
            raise UserError(text)
        say(f'{text}, waiting for it')
        self.lock = lock_folder(self.folder, against, say, wait=True)
        return True

    def release_lock(self):
        """Lets another process prepare the folder."""
        if self.lock:
            self.lock.close()

    def is_prepared(self):
        """Returns whether the folder has the whole data set that this writer is to make."""
        meta = self.finished_meta()
        return bool(meta) and all(meta.get(key) == value for key, value in self.origin().items())

    def finished_meta(self):
        """Returns meta.json of the whole data set in the folder, {} if there is none or it is another's."""
        with contextlib.suppress(OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
            meta = json.loads((self.folder / 'meta.json').read_bytes())
            names = [file['name'] for values in meta['splits'].values() for file in values['files']]
            if names and all(SHARD_NAME.fullmatch(name) for name in names):  # nothing else is ever removed
                return meta
        return {}

    def name_earlier(self):
        """Returns words for what finish() will replace in the folder, '' if it is nothing."""
        if meta := self.finished_meta():
            return f'a data set from {name_source(meta.get("source"))}'
        if (self.folder / 'meta.json').exists():
            return 'a meta.json of another program'
        mixed = (self.folder / MOVING).exists()  # by a preparation that was interrupted
        return "a data set in nanoGPT's form" if nanogpt_files(self.folder) and not mixed else ''

    def origin(self):
        """Returns the values of meta.json that say what the set was made from."""
        kept = {key: self.state[key] for key in ('source', 'made_from')}
        return dict(kept, tokenizer=self.tokenizer.spec)

    def load_state(self, say=None):
        """Goes on from the last save of the same source, tokenizer and input: reopens its last shards."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            state = json.loads((self.unfinished / 'state.json').read_text())
            keys = 'source', 'tokenizer', 'made_from'
            others = [key for key in keys if state.get(key) != self.state[key]]
            if not others:
                self.state.update(state)
            elif say:
                what = 'text or settings' if others == ['made_from'] else ' and '.join(others)
                say(
                    f'the unfinished preparation in {self.folder} was of another {what}, this one begins anew'
                )
        for split, shards in self.state['splits'].items():
            for suffix in self.suffixes(split):
                file = open(self.shard(split, len(shards) - 1, suffix), 'r+b')
                token_bytes = self.dtype.itemsize if suffix == '.bin' else 1
                file.truncate(shards[-1] * token_bytes)  # cuts off what was added after the save
                file.seek(0, io.SEEK_END)
                self.files[split, suffix] = file

    @property
    def done(self):
        """Returns the argument of the last save(), 0 before the first."""
        return self.state['done']

    def suffixes(self, split):
        """Returns the kinds of files that a split has."""
        return ('.bin', '.mask') if split in self.state['masked'] else ('.bin',)

    def shard(self, split, i, suffix):
        """Returns the path of a split's shard number i until finish()."""
        return self.unfinished / f'{split}_{i:05d}{suffix}'

    def add(self, split, ids, mask=None):
        """Appends a document, whole, to the split's last shard.

        ids: a sequence of integers. mask: as many values, 1 = this token counts as a target, 0 = it does
        not; without a mask every token counts. Nothing is put between documents: the eot_token that ends one
        is part of its ids. Raises UserError for ids that the tokenizer does not have, and for a mask of
        another length or other values.
        """
        ids = np.asarray(ids) if len(ids) else np.zeros(0, self.dtype)
        fits = ids.ndim == 1 and np.issubdtype(ids.dtype, np.integer)
        check(fits, 'ids', f'{ids.dtype}, shape {ids.shape}', 'integers in one dimension')
        if len(ids):
            n_vocab = len(self.tokenizer.token_bytes)
            expected = f'from 0 to {n_vocab - 1}, as its tokenizer has {n_vocab} ids'
            check(ids.min() >= 0 and ids.max() < n_vocab, 'ids', [int(ids.min()), int(ids.max())], expected)
        ids = ids.astype(self.dtype)
        if mask is not None:
            mask = np.asarray(mask)
            check(mask.shape == ids.shape, 'mask', mask.shape, f'the shape of the ids, {ids.shape}')
            check(np.isin(mask, (0, 1)).all(), 'mask', np.unique(mask).tolist(), '0 or 1 for every token')
        shards = self.state['splits'].setdefault(split, [])
        if mask is not None and split not in self.state['masked']:
            self.add_mask_files(split)
        if not shards or shards[-1] >= self.shard_tokens:
            self.begin_shard(split)
        self.files[split, '.bin'].write(ids.tobytes())
        if split in self.state['masked']:
            mask = np.ones(len(ids)) if mask is None else mask
            self.files[split, '.mask'].write(mask.astype(np.uint8).tobytes())
        shards[-1] += len(ids)
        self.state['max_id'] = max(self.state['max_id'], int(ids.max(initial=0)))

    def begin_shard(self, split):
        """Closes a split's last shard, if there is one, and opens the next."""
        shards = self.state['splits'][split]
        for suffix in self.suffixes(split):
            if shards:
                sync(self.files[split, suffix]).close()
            self.files[split, suffix] = open(self.shard(split, len(shards), suffix), 'wb')
        shards.append(0)

    def add_mask_files(self, split):
        """Gives a split its mask files; in those of its shards so far every token counts."""
        self.state['masked'].append(split)
        for i, tokens in enumerate(self.state['splits'][split]):
            file = open(self.shard(split, i, '.mask'), 'wb')
            file.write(b'\1' * tokens)
            self.files[split, '.mask'] = sync(file)  # the last one stays open

    def save(self, done):
        """Makes everything added so far durable, together with done, a JSON value of the caller."""
        for file in self.files.values():
            sync(file)
        write_json(self.unfinished / 'state.json', dict(self.state, done=done))
        self.state['done'] = done

    def finish(self, say=None, **more):
        """Moves the files into the folder and writes meta.json last. The writer cannot be used any more.

        say: called with a line per split. more: further keys of meta.json.
        """
        self.save(self.done)
        longest = {split: max(shards, default=0) for split, shards in self.state['splits'].items()}
        least = more.get('row_len') or 2  # tokens of the shortest window, with its last target
        for split, tokens in longest.items():
            if tokens < least:
                counts = f'{tokens} tokens of {split}, a window needs {least}'
                raise UserError(f'{self.folder.name}: {counts}: take more text, or another --val_share')
        splits = {split: self.describe(split) for split in self.state['splits']}
        meta = dict(
            vocab_size=len(self.tokenizer.token_bytes),
            max_id=self.state['max_id'],
            dtype=self.dtype_name,
            token_bytes=self.tokenizer.token_bytes,
            splits=splits,
            **self.origin(),
        )
        write_json(self.unfinished / NEW_META, dict(meta, **more))
        self.move_files(splits)
        os.replace(self.unfinished / NEW_META, self.folder / 'meta.json')
        sync_folder(self.folder)
        shutil.rmtree(self.unfinished)
        self.release_lock()
        for split in sorted(splits) if say else ():  # train, val
            tokens, kind = splits[split]['tokens'], self.tokenizer.spec['kind']
            few = longest[split] <= FEW_TOKENS and not more.get('row_len')
            enough = f', enough for block_size up to {longest[split] - 1}' * few
            say(f'{self.folder.name}: {split} has {tokens:,} tokens ({kind}){enough}')

    def describe(self, split):
        """Returns the entry of a split in meta.json."""
        shards, files = self.state['splits'][split], []
        for i, tokens in enumerate(shards):
            name = f'{split}_{i:05d}.bin' if len(shards) > 1 else f'{split}.bin'
            files.append(dict(name=name, tokens=tokens, sha256=sha256(self.shard(split, i, '.bin'))))
            if split in self.state['masked']:
                files[-1]['mask_sha256'] = sha256(self.shard(split, i, '.mask'))
        return dict(tokens=sum(shards), files=files)

    def move_files(self, splits):
        """Moves the shards to the names in splits, meta.json's entry; an earlier set there ends with this."""
        earlier = self.finished_meta().get('splits', {}).values()
        old = [file['name'] for values in earlier for file in values['files']] or nanogpt_files(self.folder)
        new = [file['name'] for values in splits.values() for file in values['files']]
        # masks of the earlier set do not fit the new tokens; a run that reads its shards has them open
        old = [*self.folder.glob('*.mask'), *(self.folder / name for name in ('meta.json', *old))]
        for path in (*old, *(self.folder / name for name in new)):
            check(not path.is_dir(), 'folder', str(path), 'a file there: move this folder away')
        (self.folder / MOVING).touch()
        (self.unfinished / 'state.json').unlink()  # from here on an interrupted preparation begins anew
        for path in old:
            path.unlink(missing_ok=True)
        for split, values in splits.items():
            for i, file in enumerate(values['files']):
                for suffix in self.suffixes(split):
                    self.files[split, suffix].close()
                    target = (self.folder / file['name']).with_suffix(suffix)
                    os.replace(self.shard(split, i, suffix), target)
        sync_folder(self.folder)


# -----------------------------------------------------------------------------
# text files


def write_text(
    folder,
    paths,
    tokenizer,
    source,
    val_share=0.1,
    say=None,
    special=False,
    shard_tokens=SHARD_TOKENS,
    held_out=None,
    **more,
):
    """Prepares a data set from text files.

    About val_share of the text is held out: the end of a single file; of several files, some are held out
    whole, see hold_out, and the tokenizer's eot_token ends each. special: special tokens may be written in
    the text. say: called with a line about what is done. held_out: what hold_out returns,
    if it is chosen already. more: see Writer.finish.
    Raises UserError if there is no text, or one that the tokenizer cannot encode.
    """
    check(0 < val_share < 1, 'val_share', val_share, 'a number above 0 and below 1')
    check(shard_tokens >= 1, 'shard_tokens', shard_tokens, 'at least 1')
    size = sum(path.stat().st_size for path in paths if path.exists())
    if size < 2:
        raise UserError(f'{paths[0]}: there is no text to learn from')
    made_from = dict(
        files=[[path.name, sha256(path)] for path in paths], val_share=val_share, special=special
    )
    writer = Writer(folder, tokenizer, source, shard_tokens, resume=False, made_from=made_from, say=say)
    if writer.done_by_another:
        return
    check_space(folder, size / max(1, np.mean(tokenizer.token_bytes)) * writer.dtype.itemsize)
    parts = held_out or hold_out(paths, val_share, say)
    end = [tokenizer.eot_token] if len(paths) > 1 else []
    for path in paths:
        text, part = read_text(path, tokenizer.text_errors), parts.get(path, 0)
        cut = int(len(text) * (1 - part))
        if 0 < part < 1 and len(paths) > 1 and say:
            say(f'val has the last {part:.0%} of {path.name}')
        for split, piece, exists in (('train', text[:cut], part < 1), ('val', text[cut:], part > 0)):
            if exists:
                add_text(writer, split, piece, special, path)
                writer.add(split, end)
    for split in ('train', 'val'):
        writer.state['splits'].setdefault(split, [])  # finish() refuses one that is empty
    writer.finish(say, **more)


def check_space(folder, size):
    """Raises OSError if a folder's disk has not `size` bytes left."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(f'{folder} needs about {size / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB left')


def add_text(writer, split, text, special=False, path=None):
    """Encodes a text, that of a path, in pieces and adds them to a split."""
    for piece in split_text(text, PIECE_CHARS):
        try:
            writer.add(split, writer.tokenizer.encode(piece, special))
        except UserError as error:
            raise UserError(f'{path}: {error}') from None


def split_text(text, size):
    """Yields pieces of a text: each ends at the first newline after `size` characters, the last anywhere."""
    start = 0
    while start < len(text):
        end = text.find('\n', start + size) + 1 or len(text)
        yield text[start:end]
        start = end
