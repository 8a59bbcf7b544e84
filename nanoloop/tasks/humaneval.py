"""
HumanEval: functions that are written from their docstrings (arXiv:2107.03374). Needs no torch.
"""

import re

from nanoloop.checks import check
from nanoloop.tasks.base import Task, ask, take
from nanoloop.tasks.run_code import check_machine, passes
from nanoloop.tasks.sources import Source, Unavailable

FENCE = re.compile(r'```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)', re.DOTALL)


class HumanEval(Task):
    """Functions of Python, judged by tests. Options: humaneval, a file or a folder; run_code.

    run_code: answers may be run, see run_code.py. There is no training split.
    """

    name = 'humaneval'
    option = 'humaneval'
    source = Source('openai/openai_humaneval', 'openai_humaneval', 'prompt', dict(test='test'))

    def parse(self, row, where):
        """Returns (prompt, solution, tests, the name of the function) of a row."""
        kept = take(row, where, 'prompt', 'canonical_solution', 'test', 'entry_point')
        check(kept[3].isidentifier(), f'{where}: entry_point', kept[3], 'the name of a function')
        check('def check(' in kept[2], f'{where}: test', kept[2][:40], 'tests that define check(candidate)')
        return tuple(kept)

    def make_item(self, kept):
        prompt, solution, test, entry_point = kept
        return ask(prompt, prompt + solution, test=test, entry_point=entry_point)

    def judge(self, item, answer):
        self.allow(self.options)
        name, reference = item['entry_point'], item['messages'][-1]['content']
        program = make_program(item['messages'][0]['content'], answer, name)
        return passes(program, reference, item['test'], name)

    @classmethod
    def check_judge(cls, options):
        cls.allow(options)
        check_machine()

    @staticmethod
    def allow(options):
        """Raises Unavailable unless the options allow to run code."""
        if not options.get('run_code'):
            raise Unavailable(
                'humaneval runs programs that the model wrote, without being a security boundary: '
                '--run_code=True allows it'
            )


def make_program(prompt, answer, entry_point):
    """Returns the program of an answer: a whole function, in a code fence or not, or the prompt's rest.

    In front of a whole function stands the beginning of the prompt, its imports and helpers.
    """
    found = FENCE.search(answer)
    code = found[1] if found else answer
    head = re.compile(rf'^def {entry_point}\b', re.MULTILINE)
    if not head.search(code):
        return prompt + code
    start = head.search(prompt)
    return prompt[: start.start() if start else 0] + code
