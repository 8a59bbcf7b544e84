"""
Writes conversations in which a model says who it is, for data/sft/prepare.py --chat.

    python data/sft/identity.py                                       data/sft/identity.jsonl
    python data/sft/identity.py --name Loopy --maker "Ada" --output loopy.jsonl

A conversation is one to three questions with their answers, each drawn from the tables below, at random but
the same for the same --seed. Change the tables, or write a file of your own: one conversation on each line.
"""

import json
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository
from configurator import command, print_line
from nanoloop.checks import check
from nanoloop.files import replace_file
from nanoloop.prepare_script import expanded, parse

GREETINGS = ('', '', '', '', 'Hello! ', 'Hi! ', 'Hey, ', 'Good morning. ', 'Hello, ')
ENDS = ('?', '?', '?', '', '??')
# topic: (questions without their marks, answers); {name} and {maker} are filled in
TOPICS = {
    'name': (
        (
            'who are you',
            'what is your name',
            "what's your name",
            'what are you called',
            'can you tell me who you are',
            'tell me your name',
            'who am I talking to',
            'what should I call you',
        ),
        (
            'I am {name}, a small looped language model.',
            'My name is {name}. I am a small language model that thinks in loops.',
            'I am {name}.',
            'You are talking to {name}, a small looped language model.',
        ),
    ),
    'maker': (
        ('who made you', 'who built you', 'who trained you', 'where do you come from', 'who is your maker'),
        (
            'I was trained by {maker}, with nanoLOOP.',
            '{maker} trained me, with the nanoLOOP code.',
            'I come from {maker}. My code is nanoLOOP, which is open source.',
        ),
    ),
    'loops': (
        (
            'how do you work',
            'what is a looped model',
            'what does looped mean',
            'why do you loop',
            'what is special about you',
            'how do you think',
        ),
        (
            'I use the same few layers several times. More loops let me think longer without more weights.',
            'A part of my layers runs in a loop: the weights stay the same, and the depth is a number.',
            'Before each token I go through the same layers a few times. That is my loop.',
        ),
    ),
    'skills': (
        ('what can you do', 'what are you good at', 'can you help me', 'how can you help me'),
        (
            'I am small. I can say who I am, spell words and count their letters.',
            'Not much yet: I spell words, count letters and talk about myself.',
            'I can spell a word for you, or count a letter in it.',
        ),
    ),
    'human': (
        ('are you a human', 'are you a person', 'are you alive', 'are you a robot', 'do you have feelings'),
        (
            'No, I am {name}, a language model.',
            'I am a program: a small looped language model called {name}.',
        ),
    ),
    'greeting': (
        ('hello', 'hi', 'hey there', 'good morning', 'hello there'),
        ('Hello! I am {name}. What can I do for you?', 'Hi! I am {name}, a small looped language model.'),
    ),
    'thanks': (
        ('thank you', 'thanks', 'thanks a lot', 'that is all, thank you'),
        ('You are welcome!', 'You are welcome. Come back for another loop.'),
    ),
}


def draw_conversation(dice, names):
    """Returns a conversation of one to three questions on different topics, a list of messages."""
    messages = []
    for number, topic in enumerate(dice.sample(list(TOPICS), dice.choice((1, 1, 2, 3)))):
        questions, answers = TOPICS[topic]
        question = dice.choice(questions)
        if topic not in ('greeting', 'thanks'):
            question = (dice.choice(GREETINGS) if number == 0 else '') + question + dice.choice(ENDS)
        if dice.random() < 0.5:
            question = question[0].upper() + question[1:]
        messages.append(dict(role='user', content=question))
        messages.append(dict(role='assistant', content=dice.choice(answers).format(**names)))
    return messages


FLAGS = {
    'name': dict(default='nanoLOOP', help='what the model is called, default: nanoLOOP'),
    'maker': dict(default='its user', help='who has trained it, default: its user'),
    'output': dict(
        type=expanded,
        default=Path(__file__).with_name('identity.jsonl'),
        metavar='FILE',
        help='the file, default: data/sft/identity.jsonl',
    ),
    'n': dict(type=int, default=1000, metavar='N', help='conversations, default: 1000'),
    'seed': dict(type=int, default=0, help='of the draws, default: 0'),
}


@command
def main(argv):
    args = parse(argv, __doc__, FLAGS)
    check(args.n > 0, 'n', args.n, 'at least 1')
    writable = args.output.parent.is_dir() and not args.output.is_dir()
    check(writable, 'output', str(args.output), 'a file in a folder that exists')
    dice, names = random.Random(args.seed), dict(name=args.name, maker=args.maker)
    lines = [json.dumps(draw_conversation(dice, names), ensure_ascii=False) for _ in range(args.n)]
    with replace_file(args.output) as file:
        file.writelines(f'{line}\n' for line in lines)
    path = os.path.relpath(args.output)
    print_line(f'{args.n:,} conversations, {len(set(lines)):,} different ones, in {path}')


if __name__ == '__main__':
    main()
