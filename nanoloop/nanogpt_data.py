"""
Reads the description of nanoGPT's data folders, which have a meta.pkl or nothing beside their token files.
"""

import pickle

from nanoloop.checks import UserError


class PlainUnpickler(pickle.Unpickler):
    """Reads pickles of plain values, as nanoGPT's meta.pkl; refuses one that names a class or a function."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'{module}.{name} is not a plain value')


def nanogpt_meta(folder):
    """Returns the meta of a folder of nanoGPT. Without a meta.pkl its tokens are GPT-2's."""
    meta = dict(dtype='uint16', source='nanoGPT', vocab_size=50257, splits={})
    meta['tokenizer'] = dict(kind='tiktoken', name='gpt2')
    if (folder / 'meta.pkl').exists():
        try:
            with open(folder / 'meta.pkl', 'rb') as file:
                old = PlainUnpickler(file).load()
            chars = [old['itos'][i] for i in range(old['vocab_size'])]
        except (pickle.UnpicklingError, KeyError, TypeError, EOFError) as error:
            raise UserError(
                f'{folder}/meta.pkl is not what nanoGPT writes ({error}): prepare the data again'
            ) from None
        meta.update(tokenizer=dict(kind='char', chars=chars), vocab_size=len(chars))
    for split in ('train', 'val'):
        path = folder / f'{split}.bin'
        if path.exists():
            tokens = path.stat().st_size // 2  # bytes of a uint16
            meta['splits'][split] = dict(tokens=tokens, files=[dict(name=path.name, tokens=tokens)])
    return meta
