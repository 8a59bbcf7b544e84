"""
Evaluations of the generated tasks: accuracy on held-out questions, by difficulty.

The questions are the same in every run: of each difficulty the first ones that a generator with a fixed seed
draws, without repeats. An answer is right if it is the most likely token behind <ans>. Mano's 1,587 questions
with one operation are its tables: all of them are asked, and training has them too.
"""

import functools
import math
import re

import numpy as np

from nanoloop.checks import check
from nanoloop.generated import GENERATED, find_generated
from nanoloop.perplexity import exponential
from nanoloop.scoring import Evaluation, Item, Text
from nanoloop.uncertainty import mean_and_error

QUESTIONS = 2000  # of each difficulty
ROUND = 2048  # rows that are drawn at a time


def mano(c, tokenizer, config, say):
    """Returns the Evaluations of Mano: mano/l=1 and so on, see evaluations."""
    return evaluations('mano', c, tokenizer, config)


def p_hop(c, tokenizer, config, say):
    """Returns the Evaluations of p-hop induction: p_hop/hops=1 and so on, see evaluations."""
    return evaluations('p_hop', c, tokenizer, config)


def evaluations(task, c, tokenizer, config):
    """Returns an Evaluation for each difficulty of a task; the last one is the hardest.

    c: the keys of eval.py: dataset, whose size counts if it is of this task (else that of the model's words),
    and windows, the number of questions of each difficulty (0 = QUESTIONS). config: the model's GPTConfig.
    Raises UserError for a model that was not trained on the task.
    """
    data = find_task(task, c, tokenizer)
    expected = (
        f'a model with a block_size of at least {data.row_len - 1} for {data.name}, not {config.block_size}'
    )
    check(data.row_len - 1 <= config.block_size, 'tasks', task, expected)
    n, result = c.windows or QUESTIONS, []
    for level in range(1, data.size + 1):
        items = make_items(data, level, n, tokenizer)
        settings = f'dataset={data.name} version={data.version} questions={n}'
        note = f'majority answer {100 * data.majority(level):.1f} %'
        name = f'{task}/{data.level}={level}'
        result.append(Evaluation(name, settings, items, judge, functools.partial(summarise, note=note)))
    return result


def find_task(task, c, tokenizer):
    """Returns the Generated of the questions. Raises UserError if the tokenizer does not have its words."""
    words = tokenizer.spec.get('words', ())
    size = sum(word.startswith(GENERATED[task].level_word) for word in words)
    data = find_generated(c.dataset)
    if data is None or data.task != task:
        data = GENERATED[task](max(size, 1))
    missing = [word for word in data.words if word not in words]
    expected = f'a model trained with --dataset={data.name}: this one does not know {" ".join(missing[:3])}'
    check(not missing, 'tasks', task, expected)
    return data


def draw_questions(data, level, n):
    """Returns n rows of a difficulty that belong to val, (n, row_len), without repeats.

    If there are less, nearly all of them: drawing ends with a round that brings no new one. Fewer
    rows are the first ones of more.
    """
    rng = np.random.default_rng((int(data.fingerprint('questions')[:15], 16), level))
    rows = np.empty((0, data.row_len), np.int64)
    while len(rows) < n:
        more = np.concatenate((rows, data.draw(rng, ROUND, 'val', level)[0]))
        _, first = np.unique(more, axis=0, return_index=True)
        if len(first) == len(rows):
            break
        rows = more[np.sort(first)]
    return rows[:n]


def make_items(data, level, n, tokenizer):
    """Returns the questions of a difficulty as Items in the tokenizer's ids."""
    ids = np.array(tokenizer.encode(' '.join(data.words)))
    place = int(data.answer_places(np.array([level]))[0])
    items = []
    for index, row in enumerate(ids[draw_questions(data, level, n)[:, : place + 1]].tolist()):
        info = dict(index=index, level=level, text=tokenizer.decode(row).strip(), answer=row[-1])
        items.append(Item([Text(row, slice(place, place + 1))], info))
    return items


def judge(item, ces, predicted):
    """Returns the record of a question, see scoring.Evaluation."""
    token = int(predicted[0][0])
    return dict(correct=int(token == item.info['answer']), losses=[float(ces[0][0])], predicted=[token])


def summarise(records, note):
    """Returns the columns of eval.csv for the records of a difficulty."""
    accuracy, accuracy_se = mean_and_error([record['correct'] for record in records])
    loss, loss_se = mean_and_error([record['losses'][0] for record in records])
    columns = dict(loss=loss, loss_se=loss_se, ppl=exponential(loss), accuracy=accuracy)
    return dict(columns, accuracy_se=accuracy_se, items=len(records), tokens=len(records), note=note)


def combine(rows):
    """Returns the columns of a task's own row: means over its difficulties, which count the same.

    rows: {column: value} of each difficulty. The standard errors are those of a mean of independent values.
    """
    n = len(rows)
    columns = {column: sum(row[column] for row in rows) / n for column in ('loss', 'accuracy')}
    for column in ('loss_se', 'accuracy_se'):
        columns[column] = math.sqrt(sum(row[column] ** 2 for row in rows)) / n
    columns |= {column: sum(row[column] for row in rows) for column in ('items', 'tokens')}
    share = sum(majority_in(row['note']) for row in rows) / n
    note = f'mean over {n} difficulties, majority answer {share:.1f} %'
    return dict(columns, ppl=exponential(columns['loss']), note=note)


def majority_in(note):
    """Returns the percentage that a note of summarise names, nan if it names none."""
    found = re.search(r'majority answer ([0-9.]+) %', note)
    return float(found[1]) if found else math.nan
