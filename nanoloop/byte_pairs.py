"""
Byte-pair encodings of the libraries tiktoken and tokenizers. Needs no torch.
"""

import re

from nanoloop.blanks import LINE_ENDS, split_at_blanks
from nanoloop.checks import UserError, check, missing_package
from nanoloop.plain_tokenizers import Tokenizer


class Tiktoken(Tokenizer):
    """A byte-pair encoding of the tiktoken library. spec: {'kind': 'tiktoken', 'name': 'gpt2'}."""

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
        self.special_ids = {
            text: self.bpe.encode_single_token(text) for text in sorted(self.bpe.special_tokens_set)
        }
        special = {*self.special_ids.values()}
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
EOT = '<|endoftext|> <|end_of_text|> </s> <eos> <|eos|> <|im_end|> [EOS] [SEP] <|bos|>'.split()


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
        self.special_ids = {token.content: i for i, token in sorted(added.items()) if token.special}
        special = {*self.special_ids.values()}
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
