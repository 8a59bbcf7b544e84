"""
Conversations for supervised fine-tuning, packed into rows, as the data set data/sft.

    python data/sft/prepare.py                                                  the mixture of looped nanochat
    python data/sft/prepare.py --chat mine.jsonl --words words.txt --tokenizer byte --block_size 512
    python data/sft/prepare.py --gsm8k train.jsonl --mmlu FOLDER --take gsm8k=2000 --name math

Then train on it from a base model with config/sft.py: tokenizer and block_size are those of the base.

Without local files it downloads the mixture (MIXTURE below, about 850,000 conversations): 2 GB, 30 minutes
or more, and 1.5 GB of disk for about 450 million tokens of gpt2. With local files only those are in it:

    --chat     a conversation on each line, [{"role": "user", "content": TEXT}, {"role": "assistant", ...}]
               or {"messages": that list}; a system message may come first; .jsonl or .parquet
    --gsm8k    problems {"question", "answer"}: a file, or the training files of a folder
    --mmlu     questions with choices: a file, or the training files of a folder
    --words    a word on each line, of which two spelling tasks are made

Only what the assistant writes counts as a target. Rows have block_size + 1 tokens. No conversation is cut:
one that is longer than a row is left out, and counted. A row takes the longest that fits of 100 that wait;
its rest is filled up with tokens that do not count. A token attends to the earlier conversations of its row,
too, as in the original.
"""

import functools
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository
from configurator import command, print_line
from nanoloop.added_tokens import chat_tokenizer
from nanoloop.checks import check
from nanoloop.conversation import parts_of, read_conversations
from nanoloop.files import cache_folder, sha256
from nanoloop.hub import HubDocuments, reach_hub
from nanoloop.mixture import describe, hold_out, take, write_rows
from nanoloop.prepare import Writer
from nanoloop.prepare_script import TOKENIZER, expanded, fetch, name_folder, parse
from nanoloop.tasks import make_task
from nanoloop.tokenizer import choose_tokenizer


class Share(NamedTuple):
    """How much of a source is in the mixture."""

    train: int  # most conversations for training,
    times: int  # each of them so often
    val: int  # most conversations for validation
    flag: str  # names a local file instead


MIXTURE = {  # chat_sft of github.com/LoopedLMs/looped_nanochat
    'smoltalk': Share(460_000, 1, 24_000, 'chat'),
    'mmlu': Share(100_000, 1, 5_200, 'mmlu'),
    'gsm8k': Share(8_000, 2, 420, 'gsm8k'),
    'identity': Share(1_000, 2, 0, 'chat'),
    'simplespelling': Share(200_000, 1, 0, 'words'),
    'spellingbee': Share(80_000, 1, 0, 'words'),
}
SMOLTALK = 'HuggingFaceTB/smol-smoltalk'
MOST_TAKEN, MOST_INPUTS = 10**8, 2**20  # of --take and --block_size: what fits into memory
IDENTITY = 'https://karpathy-public.s3.us-west-2.amazonaws.com/identity_conversations.jsonl'

FILE = dict(type=expanded, metavar='FILE')
FLAGS = {
    'chat': FILE | dict(nargs='+', action='extend', help='files of conversations; can be given repeatedly'),
    'gsm8k': FILE | dict(help='problems in words, a file or a folder'),
    'mmlu': FILE | dict(metavar='DIR', help='questions with choices, a folder or a file'),
    'words': FILE | dict(help='a word of English on each line'),
    'take': dict(
        nargs='+',
        action='extend',
        default=[],
        metavar='PART=N',
        help='conversations of a part: the first N, or all in turns if it has fewer, say spellingbee=2000; '
        'default: as many as MIXTURE has, and all of --chat once',
    ),
    'tokenizer': dict(
        default='gpt2', metavar='NAME', help=f'{TOKENIZER}, with the special tokens added; default: gpt2'
    ),
    'block_size': dict(type=int, default=2048, metavar='N', help='inputs of a row, default: 2048'),
    'all_tokens': dict(
        action='store_true', help='all tokens count, prompts too, as in earlier figures of the original'
    ),
    'val_share': dict(type=float, metavar='X', help='share of local files for validation, default: 0.1'),
    'name': dict(default='sft', help='the data set is data/NAME, default: sft'),
}


class Conversations(list):
    """Conversations of files as items with `messages`, as tasks have them."""

    def __init__(self, paths):
        super().__init__(dict(messages=messages) for path in paths for messages in read_conversations(path))


def local_sources(args):
    """Returns {name: source} of the local files that the flags name."""
    options = {key: str(getattr(args, key) or '') for key in ('gsm8k', 'mmlu', 'words')}
    sources = {'chat': Conversations(args.chat)} if args.chat else {}
    for name, share in MIXTURE.items():
        if options.get(share.flag):
            sources[name] = make_task(name, options, 'train')
    return sources


def hub_sources(split):
    """Returns {name: source} of what is not local: train or test."""
    with reach_hub(SMOLTALK, 'chat', 'with a conversation on each line'):
        sources = {'smoltalk': HubDocuments(SMOLTALK, 'source').open(split)}
    for name, share in MIXTURE.items():
        if share.flag != 'chat':
            sources[name] = make_task(name, {}, split)
    if split == 'train':
        path = cache_folder() / 'identity_conversations.jsonl'
        path.parent.mkdir(parents=True, exist_ok=True)
        sources['identity'] = Conversations([fetch(IDENTITY, path, print_line, flag='chat')])
    return sources


def has_files(args):
    """Returns whether the flags name local files, of which alone the set is made then."""
    return any((args.chat, args.gsm8k, args.mmlu, args.words))


def part_names(args):
    """Returns the names of the parts that the flags choose: of local files, or of the whole mixture."""
    tasks = [name for name, share in MIXTURE.items() if share.flag != 'chat' and getattr(args, share.flag)]
    return ['chat'] * bool(args.chat) + tasks or list(MIXTURE)


def check_flags(args):
    """Returns --take as {part: N}. Raises UserError for flags that cannot work. It reads no data."""
    names, taken, share = part_names(args), {}, args.val_share
    check(1 <= args.block_size <= MOST_INPUTS, 'block_size', args.block_size, f'from 1 to {MOST_INPUTS:,}')
    for text in args.take:
        name, _, number = text.partition('=')
        check(name in names, 'take', text, f'PART=N, with a part of {", ".join(names)}')
        fits = number.isdecimal() and 0 < int(number) <= MOST_TAKEN
        check(fits, 'take', text, f'PART=N, with a number above 0 and at most {MOST_TAKEN:,}')
        taken[name] = int(number)
    free = share is None or has_files(args)
    check(free, 'val_share', share, 'none: the mixture has a validation split')
    check(share is None or 0 < share < 1, 'val_share', share, 'a number above 0 and below 1')
    return taken


def choose_parts(args, taken):
    """Returns what is in the set: parts for training and for validation, and how many repeats are in neither.

    taken: see check_flags.
    """
    train, local = [], has_files(args)
    for name, source in (local_sources(args) if local else hub_sources('train')).items():
        most, times, *_ = MIXTURE.get(name, (len(source), 1))
        train.append(take(name, source, taken.get(name, times * min(most, len(source)))))
    if local:
        held_out = hold_out(train, 0.1 if args.val_share is None else args.val_share)
        return *held_out, sum(map(len, train)) - sum(map(len, sum(held_out, [])))
    sources = hub_sources('test')
    val = [take(name, source, min(MIXTURE[name].val, len(source))) for name, source in sources.items()]
    return train, val, 0


def texts_of(parts):
    """Yields the texts of conversations, for the characters of the tokenizer char."""
    for part in parts:
        for messages in part:
            yield from (text for message in messages for _, text in parts_of(message['content']))


@command
def main(argv):
    args = parse(argv, __doc__, FLAGS)
    taken, folder, row_len = check_flags(args), name_folder(__file__, args.name), args.block_size + 1
    parts = functools.cache(lambda: choose_parts(args, taken))
    # a tokenizer that is not there is told before anything is downloaded: only char reads the parts
    tokenizer = chat_tokenizer(choose_tokenizer(args.tokenizer, lambda: texts_of(sum(parts()[:2], []))))
    train, val, n_repeats = parts()
    repeats = f', without {n_repeats:,} repeats of those in val' if n_repeats else ''
    print_line(f'{folder.name}: train is {describe(train)}; val is {describe(val)} (conversations{repeats})')
    keys = 'block_size', 'all_tokens', 'val_share'
    made_from = {key: getattr(args, key) for key in keys} | dict(
        files=[sha256(path) for path in args.chat or ()]
    )
    made_from['parts'] = [[part.name, len(part), getattr(part.source, 'data', '')] for part in train]
    source = f'conversations: {describe(train)}'
    writer = Writer(folder, tokenizer, source, resume=False, made_from=made_from, say=print_line)
    if writer.done_by_another:
        return
    for split, parts in dict(train=train, val=val).items():
        write_rows(writer, split, parts, row_len, args.all_tokens, print_line)
    writer.finish(print_line, row_len=row_len)


if __name__ == '__main__':
    main()
