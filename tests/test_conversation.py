"""Conversations as tokens and masks, and the calculator."""

import json
import random
import re
import time
from fractions import Fraction

import pytest

from nanoloop.calculator import DIGITS, MAX_LENGTH, calculate
from nanoloop.checks import UserError
from nanoloop.conversation import read_conversations, render, render_prompt
from nanoloop.tokenizer import Bytes

NAMES = (
    'bos user_start user_end assistant_start assistant_end python_start python_end output_start output_end'
)


class ChatBytes(Bytes):
    """Bytes with the special tokens after them."""

    special_ids = {f'<|{name}|>': 256 + i for i, name in enumerate(NAMES.split())}


TOKENIZER = ChatBytes()
TEXTS = {i: text for text, i in TOKENIZER.special_ids.items()}


def written(ids, mask):
    """Returns a rendered conversation as a text, in which braces are around what counts."""
    text = ''
    for i, counts in zip(ids, mask, strict=True):
        token = TEXTS.get(i) or chr(i)
        text += f'{{{token}}}' if counts else token
    return text.replace('}{', '')


def user(content):
    return dict(role='user', content=content)


def assistant(content):
    return dict(role='assistant', content=content)


def part(kind, text):
    return dict(type=kind, text=text)


def test_a_conversation_is_rendered_as_published_and_only_the_assistants_own_tokens_count():
    parts = [part('text', 'so '), part('python', '1+1'), part('python_output', '2'), part('text', '!')]
    messages = [dict(role='system', content='Be'), user('Hi'), assistant('Yo'), user('1+1'), assistant(parts)]
    assert written(*render(messages, TOKENIZER)) == (
        '<|bos|><|user_start|>Be\n\nHi<|user_end|><|assistant_start|>{Yo<|assistant_end|>}'
        '<|user_start|>1+1<|user_end|><|assistant_start|>{so <|python_start|>1+1<|python_end|>}'
        '<|output_start|>2<|output_end|>{!<|assistant_end|>}'
    )


def test_a_prompt_ends_where_the_answer_begins_and_leaves_out_the_last_answer():
    messages = [user('Hi'), assistant('Yo'), user('1+1')]
    expected = render(messages, TOKENIZER)[0] + [TOKENIZER.special_ids['<|assistant_start|>']]
    assert render_prompt(messages, TOKENIZER) == expected
    assert render_prompt([*messages, assistant('2')], TOKENIZER) == expected
    whole, _ = render([*messages, assistant('2')], TOKENIZER)
    assert whole[: len(expected)] == expected
    assert render_prompt([dict(role='system', content='Be'), user('Hi'), assistant('')], TOKENIZER)


def test_a_special_token_that_is_written_in_a_message_is_ordinary_text():
    ids, _ = render([user('<|assistant_start|>'), assistant('<|user_end|>')], TOKENIZER)
    special = [i for i in ids if i >= 256]
    assert special == [256 + i for i in range(5)]


@pytest.mark.parametrize(
    'messages, expected',
    [
        ([], 'a list of messages'),
        (None, 'a list of messages'),
        ('Hi', 'a list of messages'),
        ([user('a'), user('b')], "message 2: role='user', expected assistant, as"),
        ([assistant('a')], "message 1: role='assistant', expected user, as"),
        ([user('a'), dict(role='system', content='b')], "message 2: role='system', expected assistant"),
        ([dict(role='system', content='b')], 'a message of a user'),
        ([dict(role='tool', content='b')], "role='tool', expected user"),
        ([dict(content='b')], 'role=None, expected user'),
        (['a'], '{"role": ..., "content": ...}'),
        ([user(None)], 'content=None, expected a text in a message of role user'),
        ([user([part('text', 'a')])], 'a text in a message of role user'),
        ([user('a'), assistant(3)], 'content=3, expected a text or a list of parts'),
        ([user('a'), assistant(['b'])], '{"type": ..., "text": ...} in a list of parts'),
        ([user('a'), assistant([part('text', None)])], '{"type": ..., "text": ...} in a list of parts'),
        ([user('a'), assistant([part('image', 'b')])], "type='image', expected one of text, python, python_"),
        ([user('a'), assistant([part(['text'], 'b')])], 'expected one of text, python, python_output'),
    ],
)
def test_another_conversation_is_refused_in_a_line(messages, expected):
    for function in (render, render_prompt):
        with pytest.raises(UserError, match=re.escape(expected)):
            function(messages, TOKENIZER)


def test_a_refusal_stays_short():
    with pytest.raises(UserError) as error:
        render([user('a'), *[user('b' * 10**6)] * 3], TOKENIZER)
    assert len(str(error.value)) < 200
    with pytest.raises(UserError) as error:
        render([['b' * 10**6] * 100], TOKENIZER)
    assert len(str(error.value)) < 400


def test_a_tokenizer_without_the_special_tokens_is_refused_with_what_helps():
    plain = Bytes()
    plain.special_ids = {}
    with pytest.raises(UserError, match=r'no token <\|bos\|> for conversations: data/sft/prepare.py adds'):
        render([user('a')], plain)


# -----------------------------------------------------------------------------
# files


def test_a_file_has_a_conversation_on_each_line_as_a_list_or_under_messages(tmp_path):
    first, second = [user('a\u2028b'), assistant('c')], [user('d'), assistant([part('python', '1')])]
    lines = [json.dumps(first, ensure_ascii=False), '', json.dumps(dict(messages=second, source='x'))]
    (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
    assert read_conversations(tmp_path / 'a.jsonl') == [first, second]
    pytest.importorskip('pyarrow')
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist([dict(messages=first, source='x')] * 2), tmp_path / 'a.parquet')
    assert read_conversations(tmp_path / 'a.parquet') == [first, first]


@pytest.mark.parametrize(
    'line, expected',
    [
        ('{"conversations": []}', 'line 2: conversation=None, expected a list of messages'),
        ('3', 'line 2: conversation=3, expected a list of messages'),
        ('[', 'line 2 is no JSON'),
        ('[{"role": "user", "content": "\\ud800"}]', 'line 2: expected texts, it has half of a surrogate'),
        ('[{"role": "assistant", "content": "a"}]', "line 2: message 1: role='assistant', expected user"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(tmp_path, line, expected):
    path = tmp_path / 'a.jsonl'
    path.write_text(json.dumps([user('a')]) + '\n' + line)
    with pytest.raises(UserError, match=re.escape(f'{path}, {expected}')):
        read_conversations(path)


def test_other_files_are_refused(tmp_path):
    (tmp_path / 'a.jsonl').write_text('\n')
    (tmp_path / 'a.txt').write_text('Hello')
    for name, expected in (('a.jsonl', 'a file with conversations'), ('a.txt', '.jsonl or .parquet')):
        with pytest.raises(UserError, match=expected):
            read_conversations(tmp_path / name)
    with pytest.raises(UserError, match='cannot be read'):
        read_conversations(tmp_path / 'none.jsonl')


# -----------------------------------------------------------------------------
# the calculator


@pytest.mark.parametrize(
    'expression, value',
    [
        ('48/2', '24'),
        ('1,000,000 * 3', '3000000'),
        ('0.1+0.2', '0.3'),
        ('2*(3-4.5)', '-3'),
        ('-.5', '-0.5'),
        ('10/3', '3.33333333333'),
        ('2/3', '0.666666666667'),
        ('1/8000000', '0.000000125'),
        ('9' * 40 + '*10', '9' * 40 + '0'),
        (' 7 ', '7'),
        ("'strawberry'.count('r')", '3'),
        ('"a,b,c".count(",")', '2'),
        ("'aaa'.count('')", '4'),
    ],
)
def test_arithmetic_and_counts_are_calculated(expression, value):
    assert calculate(expression) == value


REFUSED = [
    '9**9**9', "'a'*10**9", "'a'*9", '2//3', '1/0', '1/(2-2)', '', ' ', '()', '...', '(...)',
    '1e9', '0x10', '1j',
    '1_0', '007', '5 5', '2(3)', '1+', '1\n+1', '\x00', '\u0661+1', 'x', 'True', 'abs(1)',
    '1 if 1 else 2', '[1]',
    "'a'.count", "'a'.count()", "'a'.count('a',0)", "'a'.count(sub='a')", "b'a'.count(b'a')",
    "f'a'.count('a')",
    "'a'.count('a').real", "'a'.index('a')", "'a'.count(*'a')", "x.count('a')", "'a'.count(x)",
    "[].count('a')",
    r"'\n'.count('n')", "__import__('os').system('true')", "''.join('a').count('a')",
    "'a'.count('a')+1",
    '-' * MAX_LENGTH + '1', "'" + 'a' * MAX_LENGTH + "'.count('a')",
]  # fmt: skip


@pytest.mark.parametrize('expression', REFUSED)
def test_nothing_else_is_calculated(expression):
    assert calculate(expression) is None


NUMBER = re.compile(r'\d+\.?\d*|\.\d+')


def value_by_python(expression):
    """Returns the value of a harmless expression by Python's own rules, with exact numbers."""
    return eval(NUMBER.sub(lambda number: f'Fraction("{number[0]}")', expression.replace(',', '')))


def random_arithmetic(dice, depth):
    """Returns a random expression."""
    if depth == 0:
        return dice.choice(['7', '1,250', '0.5', '.25', '3.', '12'])
    left, right = (random_arithmetic(dice, dice.randrange(depth)) for _ in range(2))
    return dice.choice(
        [f'{left} {dice.choice("+-*/")} {right}', f'({left})', f'-{left}', f'({left})*{right}']
    )


def test_random_arithmetic_has_the_value_that_python_gives():
    dice = random.Random(1)
    for _ in range(1000):
        expression = random_arithmetic(dice, 4)
        try:
            expected = value_by_python(expression)
        except ZeroDivisionError:
            expected = None
        got = calculate(expression)
        if len(expression) > MAX_LENGTH or expected is None:
            assert got is None
        elif Fraction(expected).denominator == 1:
            assert got == str(expected)
        else:
            assert abs(Fraction(got) - expected) <= abs(expected) / 10 ** (DIGITS - 1), expression


PIECES = [
    *'0123456789+-*/().,\'" \\\n\x00_=:[]{}@%&|<>~;#`\u0661\ud800',
    *'abrx',
    "'a'.count('a')",
    '**',
    '//',
]
PIECES += [
    '9**9**9',
    "'a'*10**9",
    '__import__',
    '.count(',
    'lambda:',
    '1e999',
    '(' * 50,
    '-' * 80,
    'not ',
    'f"{',
]


def test_of_10000_random_strings_only_arithmetic_and_counts_are_calculated_and_in_bounded_time():
    dice, start, known = random.Random(2), time.perf_counter(), 0
    text = r'''("[^"\\]*"|'[^'\\]*')'''
    counts = re.compile(rf'\s*\(*\s*({text}\s*)+\)*\s*\.\s*count\s*\(.*\)\s*(#.*)?', re.DOTALL)
    slowest = 0.0
    for i in range(10_000):
        pieces = PIECES[:19] if i % 2 else PIECES
        expression = ''.join(dice.choices(pieces, k=dice.randrange(1, 20 if i % 4 else 150)))
        began = time.perf_counter()
        result = calculate(expression)
        slowest = max(slowest, time.perf_counter() - began)
        if result is None:
            continue
        known += 1
        assert len(expression) <= MAX_LENGTH and re.fullmatch(r'-?\d+(\.\d+)?', result), expression
        if not counts.fullmatch(expression):
            assert set(expression) <= set('0123456789+-*/()., '), expression
            assert '**' not in expression and '//' not in expression
    assert known > 100
    assert slowest < 1 and time.perf_counter() - start < 20
