"""
Your own text, or tables of documents, as the data set data/NAME.

    python data/text/prepare.py --input my.txt                                 a file, a token per byte
    python data/text/prepare.py --input notes --pattern '*.md' --name notes    every *.md below a folder
    python data/text/prepare.py --input docs.jsonl --column body --tokenizer gpt2

Train on it with --dataset=NAME. A token takes 2 bytes of disk. Bytes and characters are encoded at about 10
MB per second; gpt2 takes about 4 MB per second and makes a quarter of the tokens.

Text files are in UTF-8, or in UTF-16 with a byte order mark. Of a folder, hidden, binary and empty files and
data sets are left out, and counted. The end of a single file is held out for validation; of several, whole
files are, unless their sizes are too unlike.

Tables are parquet and jsonl (or jsonl.gz) files, and with --column also json and csv. Several processes
encode them; interrupted, the same command goes on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository
from configurator import command, print_line
from nanoloop.prepare import write_text
from nanoloop.prepare_script import (
    FILE_FLAGS,
    SPECIAL,
    TABLE_FLAGS,
    TOKENIZER,
    VAL_SHARE,
    are_tables,
    name_folder,
    parse,
    prepare_tables,
)
from nanoloop.text_files import find_texts
from nanoloop.tokenizer import choose_tokenizer, read_text

FLAGS = {
    **FILE_FLAGS,
    'tokenizer': dict(default='byte', metavar='NAME', help=f'{TOKENIZER}; default: byte'),
    'name': dict(default='text', help='the data set is data/NAME, default: text'),
    'val_share': VAL_SHARE,
    'special_tokens': SPECIAL,
    **TABLE_FLAGS,
}


@command
def main(argv):
    args = parse(argv, __doc__, FLAGS)
    folder, source = name_folder(__file__, args.name), ', '.join(path.name for path in args.input)
    if are_tables(args, of_tables=('max_documents', 'processes')):
        prepare_tables(args, folder, args.input, say=print_line)
        return
    options = dict(any_bytes=args.tokenizer == 'byte', say=print_line)
    paths = [text for path in args.input for text in find_texts(path, args.pattern, folder, **options)]
    tokenizer = choose_tokenizer(args.tokenizer, lambda: map(read_text, paths))
    options = dict(special=args.special_tokens, shard_tokens=args.shard_tokens, say=print_line)
    if args.val_share is not None:
        options['val_share'] = args.val_share
    write_text(folder, list(dict.fromkeys(paths)), tokenizer, source, **options)


if __name__ == '__main__':
    main()
