"""
Your own text: a file, or every file below a folder.

    python data/text/prepare.py --input my.txt [--tokenizer byte|gpt2|char] [--name text]

Train on it with --dataset=text, or the name you gave.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from configurator import command  # noqa: E402
from nanoloop.checks import UserError  # noqa: E402
from nanoloop.prepare import write_text  # noqa: E402
from nanoloop.tokenizer import Bytes, Characters, Tiktoken, read_text  # noqa: E402

TOKENIZERS = {
    'byte': lambda paths: Bytes(),
    'gpt2': lambda paths: Tiktoken('gpt2'),
    'char': lambda paths: Characters(sorted(set().union(*(read_text(path) for path in paths), '\n'))),
}


@command
def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--input', type=Path, required=True, help='a text file or a folder of them')
    add('--tokenizer', choices=TOKENIZERS, default='byte')
    add('--name', default='text', help='the data set is data/NAME')
    add('--pattern', default='*', help='of a folder, only the files of this pattern, say *.md')
    args = parser.parse_args(argv)
    folder = args.input.is_dir()
    paths = sorted(p for p in args.input.rglob(args.pattern) if p.is_file()) if folder else [args.input]
    if not paths or not paths[0].exists():
        raise UserError(f'--input {args.input}: there is no such file, or no {args.pattern} in the folder')
    write_text(FOLDER.parent / args.name, paths, TOKENIZERS[args.tokenizer](paths), source=args.input.name)


if __name__ == '__main__':
    main()
