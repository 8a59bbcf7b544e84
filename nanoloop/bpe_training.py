"""
Trains a byte-level byte-pair encoding with the library tokenizers, and measures how well one compresses.
Needs no torch.
"""

import os

from nanoloop.added_tokens import SPECIAL
from nanoloop.checks import check, missing_package
from nanoloop.prepare import PIECE_CHARS, split_text

TRAINED_CHARS = 2**16  # handed to the library at a time, so that all cores have some

# how a text is split before bytes are merged: GPT-4's rules (cl100k_base), but two digits at most
SPLIT = '|'.join(
    [
        r"'(?i:[sdmt]|ll|ve|re)",  # the end of it's, I'll
        r'[^\r\n\p{L}\p{N}]?+\p{L}+',  # a word, with the blank or sign before it
        r'\p{N}{1,2}',  # digits
        r' ?[^\s\p{L}\p{N}]++[\r\n]*',  # signs, with the line ends behind them
        r'\s*[\r\n]',  # line ends, with the blanks before them
        r'\s+(?!\S)',  # blanks, but the last one before a word
        r'\s+',
    ]
)


class Excerpt:
    """The parts of texts that a tokenizer is trained on, and how many characters and texts they are.

    doc_cap: characters of each text. max_chars: characters in all. None = no limit.
    """

    def __init__(self, texts, doc_cap=None, max_chars=None):
        self.texts, self.doc_cap, self.max_chars = texts, doc_cap, max_chars
        self.chars = self.count = 0

    def __iter__(self):
        """Yields pieces of the texts: each ends with a line, if it can."""
        for text in self.texts:
            room = None if self.max_chars is None else self.max_chars - self.chars
            text = text[: self.doc_cap][:room]
            self.chars, self.count = self.chars + len(text), self.count + 1
            yield from split_text(text, TRAINED_CHARS)
            if self.chars == self.max_chars:
                return


def train_tokenizer(texts, vocab_size):
    """Returns a byte-level BPE, a tokenizers.Tokenizer, that was trained on an iterable of texts.

    It has all bytes and SPECIAL, the first ids. A pair that occurs once is not merged, so a short text makes
    fewer than vocab_size tokens. The same texts make the same tokenizer. Raises UserError for a vocab_size
    without room for the bytes.
    """
    check_vocab_size(vocab_size)
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise missing_package('a tokenizer of your own', 'data', 'tokenizers') from None
    tokenizer = Tokenizer(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), 'isolated'), to_bytes]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def check_vocab_size(vocab_size):
    """Raises UserError unless the bytes and the special tokens have room."""
    least = 256 + len(SPECIAL)
    expected = f'at least {least}: the bytes and {len(SPECIAL)} special tokens'
    check(vocab_size >= least, 'vocab_size', vocab_size, expected)


def round_trip(tokenizer, text):
    """Returns the number of tokens of a text, and '' or what is not the text again.

    The tokens are those that data/text/prepare.py writes. Raises UserError for a text without tokens.
    """
    n_tokens, fault = 0, ''
    for piece in split_text(text, PIECE_CHARS):
        ids = tokenizer.encode(piece)
        n_tokens += len(ids)
        again = tokenizer.decode_bytes(ids).decode('utf-8', 'replace')
        if again != piece and not fault:
            at = len(os.path.commonprefix([piece, again]))
            fault = f'{piece[at : at + 20]!r} becomes {again[at : at + 20]!r}'
    return n_tokens, fault
