"""
Trains a tokenizer on your own text: a byte-level byte-pair encoding, saved as a tokenizer.json.

    python data/tokenizer/train.py --input my.txt --vocab_size 4096
    python data/tokenizer/train.py --input notes --pattern '*.md' --out notes.json
    python data/tokenizer/train.py --input 'docs/*.parquet' --column body
    python data/text/prepare.py --input my.txt --tokenizer data/tokenizer/tokenizer.json

A text is split as GPT-4 does it, but numbers into groups of one or two digits. All bytes are tokens, so every
text has tokens, and those are the text again. The first nine ids are the special tokens of conversations,
<|bos|> to <|output_end|>. The same text makes the same tokenizer.

Files are read as data/text/prepare.py does it. Of each document of a table the first 10,000 characters count,
so that a few long ones do not decide; a text file counts whole.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository
from configurator import command, print_line
from nanoloop.added_tokens import SPECIAL
from nanoloop.bpe_training import Excerpt, check_vocab_size, train_tokenizer
from nanoloop.checks import UserError, check
from nanoloop.files import replace_file
from nanoloop.prepare_script import (
    COLUMN,
    FILE_FLAGS,
    MAX_DOCUMENTS,
    are_tables,
    expanded,
    parse,
    read_documents,
)
from nanoloop.text_files import count

OUT = Path(__file__).resolve().parent / 'tokenizer.json'
DOC_CAP, MAX_CHARS = 10_000, 2 * 10**9
FLAGS = {
    **FILE_FLAGS,
    'vocab_size': dict(type=int, default=2**15, metavar='N', help='tokens, special ones too; default: 32768'),
    'out': dict(
        type=expanded, default=OUT, metavar='PATH', help='the file, default: data/tokenizer/tokenizer.json'
    ),
    'doc_cap': dict(
        type=int, metavar='N', help=f'characters of each document that count, default: {DOC_CAP:,} of tables'
    ),
    'max_chars': dict(
        type=int, default=MAX_CHARS, metavar='N', help=f'characters in all, default: {MAX_CHARS:,}'
    ),
    'column': COLUMN,
    'max_documents': MAX_DOCUMENTS,
}


def check_flags(args):
    """Raises UserError for flags that cannot work, before a text is read."""
    check_vocab_size(args.vocab_size)
    for key in ('doc_cap', 'max_chars'):
        check(getattr(args, key) is None or getattr(args, key) >= 1, key, getattr(args, key), 'at least 1')
    writable = args.out.suffix == '.json' and args.out.parent.is_dir() and not args.out.is_dir()
    check(writable, 'out', str(args.out), 'the name of a file .json in a folder that exists')


@command
def main(argv):
    args = parse(argv, __doc__, FLAGS)
    check_flags(args)
    doc_cap = args.doc_cap or (DOC_CAP if are_tables(args) else None)
    texts = Excerpt(read_documents(args, print_line, leave_out=args.out), doc_cap, args.max_chars)
    began = time.perf_counter()
    tokenizer = train_tokenizer(texts, args.vocab_size)
    if not texts.chars:
        raise UserError(f'--input {args.input[0]}: there is no text to learn from')
    with replace_file(args.out, 'wb') as file:
        file.write(tokenizer.to_str(pretty=True).encode())
    amount = f'{count(texts.chars, "character")} of {count(texts.count, "text")}'
    print_line(f'trained on {amount} in {time.perf_counter() - began:.1f} s')
    size = tokenizer.get_vocab_size()
    if size < args.vocab_size:
        print_line(f'vocab_size={args.vocab_size} takes more text: no pair of tokens is twice in this one')
    print_line(f'written: {args.out}, {size:,} tokens, {len(SPECIAL)} of them special')


if __name__ == '__main__':
    main()
