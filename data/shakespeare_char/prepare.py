"""
Tiny Shakespeare, a token per character: 65 of them, 1,003,854 tokens for training and 111,540 for validation,
the end of the text. It takes a second. The text, 1.1 MB, is downloaded here unless it is there or given.

    python data/shakespeare_char/prepare.py [--input FILE]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository
from configurator import command, print_line
from nanoloop.prepare import write_text
from nanoloop.prepare_script import TEXT_FLAGS, fetch, parse
from nanoloop.tokenizer import Characters, read_text

FOLDER = Path(__file__).resolve().parent
URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'


@command
def main(argv):
    args = parse(argv, __doc__, TEXT_FLAGS)
    path = args.input or fetch(URL, FOLDER / 'input.txt', print_line)
    write_text(FOLDER, [path], Characters(sorted(set(read_text(path)))), URL, args.val_share, say=print_line)


if __name__ == '__main__':
    main()
