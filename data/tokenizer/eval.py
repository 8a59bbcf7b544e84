"""
Compares tokenizers on your own text: bytes per token, and whether the tokens are the text again.

    python data/tokenizer/eval.py --input my.txt             that of data/tokenizer/train.py, and GPT-2's
    python data/tokenizer/eval.py --input my.txt notes --tokenizer a.json cl100k_base

GPT-2's tokenizer is always in the table: `vs gpt2` says how many more bytes a token stands for. More bytes
per token mean fewer tokens for the same text. Take a text that no tokenizer was trained on.
"""

import os
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository
from configurator import command, print_error, print_line
from nanoloop.bpe_training import round_trip
from nanoloop.checks import UserError, check
from nanoloop.prepare_script import COLUMN, FILE_FLAGS, MAX_DOCUMENTS, parse, read_documents
from nanoloop.tables import align
from nanoloop.tokenizer import choose_tokenizer

TRAINED = Path(__file__).resolve().parent / 'tokenizer.json'
BASELINE = 'gpt2'
FLAGS = {
    **FILE_FLAGS,
    'tokenizer': dict(
        nargs='+', metavar='NAME', help='byte, encodings of tiktoken, FILE.json; default: that of train.py'
    ),
    'column': COLUMN,
    'max_documents': MAX_DOCUMENTS,
}
HEAD = ['text', 'tokenizer', 'vocabulary', 'bytes', 'tokens', 'bytes/token', f'vs {BASELINE}', 'round trip']


def find_tokenizers(names):
    """Returns {name: tokenizer}, GPT-2's first; if that cannot be had, a line says so."""
    expected = 'byte, encodings of tiktoken or FILE.json: char has the characters of its own text'
    check('char' not in names, 'tokenizer', 'char', expected)
    tokenizers = {}
    try:
        tokenizers[BASELINE] = choose_tokenizer(BASELINE, None)
    except UserError as error:
        if BASELINE in names:
            raise
        print_error(f'without {BASELINE}: {error}')
    return tokenizers | {name: choose_tokenizer(name, None) for name in names if name not in tokenizers}


def measure(tokenizers, texts):
    """Returns the bytes of texts, and for each tokenizer its number of tokens and the first fault, or ''."""
    n_bytes, counts, faults = 0, dict.fromkeys(tokenizers, 0), dict.fromkeys(tokenizers, '')
    for text in texts:
        n_bytes += len(text.encode())
        for name, tokenizer in tokenizers.items():
            n_tokens, fault = round_trip(tokenizer, text)
            counts[name], faults[name] = counts[name] + n_tokens, faults[name] or fault
    return n_bytes, {name: (counts[name], faults[name]) for name in tokenizers}


def rows_of(text, tokenizers, n_bytes, results):
    """Returns the lines of the table about one text, a list of cells each."""
    baseline, rows = results.get(BASELINE, (0, ''))[0], []
    for name, (n_tokens, fault) in results.items():
        gain = f'{baseline / n_tokens - 1:+.1%}' if baseline and name != BASELINE else ''
        sizes = [f'{n:,}' for n in (len(tokenizers[name].token_bytes), n_bytes, n_tokens)]
        trip = f'no: {fault}' if fault else 'yes'
        rows.append([text, name, *sizes, f'{n_bytes / n_tokens:.3f}', gain, trip])
    return rows


@command
def main(argv):
    args = parse(argv, __doc__, FLAGS)
    own = [os.path.relpath(TRAINED)] if TRAINED.exists() else []
    names = own if args.tokenizer is None else args.tokenizer
    tokenizers, table = find_tokenizers(names), [HEAD]
    if not tokenizers:
        raise UserError('there is no tokenizer: --tokenizer names one, data/tokenizer/train.py trains one')
    for path in args.input:
        texts = read_documents(Namespace(**vars(args) | dict(input=[path])), print_error)
        n_bytes, results = measure(tokenizers, texts)
        if not n_bytes:
            raise UserError(f'--input {path}: there is no text in it')
        table += rows_of(path.name, tokenizers, n_bytes, results)
    for line in align(table):
        print_line(line)


if __name__ == '__main__':
    main()
