"""
Special tokens that are added to a tokenizer, behind its own: those of conversations. Needs no torch.

    tokenizer = chat_tokenizer(make_tokenizer(dict(kind='tiktoken', name='gpt2')))
    tokenizer.special_ids['<|bos|>']  # 50257

A checkpoint of the old tokenizer is continued with the new one: nanoloop/growth.py adds rows for the tokens.
"""

import re

from nanoloop.checks import check
from nanoloop.plain_tokenizers import Tokenizer

# of a conversation, see nanoloop/conversation.py; <|bos|> begins every document
SPECIAL = (
    '<|bos|>',
    '<|user_start|>',
    '<|user_end|>',
    '<|assistant_start|>',
    '<|assistant_end|>',
    '<|python_start|>',
    '<|python_end|>',
    '<|output_start|>',
    '<|output_end|>',
)


def chat_tokenizer(tokenizer):
    """Returns a tokenizer with all of SPECIAL: `tokenizer` itself, or it with the missing ones added."""
    missing = [text for text in SPECIAL if text not in tokenizer.special_ids]
    if missing and isinstance(tokenizer, Added):
        return Added(tokenizer.base, [*tokenizer.special, *missing])
    return Added(tokenizer, missing) if missing else tokenizer


def split_spec(spec):
    """Returns the spec of the tokenizer that nothing was added to, and the texts that were added to it."""
    texts = []
    while spec['kind'] == 'added':
        spec, texts = spec['base'], [*spec['special'], *texts]
    return spec, texts


def extends(new, old):
    """Returns whether the ids of the tokenizer `old` mean the same in `new`; both are specs."""
    (new_base, new_texts), (old_base, old_texts) = split_spec(new), split_spec(old)
    return new_base == old_base and new_texts[: len(old_texts)] == old_texts


class Added(Tokenizer):
    """A tokenizer with special tokens behind its own ids, in the order of `special`.

    spec: {'kind': 'added', 'base': the other's spec, 'special': [their texts]}.
    """

    def __init__(self, base, special):
        self.base, self.special = base, list(special)
        self.spec = dict(kind='added', base=base.spec, special=self.special)
        texts = bool(self.special) and all(isinstance(text, str) and text for text in self.special)
        new = texts and len({*base.special_ids, *self.special}) == len(base.special_ids) + len(self.special)
        check(new, 'special', self.special, 'texts, none of them twice or a special token already')
        self.size = len(base.token_bytes)  # the first added id
        self.special_ids = base.special_ids | {text: self.size + i for i, text in enumerate(self.special)}
        self.token_bytes = base.token_bytes + [0] * len(self.special)
        self.eot_token = self.special_ids.get(SPECIAL[0], base.eot_token)
        self.text_errors, self.note = base.text_errors, base.note
        longest_first = sorted(self.special, key=len, reverse=True)
        self.added = re.compile(f'({"|".join(map(re.escape, longest_first))})')

    def encode(self, text, special=False):
        """Returns the ids of a text. special: special tokens may be written in it, as <|user_start|>."""
        if not special:
            return self.base.encode(text)
        ids, of_base = [], bool(self.base.special_ids)
        for i, part in enumerate(self.added.split(text)):  # the odd ones are added tokens
            ids += [self.special_ids[part]] if i % 2 else self.base.encode(part, special=of_base)
        return ids

    def decode_bytes(self, ids):
        """Returns the bytes of ids: an added token is written as its text."""
        added = range(self.size, len(self.token_bytes))
        return b''.join(
            self.special[i - self.size].encode() if i in added else self.base.decode_bytes([i]) for i in ids
        )
