"""
Reads the description of nanoGPT's data folders, which have a meta.pkl or nothing beside their token files.
"""

import pickle

from nanoloop.checks import UserError

# the functions and classes that plain values need: numbers of numpy, bytes in old protocols, ordered dicts
HARMLESS = {('_codecs', 'encode'), ('collections', 'OrderedDict'), ('numpy', 'dtype')}
HARMLESS |= {('numpy.core.multiarray', 'scalar'), ('numpy._core.multiarray', 'scalar')}

# what reading a pickle that is broken, or has something else in it, raises
FAULTS = (pickle.UnpicklingError, LookupError, TypeError, ValueError, AttributeError, EOFError)


class Unread:
    """Stands in a pickle's value for an object of a class or of a function that is not HARMLESS."""

    def __init__(self, *args, **kwargs):
        pass

    def ignore(self, *args):
        pass

    __setstate__ = __setitem__ = append = extend = add = ignore


class PlainUnpickler(pickle.Unpickler):
    """Reads the plain values of a pickle, such as nanoGPT's meta.pkl. No code in it is run."""

    def find_class(self, module, name):
        return super().find_class(module, name) if (module, name) in HARMLESS else Unread


def nanogpt_files(folder):
    """Returns the names of nanoGPT's files in a folder, none if meta.json says what is there."""
    if (folder / 'meta.json').exists():
        return []
    names = [name for name in ('meta.pkl', 'train.bin', 'val.bin') if (folder / name).is_file()]
    return names if names != ['meta.pkl'] else []


def nanogpt_meta(folder):
    """Returns the meta of a folder of nanoGPT. Without a meta.pkl its tokens are GPT-2's."""
    meta = dict(dtype='uint16', source='nanoGPT', vocab_size=50257, splits={})
    meta['tokenizer'] = dict(kind='tiktoken', name='gpt2')
    if (folder / 'meta.pkl').exists():
        try:
            with open(folder / 'meta.pkl', 'rb') as file:
                meta['vocab_size'], meta['tokenizer'] = read_vocabulary(PlainUnpickler(file).load())
        except FAULTS as error:
            reason = f'has no vocabulary as nanoGPT writes it ({error})'
            raise UserError(f'{folder}/meta.pkl {reason}: prepare the data again') from None
    for split in ('train', 'val'):
        path = folder / f'{split}.bin'
        if path.exists():
            tokens = path.stat().st_size // 2  # bytes of a uint16
            meta['splits'][split] = dict(tokens=tokens, files=[dict(name=path.name, tokens=tokens)])
    return meta


def read_vocabulary(old):
    """Returns (vocab_size, the spec of the tokenizer) of a meta.pkl's dict.

    nanoGPT reads nothing but vocab_size. Unless itos, {id: symbol} or a list, has texts for the ids, the
    tokenizer is that of ids.
    """
    symbols = old.get('itos')
    if isinstance(symbols, list | tuple):
        symbols = dict(enumerate(symbols))
    symbols = {int(i): symbol for i, symbol in symbols.items()} if isinstance(symbols, dict) else {}
    size = int(old['vocab_size'] if 'vocab_size' in old else max(symbols) + 1)
    if symbols and all(isinstance(symbol, str) for symbol in symbols.values()):
        chars = [symbols.get(i, '\N{REPLACEMENT CHARACTER}') for i in range(min(size, max(symbols) + 1))]
        return size, dict(kind='char', chars=chars)
    return size, dict(kind='ids', size=size)
