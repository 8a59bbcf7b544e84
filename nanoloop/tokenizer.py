"""
Tokenizers: text to token ids and back.

meta.json and checkpoints hold a tokenizer as a plain dict, its `spec`; make_tokenizer builds it again.
A string such as <|endoftext|> in a text is ordinary text. encode(text, special=True) makes the special token
of it, which sample.py does for a prompt, as nanoGPT, and prepare.py if --special_tokens is given.
"""

import codecs
import json
import re
from pathlib import Path

from nanoloop.blanks import LINE_ENDS, split_at_blanks
from nanoloop.checks import UserError, check, missing_package

# byte order marks: the encoding of a file that begins with one; UTF-32's begins with UTF-16's
ENCODINGS = {
    codecs.BOM_UTF8: 'utf-8-sig',
    codecs.BOM_UTF32_LE: 'utf-32',
    codecs.BOM_UTF32_BE: 'utf-32',
    codecs.BOM_UTF16_LE: 'utf-16',
    codecs.BOM_UTF16_BE: 'utf-16',
}


def text_encoding(start):
    """Returns the encoding of a file from its first bytes: UTF-8 unless a byte order mark tells another."""
    return next((name for mark, name in ENCODINGS.items() if start.startswith(mark)), 'utf-8')


def read_text(path, errors='strict'):
    """Returns the text of a file without its byte order mark, line ends unchanged.

    errors: what to do with bytes that are not in the file's encoding (see text_encoding), as in bytes.decode.
    Raises UserError if the file cannot be read.
    """
    try:
        content = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f'{str(path)!r} cannot be read: {error.strerror}') from None
    encoding = text_encoding(content)
    try:
        return content.decode(encoding, errors)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix('-sig').upper()
        raise UserError(
            f'{path} is not {name} ({error.reason} at byte {error.start}): '
            'save it as UTF-8; data/text/prepare.py --tokenizer=byte reads any file without a byte order mark'
        ) from None


SPECIAL = r'<\|\w+\|>'  # how special tokens are written


class Tokenizer:
    """Base class. Subclasses have these methods and attributes:

    encode(text, special=False): the ids of a text; special: special tokens may be written in it
    decode_bytes(ids): the bytes of ids
    spec: the plain dict from which make_tokenizer builds it again
    token_bytes: for every id, the number of bytes that the token stands for; 0 for a special token
    eot_token: the id that ends a document (end of text), a newline for characters and bytes; samples without
        a prompt start from it
    text_errors: the argument `errors` of read_text for text to encode
    has_special: a text can have special tokens in it; no_special: says that it cannot
    note: a line to tell whoever sees a text of this tokenizer; '' = none
    """

    text_errors = 'strict'
    note = ''
    has_special = False
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
            hint = f'; {self.no_special}' if special and re.search(SPECIAL, text) else ''
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


# -----------------------------------------------------------------------------
# byte-pair encodings of the libraries tiktoken and tokenizers


class Tiktoken(Tokenizer):
    """A byte-pair encoding of the tiktoken library. spec: {'kind': 'tiktoken', 'name': 'gpt2'}."""

    has_special = True

    def __init__(self, name):
        try:
            import tiktoken
        except ImportError:
            raise missing_package(f'the {name} tokenizer', 'data', 'tiktoken') from None
        known = tiktoken.list_encoding_names()
        encodings = f'byte, char, FILE.json or an encoding of tiktoken: {", ".join(known)}'
        check(name in known, 'tokenizer', name, encodings)
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

    def encode(self, text, special=False):
        """Returns the ids of a text. Raises UserError if tiktoken cannot encode it.

        special: special tokens may be written in it, as <|endoftext|>.
        """
        ids = []
        for part in split_at_blanks(text, LINE_ENDS.get(self.bpe.name)):
            try:
                if special:
                    ids += self.bpe.encode(part, allowed_special='all')
                else:
                    ids += self.bpe.encode_ordinary(part)
            except BaseException as error:  # an error in Rust is a PanicException, which is no Exception
                if not isinstance(error, ValueError) and type(error).__name__ != 'PanicException':
                    raise
                raise UserError(
                    f'tiktoken cannot encode a text of {len(text):,} characters that begins with '
                    f'{text[:20]!r}, a long run of blanks or line ends in it is more than it can take'
                ) from None
        return ids

    def decode_bytes(self, ids):
        """Returns the bytes of ids; an id without a token becomes a question mark."""
        return b''.join(self.bytes_of(i) or b'?' for i in ids)


# names of the special token that ends a document, in the tokenizer.json of others
EOT = ('<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>', '<|eos|>', '<|im_end|>', '[EOS]', '[SEP]')


def byte_level_alphabet():
    """Returns {character: its byte, as bytes} of byte-level BPE: GPT-2's printable stand-in for every byte.

    A printable byte stands for itself, the others have the characters from 256 on, in their order.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins = [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]
    return {char: bytes([byte]) for char, byte in zip(stand_ins, printable + others, strict=True)}


class HuggingFace(Tokenizer):
    """A tokenizer.json of the tokenizers library: byte-level BPE, or SentencePiece with its sign for a blank.

    spec: {'kind': 'tokenizers', 'json': the text of the file}. A checkpoint so holds all of it; the library
    reads it without running code in it.
    """

    ALPHABET = byte_level_alphabet()
    BYTE = re.compile('<0x([0-9A-F]{2})>')  # SentencePiece's token of a single byte

    has_special = True

    def __init__(self, json):
        try:
            import tokenizers
        except ImportError:
            raise missing_package('a tokenizer.json', 'data', 'tokenizers') from None
        try:
            self.bpe = tokenizers.Tokenizer.from_str(json)
        except Exception as error:  # the library raises no other class
            raise UserError(f'tokenizer.json cannot be read: {error}') from None
        self.spec = dict(kind='tokenizers', json=json)
        self.bpe.no_truncation()
        self.bpe.no_padding()
        added = self.bpe.get_added_tokens_decoder()  # {id: AddedToken}, in none of the alphabets
        self.byte_level = '"ByteLevel"' in json
        known = self.byte_level or '\u2581' in json or '\\u2581' in json
        check(known, 'tokenizer', 'tokenizer.json', 'a byte-level or SentencePiece tokenizer')
        vocabulary = self.bpe.get_vocab()
        self.tokens = {i: self.bytes_of(token) for token, i in vocabulary.items() if i not in added}
        self.tokens |= {i: token.content.encode() for i, token in added.items()}
        special = {i for i, token in added.items() if token.special}
        self.token_bytes = [
            0 if i in special else len(self.tokens.get(i, b'')) for i in range(max(self.tokens) + 1)
        ]
        ends = [vocabulary[name] for name in EOT if name in vocabulary]
        self.eot_token = next(iter(ends + sorted(special) + self.encode('\n')[-1:]), 0)

    def bytes_of(self, token):
        """Returns the bytes of a token of the vocabulary, given by its name there."""
        if self.byte_level:
            return b''.join(self.ALPHABET.get(char, char.encode()) for char in token)
        if byte := self.BYTE.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return token.replace('\u2581', ' ').encode()

    def encode(self, text, special=False):
        """Returns the ids of a text. special: special tokens may be written in it, as <|endoftext|>."""
        self.bpe.encode_special_tokens = not special
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode_bytes(self, ids):
        """Returns the bytes of ids; an id without a token becomes a question mark."""
        return b''.join(self.tokens.get(i, b'?') for i in ids)


# -----------------------------------------------------------------------------
# from a spec, a file or a name to a tokenizer

TOKENIZERS = {'char': Characters, 'byte': Bytes, 'ids': Numbers, 'words': Words}
TOKENIZERS |= {'tiktoken': Tiktoken, 'tokenizers': HuggingFace}


def make_tokenizer(spec):
    """Builds the tokenizer that a plain dict describes, as meta.json and checkpoints hold it."""
    options = {key: value for key, value in spec.items() if key != 'kind'}
    kind = spec['kind']
    check(kind in TOKENIZERS, 'tokenizer', kind, f'one of the kinds {", ".join(TOKENIZERS)}')
    return TOKENIZERS[kind](**options)


def tokenizer_file(path):
    """Returns the spec of a tokenizer.json. Raises UserError if it is none."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f'{path} is no tokenizer.json: {error}') from None
    known = isinstance(content, dict) and 'model' in content
    check(known, 'tokenizer', str(path), 'a tokenizer.json of the tokenizers library, it has no model')
    return dict(kind='tokenizers', json=json.dumps(content, ensure_ascii=False, separators=(',', ':')))


def choose_tokenizer(name, texts):
    """Returns the tokenizer that a flag names: byte, char, an encoding of tiktoken or a FILE.json.

    texts: a function that yields the texts, for the characters of char.
    """
    if name == 'byte':
        return Bytes()
    if name == 'char':
        return Characters(sorted(set('\n').union(*texts())))
    if name.endswith('.json'):
        return make_tokenizer(tokenizer_file(name))
    return Tiktoken(name)
