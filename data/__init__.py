"""
What the scripts data/NAME/prepare.py share: how they read their flags, and those of sets of the hub.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from nanoloop.checks import UserError
from nanoloop.hub import HubDocuments, write_hub
from nanoloop.prepare import SHARD_TOKENS

# arguments of ArgumentParser.add_argument, by the name of the flag
TEXT_FLAGS = {'input': dict(type=Path, metavar='FILE', help='the text, if it is here already')}
HUB_FLAGS = {
    'input': dict(nargs='*', metavar='FILE', help='local parquet files to read instead, as one split'),
    'processes': dict(type=int, metavar='N', help='tokenising processes, default: one per core'),
    'streaming': dict(action='store_true', help='read over the network, keep no copy on this disk'),
    'tokenizer': dict(default='gpt2', metavar='NAME', help='an encoding of tiktoken, default: gpt2'),
    'max_documents': dict(type=int, metavar='N', help='documents to read of each split, default: all'),
    'shard_tokens': dict(
        type=int, metavar='N', default=SHARD_TOKENS, help=f'tokens per file, default: {SHARD_TOKENS:,}'
    ),
}


class Parser(ArgumentParser):
    """An ArgumentParser whose errors are one line, as those of the other scripts."""

    def error(self, message):
        raise UserError(f'{message} (see --help)')


def parse(argv, doc, flags):
    """Returns the values of `flags` in argv. --help prints doc, the script's docstring, and the flags."""
    parser = Parser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    for name, options in flags.items():
        parser.add_argument(f'--{name}', **options)
    return parser.parse_args(argv)


def prepare_hub(argv, doc, folder, path, splits, eot=True, **load):
    """Prepares a set of the hub with the flags in argv; interrupted, the same command goes on.

    doc: the script's docstring. path, load: of HubDocuments. splits, eot: of write_hub.
    """
    args = parse(argv, f'{doc}\nInterrupted, the same command goes on.', HUB_FLAGS)
    if args.input:
        path, load, splits = 'parquet', dict(data_files=args.input), {'train': 'train'}
    documents = HubDocuments(path, streaming=args.streaming, max_documents=args.max_documents, **load)
    options = dict(tokenizer=args.tokenizer, processes=args.processes, shard_tokens=args.shard_tokens)
    write_hub(folder, documents, splits, eot=eot, **options, say=print)
