"""
Tokenizers: text to token ids and back, each rebuilt from the plain dict that meta.json and checkpoints hold.
"""

from pathlib import Path

from nanoloop.checks import UserError


def read_text(path, errors='strict'):
    """The text of a UTF-8 file, its line ends kept. Raises ValueError if it is not UTF-8 or not there."""
    try:
        return Path(path).read_bytes().decode('utf-8', errors)
    except OSError as error:
        raise UserError(f'{str(path)!r} cannot be read: {error.strerror}') from None
    except UnicodeDecodeError as error:
        where = f'{error.reason} at byte {error.start}'
        raise UserError(f'{path} is not UTF-8 ({where}); only prepare.py --tokenizer=byte takes it') from None


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
            raise UserError(
                f'characters that the tokenizer does not know: {" ".join(map(repr, unknown[:20]))}'
            )
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
            raise UserError(f'the {name} tokenizer needs tiktoken: pip install tiktoken') from None
        try:
            self.bpe = tiktoken.get_encoding(name)
        except OSError as error:
            offline = f'without a network, TIKTOKEN_CACHE_DIR=FOLDER names a copy of its files ({error})'
            raise UserError(f'the {name} tokenizer cannot be downloaded; {offline}') from None
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
