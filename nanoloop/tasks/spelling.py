"""
Tasks about the letters of words, which tokens hide: SpellingBee counts a letter, SimpleSpelling spells. As in
nanochat, they are made from a list of English words. Needs no torch.
"""

import random
import string
import urllib.request
from pathlib import Path

from nanoloop.checks import UserError, check
from nanoloop.core_bundle import NETWORK_ERRORS, SECONDS
from nanoloop.files import cache_folder, replace_file
from nanoloop.tasks.base import Task, ask, final_number, part
from nanoloop.text_files import hash_fraction
from nanoloop.tokenizer import read_text

WORDS_URL = 'https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt'
TEST_SHARE = 1 / 16  # of the words; the others are for training


class Spelling(Task):
    """Base class of tasks that are made from words. Options: words, a file with a word on each line.

    An item is a function of the words, the split and its number. Which split a word belongs to is a hash of
    the word. sizes: the number of items of each split.
    """

    option, sizes = 'words', {}

    def read(self):
        """Returns the words of the split."""
        file = self.options.get(self.option) or ''
        found = not file or Path(file).expanduser().is_file()
        check(found, 'words', file, 'a file that exists, with a word on each line')
        text = read_text(file or download_words())
        lines = dict.fromkeys(line.strip().lower() for line in text.split('\n'))
        words = [word for word in lines if word and set(word) <= set(string.ascii_lowercase)]
        words = [word for word in words if (hash_fraction(word) < TEST_SHARE) == (self.split == 'test')]
        check(
            words, 'words', file, f'a file with a word of English on each line, it has none for {self.split}'
        )
        return words

    def __len__(self):
        return self.sizes[self.split]

    def __getitem__(self, i):
        number = range(len(self))[i]
        dice = random.Random(f'{self.name} {self.split} {number}')
        return self.make_item(dice.choice(self.rows), dice)


def download_words():
    """Returns the path of the list of words, downloaded once. Raises UserError without a network."""
    path = cache_folder() / 'words_alpha.txt'
    if not path.is_file():
        try:
            with urllib.request.urlopen(WORDS_URL, timeout=SECONDS) as answer:
                content = answer.read()
        except NETWORK_ERRORS as error:
            reason = getattr(error, 'reason', '') or error
            raise UserError(
                f'the list of words, {WORDS_URL}, cannot be reached ({reason}): --words=FILE names a '
                'file with a word on each line'
            ) from None
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path, 'wb') as file:
            file.write(content)
    return path


class SimpleSpelling(Spelling):
    """Spells a word, with commas between its letters."""

    name = 'simplespelling'
    sizes = dict(train=200_000, test=256)

    def make_item(self, word, dice):
        return ask(f'Spell the word: {word}', spell(word))

    def judge(self, item, answer):
        return answer.strip() == item['messages'][-1]['content']


def spell(word):
    """Returns the spelling of a word: cat:c,a,t."""
    return f'{word}:{",".join(word)}'


QUESTIONS = (
    'How many {letter} are in {word}',
    'How many {letter} are in the word {word}',
    'How many {letter} are there in {word}',
    'How many {letter} does {word} have',
    'How many {letter} does the word {word} contain',
    'How many times does {letter} appear in {word}',
    'How many times does the letter {letter} occur in the word {word}',
    'How often is {letter} in {word}',
    'How often does {letter} occur in the word {word}',
    'Count the {letter} in {word}',
    'Count how many times {letter} appears in {word}',
    'In the word {word}, how many {letter} are there',
    'In {word}, how often do you find {letter}',
    'What is the number of {letter} in {word}',
    'Tell me how many {letter} there are in {word}',
    'I need the number of times that {letter} is in the word {word}',
)
QUOTES = ('', "'", '"')


class SpellingBee(Spelling):
    """Counts a letter in a word: first letter by letter, then with a call of the calculator."""

    name, tools = 'spellingbee', True
    sizes = dict(train=80_000, test=256)

    def make_item(self, word, dice):
        # mostly a letter of the word, sometimes any letter: the count may be 0
        letter = dice.choice(word if dice.random() < 0.9 else string.ascii_lowercase)
        question = dice.choice(QUESTIONS)
        question = question.lower() if dice.random() < 0.3 else question
        names = dict(letter=letter, word=word)
        quotes = {name: dice.choice(QUOTES) for name in names}
        question = question.format(
            **{key: f'{quotes[key]}{text}{quotes[key]}' for key, text in names.items()}
        )
        count = str(word.count(letter))
        return ask(question + '?' * (dice.random() < 0.5), count_letter(word, letter), answer=count)

    def judge(self, item, answer):
        return final_number(answer) == item['answer']


def count_letter(word, letter):
    """Returns the parts of the answer that counts a letter in a word."""
    n, lines = 0, []
    for place, char in enumerate(word, 1):
        n += char == letter
        lines.append(f'{place}:{char}' + f' yes, {n}' * (char == letter))
    steps = f'I count {letter} in {word} letter by letter.\n\n{spell(word)}\n\n' + '\n'.join(lines)
    return [
        part('text', f'{steps}\n\nThat makes {n}. I check it with Python.\n\n'),
        part('python', f"'{word}'.count('{letter}')"),
        part('python_output', str(n)),
        part('text', f'\n\nPython says {n}, too.\n\n#### {n}'),
    ]
