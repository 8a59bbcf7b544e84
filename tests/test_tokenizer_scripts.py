"""Tokenizers trained on a user's text, and compared on it: data/tokenizer."""

import json
import os
import runpy
import subprocess
import sys

import pytest
from helpers import ROOT

from nanoloop.added_tokens import SPECIAL
from nanoloop.bpe_training import SPLIT, Excerpt, round_trip, train_tokenizer
from nanoloop.checks import UserError
from nanoloop.tokenizer import Bytes, Words, make_tokenizer

tokenizers = pytest.importorskip('tokenizers')
TEXT = "It's the 12345th of May, isn't it?\n\n  It is the 12th; the 12th, na\u00efvely \u4e2d\u6587.\r\n" * 9


def run(name, *argv):
    """Runs the main function of a script in data/tokenizer. Returns its exit status."""
    try:
        runpy.run_path(str(ROOT / 'data' / 'tokenizer' / f'{name}.py'))['main']([str(part) for part in argv])
    except SystemExit as error:
        return error.code
    return 0


def trained(texts, size):
    return make_tokenizer(dict(kind='tokenizers', json=train_tokenizer(texts, size).to_str()))


def test_a_trained_tokenizer_has_the_tokens_of_conversations_first_then_all_bytes():
    tokenizer = trained([TEXT], 300)
    assert len(tokenizer.token_bytes) == 300 and tokenizer.token_bytes[: 9 + 256] == [0] * 9 + [1] * 256
    assert min(tokenizer.token_bytes[9 + 256 :]) == 2 and len(tokenizer.encode(TEXT)) < len(TEXT) * 0.7
    assert tokenizer.special_ids == {text: i for i, text in enumerate(SPECIAL)} and tokenizer.eot_token == 0
    for text in (TEXT, '\x00\x7f\U0001f600<|bos|> a  b\n\n\n\t', ''.join(map(chr, range(1, 500)))):
        assert tokenizer.decode_bytes(tokenizer.encode(text)).decode() == text
        assert min(tokenizer.encode(text)) >= 9  # a special token in a text is text
    assert tokenizer.encode('<|bos|><|user_start|>', special=True) == [0, 1]


@pytest.mark.parametrize(
    'text, parts',
    [
        ('12345 0.25', ['12', '34', '5', ' ', '0', '.', '25']),  # GPT-4 takes three digits
        ('\u0663\u0664\u0665', ['\u0663\u0664', '\u0665']),
        ("IT'S I'll don't 'so", ['IT', "'S", ' I', "'ll", ' don', "'t", " '", 'so']),
        ('(word) a_b', ['(word', ')', ' a', '_b']),
        ('a!?\n\nb  c', ['a', '!?\n\n', 'b', ' ', ' c']),
        ('a \n \nb\t\r\n', ['a', ' \n \n', 'b', '\t\r\n']),
        ('a   ', ['a', '   ']),
        ('na\u00efve \u4e2d\u6587', ['na\u00efve', ' \u4e2d\u6587']),
    ],
)
def test_a_text_is_split_as_by_gpt_4_but_with_two_digits_at_most(text, parts):
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT), 'isolated')
    assert [part for part, _ in split.pre_tokenize_str(text)] == parts
    tokenizer = trained([text] * 9, 1000)  # merges never cross the parts
    merged = [tokenizer.decode([i]) for i in tokenizer.encode(text)]
    assert merged == parts


def test_long_documents_are_cut_and_the_characters_counted():
    texts = Excerpt(['a' * 9, 'b' * 3, 'c' * 9, 'd'], doc_cap=5, max_chars=11)
    assert [*texts] == ['a' * 5, 'b' * 3, 'c' * 3] and (texts.chars, texts.count) == (11, 3)
    whole = Excerpt([('x' * 60 + '\n') * 2000, ''])
    pieces = [*whole]
    assert ''.join(pieces) == whole.texts[0] and len(pieces) == 2 and pieces[0][-1] == '\n'
    assert (whole.chars, whole.count) == (61 * 2000, 2)


def test_tokens_that_are_not_the_text_again_are_told():
    assert round_trip(Bytes(), TEXT) == (len(TEXT.encode()), '')
    assert round_trip(Words(['a', 'b']), 'a b b') == (3, "'a b b' becomes ' a b b'")


def test_a_tokenizer_is_trained_saved_whole_and_the_same_in_every_process(tmp_path, capsys):
    (tmp_path / 'a.txt').write_text(TEXT)
    out = tmp_path / 'tokenizer.json'
    for _ in range(2):  # the second time its own file is there, and is no text
        assert run('train', '--input', tmp_path, '--out', out, '--vocab_size', 300) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1] == f'written: {out}, 300 tokens, 9 of them special'
        assert lines[-2].startswith(f'trained on {len(TEXT):,} characters of 1 text in ')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.txt', 'tokenizer.json']
    other = tmp_path / 'other.json'
    command = [sys.executable, ROOT / 'data' / 'tokenizer' / 'train.py', '--input', 'a.txt']
    environment = os.environ | dict(RAYON_NUM_THREADS='1', PYTHONHASHSEED='1')
    command += ['--out', 'other.json', '--vocab_size=300']
    assert subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL).returncode == 0
    assert other.read_bytes() == out.read_bytes() and json.loads(out.read_bytes())['model']['type'] == 'BPE'


def test_of_tables_the_beginnings_of_documents_count(tmp_path, capsys):
    pytest.importorskip('datasets')
    rows = [dict(body='long ' * 4000), dict(body='short')]
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    argv = [
        '--input',
        tmp_path / 'a.jsonl',
        '--column=body',
        '--out',
        tmp_path / 't.json',
        '--vocab_size=999',
    ]
    assert run('train', *argv) == 0
    told = capsys.readouterr().out
    assert 'trained on 10,005 characters of 2 texts' in told
    assert 'vocab_size=999 takes more text: no pair of tokens is twice in this one' in told
    assert run('train', *argv, '--doc_cap=3', '--max_chars=5', '--max_documents=2') == 0
    assert 'trained on 5 characters of 2 texts' in capsys.readouterr().out


@pytest.mark.parametrize(
    'argv, told',
    [
        (['--vocab_size=264'], 'vocab_size=264, expected at least 265: the bytes and 9 special tokens'),
        (['--doc_cap=0'], 'doc_cap=0, expected at least 1'),
        (['--max_chars=0'], 'max_chars=0, expected at least 1'),
        (['--out=a.bin'], "out='a.bin', expected the name of a file .json in a folder that exists"),
        (['--out=nowhere/a.json'], 'a folder that exists'),
        (['--max_documents=3'], 'max_documents=3, expected none: the files are no tables'),
        (['--vocabulary=9'], 'unrecognised option --vocabulary'),
        (['--input=nowhere.txt'], 'there is no such file'),
        (['--input=a.bin'], 'a.bin is a binary file'),
        (['--input=latin.txt'], 'latin.txt is not UTF-8'),
        (['--input=t.jsonl', '--column=body'], "column='body', expected one of text"),
        (['--input=blank.txt'], 'there is no text to learn from'),
    ],
)
def test_mistakes_end_in_one_line_before_anything_is_written(tmp_path, monkeypatch, capsys, argv, told):
    monkeypatch.chdir(tmp_path)
    files = {'a.txt': b'text', 'a.bin': b'\0\1', 'latin.txt': b'caf\xe9', 'blank.txt': b''}
    for name, content in (files | {'t.jsonl': b'{"text": "a"}'}).items():
        (tmp_path / name).write_bytes(content)
    assert run('train', '--input=a.txt', '--out=t.json', *argv) == 2
    error = capsys.readouterr().err
    assert told in error and error.count('\n') == 1 and not (tmp_path / 't.json').exists()


def gpt2_of(tokenizer):
    """A stand-in for tiktoken's gpt2, which may have to be downloaded."""
    return lambda name: tokenizer if name == 'gpt2' else pytest.fail(name)


def test_tokenizers_are_compared_with_that_of_gpt_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('nanoloop.tokenizer.Tiktoken', gpt2_of(Bytes()))
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.txt').write_text(TEXT)
    (tmp_path / 'b.txt').write_text('abc')
    train_tokenizer([TEXT], 300).save('own.json')
    assert run('eval', '--input', 'a.txt', 'b.txt', '--tokenizer', 'own.json') == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    size, tokens = len(TEXT.encode()), len(trained([TEXT], 300).encode(TEXT))
    assert table[0] == 'text tokenizer vocabulary bytes tokens bytes/token vs gpt2 round trip'.split()
    assert table[1] == ['a.txt', 'gpt2', '256', f'{size}', f'{size}', '1.000', 'yes']
    gain = f'{size / tokens - 1:+.1%}'
    assert table[2] == [
        'a.txt',
        'own.json',
        '300',
        f'{size}',
        f'{tokens}',
        f'{size / tokens:.3f}',
        gain,
        'yes',
    ]
    assert [line[:2] for line in table[3:]] == [['b.txt', 'gpt2'], ['b.txt', 'own.json']]


def test_without_gpt_2_a_line_is_told_and_the_others_are_compared(tmp_path, monkeypatch, capsys):
    def fail(name):
        raise UserError('the gpt2 tokenizer cannot be downloaded')

    monkeypatch.setattr('nanoloop.tokenizer.Tiktoken', fail)
    (tmp_path / 'a.txt').write_text('abc')
    assert run('eval', '--input', tmp_path / 'a.txt', '--tokenizer=byte') == 0
    out, error = capsys.readouterr()
    assert error == 'without gpt2: the gpt2 tokenizer cannot be downloaded\n'
    assert out.splitlines()[1].split() == ['a.txt', 'byte', '256', '3', '3', '1.000', 'yes']
    assert run('eval', '--input', tmp_path / 'a.txt', '--tokenizer', 'gpt2', 'byte') == 2
    assert run('eval', '--input', tmp_path / 'a.txt', '--tokenizer=char') == 2
    assert 'expected byte, encodings of tiktoken or FILE.json' in capsys.readouterr().err
