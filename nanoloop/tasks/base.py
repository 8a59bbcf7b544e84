"""
What the tasks have in common. Needs no torch.
"""

import functools
import hashlib
import re
from collections.abc import Sequence

from nanoloop.checks import check
from nanoloop.tasks.sources import SPLITS, read_rows


class Task(Sequence):
    """Questions with their answers, as conversations, and a judge of other answers.

    task[i] is a dict. Its `messages` is a conversation of nanoloop/conversation.py, whose last message is the
    reference answer; the rest is what the judge needs. The order of the items is fixed.

    A subclass has these attributes and methods:

    name: its name in TASKS
    kind: 'choice' (an item has `letters`, one of which is its `answer`) or 'text' (an answer is generated)
    baseline: the accuracy of random answers
    tools: whether the calculator is used while an answer is generated
    option: the key that names its data
    source: where its rows are, a Source, unless it makes them
    parse(row, where): what it keeps of a row, plain values; raises UserError for a row that it cannot take
    make_item(kept): the item
    judge(item, answer): whether a text is a right answer
    """

    kind, baseline, tools = 'text', 0.0, False

    def __init__(self, options, split='test'):
        """options: {key: value}, such as gsm8k='train.jsonl'; a key that is missing has the value ''."""
        check(split in SPLITS, 'split', split, ' or '.join(SPLITS))
        self.options, self.split = options, split
        self.rows = self.read()

    def read(self):
        """Returns the rows that __getitem__ makes items of."""
        rows = read_rows(self.source, self.option, self.options.get(self.option) or '', self.split)
        return [self.parse(row, where) for where, row in rows]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.make_item(self.rows[i])

    def reward(self, item, answer):
        """Returns the reward of an answer, for reinforcement learning."""
        return float(self.judge(item, answer))

    @classmethod
    def check_judge(cls, options):
        """Raises Unavailable if these options do not allow to judge, UserError if the machine does not."""

    @functools.cached_property
    def data(self):
        """A short hash of all that decides the items."""
        return hashlib.sha256(repr((self.name, self.rows)).encode()).hexdigest()[:8]


def ask(question, reply, **others):
    """Returns an item: a question, the reference answer (a text or parts), and what the judge needs."""
    messages = [dict(role='user', content=question), dict(role='assistant', content=reply)]
    return dict(messages=messages, **others)


def part(kind, text):
    """Returns a part of an assistant's message: text, python or python_output."""
    return dict(type=kind, text=text)


def take(row, where, *names):
    """Returns the values of a row that must be texts. Raises UserError if one is none."""
    for name in names:
        check(isinstance(row.get(name), str), f'{where}: {name}', row.get(name), 'a text')
    return [row[name] for name in names]


FINAL_NUMBER = re.compile(r'#### (-?[0-9.,]+)')


def final_number(text):
    """Returns the number after #### in a text, without commas, as a text; None if there is none."""
    found = FINAL_NUMBER.search(text)
    return found[1].replace(',', '') if found else None
