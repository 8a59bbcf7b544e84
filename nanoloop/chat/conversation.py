"""
From the turns of a chat to the ids of a prompt that fits in view.

A chat model gets the special tokens of nanoloop/conversation.py around every turn. A base model gets the bare
texts, one after the other, and continues the last. In both the ids of an earlier answer are those that the
model wrote, where they are given: text that is encoded anew can give others, which the KV cache has not.

A prompt that leaves no room in view for an answer loses its oldest turns, a question with its answer at a
time. The system's text stays. It stands in front of the oldest question that is left.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from nanoloop.checks import UserError
from nanoloop.conversation import render_turn, special_id, take_turns
from nanoloop.tool_use import make_calculator

KINDS = dict(python_start='python', python_end='text', output_start='python_output', output_end='text')


class Turn(NamedTuple):
    """A question (role user) or an answer (role assistant)."""

    role: str
    content: object  # a text, or a list of parts, see nanoloop/conversation.py
    ids: list | None = None  # of an answer that the model wrote itself; None: the content is encoded


class ChatFormat:
    """How a chat model reads a conversation. Raises UserError for a tokenizer without the special tokens."""

    name = 'chat'

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.first, self.answer_start, self.answer_end = (
            [special_id(tokenizer, name)] for name in ('bos', 'assistant_start', 'assistant_end')
        )
        # token: the kind of the text behind it
        self.kinds = {special_id(tokenizer, name): kind for name, kind in KINDS.items()}
        self.stop = frozenset(tokenizer.special_ids.values()) - self.kinds.keys()  # each ends an answer
        self.closing = {
            special_id(tokenizer, f'{name}_start'): special_id(tokenizer, f'{name}_end')
            for name in ('python', 'output')
        }
        self.tool = make_calculator(tokenizer)

    def question(self, text, system):
        """Returns the ids of a question, with the system's text in front of it, if there is one."""
        return render_turn('user', f'{system}\n\n{text}' if system else text, self.tokenizer)[0]

    def answer(self, turn):
        """Returns the ids of an earlier answer. One that was stopped is ended, and a call in it closed."""
        if turn.ids is None:
            return render_turn('assistant', turn.content, self.tokenizer)[0]
        ids = turn.ids[:-1] if turn.ids and turn.ids[-1] in self.stop else turn.ids
        newest = next((token for token in reversed(ids) if token in self.kinds), None)
        closing = [self.closing[newest]] if newest in self.closing else []
        return [*self.answer_start, *ids, *closing, *self.answer_end]


class TextFormat:
    """How a base model reads a conversation: as a text."""

    name = 'text'

    def __init__(self, tokenizer):
        self.tokenizer, self.tool, self.kinds = tokenizer, None, {}
        self.first, self.answer_start = [], []
        self.stop = frozenset(tokenizer.special_ids.values())

    def question(self, text, system):
        """Returns the ids of the user's text, with the system's text in front of it."""
        return self.tokenizer.encode(system + text)

    def answer(self, turn):
        """Returns the ids of an earlier answer, without the token that ended it."""
        if turn.ids is None:
            return self.tokenizer.encode(text_of(turn.content))
        return [token for token in turn.ids if token not in self.stop]


def choose_format(tokenizer, text):
    """Returns the format of a model's conversations. text: take the bare text, whatever the tokenizer has."""
    if not text and '<|assistant_start|>' in tokenizer.special_ids:
        return ChatFormat(tokenizer)
    return TextFormat(tokenizer)


def text_of(content):
    """Returns the text of a message's content, without calls of the calculator and their results."""
    if isinstance(content, str):
        return content
    return ''.join(part['text'] for part in content if part['type'] == 'text')


@dataclass
class Conversation:
    """A system's text and turns, of which the last one is a question when it is to be answered."""

    system: str | None = ''  # None: it has none, and another may be put in its place
    turns: list = field(default_factory=list)  # of Turns, user and assistant in turns

    @classmethod
    def of_messages(cls, messages):
        """Returns the Conversation of messages, see nanoloop/conversation.py. Raises UserError as render."""
        take_turns(messages)
        leads = messages[0]['role'] == 'system'
        turns = [
            Turn(message['role'], message['content'], message.get('tokens')) for message in messages[leads:]
        ]
        return cls(messages[0]['content'] if leads else None, turns)

    def messages(self):
        """Returns the conversation as messages."""
        system = [dict(role='system', content=self.system)] if self.system else []
        return system + [dict(role=turn.role, content=turn.content) for turn in self.turns]

    def prompt(self, form, block_size, room):
        """Returns the ids up to where the answer begins, and how many of the oldest turns are left out.

        form: a ChatFormat or TextFormat. room: number of tokens in view that are kept free for the answer; a
        longer answer moves the beginning out of view. Raises UserError if the last question is too long.
        """
        limit = block_size - room
        rendered = [
            form.answer(turn) if turn.role == 'assistant' else form.question(turn.content, '')
            for turn in self.turns
        ]
        behind = len(form.first) + len(form.answer_start) + sum(map(len, rendered))
        for n_dropped in range(0, len(self.turns), 2):
            if behind <= limit:
                start = form.question(self.turns[n_dropped].content, self.system or '')
                rest = [token for ids in rendered[n_dropped + 1 :] for token in ids]
                ids = [*form.first, *start, *rest, *form.answer_start] or [form.tokenizer.eot_token]
                if len(ids) <= limit:
                    return ids, n_dropped
            behind -= sum(map(len, rendered[n_dropped : n_dropped + 2]))
        question = form.question(self.turns[-1].content, self.system or '')
        n = len(form.first) + len(question) + len(form.answer_start)
        system = ' with the system text' if self.system else ''
        raise UserError(
            f'the message{system} has {n:,} tokens, expected at most {limit:,}: the model sees '
            f'{block_size:,}, of which {room:,} are kept for the answer'
        )
