"""
Conversations as tokens: the same for training, prompts, evaluation and chat. Needs no torch.

A conversation is a list of messages {'role': 'system', 'user' or 'assistant', 'content': a text}. The content
of an assistant's message may also be a list of parts {'type': ..., 'text': ...}: text, python (an expression
for the calculator) or python_output (its result).

    <|bos|><|user_start|>Hello<|user_end|><|assistant_start|>Hi!<|assistant_end|>
"""

import reprlib
from pathlib import Path

from nanoloop.checks import UserError, check
from nanoloop.tables import read_json_lines, read_table

ROLES = 'user', 'assistant'  # in turns; a system message may come first
# part of an assistant's message: (the name of the tokens around it, whether it counts as a target)
PARTS = {'text': (None, 1), 'python': ('python', 1), 'python_output': ('output', 0)}


def render(messages, tokenizer):
    """Returns the ids and the mask of a conversation, two lists of one length.

    The mask is 1 for the tokens that an assistant writes: its texts, its calls of the calculator and the
    token that ends its message. It is 0 for all others, the results of the calculator among them. A special
    token that is written in a message is ordinary text. Raises UserError for roles that do not take turns, an
    unknown role or part, and a tokenizer without the special tokens.
    """
    ids, mask = [special_id(tokenizer, 'bos')], [0]
    for role, content in take_turns(messages):
        turn_ids, turn_mask = render_turn(role, content, tokenizer)
        ids += turn_ids
        mask += turn_mask
    return ids, mask


def render_turn(role, content, tokenizer):
    """Returns the ids and the mask of the message of a user or an assistant, see render."""
    start, end = (special_id(tokenizer, f'{role}_{edge}') for edge in ('start', 'end'))
    ids, mask, writes = [start], [0], int(role == 'assistant')
    for kind, text in parts_of(content):
        name, counts = PARTS[kind]
        edges = [[special_id(tokenizer, f'{name}_{edge}')] for edge in ('start', 'end')] if name else []
        first, last = edges or ([], [])
        tokens = first + tokenizer.encode(text) + last
        ids += tokens
        mask += [counts * writes] * len(tokens)
    return [*ids, end], [*mask, writes]


def render_prompt(messages, tokenizer):
    """Returns the ids of a conversation up to where an assistant's answer begins.

    An answer that the conversation ends with is left out. Raises UserError as render, and if there is no
    message of a user.
    """
    turns = take_turns(messages)
    answered = bool(turns) and turns[-1][0] == 'assistant'
    ids, _ = render(messages[:-1] if answered else messages, tokenizer)
    return [*ids, special_id(tokenizer, 'assistant_start')]


def special_id(tokenizer, name):
    """Returns the id of a special token. Raises UserError if the tokenizer does not have it."""
    text = f'<|{name}|>'
    if text not in tokenizer.special_ids:
        kind = tokenizer.spec['kind']
        raise UserError(
            f'this tokenizer (of kind {kind}) has no token {text} for conversations: data/sft/prepare.py '
            'adds the missing ones to any tokenizer, and a model that was trained on its data set has them'
        )
    return tokenizer.special_ids[text]


def expect(holds, key, got, expected):
    """Is checks.check for a value that may be a long one."""
    if not holds:
        raise UserError(f'{key}={reprlib.repr(got)}, expected {expected}')


def take_turns(messages):
    """Returns [(role, content)] of a conversation. A system message joins the user's after it.

    Raises UserError unless user and assistant take turns, the user first, with contents that can be rendered.
    """
    form = 'a list of messages {"role": ..., "content": ...}'
    expect(isinstance(messages, list | tuple) and len(messages), 'conversation', messages, form)
    turns, system = [], ''
    for number, message in enumerate(messages, 1):
        expect(isinstance(message, dict), f'message {number}', message, '{"role": ..., "content": ...}')
        role, content, due = message.get('role'), message.get('content'), ROLES[len(turns) % 2]
        leads = role == 'system' and number == 1
        expected = f'{due}, as user and assistant take turns after a system message or none'
        expect(leads or role == due, f'message {number}: role', role, expected)
        check_content(content, role, f'message {number}: content')
        if leads:
            system = f'{content}\n\n'
        else:
            turns.append((role, f'{system}{content}' if system else content))
            system = ''
    expect(turns, 'conversation', messages, 'a message of a user')
    return turns


def check_content(content, role, key):
    """Raises UserError unless a message of this role may have this content."""
    if isinstance(content, str):
        return
    expect(role == 'assistant', key, content, f'a text in a message of role {role}')
    expect(isinstance(content, list | tuple), key, content, 'a text or a list of parts')
    for part in content:
        form = '{"type": ..., "text": ...} in a list of parts'
        expect(isinstance(part, dict) and isinstance(part.get('text'), str), key, part, form)
        known = isinstance(part.get('type'), str) and part['type'] in PARTS
        expect(known, f'{key}: type', part.get('type'), f'one of {", ".join(PARTS)}')


def parts_of(content):
    """Returns [(type, text)] of a message's content."""
    return (
        [('text', content)]
        if isinstance(content, str)
        else [(part['type'], part['text']) for part in content]
    )


def read_conversations(path):
    """Returns the conversations of a file, .jsonl or .parquet.

    A line is the list of messages or {"messages": the list}, with any other keys. Raises UserError, with file
    and line, for anything else.
    """
    path, conversations = Path(path).expanduser(), []
    jsonl = path.suffix == '.jsonl'
    rows = read_json_lines(path) if jsonl else enumerate(read_table(path, 'chat'), 1)
    for number, row in rows:
        messages = row.get('messages') if isinstance(row, dict) else row
        try:
            take_turns(messages)
        except UserError as error:
            raise UserError(f'{path}, {"line" if jsonl else "row"} {number}: {error}') from None
        conversations.append(messages)
    check(conversations, 'chat', str(path), 'a file with conversations, it has none')
    return conversations
