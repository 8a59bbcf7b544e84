"""
Tiny Shakespeare in GPT-2's tokens: 301,966 for training and 36,059 for validation, the end of the text. It
takes a few seconds. The text, 1.1 MB, is downloaded to this folder unless it is there or given.

    python data/shakespeare/prepare.py [--input FILE]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository
from configurator import command, print_line
from nanoloop.prepare import write_text
from nanoloop.prepare_script import TEXT_FLAGS, fetch, parse
from nanoloop.tokenizer import Tiktoken

FOLDER = Path(__file__).resolve().parent
URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'


@command
def main(argv):
    args = parse(argv, __doc__, TEXT_FLAGS)
    path = args.input or fetch(URL, FOLDER / 'input.txt', print_line)
    write_text(FOLDER, [path], Tiktoken('gpt2'), URL, args.val_share, say=print_line)


if __name__ == '__main__':
    main()
