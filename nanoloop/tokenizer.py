"""
Tokenizers: text to token ids and back.

meta.json and checkpoints hold a tokenizer as a plain dict, its `spec`; make_tokenizer builds it again.
A string such as <|endoftext|> in a text is ordinary text. encode(text, special=True) makes the special token
of it, which sample.py does for a prompt, as nanoGPT, and prepare.py if --special_tokens is given.
"""

import codecs
import json
from pathlib import Path

from nanoloop.added_tokens import Added
from nanoloop.byte_pairs import HuggingFace, Tiktoken
from nanoloop.checks import UserError, check
from nanoloop.plain_tokenizers import Bytes, Characters, Numbers, Words

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


# -----------------------------------------------------------------------------
# from a spec, a file or a name to a tokenizer

TOKENIZERS = {'char': Characters, 'byte': Bytes, 'ids': Numbers, 'words': Words}
TOKENIZERS |= {'tiktoken': Tiktoken, 'tokenizers': HuggingFace}
TOKENIZERS |= {'added': lambda base, special: Added(make_tokenizer(base), special)}


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
