"""
Questions for reinforcement learning: prompts with a judge of their answers.

    questions.train(step, number, n)     n questions for a micro-batch, a function of (seed, step, number)
    questions.val(n)                     the first n questions that are held out; fewer if there are fewer

Their other attributes: name; identity (JSON values, the same for the same questions); max_new_tokens; stop
(ids that end an answer, () = it has max_new_tokens tokens); tool (see rollout.roll_out, None = none).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from nanoloop.checks import check
from nanoloop.generated import GENERATED, find_generated
from nanoloop.randomness import random_generator


class Question(NamedTuple):
    """A prompt and its judge."""

    prompt: list  # of ids
    reward: Callable  # ids of an answer -> a number; 1 or more: it is right


class GeneratedQuestions:
    """Questions of a generated task, see generated.py: the answer is one token, its reward 0 or 1."""

    max_new_tokens, stop, tool = 1, (), None

    def __init__(self, data, c, tokenizer, config, say):
        known = tokenizer.spec.get('words', ())[: len(data.words)]
        expected = f'a model trained with --dataset={data.name}, or with a larger number'
        check(known == data.words, 'init_from', c.init_from, expected)
        fits = data.row_len - 1 <= config.block_size
        check(fits, 'rl_task', c.rl_task, f'questions for a block_size of {config.block_size}')
        self.data, self.seed, self.name = data, c.seed, data.name
        self.identity = [data.fingerprint(split) for split in ('train', 'val')]

    def train(self, step, number, n):
        return self.make(*self.data.draw(random_generator(self.seed, step, number, stream='data'), n, 'train'))

    def val(self, n):
        return self.make(*self.data.draw(np.random.default_rng(0), n, 'val'))

    def make(self, rows, levels):
        """Returns the Questions of rows (n, row_len) with their difficulties (n,)."""
        places = self.data.answer_places(levels)
        return [
            Question(row[:place].tolist(), lambda answer, right=row[place]: float(answer == [right]))
            for row, place in zip(rows, places, strict=True)
        ]

    def describe(self):
        """Returns the line that a run says about its questions."""
        return f'questions of {self.name}, drawn when they are needed: an answer is one token, its reward 0 or 1'


def find_questions(c, tokenizer, config, say):
    """Returns the questions of c.rl_task. Raises UserError for a task that does not exist, or without data."""
    data = find_generated(c.rl_task)
    if data is not None:
        return GeneratedQuestions(data, c, tokenizer, config, say)
    check(False, 'rl_task', c.rl_task, f'one of {", ".join(f"{name}:N" for name in GENERATED)}')
