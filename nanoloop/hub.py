"""
Writes data sets from the Hugging Face hub, or from parquet files: document by document, in several processes.
"""

import functools
import os
from itertools import islice
from multiprocessing import get_context

from nanoloop.checks import UserError, check
from nanoloop.prepare import SHARD_TOKENS, Writer, hash_fraction
from nanoloop.tokenizer import Tiktoken

DOCUMENTS_PER_SAVE = 8192  # an interruption loses the work on as many documents at most


class HubDocuments:
    """The documents of a data set of the hub that consists of parquet files.

    path, load: arguments of datasets.load_dataset. column: the column that holds the text. streaming: read
    over the network, keep no copy. max_documents: most documents to read from each split; None = all.
    """

    def __init__(self, path, column='text', streaming=False, max_documents=None, **load):
        check(max_documents is None or max_documents >= 1, 'max_documents', max_documents, 'at least 1')
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise UserError(f'{error.name} is missing: pip install -e ".[data]"') from None
        self.column, self.streaming, self.max_documents = column, streaming, max_documents
        self.source = dict(path=path, **load)  # what decides the documents, for meta.json
        self.load = functools.partial(load_dataset, path, streaming=streaming, **load)

    def read(self, split, first):
        """Returns an iterator of a split's texts from document number `first` on, and their number if known.

        Raises UserError if there is no such data set, file or column.
        """
        try:
            rows = self.load(split=split)
        except (FileNotFoundError, ValueError) as error:  # ValueError: no such name or split, no parquet file
            raise UserError(f'{self.source} cannot be read: {error}') from None
        columns = rows.column_names or [self.column]  # unknown until the first row in some streams
        check(self.column in columns, 'column', self.column, f'one of {", ".join(columns)}')
        total = None if self.streaming else len(rows)
        last = None if self.max_documents is None else max(0, self.max_documents - first)
        return islice((row[self.column] for row in rows.skip(first)), last), total


def write_hub(
    folder,
    documents,
    splits,
    *,
    tokenizer='gpt2',
    eot=True,
    val_share=0.0005,
    processes=None,
    shard_tokens=SHARD_TOKENS,
    say=None,
):
    """Prepares a data set from HubDocuments. Interrupted, it goes on from the last save when called again.

    splits: {split on the hub: split here}. If none here is 'val', val_share of the documents is held out.
    tokenizer: an encoding of tiktoken; eot: its end-of-text token follows every document. processes: number
    of processes that tokenise; None = one per core. say: see Writer.finish; None = also no progress bar.
    """
    from tqdm import tqdm  # datasets needs it, too

    for key, value in dict(processes=processes, shard_tokens=shard_tokens).items():
        check(value is None or value >= 1, key, value, 'at least 1')
    bpe = Tiktoken(tokenizer)
    encode = functools.partial(encode_document, tokenizer, [bpe.eot_token] if eot else [])
    writer = Writer(folder, bpe, documents.source, shard_tokens)
    done = dict(writer.done or {})  # documents written so far, by split on the hub
    if 'val' in splits.values():
        val_share = 0
    with get_context('spawn').Pool(processes or os.cpu_count()) as pool:
        for hub_split, our_split in splits.items():
            first = done.setdefault(hub_split, 0)
            texts, total = documents.read(hub_split, first)
            with tqdm(desc=hub_split, initial=first, total=total, unit=' documents', disable=not say) as bar:
                for group in encode_in_groups(pool, encode, texts):
                    for ids in group:
                        held_out = hash_fraction(str(done[hub_split])) < val_share
                        writer.add('val' if held_out else our_split, ids)
                        done[hub_split] += 1
                    writer.save(dict(done))
                    bar.update(done[hub_split] - bar.n)
    if 'val' not in writer.state['splits']:
        raise UserError(f'no document was held out for validation: take more than {sum(done.values())}')
    writer.finish(say)


def encode_in_groups(pool, encode, texts):
    """Yields the ids of the texts in groups, each an iterator: the pool does not run ahead of the group."""
    while group := list(islice(texts, DOCUMENTS_PER_SAVE)):
        yield pool.imap(encode, group, chunksize=32)


def encode_document(name, end, text):
    """Returns the ids of a text in an encoding of tiktoken, and those of `end` after them."""
    import tiktoken

    return tiktoken.get_encoding(name).encode_ordinary(text) + end  # a process loads the encoding once
