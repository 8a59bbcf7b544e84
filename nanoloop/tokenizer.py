"""
Tokenizers: text to token ids and back.

meta.json and checkpoints hold a tokenizer as a plain dict, its `spec`; make_tokenizer builds it again.
"""

from pathlib import Path

from nanoloop.checks import UserError, check


def read_text(path, errors='strict'):
    """Returns the text of a UTF-8 file, line ends unchanged. Raises UserError if there is none.

    errors: what to do with bytes that are not UTF-8, as in bytes.decode.
    """
    try:
        return Path(path).read_bytes().decode('utf-8', errors)
    except OSError as error:
        raise UserError(f'{str(path)!r} cannot be read: {error.strerror}') from None
    except UnicodeDecodeError as error:
        raise UserError(
            f'{path} is not UTF-8 ({error.reason} at byte {error.start}): '
            'data/text/prepare.py --tokenizer=byte reads any file'
        ) from None


class Tokenizer:
    """Base class. Subclasses have encode(text) -> ids and decode_bytes(ids) -> bytes, and these attributes.

    spec: the plain dict from which make_tokenizer builds it again
    token_bytes: for every id, the number of bytes that the token stands for; 0 for a special token
    eot_token: the id that ends a document (end of text), a newline for characters and bytes; samples without
        a prompt start from it
    text_errors: the argument `errors` of read_text for text to encode
    """

    text_errors = 'strict'


class Characters(Tokenizer):
    """One token per character. spec: {'kind': 'char', 'chars': [...]}."""

    def __init__(self, chars):
        self.chars = list(chars)
        self.spec = dict(kind='char', chars=self.chars)
        self.ids = {char: i for i, char in enumerate(self.chars)}
        self.token_bytes = [len(char.encode()) for char in self.chars]
        self.eot_token = self.ids.get('\n', 0)

    def encode(self, text):
        """Returns the ids of a text. Raises UserError for characters that are not in the vocabulary."""
        unknown = sorted(set(text) - set(self.ids))
        if unknown:
            names = ' '.join(repr(char) for char in unknown[:20])
            raise UserError(f'characters that the tokenizer does not know: {names}')
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

    def encode(self, text):
        """Returns the bytes of a text as ids."""
        return list(text.encode('utf-8', 'surrogateescape'))

    def decode_bytes(self, ids):
        """Returns ids as bytes; an id past the vocabulary becomes a question mark."""
        return b''.join(bytes([i]) if i < 256 else b'?' for i in ids)


class Tiktoken(Tokenizer):
    """A byte-pair encoding of the tiktoken library. spec: {'kind': 'tiktoken', 'name': 'gpt2'}."""

    def __init__(self, name):
        try:
            import tiktoken
        except ImportError:
            raise UserError(f'the {name} tokenizer needs tiktoken: pip install tiktoken') from None
        known = tiktoken.list_encoding_names()
        check(name in known, 'tokenizer', name, f'an encoding of tiktoken: {", ".join(known)}')
        try:
            self.bpe = tiktoken.get_encoding(name)
        except OSError as error:
            raise UserError(
                f'the {name} tokenizer cannot be downloaded ({error}); '
                'without a network, TIKTOKEN_CACHE_DIR=FOLDER names a copy of its files'
            ) from None
        self.spec = dict(kind='tiktoken', name=name)
        self.eot_token = self.bpe.eot_token
        special = {self.bpe.encode_single_token(text) for text in self.bpe.special_tokens_set}
        self.token_bytes = [
            0 if i in special else len(self.bytes_of(i) or b'') for i in range(self.bpe.n_vocab)
        ]

    def bytes_of(self, token):
        """Returns the bytes of a token, or None for an id without one.

        Some encodings have holes, and a model may have more rows than its tokenizer has tokens.
        """
        try:
            return self.bpe.decode_single_token_bytes(token)
        except KeyError:
            return None

    def encode(self, text):
        """Returns the ids of a text. Special tokens may be written in it, as <|endoftext|>."""
        return self.bpe.encode(text, allowed_special='all')

    def decode_bytes(self, ids):
        """Returns the bytes of ids; an id without a token becomes a question mark."""
        return b''.join(self.bytes_of(i) or b'?' for i in ids)


TOKENIZERS = {'char': Characters, 'byte': Bytes, 'tiktoken': Tiktoken}


def make_tokenizer(spec):
    """Builds the tokenizer that a plain dict describes, as meta.json and checkpoints hold it."""
    options = {key: value for key, value in spec.items() if key != 'kind'}
    return TOKENIZERS[spec['kind']](**options)
