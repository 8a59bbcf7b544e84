"""
GSM8K: problems in words, solved in steps (arXiv:2110.14168). Needs no torch.
"""

import re

from nanoloop.checks import check
from nanoloop.tasks.base import Task, ask, final_number, part, take
from nanoloop.tasks.sources import Source

ANNOTATION = re.compile(r'<<([^<>]*)=([^<>=]*)>>')  # of the calculator, such as <<48/2=24>>


class Gsm8k(Task):
    """Problems in words whose answer is a number after ####. Options: gsm8k, a file or a folder.

    The calculator annotations of a solution are its tool calls: <<48/2=24>> is the part python 48/2 and the
    part python_output 24. An answer is right if its first number after #### is that of the solution, without
    commas and compared as a text, as in the published judge.
    """

    name, tools = 'gsm8k', True
    option = 'gsm8k'
    source = Source('openai/gsm8k', 'main', 'question', dict(train='train', test='test'), (), ('socratic',))

    def parse(self, row, where):
        """Returns (question, solution) of a row."""
        question, solution = take(row, where, 'question', 'answer')
        known = final_number(solution)
        check(
            known is not None,
            f'{where}: answer',
            solution[-40:],
            'a solution that ends with #### and a number',
        )
        return question, solution

    def make_item(self, kept):
        question, solution = kept
        return ask(question, split_solution(solution), answer=final_number(solution))

    def judge(self, item, answer):
        return final_number(answer) == item['answer']


def split_solution(solution):
    """Returns the parts of a solution: its texts, and a tool call with its result for each annotation."""
    parts, start = [], 0
    for found in ANNOTATION.finditer(solution):
        parts += [part('text', solution[start : found.start()])] if found.start() > start else []
        parts += [part('python', found[1]), part('python_output', found[2])]
        start = found.end()
    return parts + ([part('text', solution[start:])] if solution[start:] else [])
