"""
Questions with choices: ARC (arXiv:1803.05457) and MMLU (arXiv:2009.03300). Needs no torch.

The prompt is nanochat's. A letter stands behind its choice, without a blank: so its token is the same one as
in the answer.
"""

import string

from nanoloop.checks import UserError
from nanoloop.tasks.base import Task, ask
from nanoloop.tasks.sources import Source


class Choice(Task):
    """A task whose answers are letters. A few questions have 3 or 5 choices; chance is still 1 of 4."""

    kind, baseline = 'choice', 0.25

    def parse(self, row, where):
        """Returns (question, choices, letters, the right letter) of a row, see parse_choices."""
        return parse_choices(row, where)

    def make_item(self, kept):
        question, choices, letters, answer = kept
        return ask(render_choices(question, choices, letters), answer, letters=letters, answer=answer)

    def judge(self, item, answer):
        return answer.strip() == item['answer']


def render_choices(question, choices, letters):
    """Returns the prompt of a question with choices."""
    lines = [f'- {choice}={letter}\n' for choice, letter in zip(choices, letters, strict=True)]
    head, end = (
        f'Multiple Choice question: {question}\n',
        '\nRespond only with the letter of the correct answer.',
    )
    return head + ''.join(lines) + end


def parse_choices(row, where):
    """Returns (question, choices, letters, the right letter) of a row, tuples and texts.

    A row is one of these, or has the forms of their fields mixed:

        {question, choices: {text: [...], label: [...]}, answerKey}           ARC on the hub
        {question: {stem, choices: [{text, label}, ...]}, answerKey}          ARC as it was published
        {question, choices: [...], answer: a number from 0 on or a letter}    MMLU
        {query, choices: [...], gold: a number from 0 on}                     CORE

    Raises UserError for another row.
    """
    row = row.get('train') or row  # as the training split of MMLU was once packed
    question = row.get('question', row.get('query'))
    choices = row.get('choices')
    if isinstance(question, dict):
        question, choices = question.get('stem'), question.get('choices')
    if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        choices = {key: [choice.get(key) for choice in choices] for key in ('text', 'label')}
    letters = None
    if isinstance(choices, dict):
        choices, letters = choices.get('text'), choices.get('label')
    fits = isinstance(choices, list) and 2 <= len(choices) <= len(string.ascii_uppercase)
    letters = list(string.ascii_uppercase[: len(choices)]) if fits and letters is None else letters
    fits = fits and isinstance(letters, list) and len(set(map(str, letters))) == len(choices) == len(letters)
    texts = [question, *(choices if fits else ()), *(letters if fits else ())]
    if not (fits and all(isinstance(text, str) for text in texts) and all(letters)):
        raise UserError(f'{where}: expected a question and its choices, texts, with a label each or none')
    answer = find_letter(row, letters)
    if answer is None:
        raise UserError(
            f'{where}: expected answerKey, answer or gold, one of {" ".join(letters)} or a number from 0'
        )
    return question.removeprefix('Question: '), tuple(choices), tuple(letters), answer


def find_letter(row, letters):
    """Returns the letter that is the answer of a row, None if it names none of them."""
    answer = next((row[key] for key in ('answerKey', 'answer', 'gold') if row.get(key) is not None), None)
    if isinstance(answer, str):
        answer = answer.strip()
        if answer in letters:
            return answer
        answer = int(answer) if answer.isdecimal() and answer.isascii() else None
    known = type(answer) is int and 0 <= answer < len(letters)
    return letters[answer] if known else None


ARC_SPLITS = dict(train='train', test='test')


class ArcEasy(Choice):
    """Science questions of school exams, the easier part. Options: arc, a file or a folder."""

    name = 'arc_easy'
    option = 'arc'
    source = Source('allenai/ai2_arc', 'ARC-Easy', 'question', ARC_SPLITS, ('easy',), ('challenge',))


class ArcChallenge(Choice):
    """Science questions of school exams, the harder part. Options: arc, a file or a folder."""

    name = 'arc_challenge'
    option = 'arc'
    source = Source('allenai/ai2_arc', 'ARC-Challenge', 'question', ARC_SPLITS, ('challenge',), ('easy',))


class Mmlu(Choice):
    """Questions of 57 subjects; train is auxiliary_train. Options: mmlu, a file or a folder."""

    name = 'mmlu'
    option = 'mmlu'
    source = Source('cais/mmlu', 'all', 'question', dict(train='auxiliary_train', test='test'), ('all',))
