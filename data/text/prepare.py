"""
Your own text: a file, or every file below a folder.

    python data/text/prepare.py --input my.txt [--tokenizer byte|gpt2|char] [--name text]

Train on it with --dataset=text, or the name you gave.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository
from configurator import command
from data import parse
from nanoloop.checks import UserError
from nanoloop.prepare import write_text
from nanoloop.tokenizer import Bytes, Characters, Tiktoken, read_text

DATA = Path(__file__).resolve().parents[1]
TOKENIZERS = {  # made for the text in `paths`
    'byte': lambda paths: Bytes(),
    'gpt2': lambda paths: Tiktoken('gpt2'),
    'char': lambda paths: Characters(sorted(set().union(*(read_text(path) for path in paths), '\n'))),
}
FLAGS = {
    'input': dict(type=Path, required=True, metavar='PATH', help='a text file or a folder of them'),
    'tokenizer': dict(choices=TOKENIZERS, default='byte', help='the kind of tokens, default: byte'),
    'name': dict(default='text', help='the data set is data/NAME, default: text'),
    'pattern': dict(default='*', help='of a folder, only the files of this pattern, say *.md'),
}


@command
def main(argv):
    args = parse(argv, __doc__, FLAGS)
    paths = [args.input]
    if args.input.is_dir():
        paths = sorted(path for path in args.input.rglob(args.pattern) if path.is_file())
    if not paths or not paths[0].exists():
        raise UserError(f'--input {args.input}: there is no such file, or no {args.pattern} in the folder')
    write_text(DATA / args.name, paths, TOKENIZERS[args.tokenizer](paths), source=args.input.name, say=print)


if __name__ == '__main__':
    main()
