"""
The chat in a terminal: turns, their answers, and the commands that begin with a slash.

To add a command, add an entry to COMMANDS: /help, the dispatch and the tests take it up.
"""

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from nanoloop.chat.conversation import Conversation, Turn
from nanoloop.chat.engine import Engine
from nanoloop.checks import UserError, check
from nanoloop.early_exit import EXIT
from nanoloop.files import reason_of, replace_file
from nanoloop.lens_page import PRINTED, LensView
from nanoloop.signals import note_interrupts

LEGEND = 8  # most numbers of loops in the legend of /depth
MARKS = dict(text='', python='[calculator: ', python_output=' = ')  # in front of a part of an answer
COLOURS = (27, 33, 39, 43, 41, 76, 112, 148, 184, 214, 208, 202, 196)  # of 256: few loops blue, many red


def shade(text, loops, n_loop):
    """Returns a text on the colour of a number of loops, of n_loop at most, for a terminal."""
    share = (loops - 1) / max(1, n_loop - 1)
    return f'\x1b[30;48;5;{COLOURS[round(share * (len(COLOURS) - 1))]}m{text}\x1b[0m'


class Terminal:
    """A conversation with a ChatModel.

    settings: Settings. write: called with the answers' text as it comes. say: called with lines on what
    happens. clean: returns a text as it can be shown. colours: what is written may have colours.
    """

    def __init__(self, chat, settings, system='', write=print, say=print, clean=str, colours=False):
        self.chat, self.settings, self.write, self.say, self.clean = chat, settings, write, say, clean
        self.conversation = Conversation(system)
        self.engine = Engine(chat.model, max_batch=1, max_tokens=chat.context, say=say)
        self.colours, self.depth = colours, False  # depth: colour the tokens by their loops
        self.last, self.last_pieces = None, []  # the newest Answer

    def talk(self, read_line):
        """Reads lines and answers them until there are none. read_line: returns a line, None at the end."""
        while (line := read_line()) is not None:
            try:
                if line.startswith('/'):
                    self.command(line)
                elif line or self.can_go_on():
                    self.answer(line)
            except UserError as error:
                self.say(str(error))
            except StopIteration:
                return
            except (RuntimeError, ArithmeticError, MemoryError) as error:  # of an answer: the next can follow
                self.say(f'the answer failed: {error or type(error).__name__}')

    def command(self, line):
        """Runs a command. Raises UserError for one that does not exist or whose values are wrong."""
        name, *values = line[1:].split() or ['']
        known = ', '.join(f'/{other}' for other in COMMANDS)
        expected = f'one of {known}; a line with a blank in front is text'
        check(name in COMMANDS, 'command', f'/{name}', expected)
        entry = COMMANDS[name]
        least, most = entry.n_values
        check(least <= len(values) <= most, 'command', line, f'/{name} {entry.values}'.rstrip())
        entry.run(self, *values)

    # -----------------------------------------------------------------------------
    # answers

    def can_go_on(self):
        """Returns whether an empty line continues a base model's text."""
        return self.chat.form.name == 'text' and bool(self.conversation.turns)

    def answer(self, text):
        """Answers a question, and keeps both in the conversation. Ctrl-C ends the answer."""
        self.conversation.turns.append(Turn('user', text))
        try:
            answer, n_dropped = self.chat.answer(self.conversation, self.settings)
        except UserError:
            self.conversation.turns.pop()
            raise
        if n_dropped:
            self.say(f'({n_dropped} of the oldest turns do not fit in view any more)')
        self.engine.submit(answer)
        self.last, self.last_pieces, shown = answer, [], 'text'
        with note_interrupts() as interrupts:
            while not answer.finish:
                self.engine.step()
                shown = self.show(answer.take_pieces(), shown)
                answer.cancelled = bool(interrupts)
        shown = self.show(answer.take_pieces(), shown)
        self.write(']\n' if shown != 'text' else '\n')
        if answer.error:  # out of memory, for instance
            self.conversation.turns.pop()
            self.last = None
            raise answer.error
        self.conversation.turns.append(Turn('assistant', content_of(self.last_pieces), answer.tokens))
        ended = dict(length=', cut: max_new_tokens', cancelled=', interrupted').get(answer.finish, '')
        speed, loops = answer.tokens_per_second(), answer.mean_loops()
        self.say(f'[{len(answer.loops)} tokens, {speed:.1f} tokens/s, {loops:.2f} loops per token{ended}]')
        return answer

    def show(self, pieces, shown):
        """Writes the next Pieces of the newest answer. Returns the kind of the last one.

        shown: the kind of the piece before them.
        """
        self.last_pieces += pieces
        n_loop = self.last.policy.n_loop
        for piece in pieces:
            text, predicted = self.clean(piece.text), [n for n in piece.loops if n]
            if not text:
                continue
            if self.depth and self.colours and predicted:
                text = shade(text, sum(predicted) / len(predicted), n_loop)
            if piece.kind != shown:
                closes = ']' * (piece.kind == 'text')
                text, shown = f'{closes}{MARKS[piece.kind]}{text}', piece.kind
            self.write(text)
        return shown

    def change(self, **values):
        """Sets keys of the settings. Raises UserError for values that do not fit, and keeps the old ones."""
        settings = replace(self.settings, **values)
        settings.policy(self.chat.model)
        self.settings = settings
        self.say(', '.join(f'{key} = {getattr(settings, key)!r}' for key in values))


def content_of(pieces):
    """Returns the content of a message: a text, or parts where the calculator was called."""
    parts = [
        dict(type=kind, text=''.join(piece.text for piece in group))
        for kind, group in itertools.groupby(pieces, lambda piece: piece.kind)
    ]
    parts = [part for part in parts if part['text']]
    plain = all(part['type'] == 'text' for part in parts)
    return ''.join(part['text'] for part in parts) if plain else parts


# -----------------------------------------------------------------------------
# commands


class Command(NamedTuple):
    """A command of the terminal."""

    run: Callable  # of the Terminal and the command's values, texts
    values: str  # the names of the values, for /help
    about: str
    n_values: tuple = (0, 0)  # the fewest and the most values


def literal(text):
    """Returns the number in a text, None for the word none, else the text."""
    if text.lower() == 'none':
        return None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def set_exit(terminal, name, threshold=None):
    """Sets the early exit. Without a threshold it is the advised one; off = none."""
    if name == 'off':
        return terminal.change(exit='', exit_threshold=None, min_loops=1)
    check(name in EXIT, 'exit', name, f'off or one of {", ".join(EXIT)}')
    terminal.change(exit=name, exit_threshold=literal(threshold or str(EXIT[name].advised)))


def set_depth(terminal, value=''):
    """Switches the colours of the tokens, and shows the newest answer again."""
    check(terminal.colours, 'command', '/depth', 'a terminal, which can show colours')
    check(value in ('', 'on', 'off'), 'depth', value, 'on or off')
    terminal.depth = value == 'on' if value else not terminal.depth
    if not terminal.depth:
        return terminal.say('depth = off')
    policy = terminal.last.policy if terminal.last else terminal.settings.policy(terminal.chat.model)
    n_loop, n = policy.n_loop, min(policy.n_loop, LEGEND)
    shown = [1 + i * (n_loop - 1) // max(1, n - 1) for i in range(n)]
    terminal.say(f'loops of a token: {" ".join(shade(f" {i} ", i, n_loop) for i in shown)}')
    if terminal.last:
        pieces, terminal.last_pieces = terminal.last_pieces, []
        terminal.show(pieces, 'text')
        terminal.write('\n')


def show_lens(terminal, n_tokens='10'):
    """Shows what every loop predicted for the last tokens of the newest answer."""
    answer = terminal.last
    check(answer is not None and answer.loops, 'command', '/lens', 'an answer first')
    n = literal(n_tokens)
    check(type(n) is int and 1 <= n <= PRINTED, 'lens', n_tokens, f'a number of tokens from 1 to {PRINTED}')
    first, policy = max(answer.n_prompt, len(answer.ids) - n), answer.policy
    columns = shutil.get_terminal_size((120, 24)).columns
    k = max(1, min(3, (columns - 46) // 28))  # as many predictions as a line has room for
    lens = terminal.chat.lens(answer.ids, first, policy, k)
    early_exit = policy.early_exit(terminal.chat.model)
    for line in LensView(lens, answer.ids[first - 1 : -1], terminal.chat.tokenizer, early_exit).lines():
        terminal.say(line)


def reset(terminal):
    """Forgets the conversation, but not the system's text."""
    terminal.conversation, terminal.last = Conversation(terminal.conversation.system), None
    terminal.say('a new conversation')


def set_system(terminal, *words):
    """Sets the system's text and begins a new conversation."""
    terminal.conversation.system = ' '.join(words)
    reset(terminal)


def save(terminal, name):
    """Writes the conversation as a line of JSON, which data/sft/prepare.py --chat reads."""
    path = Path(os.path.expanduser(name))
    check(terminal.conversation.turns, 'command', '/save', 'a conversation first')
    check(path.suffix == '.jsonl', 'file', name, 'a name that ends in .jsonl')
    check(path.parent.is_dir(), 'file', name, 'a file in a folder that exists')
    check(not os.path.lexists(path), 'file', name, 'a new name: this file exists')
    line = json.dumps(dict(messages=terminal.conversation.messages()), ensure_ascii=False)
    try:
        with replace_file(path, 'wb') as file:
            file.write(f'{line}\n'.encode('utf-8', 'replace'))
    except OSError as error:
        raise UserError(f'{name} cannot be written: {reason_of(error)}') from None
    terminal.say(f'written: {path}')


def show_help(terminal):
    """Lists the commands and the settings."""
    width = max(len(f'{name} {command.values}') for name, command in COMMANDS.items())
    for name, command in COMMANDS.items():
        terminal.say(f'/{f"{name} {command.values}":{width}}  {command.about}')
    settings = asdict(terminal.settings)
    terminal.say(', '.join(f'{key} = {value!r}' for key, value in settings.items()))


def leave(terminal):
    raise StopIteration


def setter(key):
    """Returns the function of a command that sets a key."""

    def set_key(terminal, value=None):
        if value is None:  # only tells it
            value = str(getattr(terminal.settings, key))
        terminal.change(**{key: literal(value)})

    return set_key


COMMANDS = {
    'loops': Command(setter('n_loop'), 'N', "number of loops, or the word none: the checkpoint's", (0, 1)),
    'exit': Command(
        set_exit, 'RULE [X]', f'early exit: {", ".join(EXIT)} below or above X, or the word off', (1, 2)
    ),
    'depth': Command(set_depth, '[on, off]', 'colour each token by the loops that it took', (0, 1)),
    'lens': Command(show_lens, '[N]', 'what every loop predicted for the last N tokens', (0, 1)),
    'temperature': Command(setter('temperature'), 'X', '0 = always the most likely token', (0, 1)),
    'top_k': Command(setter('top_k'), 'K', 'draw from the K most likely tokens, or the word none', (0, 1)),
    'tokens': Command(setter('max_new_tokens'), 'N', 'most tokens of an answer', (0, 1)),
    'system': Command(set_system, '[TEXT]', 'text in front of a new conversation', (0, 10_000)),
    'reset': Command(reset, '', 'begin a new conversation'),
    'save': Command(save, 'FILE', 'write the conversation to a new file .jsonl', (1, 1)),
    'help': Command(show_help, '', 'this list, and the settings'),
    'quit': Command(leave, '', 'end the program, as Ctrl-D'),
}
