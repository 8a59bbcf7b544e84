"""Supervised fine-tuning: conversations packed into rows, mixtures, and epochs over rows."""

import random

import numpy as np
import pytest
from test_conversation import ChatBytes, assistant, user

from nanoloop.checks import UserError
from nanoloop.conversation import render
from nanoloop.datasets import open_split, read_meta
from nanoloop.mixture import Part, describe, hold_out, take, write_rows
from nanoloop.packing import pack
from nanoloop.prepare import Writer

TOKENIZER = ChatBytes()
TOKENIZER.token_bytes = [1] * 256 + [0] * 9
BOS = TOKENIZER.special_ids['<|bos|>']

# -----------------------------------------------------------------------------
# packing


def random_conversations(dice, n, longest):
    """Returns n conversations (ids, mask) of random lengths; each has its number in its ids."""
    made = []
    for number in range(n):
        size = dice.choice([1, longest, dice.randint(1, longest)])
        made.append(([1000 + number] * size, [dice.randint(0, 1) for _ in range(size)]))
    return made


@pytest.mark.parametrize('seed', range(30))
def test_packing_loses_no_conversation_and_cuts_none(seed):
    dice = random.Random(seed)
    row_len, n = dice.randint(1, 60), dice.choice([0, 1, 2, 50, 300])
    conversations = random_conversations(dice, n, row_len)
    rows = list(pack(iter(conversations), row_len, filler=7, n_waiting=dice.choice([1, 3, 100])))
    found = {}
    for ids, mask in rows:
        assert len(ids) == len(mask) == row_len
        end = ids.index(7) if 7 in ids else row_len
        assert end > 0 and ids[end:] == [7] * (row_len - end) and not any(mask[end:])
        start = 0
        while start < end:  # equal ids in a row are one conversation, whole
            size = ids[start:end].count(ids[start])
            assert ids[start] not in found and ids[start : start + size] == [ids[start]] * size
            found[ids[start]] = ids[start : start + size], mask[start : start + size]
            start += size
    assert [found[1000 + number] for number in range(n)] == conversations


def test_a_row_takes_the_longest_conversation_that_fits():
    lengths = [3, 9, 4, 6, 1, 2]
    rows = list(pack((([i] * i, [1] * i) for i in lengths), 10, filler=0))
    assert [ids for ids, _ in rows] == [[9] * 9 + [1], [6] * 6 + [4] * 4, [3] * 3 + [2] * 2 + [0] * 5]
    assert rows[-1][1] == [1] * 5 + [0] * 5
    first_come = list(pack((([i] * i, [1] * i) for i in lengths), 10, filler=0, n_waiting=1))
    assert [ids[0] for ids, _ in first_come] == [3, 9, 4, 1]


# -----------------------------------------------------------------------------
# mixtures


def items(*texts):
    return [dict(messages=[user(f'say {text}'), assistant(text)]) for text in texts]


def contents(parts):
    return [part[i][-1]['content'] for part in parts for i in range(len(part))]


def test_a_part_is_the_first_conversations_or_all_in_turns():
    source = items('a', 'b', 'c')
    assert contents([take('x', source, 2)]) == ['a', 'b']
    assert contents([take('x', source, 7)]) == [*'abcabca']
    assert describe([take('x', source, 1000), take('y', source, 0)]) == '1,000 of x'


def test_what_is_held_out_is_never_in_train_also_not_in_another_part():
    texts = [str(i) for i in range(200)]
    first, second = take('first', items(*texts), 400), take('second', items(*texts[100:], *'abcd'), 104)
    train, val = hold_out([first, second], 0.1)
    assert [part.name for part in train] == [part.name for part in val] == ['first', 'second']
    trained, held = contents(train), contents(val)
    assert not set(trained) & set(held) and set(trained) | set(held) == {*texts, *'abcd'}
    assert len(held) == len(set(held)) and 20 <= len(val[0]) <= 30
    assert all(trained.count(text) == 2 for text in texts[:100] if text in trained)
    again = hold_out([take('other', items(*reversed(texts)), 200)], 0.1)[1]
    assert set(contents(again)) == set(contents(hold_out([first], 0.1)[1]))  # of any order


def test_a_part_always_keeps_something_to_train_on():
    for n in (1, 2, 3):
        train, val = hold_out([take('x', items(*'abc'[:n]), n)], 0.9)
        assert (
            len(train[0]) >= 1 and len(val[0]) == (n > 1) * len(val[0]) and len(train[0]) + len(val[0]) == n
        )
        assert n == 1 or len(val[0]) >= 1


def prepare(tmp_path, train, val, row_len=40, **options):
    """Writes a data set of parts. Returns its folder."""
    writer = Writer(tmp_path / 'sft', TOKENIZER, 'test', resume=False)
    for split, parts in dict(train=train, val=val).items():
        write_rows(writer, split, parts, row_len, **options)
    writer.finish(row_len=row_len)
    return tmp_path / 'sft'


def read_rows(folder, split, row_len):
    ids = np.fromfile(folder / f'{split}.bin', '<u2').reshape(-1, row_len)
    return ids, np.fromfile(folder / f'{split}.mask', np.uint8).reshape(-1, row_len)


def conversations_in(ids):
    """Returns the conversations of a row without its filler, lists of ids."""
    starts = [i for i, token in enumerate(ids) if token == BOS] + [len(ids)]
    return [ids[a:b] for a, b in zip(starts, starts[1:], strict=False) if b > a + 1]


def test_a_data_set_has_every_conversation_whole_and_counts_what_the_assistant_writes(tmp_path):
    dice, lines = random.Random(3), []
    source = items(*('x' * dice.randint(0, 30) + str(i) for i in range(300)))
    folder = prepare(tmp_path, [take('x', source, 300)], [take('y', source, 5)], row_len=40, say=lines.append)
    rendered = [render(item['messages'], TOKENIZER) for item in source]
    fitting = {tuple(ids): mask for ids, mask in rendered if len(ids) <= 40}
    ids, mask = read_rows(folder, 'train', 40)
    found = [tuple(found) for row in ids.tolist() for found in conversations_in(row)]
    assert sorted(found) == sorted(fitting)
    assert mask.sum() == sum(map(sum, fitting.values()))
    assert (mask.astype(bool) & (ids == BOS)).sum() == 0
    left_out = f'; left out: {300 - len(fitting)} longer than a row'
    assert lines[0].startswith(
        f'sft: train has {len(fitting)} conversations in {len(ids)} rows of 40 tokens, '
    )
    assert lines[0].endswith(left_out)
    split = open_split(folder, read_meta(folder), 'train', 39, 265)
    assert split.train_windows.sum() == len(ids)


def test_all_tokens_counts_prompts_but_not_what_fills_up_a_row(tmp_path):
    source = items('a', 'b')
    folder = prepare(tmp_path, [take('x', source, 2)], [take('x', source, 1)], all_tokens=True)
    ids, mask = read_rows(folder, 'train', 40)
    used = sum(len(render(item['messages'], TOKENIZER)[0]) for item in source)
    assert mask.sum() == used < mask.size
    assert ids[mask == 0].tolist() == [BOS] * (mask.size - used)


def test_a_split_without_a_conversation_that_fits_is_refused_with_what_helps(tmp_path):
    part, silent = take('x', items('a' * 99), 1), Part('x', [dict(messages=[user('a')])], [0])
    for wrong, told in (
        (part, '1 longer than a row.*a larger --block_size'),
        (silent, '1 without an answer'),
    ):
        with pytest.raises(UserError, match=f'sft: train has no conversation of 1 .left out: {told}'):
            prepare(tmp_path, [wrong], [part])


def test_the_order_of_a_mixture_is_always_the_same_and_mixes_its_parts(tmp_path):
    parts = [take('x', items(*map(str, range(50))), 50), take('y', items(*map(str, range(50, 100))), 50)]
    rows = [read_rows(prepare(tmp_path / name, parts, parts), 'train', 40)[0] for name in 'ab']
    assert (rows[0] == rows[1]).all()
    texts = [bytes(t for t in row if t < 256) for row in rows[0].tolist()[:20]]
    assert any(int(text[4:6]) < 50 for text in texts) and any(int(text[4:6]) >= 50 for text in texts)
