"""
Tokenizers that are written here: a token per character, byte or word, and their base class. Need no torch.
"""

import re

from nanoloop.checks import UserError, check

SPECIAL_TEXT = r'<\|\w+\|>'  # how special tokens are written


class Tokenizer:
    """Base class. Subclasses have these methods and attributes:

    encode(text, special=False): the ids of a text; special: special tokens may be written in it
    decode_bytes(ids): the bytes of ids
    spec: the plain dict from which make_tokenizer builds it again
    token_bytes: for every id, the number of bytes that the token stands for; 0 for a special token
    eot_token: the id that ends a document (end of text), a newline for characters and bytes; samples without
        a prompt start from it
    text_errors: the argument `errors` of read_text for text to encode
    special_ids: {text: id} of the special tokens, which encode makes of their texts if it is asked to
    no_special: says that there are none
    note: a line to tell whoever sees a text of this tokenizer; '' = none
    """

    text_errors = 'strict'
    note = ''
    special_ids = {}
    no_special = 'this tokenizer has no special tokens, an empty prompt begins a text'

    def decode(self, ids):
        """Returns the text of ids, a sequence or a tensor (T,). Bytes that are no UTF-8 are replaced."""
        return self.decode_bytes([int(i) for i in ids]).decode('utf-8', 'replace')


class Characters(Tokenizer):
    """One token per character. spec: {'kind': 'char', 'chars': [...]}."""

    def __init__(self, chars):
        self.chars = list(chars)
        self.spec = dict(kind='char', chars=self.chars)
        self.ids = {char: i for i, char in enumerate(self.chars)}
        self.token_bytes = [len(char.encode()) for char in self.chars]
        self.eot_token = self.ids.get('\n', 0)

    def encode(self, text, special=False):
        """Returns the ids of a text. Raises UserError for characters that are not in the vocabulary."""
        unknown = sorted(set(text) - set(self.ids))
        if unknown:
            names = ' '.join(repr(char) for char in unknown[:20])
            hint = f'; {self.no_special}' if special and re.search(SPECIAL_TEXT, text) else ''
            raise UserError(f'characters that the tokenizer does not know: {names}{hint}')
        return [self.ids[char] for char in text]

    def decode_bytes(self, ids):
        """Returns the text of ids as UTF-8; an id past the vocabulary becomes the replacement character."""
        chars = [self.chars[i] if i < len(self.chars) else '\N{REPLACEMENT CHARACTER}' for i in ids]
        return ''.join(chars).encode()


class Bytes(Tokenizer):
    """One token per byte of UTF-8, for any file: other bytes pass as surrogates. spec: {'kind': 'byte'}."""

    spec = {'kind': 'byte'}
    token_bytes = [1] * 256
    eot_token = ord('\n')
    text_errors = 'surrogateescape'

    def encode(self, text, special=False):
        """Returns the bytes of a text as ids."""
        return list(text.encode('utf-8', 'surrogateescape'))

    def decode_bytes(self, ids):
        """Returns ids as bytes; an id past the vocabulary becomes a question mark."""
        return b''.join(bytes([i]) if i < 256 else b'?' for i in ids)


class Numbers(Tokenizer):
    """Tokens of which no text is known: a text is the list of their ids. spec: {'kind': 'ids', 'size': n}."""

    eot_token = 0
    note = 'no text is known for the tokens of this data: they are written as their ids'

    def __init__(self, size):
        self.spec = dict(kind='ids', size=size)
        self.token_bytes = [0] * size

    def encode(self, text, special=False):
        """Returns the ids that a text lists. Raises UserError if there is something else in it."""
        words = text.split()
        ids = [int(word) for word in words if word.isdecimal()]
        fits = len(ids) == len(words) and max(ids, default=0) < len(self.token_bytes)
        check(fits, 'text', text[:40], f'ids below {len(self.token_bytes)}: {self.note}')
        return ids

    def decode_bytes(self, ids):
        """Returns the ids, a blank before each."""
        return b''.join(b' %d' % i for i in ids)


class Words(Tokenizer):
    """One token per word of a list; blanks separate words. spec: {'kind': 'words', 'words': [...]}."""

    def __init__(self, words):
        self.words = list(words)
        self.spec = dict(kind='words', words=self.words)
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.token_bytes = [0] * len(self.words)  # a word is a symbol: there are no bits per byte
        self.eot_token = self.ids.get('<bos>', 0)

    def encode(self, text, special=False):
        """Returns the ids of a text's words. Raises UserError for words that are not in the vocabulary."""
        words = text.split()
        if unknown := [word for word in dict.fromkeys(words) if word not in self.ids]:
            names, known = (' '.join(part) for part in (unknown[:20], self.words[:60]))
            raise UserError(f'words that the tokenizer does not know: {names}; it knows {known}')
        return [self.ids[word] for word in words]

    def decode_bytes(self, ids):
        """Returns the words of ids, a blank before each; an id past the list becomes a question mark."""
        return ''.join(f' {self.words[i]}' if i < len(self.words) else ' ?' for i in ids).encode()
