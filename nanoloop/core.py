"""
CORE: 22 tasks in three forms, answered by the likelihood that a model gives to texts (DataComp-LM,
arXiv:2406.11794, as nanochat evaluates it).

    multiple_choice    the choice with the least mean cross-entropy is the answer
    schema             the same, for contexts in front of one continuation, whose tokens are scored
    language_modeling  every token of the continuation must be the most likely one

In front of a question stand other questions of the task with their answers, the shots. With the accuracy of
random answers b, centered = (accuracy - b) / (1 - b), and CORE is the mean of centered over the tasks.
"""

import functools
import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from model import POS
from nanoloop.checks import UserError, check
from nanoloop.core_bundle import KINDS, find_bundle, hash_task, read_questions, read_tasks
from nanoloop.number_lists import read_numbers
from nanoloop.scoring import Evaluation, Item, Text
from nanoloop.text_losses import common_prefix
from nanoloop.uncertainty import mean_and_error

SHUFFLE_SEED = 1337  # of the questions; the first max_per_task are taken

# -----------------------------------------------------------------------------
# the three kinds of tasks


def render_choices(row, delimiter, shots=''):
    """Returns the prompts of a multiple-choice question, one for each choice."""
    return [shots + row['query'] + delimiter + choice for choice in row['choices']]


def render_schema(row, delimiter, shots=''):
    """Returns the prompts of a schema, one for each context."""
    return [shots + context + delimiter + row['continuation'] for context in row['context_options']]


def render_continuation(row, delimiter, shots=''):
    """Returns the prompt of a language-modeling question without and with its continuation.

    The former ends without blanks: in most tokenizers a blank belongs to the word behind it.
    """
    prompt = shots + row['context'].strip() + delimiter
    return [prompt.strip(), prompt + row['continuation']]


def score_choices(sequences):
    """Scores every choice from the first token that is not the same in all of them."""
    start, last = common_prefix(sequences), min(map(len, sequences)) - 1
    return [(ids, min(start, last)) for ids in sequences], start > last


def score_suffix(sequences):
    """Scores the tokens that all sequences have in common at their end."""
    length = common_prefix([ids[::-1] for ids in sequences])
    return [(ids, max(1, len(ids) - max(1, length))) for ids in sequences], length == 0


def score_continuation(sequences):
    """Scores the tokens that the continuation adds to the prompt, or changes in it."""
    prompt, ids = sequences
    start = common_prefix(sequences)
    return [(ids, min(start, len(ids) - 1))], start < len(prompt)


def choose(item, ces, predicted):
    """Returns the record of a question with choices: the least mean cross-entropy is the answer."""
    losses = [float(ce.mean()) for ce in ces]
    answer = losses.index(min(losses))
    return dict(losses=losses, answer=answer, correct=int(answer == item.info['gold']))


def match(item, ces, predicted):
    """Returns the record of a question whose tokens must be the most likely ones.

    An answer that is longer than the context of the model is wrong: its start is not seen.
    """
    tokens = [int(i) for i in predicted[0]]
    right = tokens == item.info['target'] and not item.info.get('cut')
    return dict(predicted=tokens, losses=[float(ces[0].mean())], correct=int(right))


class Kind(NamedTuple):
    """How the questions of a kind are rendered and judged."""

    render: Callable  # (row, delimiter, shots) -> prompts
    # token sequences of the prompts -> (those to score and the first scored token of each, merged): merged is
    # true if a scored token begins before the answer, since one token belongs to both, or one choice is the
    # start of another; at least one token of each is scored
    score: Callable
    judge: Callable  # see Evaluation


HOW = dict(
    multiple_choice=Kind(render_choices, score_choices, choose),
    schema=Kind(render_schema, score_suffix, choose),
    language_modeling=Kind(render_continuation, score_continuation, match),
)
assert HOW.keys() == KINDS.keys()

# -----------------------------------------------------------------------------
# from questions to tokens


def context_limit(config):
    """Returns how many tokens a model can see at most, None = any number: learned positions have an end."""
    return config.block_size if POS[config.pos].learned else None


def crop(ids, start, limit):
    """Returns (a Text of the last `limit` ids, scored from start on, whether some scored ones are gone)."""
    gone = max(0, len(ids) - limit) if limit else 0
    ids, start = ids[gone:], start - gone
    return Text(ids, slice(max(1, start), len(ids))), start < 1


class Questions(Sequence):
    """The Items of a task, rendered when they are asked for: all seeds of a question follow each other."""

    def __init__(self, task, rows, seeds, tokenizer, limit):
        self.task, self.rows, self.seeds, self.tokenizer, self.limit = task, rows, seeds, tokenizer, limit
        self.kind, self.has_choices = HOW[task.kind], KINDS[task.kind].options is not None

    def __len__(self):
        return len(self.rows) * len(self.seeds)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        index, number = divmod(range(len(self))[i], len(self.seeds))
        return self.render(index, self.seeds[number])

    def draw_shots(self, index, seed):
        """Returns the indices of the questions in front of a question: a sample of all others."""
        # a sample of a list depends on its length alone, so the list of all others is not made
        drawn = random.Random(seed + index).sample(range(len(self.rows) - 1), self.task.n_shots)
        return [i + (i >= index) for i in drawn]

    def prompts(self, index, seed):
        """Returns the texts of a question, its shots in front."""
        shots = ''
        for row in (self.rows[i] for i in self.draw_shots(index, seed)):
            answer = row['gold'] if self.has_choices else -1
            shots += self.kind.render(row, self.task.delimiter)[answer] + '\n\n'
        return self.kind.render(self.rows[index], self.task.delimiter, shots)

    def render(self, index, seed):
        """Returns the Item of a question.

        Its info has `merged`, see Kind, and `cut` if tokens of an answer do not fit in the model's context.
        """
        bos = [self.tokenizer.eot_token]
        spans, merged = self.kind.score(
            [bos + self.tokenizer.encode(text) for text in self.prompts(index, seed)]
        )
        cropped = [crop(ids, start, self.limit) for ids, start in spans]
        texts, cuts = [text for text, _ in cropped], [cut for _, cut in cropped]
        info = dict(index=index, seed=seed) if self.task.n_shots else dict(index=index)
        info |= {key: True for key, flag in (('merged', merged), ('cut', any(cuts))) if flag}
        if self.has_choices:
            info['gold'] = self.rows[index]['gold']
        else:
            info['target'] = texts[0].ids[texts[0].scored]
        return Item(texts, info)


# -----------------------------------------------------------------------------
# from records to columns


def summarise(records, task, n_seeds, left_out):
    """Returns the columns of a task's row from the records of all items.

    accuracy is a mean over seeds, seed_sd the standard deviation over them, and accuracy_se the standard
    error over questions. left_out: labels of tasks that cannot be evaluated, for combine.
    """
    correct = np.array([record['correct'] for record in records], dtype=np.float64).reshape(-1, n_seeds)
    accuracy, error = mean_and_error(correct.mean(1))
    columns = dict(accuracy=accuracy, accuracy_se=error, centered=center(accuracy, task.baseline))
    columns['items'] = len(correct)
    notes = []
    if n_seeds > 1:
        columns['seed_sd'] = float(correct.mean(0).std(ddof=1))
        by_seed = center(correct.mean(0), task.baseline)
        notes.append('centered by seed ' + ' '.join(f'{value:.8g}' for value in by_seed))
    for key, what in (('merged', 'scored with the token before'), ('cut', 'longer than the context')):
        if count := sum(record.get(key, False) for record in records):
            notes.append(f'{count} of {len(records)} {what}')
    if left_out:
        notes.append(f'without {", ".join(left_out)}')
    return columns | dict(note='; '.join(notes))


def center(accuracy, baseline):
    """Returns an accuracy with random answers at 0 and right answers at 1."""
    return (accuracy - baseline) / (1 - baseline)


def find_note(row, name):
    """Returns the words behind a name in a row's note, [] if it has none."""
    found = re.search(rf'{name} ([^;]*)', row.get('note') or '')
    return found[1].replace(',', '').split() if found else []


def combine(rows):
    """Returns the columns of CORE's row from the rows of its tasks, {column: value} each.

    centered is the mean over the tasks, seed_sd its standard deviation over seeds. The note has its standard
    error over questions, and names the tasks that are left out: they are never counted as zero.
    """
    centered = np.array([float(row['centered']) for row in rows])
    accuracy, error = (np.array([float(row[key]) for row in rows]) for key in ('accuracy', 'accuracy_se'))
    # an error of centered is that of accuracy over 1 - b, which is (1 - accuracy) / (1 - centered)
    scale = np.divide(1 - centered, 1 - accuracy, out=np.zeros(len(rows)), where=accuracy < 1)
    columns = dict(centered=float(centered.mean()), items=sum(int(float(row['items'])) for row in rows))
    by_seed = [list(map(float, find_note(row, 'centered by seed'))) for row in rows]
    n_seeds = max(map(len, by_seed))
    if n_seeds:
        values = [part or [value] * n_seeds for part, value in zip(by_seed, centered, strict=True)]
        columns['seed_sd'] = float(np.mean(values, axis=0).std(ddof=1))
    notes = [f'standard error {np.sqrt(np.square(scale * error).sum()) / len(rows):.4f}']
    present = {row['task'].removeprefix('core/') for row in rows}
    named = dict.fromkeys(label for row in rows for label in find_note(row, 'without'))
    left_out = [label for label in named if label not in present]
    if left_out:
        total = len(rows) + len(left_out)
        notes.insert(0, f'partial: {len(rows)} of {total} tasks, without {", ".join(left_out)}')
    return columns | dict(note='; '.join(notes))


# -----------------------------------------------------------------------------
# the evaluations


def core(c, tokenizer, config, say):
    """Returns the Evaluations of CORE, one for each task of core.yaml whose file is there.

    c: the keys core_dir, max_per_task and fewshot_seeds of eval.py. config: the GPTConfig of the model. say:
    called with a line for each task that is left out. Raises UserError for files that cannot be read.
    """
    seeds, folder = read_numbers(c.fewshot_seeds), find_bundle(c.core_dir, say)
    tasks, present, left_out = read_tasks(folder), [], []
    for task in tasks:
        reason, rows = f'there is no {task.path}', []
        if task.path.is_file():
            rows = read_questions(task)
            reason = why_not_encoded(tokenizer, rows, task)
        if reason:
            say(f'core: {task.label} is left out: {reason}')
            left_out.append(task.label)
        else:
            present.append((task, rows))
    check(present, 'core_dir', str(folder), 'a folder with the questions of at least one task of CORE')
    limit = context_limit(config)
    return [make_evaluation(c, *entry, seeds, tokenizer, limit, left_out) for entry in present]


def make_evaluation(c, task, rows, seeds, tokenizer, limit, left_out):
    """Returns the Evaluation of a task. Seeds decide nothing without shots."""
    seeds = seeds if task.n_shots else seeds[:1]
    enough = c.max_per_task is None or c.max_per_task > task.n_shots
    check(enough, 'max_per_task', c.max_per_task, f'more than the {task.n_shots} shots of {task.label}')
    settings = [f'max_per_task={c.max_per_task}', f'data={hash_task(task, rows)}']
    if task.n_shots:
        settings.insert(1, f'fewshot_seeds={",".join(map(str, seeds))}')
    random.Random(SHUFFLE_SEED).shuffle(rows)
    items = Questions(task, rows[: c.max_per_task], seeds, tokenizer, limit)
    columns = functools.partial(summarise, task=task, n_seeds=len(seeds), left_out=left_out)
    return Evaluation(f'core/{task.label}', ' '.join(settings), items, HOW[task.kind].judge, columns)


def why_not_encoded(tokenizer, rows, task):
    """Returns why a tokenizer cannot encode the questions of a task, '' if it can."""
    fields, letters = KINDS[task.kind], set(task.delimiter + '\n')
    for row in rows:
        letters.update(*(row[name] for name in fields.texts), *row.get(fields.options, ()))
    try:
        tokenizer.encode(''.join(sorted(letters)))
    except UserError as error:
        return str(error)
    return ''
