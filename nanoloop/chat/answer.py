"""
An answer while it is generated: its tokens, how many loops each took, and its text in pieces.
"""

import collections
import time
from typing import NamedTuple

from nanoloop.early_exit import make_early_exit
from nanoloop.text_stream import TextStream


class Policy(NamedTuple):
    """How many loops a token takes: n_loop of them, or what an early exit decides, see early_exit.py."""

    n_loop: int
    exit: str = ''
    exit_threshold: float | None = None
    min_loops: int = 1

    def early_exit(self, model):
        """Returns the EarlyExit, None without one. Raises UserError for one that does not fit the model."""
        early_exit = make_early_exit(self)
        if early_exit is not None:
            early_exit.check_model(model, self.n_loop)
        return early_exit


class Piece(NamedTuple):
    """A part of an answer's text, with the tokens that it was made of."""

    kind: str  # text, python (an expression for the calculator) or python_output (its result)
    text: str
    tokens: list  # ids; several if a character takes several, or if a special token comes before it
    loops: list  # after which loop each token was predicted; 0 = it was not predicted but forced


class Pieces:
    """Turns the tokens of an answer into Pieces.

    form: see conversation.py. stops: texts that end the answer and are not in it. done: one has come.
    """

    def __init__(self, form, stops):
        self.form, self.stops, self.done = form, stops, False
        self.begin('text')
        self.tokens, self.loops = [], []  # of the next Piece

    def begin(self, kind):
        """Begins a text of another kind. The stops are looked for in the model's text only."""
        self.kind = kind
        self.stream = TextStream(self.form.tokenizer, *(self.stops if kind == 'text' else ()))

    def add(self, token, loops):
        """Takes a token and its number of loops. Returns the Pieces that are complete now, 0 to 2."""
        special = token in self.form.kinds or token in self.form.stop
        pieces = self.rest() if special else []
        self.tokens.append(token)
        self.loops.append(loops)
        if special:
            self.begin(self.form.kinds.get(token, 'text'))
            return pieces
        text = self.stream.add(token)
        self.done = self.stream.done
        return self.take(text) if text else []

    def rest(self):
        """Returns what was held back, as a Piece or none, in a list: no token of this kind follows."""
        text = self.stream.rest()
        return self.take(text) if text or self.tokens else []

    def take(self, text):
        piece = Piece(self.kind, text, self.tokens, self.loops)
        self.tokens, self.loops = [], []
        return [piece]


class Answer:
    """An answer: the ids of its prompt, the tokens generated so far, and why it has ended.

    form: of the conversation, see conversation.py. sampler: a Sampler. policy: a Policy. max_tokens: most
    tokens of the answer, forced ones included. stops: texts that end it. notify: called without arguments
    whenever new_pieces or finish have changed.

    ids: of prompt and answer. appends: whether all of ids but the last are in the model's cache. loops: of
    the answer's tokens, see Piece. finish: why it has ended: 'stop' (by itself or by one of stops), 'length'
    (max_tokens), 'cancelled' or 'error' (`error` says which); None = it goes on. Setting `cancelled` ends it.
    """

    def __init__(self, prompt, form, sampler, policy, max_tokens, stops=(), notify=lambda: None):
        self.ids, self.n_prompt, self.appends = list(prompt), len(prompt), False
        self.form, self.sampler, self.policy, self.notify = form, sampler, policy, notify
        self.max_tokens, self.pieces = max_tokens, Pieces(form, stops)
        self.loops, self.new_pieces = [], collections.deque()
        self.cancelled, self.finish, self.error = False, None, None
        self.overtaken = 0  # answers that have begun before it, see engine.py
        self.began, self.first, self.ended = time.perf_counter(), None, None  # seconds; of its first token

    @property
    def tokens(self):
        """The ids of the answer, with the token that ended it."""
        return self.ids[self.n_prompt :]

    def add(self, token, loops):
        """Takes the predicted token, and the results of the calculator that follow it."""
        self.first = self.first or time.perf_counter()
        self.put(token, loops)
        if token in self.form.stop or self.pieces.done:
            return self.end('stop')
        forced = [] if self.form.tool is None else self.form.tool(self.tokens)
        if len(self.loops) + len(forced) >= self.max_tokens:  # no result is cut
            return self.end('length')
        for result in forced:
            self.put(result, 0)
        self.appends = not forced
        self.notify()

    def put(self, token, loops):
        self.ids.append(token)
        self.loops.append(loops)
        self.new_pieces.extend(self.pieces.add(token, loops))

    def end(self, finish, error=None):
        """Ends the answer for a reason, see the class."""
        if not self.finish:
            self.new_pieces.extend(self.pieces.rest())
            self.error, self.ended = error, time.perf_counter()
            self.finish = finish  # last: another thread waits for it
            self.notify()

    def take_pieces(self):
        """Returns the Pieces that have come since the last call. Another thread may be adding some."""
        return [self.new_pieces.popleft() for _ in range(len(self.new_pieces))]

    def mean_loops(self):
        """Returns loops per predicted token, 0 before the first."""
        predicted = [n for n in self.loops if n]
        return sum(predicted) / max(1, len(predicted))

    def tokens_per_second(self):
        """Returns the speed from the first token on, 0 for fewer than two tokens."""
        if self.first is None or len(self.loops) < 2:
            return 0.0
        return (len(self.loops) - 1) / max((self.ended or time.perf_counter()) - self.first, 1e-9)
