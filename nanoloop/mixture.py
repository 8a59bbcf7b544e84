"""
Mixtures of conversations for supervised fine-tuning: what is in them, what is held out, and their rows in a
data set. Needs no torch.
"""

import json
from collections import Counter
from collections.abc import Sequence

import numpy as np

from nanoloop.checks import UserError
from nanoloop.conversation import render
from nanoloop.packing import pack
from nanoloop.text_files import hash_fraction

SEED = 42  # of the order of a mixture
TOLD_EVERY = 50_000  # conversations between two lines on the progress
TOO_LONG, NO_ANSWER = 'longer than a row', 'without an answer'


class Part(Sequence):
    """Conversations of one kind in a mixture.

    source: a sequence of dicts with `messages`, as tasks and data sets of the hub are. numbers: which of them
    the part has, in its order; a number may be there more than once.
    """

    def __init__(self, name, source, numbers):
        self.name, self.source, self.numbers = name, source, np.asarray(numbers, np.int64)

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        return self.source[int(self.numbers[i])]['messages']

    def choose(self, numbers):
        """Returns the part with other numbers of the same source."""
        return Part(self.name, self.source, numbers)


def take(name, source, count):
    """Returns the Part with a source's first `count` conversations, or with all in turns if it has fewer."""
    return Part(name, source, np.resize(np.arange(len(source)), count))


def hold_out(parts, share):
    """Returns parts for training and parts for validation, [Part] each.

    About a share of the different conversations of every part is held out, at least one unless there is no
    other. They are chosen by their content: equal ones, also of two parts, are held out together. The parts
    for validation have each of them once.
    """
    hashes, held = [], set()  # hashes: of each part, {number: hash}
    for part in parts:
        numbers = np.unique(part.numbers).tolist()
        hashes.append({n: hash_fraction(json.dumps(part.source[n]['messages'])) for n in numbers})
        distinct = sorted(set(hashes[-1].values()))
        held.update(distinct[: min(len(distinct) - 1, max(1, round(share * len(distinct))))])
    train, val, seen = [], [], set()
    for part, hash_of in zip(parts, hashes, strict=True):
        train.append(part.choose([n for n in part.numbers.tolist() if hash_of[n] not in held]))
        new = {hash_of[n]: n for n in reversed(hash_of) if hash_of[n] in held and hash_of[n] not in seen}
        val.append(part.choose(sorted(new.values())))
        seen |= new.keys()
    return train, val


def describe(parts):
    """Returns the words for the sizes of parts."""
    return ', '.join(f'{len(part):,} of {part.name}' for part in parts if len(part)) or 'none'


def shuffled(parts):
    """Yields the conversations of all parts in an order that depends on their numbers only."""
    ends = np.cumsum([len(part) for part in parts])
    for number in np.random.default_rng(SEED).permutation(ends[-1] if parts else 0).tolist():
        place = int(np.searchsorted(ends, number, side='right'))
        yield parts[place][number - ends[place]]


def encode(conversations, tokenizer, row_len, all_tokens, left_out):
    """Yields (ids, mask) of those conversations that fit into a row and have tokens that count.

    all_tokens: every token counts, not only the assistant's. left_out: a Counter of the others.
    """
    for messages in conversations:
        ids, mask = render(messages, tokenizer)
        mask = [1] * len(ids) if all_tokens else mask
        if len(ids) > row_len:
            left_out[TOO_LONG] += 1
        elif not any(mask):
            left_out[NO_ANSWER] += 1
        else:
            yield ids, mask


def write_rows(writer, split, parts, row_len, all_tokens=False, say=None):
    """Adds the conversations of parts to a split of a data set, as rows of row_len tokens.

    writer: a prepare.Writer, whose tokenizer has the special tokens. all_tokens: see encode. say: called with
    lines on the progress and on what was left out. Raises UserError if no conversation fits into a row.
    """
    total, left_out, name = sum(map(len, parts)), Counter(), writer.folder.name
    n_rows = n_counting = 0

    def told(conversations):
        for number, messages in enumerate(conversations):
            if say and number and number % TOLD_EVERY == 0:
                say(f'{name}: {number:,} of {total:,} conversations of {split} are tokens')
            yield messages

    encoded = encode(told(shuffled(parts)), writer.tokenizer, row_len, all_tokens, left_out)
    bos = writer.tokenizer.special_ids['<|bos|>']
    for ids, mask in pack(encoded, row_len, bos):
        writer.add(split, ids, mask)
        n_rows, n_counting = n_rows + 1, n_counting + sum(mask)
    why = ', '.join(f'{n:,} {reason}' for reason, n in sorted(left_out.items()))
    if n_rows == 0:
        hint = 'it takes two different ones or more, one of them to validate'
        hint = 'each needs a message of the assistant' if left_out[NO_ANSWER] else hint
        hint = 'a larger --block_size takes longer ones' if left_out[TOO_LONG] else hint
        raise UserError(
            f'{name}: {split} has no conversation of {total:,} (left out: {why or "none"}); {hint}'
        )
    if say:
        taken = total - sum(left_out.values())
        share = n_counting / (n_rows * row_len)
        text = f'{name}: {split} has {taken:,} conversations in {n_rows:,} rows of {row_len:,} tokens, '
        say(f'{text}{share:.0%} of which count; left out: {why or "none"}')
