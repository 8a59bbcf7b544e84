"""
Questions for reinforcement learning: prompts with a judge of their answers.

    questions.train(step, number, n)     n questions for a micro-batch, a function of (seed, step, number)
    questions.val(n)                     the first n questions that are held out; fewer if there are fewer

Their other attributes: name; identity (JSON values, the same for the same questions); longest_prompt (in
tokens); max_new_tokens; stop (ids that end an answer, () = it has max_new_tokens tokens); tool (see
rollout.roll_out, None = none).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from nanoloop.checks import check
from nanoloop.conversation import render_prompt, special_id
from nanoloop.generated import GENERATED, HELD_OUT, find_generated
from nanoloop.generated_eval import draw_questions
from nanoloop.randomness import random_generator
from nanoloop.tasks import TASKS, make_task
from nanoloop.tool_use import make_calculator

TEXT_TASKS = {name: task for name, task in TASKS.items() if task.kind == 'text' and name != 'humaneval'}


class Question(NamedTuple):
    """A prompt and its judge."""

    prompt: list  # of ids
    reward: Callable  # ids of an answer -> a number; 1 or more: it is right


def find_questions(c, tokenizer, config):
    """Returns the questions of c.rl_task. Raises UserError for a task that is not there, or without data."""
    data = find_generated(c.rl_task)
    if data is not None:
        return GeneratedQuestions(data, c, tokenizer, config)
    names = ', '.join([*TEXT_TASKS, *(f'{name}:N' for name in GENERATED)])
    check(c.rl_task in TEXT_TASKS, 'rl_task', c.rl_task, f'one of {names}')
    return TaskQuestions(c, tokenizer, config)


class GeneratedQuestions:
    """Questions of a generated task, see generated.py: the answer is one token, its reward 0 or 1."""

    max_new_tokens, stop, tool = 1, (), None

    def __init__(self, data, c, tokenizer, config):
        known = tokenizer.spec.get('words', ())[: len(data.words)]
        expected = f'a model trained with --dataset={data.name}, or with a larger number'
        check(known == data.words, 'init_from', c.init_from, expected)
        fits = data.row_len - 1 <= config.block_size
        check(fits, 'rl_task', c.rl_task, f'questions for a block_size of {config.block_size}')
        self.data, self.seed, self.name = data, c.seed, data.name
        self.longest_prompt = data.row_len - 1
        self.identity = [data.fingerprint(split) for split in ('train', 'val')]

    def train(self, step, number, n):
        """Returns n questions that training may ask."""
        rng = random_generator(self.seed, step, number, stream='data')
        return self.make(*self.data.draw(rng, n, 'train'))

    def val(self, n):
        """Returns n questions of the evaluation, of all difficulties in turns."""
        size = self.data.size
        parts = [draw_questions(self.data, level, -(-n // size)) for level in range(1, size + 1)]
        places = [(i, level) for i in range(-(-n // size)) for level in range(size) if i < len(parts[level])]
        rows = np.stack([parts[level][i] for i, level in places[:n]])  # (n, row_len)
        return self.make(rows, np.array([level + 1 for _, level in places[:n]]))

    def make(self, rows, levels):
        """Returns the Questions of rows (n, row_len) with their difficulties (n,)."""
        places = self.data.answer_places(levels)
        return [
            Question(row[:place].tolist(), lambda answer, right=row[place]: float(answer == [right]))
            for row, place in zip(rows, places, strict=True)
        ]

    def describe(self):
        """Returns the line that a run says about its questions."""
        return f'questions of {self.name}, drawn when they are needed: an answer is one token'


class TaskQuestions:
    """Questions of nanoloop/tasks/, as conversations. An epoch asks each once, in an order of its own.

    Questions that leave no room for max_new_tokens in block_size are left out. If the questions of both
    splits are the same, those of one file, one of HELD_OUT is held out.
    """

    def __init__(self, c, tokenizer, config):
        self.name, self.tokenizer, self.seed = c.rl_task, tokenizer, c.seed
        self.max_new_tokens, self.micros = c.max_new_tokens, c.gradient_accumulation_steps
        task = TEXT_TASKS[c.rl_task]
        self.tasks = {
            split: make_task(c.rl_task, dict(gsm8k=c.gsm8k, words=c.words), split)
            for split in ('train', 'test')
        }
        self.stop = [special_id(tokenizer, name) for name in ('assistant_end', 'bos')]
        self.tool = make_calculator(tokenizer) if task.tools else None
        room = config.block_size + 1 - c.max_new_tokens
        check(room > 0, 'max_new_tokens', c.max_new_tokens, f'at most block_size={config.block_size}')
        every = {split: range(len(task)) for split, task in self.tasks.items()}
        if len({task.data for task in self.tasks.values()}) == 1 and len(set(map(len, every.values()))) == 1:
            n = len(every['train'])
            every = dict(train=[i for i in range(n) if i % HELD_OUT], test=range(0, n, HELD_OUT))
        lengths = {s: {i: len(self.prompt(self.tasks[s][i])) for i in every[s]} for s in every}
        fits = {split: [i for i, n in parts.items() if n <= room] for split, parts in lengths.items()}
        self.left_out = sum(len(every[split]) - len(fits[split]) for split in every)
        for split, found in fits.items():
            expected = f'questions for {split} of at most {room} tokens: a lower max_new_tokens leaves more'
            check(found, 'rl_task', c.rl_task, expected)
        self.indices = fits
        self.longest_prompt = max(lengths[split][i] for split, found in fits.items() for i in found)
        self.identity = [self.name, *(task.data for task in self.tasks.values()), fits]

    def prompt(self, item):
        """Returns the ids of an item's prompt."""
        return render_prompt(item['messages'], self.tokenizer)

    def make(self, split, i):
        """Returns item i of a split as a Question."""
        task = self.tasks[split]
        item = task[i]
        return Question(self.prompt(item), lambda ids: task.reward(item, self.tokenizer.decode(ids)))

    def train(self, step, number, n):
        """Returns n questions that training may ask."""
        indices, first = self.indices['train'], (step * self.micros + number) * n
        orders, result = {}, []
        for place in range(first, first + n):
            epoch, at = divmod(place, len(indices))
            if epoch not in orders:
                orders[epoch] = random_generator(self.seed, epoch, stream='data').permutation(len(indices))
            result.append(self.make('train', indices[orders[epoch][at]]))
        return result

    def val(self, n):
        """Returns n questions of the evaluation."""
        return [self.make('test', i) for i in self.indices['test'][:n]]

    def describe(self):
        """Returns the line that a run says about its questions."""
        sizes = [len(self.indices[split]) for split in ('train', 'test')]
        rest = f'; {self.left_out:,} are too long for block_size and left out' if self.left_out else ''
        return f'questions of {self.name}: {sizes[0]:,} (train) and {sizes[1]:,} (val){rest}'
