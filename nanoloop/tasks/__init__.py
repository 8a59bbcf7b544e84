"""
Tasks that a chat model is trained on and asked: conversations with a reference answer, and a judge.

    task = make_task('gsm8k', dict(gsm8k='train.jsonl'), 'train')
    item = task[0]
    task.judge(item, 'The answer is\n#### 72')

A task is a class in TASKS. Nothing here needs torch.
"""

from nanoloop.checks import check
from nanoloop.tasks.choice import ArcChallenge, ArcEasy, Mmlu
from nanoloop.tasks.gsm8k import Gsm8k
from nanoloop.tasks.humaneval import HumanEval
from nanoloop.tasks.spelling import SimpleSpelling, SpellingBee

TASKS = {
    task.name: task for task in (ArcEasy, ArcChallenge, Mmlu, Gsm8k, HumanEval, SpellingBee, SimpleSpelling)
}


def make_task(name, options, split='test'):
    """Returns a Task. options: {key: value}, see the classes; split: train or test.

    Raises UserError for files that cannot be read, and Unavailable, one of its kind, if there is no data.
    """
    check(name in TASKS, 'task', name, f'one of {", ".join(TASKS)}')
    return TASKS[name](options, split)
