"""
Evaluations of the tasks of nanoloop/tasks/, as a chat model answers them, and ChatCORE.

A question with choices is answered by the most likely one of its letters behind the prompt; no other token
counts. Another question is answered greedily (temperature 0), with the calculator where the task has one.

With the accuracy of random answers b, centered = (accuracy - b) / (1 - b), and ChatCORE is the mean of
centered over CHATCORE. A task that cannot be run is left out and named; the result is then called partial.
"""

import functools
import random
from collections.abc import Sequence

import numpy as np

from nanoloop.checks import UserError, check
from nanoloop.conversation import render_prompt, special_id
from nanoloop.core import SHUFFLE_SEED, center, choose, context_limit, crop
from nanoloop.decode import Stats
from nanoloop.parallel import gather
from nanoloop.rollout import roll_out
from nanoloop.scoring import Evaluation, Item, Result, Text, interleave
from nanoloop.tasks import TASKS, make_task
from nanoloop.tasks.sources import Unavailable
from nanoloop.text_losses import batches
from nanoloop.tool_use import make_calculator
from nanoloop.uncertainty import mean_and_error

OPTIONS = ('arc', 'mmlu', 'gsm8k', 'humaneval', 'words', 'run_code')  # keys of eval.py that tasks read
CHATCORE = ('arc_easy', 'arc_challenge', 'mmlu', 'gsm8k', 'humaneval', 'spellingbee')


def chat_task(name, c, tokenizer, config, say):
    """Returns the Evaluation of a task, in a list.

    c: the keys OPTIONS, max_per_task and max_new_tokens of eval.py. config: the GPTConfig of the model.
    Raises UserError for data that is missing, and for a tokenizer that cannot render the questions.
    """
    options = {key: getattr(c, key) for key in OPTIONS}
    TASKS[name].check_judge(options)
    task = make_task(name, options)
    order = random.Random(SHUFFLE_SEED).sample(range(len(task)), len(task))[: c.max_per_task]
    check_letters(task, order, tokenizer)
    settings = f'max_per_task={c.max_per_task} data={task.data}'
    columns = functools.partial(summarise, baseline=task.baseline)
    if task.kind == 'choice':
        items = Choices(task, order, tokenizer, context_limit(config))
        return [Evaluation(name, settings, items, choose, columns)]
    settings += f' max_new_tokens={c.max_new_tokens}'
    stop = tuple(special_id(tokenizer, text) for text in ('assistant_end', 'bos'))
    tool = make_calculator(tokenizer) if task.tools else None
    answer = functools.partial(answer_items, max_new_tokens=c.max_new_tokens, stop=stop, tool=tool)
    judge = functools.partial(judge_answer, task=task, tokenizer=tokenizer)
    return [Evaluation(name, settings, Prompts(task, order, tokenizer), judge, columns, answer)]


def check_letters(task, order, tokenizer):
    """Raises UserError if the tokenizer lacks special tokens, or letters of the task's questions."""
    prompts = (task[i]['messages'] for i in order)
    letters = set().union(*(message['content'] for messages in prompts for message in messages[:-1]))
    render_prompt([dict(role='user', content=''.join(sorted(letters)))], tokenizer)


class Prompts(Sequence):
    """The Items of a task whose answers are generated: a prompt each, made when it is asked for.

    order: which items of the task, in this order.
    """

    def __init__(self, task, order, tokenizer):
        self.task, self.order, self.tokenizer = task, order, tokenizer

    def __len__(self):
        return len(self.order)

    def __getitem__(self, i):
        index = self.order[i]
        item = self.task[index]
        return self.make_item(item, render_prompt(item['messages'], self.tokenizer), dict(index=index))

    def make_item(self, item, prompt, info):
        return Item([Text(prompt, slice(len(prompt), len(prompt)))], info)


class Choices(Prompts):
    """The Items of a task with choices: the prompt with each letter.

    limit: the most tokens that the model can see, None = any number.
    """

    def __init__(self, task, order, tokenizer, limit):
        super().__init__(task, order, tokenizer)
        self.limit = limit

    def make_item(self, item, prompt, info):
        ids = [self.tokenizer.encode(letter) for letter in item['letters']]
        one_each = all(len(letter) == 1 for letter in ids)
        check(one_each, 'tasks', self.task.name, 'a model whose tokenizer has one token for each letter')
        if self.limit and len(prompt) > self.limit:
            info['cut'] = True
        limit = self.limit and self.limit + 1  # the model reads all tokens but the last
        texts = [crop([*prompt, *letter], len(prompt), limit)[0] for letter in ids]
        return Item(texts, dict(info, gold=item['letters'].index(item['answer'])))


# -----------------------------------------------------------------------------
# answers that are generated


def answer_items(model, evaluation, policies, m, batch_tokens, tell, max_new_tokens, stop, tool):
    """Returns a Result per policy, as scoring.score does, from answers that the model generates.

    max_new_tokens, stop, tool: see rollout.roll_out.
    """
    items = [evaluation.items[i] for i in range(m.rank, len(evaluation.items), m.world)]
    prompts = [item.texts[0].ids for item in items]
    lengths, parts, n_done = [len(ids) + max_new_tokens for ids in prompts], [], 0
    for policy in policies:
        options = dict(n_loop=policy.n_loop, kv_budget=policy.kv_budget, early_exit=policy.early_exit)
        records, stats = [None] * len(items), Stats()
        for batch in batches(lengths, batch_tokens) if items else ():
            chosen = [prompts[i] for i in batch]
            with m.autocast():
                rollouts = roll_out(model, chosen, max_new_tokens, stop, tool, temperature=0, **options)
            for i, ids, finished in zip(batch, rollouts.answers, rollouts.finished, strict=True):
                records[i] = items[i].info | evaluation.judge(items[i], ids, finished)
            stats += rollouts.stats
            n_done += len(batch)
            tell(n_done, len(items) * len(policies))
        parts.append((records, stats))
    results = []
    for of_ranks in zip(*gather(m, parts), strict=True):
        records, stats = zip(*of_ranks, strict=True)
        results.append(Result(interleave(records), sum(stats, Stats()).mean_loops))
    return results


def judge_answer(item, ids, finished, task, tokenizer):
    """Returns the record of an answer, given by its ids, and by whether it has ended by itself."""
    answer = tokenizer.decode(ids)
    correct = task.judge(task[item.info['index']], answer)
    return dict(correct=int(correct), answer=answer, tokens=len(ids), finished=int(finished))


# -----------------------------------------------------------------------------
# from records to columns


def summarise(records, baseline):
    """Returns the columns of a task's row from the records of all items."""
    accuracy, error = mean_and_error([record['correct'] for record in records])
    columns = dict(accuracy=accuracy, accuracy_se=error, centered=center(accuracy, baseline))
    notes = []
    if n := sum(record.get('cut', False) for record in records):
        notes.append(f'{n} of {len(records)} longer than the context')
    if 'tokens' in records[0]:
        columns['tokens'] = sum(record['tokens'] for record in records)
        if n := sum(not record['finished'] for record in records):
            notes.append(f'{n} of {len(records)} answers did not end')
    return dict(columns, note='; '.join(notes))


def chatcore(c, tokenizer, config, say):
    """Returns the Evaluations of CHATCORE that can be run.

    say: called with a line for each task that is left out: because its data cannot be had, or code may not be
    run. Raises UserError for a file or folder that was named and cannot be read.
    """
    evaluations = []
    for name in CHATCORE:
        try:
            evaluations += chat_task(name, c, tokenizer, config, say)
        except UserError as error:
            if getattr(c, TASKS[name].option) and not isinstance(error, Unavailable):
                raise
            say(f'chatcore: {name} is left out: {error}')
    check(evaluations, 'tasks', 'chatcore', f'data of at least one of {", ".join(CHATCORE)}')
    return evaluations


def combine(rows):
    """Returns the columns of ChatCORE's row from the rows of its tasks, {column: value} each.

    The note has the standard error over questions, and names the tasks that are left out.
    """
    centered = [row['centered'] for row in rows]
    errors = [row['accuracy_se'] / (1 - TASKS[row['task']].baseline) for row in rows]
    columns = dict(centered=float(np.mean(centered)), items=int(sum(row['items'] for row in rows)))
    notes = [f'standard error {np.sqrt(np.square(errors).sum()) / len(rows):.4f}']
    present = {row['task'] for row in rows}
    left_out = [name for name in CHATCORE if name not in present]
    if left_out:
        notes.insert(0, f'partial: {len(rows)} of {len(CHATCORE)} tasks, without {", ".join(left_out)}')
    return columns | dict(note='; '.join(notes))
