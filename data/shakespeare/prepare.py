"""
Tiny Shakespeare in GPT-2's tokens.

    python data/shakespeare/prepare.py [--input FILE]      without --input it is downloaded
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository
from configurator import command
from data import TEXT_FLAGS, parse
from nanoloop.prepare import fetch, write_text
from nanoloop.tokenizer import Tiktoken

FOLDER = Path(__file__).resolve().parent
URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'


@command
def main(argv):
    path = parse(argv, __doc__, TEXT_FLAGS).input or fetch(URL, FOLDER / 'input.txt')
    write_text(FOLDER, [path], Tiktoken('gpt2'), source=URL, say=print)


if __name__ == '__main__':
    main()
