"""
Tiny Shakespeare in GPT-2's tokens.

    python data/shakespeare/prepare.py [--input input.txt]      without --input it is downloaded
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from configurator import command  # noqa: E402
from nanoloop.prepare import fetch, write_text  # noqa: E402
from nanoloop.tokenizer import Tiktoken  # noqa: E402

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'


@command
def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('--input', type=Path, help='the text, if it is here already')
    path = parser.parse_args(argv).input or fetch(URL, FOLDER / 'input.txt')
    write_text(FOLDER, [path], Tiktoken('gpt2'), source=URL)


if __name__ == '__main__':
    main()
