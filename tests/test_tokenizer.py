import codecs
import json
import random

import pytest
import torch

from nanoloop import byte_pairs as module
from nanoloop.blanks import LINE_ENDS, split_at_blanks
from nanoloop.tokenizer import (
    Bytes,
    Characters,
    HuggingFace,
    Numbers,
    Tiktoken,
    choose_tokenizer,
    make_tokenizer,
    read_text,
    tokenizer_file,
)

TEXT = 'hello world, the r\u00efver \u4e2d stone\n'


@pytest.fixture
def encoding(monkeypatch):
    """encoding(name): an encoding of tiktoken with its own expression, but few tokens: no download."""
    tiktoken = pytest.importorskip('tiktoken')
    from tiktoken_ext import openai_public as public

    ranks = {bytes([i]): i for i in range(256)}
    for merged in (b'\n/', b'\n\n/', b'  ', b'    ', b'\n\n', b' \n', b' a', b'\r\n', b'        '):
        ranks[merged] = len(ranks)

    def make(name):
        for load in ('load_tiktoken_bpe', 'data_gym_to_mergeable_bpe_ranks'):
            monkeypatch.setattr(public, load, lambda *args, **kwargs: ranks)
        arguments = dict(getattr(public, name)(), special_tokens={'<|endoftext|>': len(ranks)})
        arguments.pop('explicit_n_vocab', None)
        made = tiktoken.Encoding(**arguments)
        monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: made)
        return Tiktoken(name)

    return make


@pytest.mark.parametrize('name', sorted(LINE_ENDS))
def test_a_text_cut_at_blanks_has_the_same_tokens(encoding, name):
    bpe, dice, cuts = encoding(name).bpe, random.Random(0), 0
    pieces = [' ', '  ', '\n', '\r', '\t', '\xa0', '\x1c', '\x85', 'a', 'B', "'s", '1', '!', '/', '\u4e2d']
    for _ in range(5000):
        text = ''.join(dice.choices(pieces, k=dice.randrange(12)))
        parts = list(split_at_blanks(text, LINE_ENDS[name], long_run=2))
        cuts += len(parts) - 1
        ids = [i for part in parts for i in bpe.encode_ordinary(part)]
        assert ids == bpe.encode_ordinary(text) and ''.join(parts) == text, parts
    assert cuts > 1000


@pytest.mark.parametrize('special', [False, True])
def test_a_million_blanks_are_encoded(encoding, special):
    tokenizer, n = encoding('gpt2'), 1_000_009
    for blank in ' \n':
        ids = tokenizer.encode(f'a table{blank * n}cell', special)
        assert tokenizer.decode_bytes(ids).decode() == f'a table{blank * n}cell'
        assert ids[: len('a table')] == tokenizer.encode(f'a table{blank * 99}cell')[: len('a table')]
        assert ids[-6:] == tokenizer.encode(f'{blank * 9}cell')[-6:]


def test_a_text_that_tiktoken_gives_up_at_is_a_mistake_in_one_line(encoding, monkeypatch):
    tokenizer = encoding('gpt2')
    monkeypatch.setattr(module, 'LINE_ENDS', {})
    for special in (False, True):  # a PanicException, which is no Exception, and a ValueError
        with pytest.raises(ValueError, match="tiktoken cannot encode a text of 1,000,102 .* with 'a   "):
            tokenizer.encode('a' + ' ' * 1_000_100 + 'b', special)
    with pytest.raises(KeyboardInterrupt):  # other exceptions go on
        monkeypatch.setattr(module, 'split_at_blanks', interrupted)
        tokenizer.encode('a')


def interrupted(*args):
    raise KeyboardInterrupt


def test_a_special_token_in_a_text_is_text_unless_it_is_asked_for(encoding):
    tokenizer = encoding('gpt2')
    assert tokenizer.encode('<|endoftext|>') == list(b'<|endoftext|>')
    assert tokenizer.encode('a<|endoftext|>', special=True) == [ord('a'), tokenizer.eot_token]


def byte_level(**options):
    """A byte-level BPE of the library tokenizers, as Ouro's, trained on TEXT."""
    tokenizers = pytest.importorskip('tokenizers')
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    options = dict(initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), vocab_size=280) | options
    special = ['<|im_start|>', '<|endoftext|>']
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=special, show_progress=False, **options)
    made.train_from_iterator([TEXT] * 9, trainer)
    return made


def test_a_tokenizer_json_is_read_and_kept_whole_in_its_spec(tmp_path):
    theirs = byte_level()
    start = pytest.importorskip('tokenizers').processors.TemplateProcessing(
        '<|im_start|> $A', None, [('<|im_start|>', 0)]
    )
    theirs.post_processor = start
    theirs.enable_truncation(3)  # settings of a file that would change what a text is
    theirs.enable_padding(length=50)
    theirs.save(str(tmp_path / 'tokenizer.json'))
    spec = json.loads(json.dumps(choose_tokenizer(str(tmp_path / 'tokenizer.json'), None).spec))
    (tmp_path / 'tokenizer.json').unlink()
    tokenizer = make_tokenizer(spec)
    text = TEXT + '<|endoftext|>'
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids).decode() == text and len(ids) < len(text.encode())
    assert len(tokenizer.token_bytes) == 280 == theirs.get_vocab_size()
    assert sum(tokenizer.token_bytes[i] for i in ids) == len(text.encode())
    assert tokenizer.eot_token == 1 and tokenizer.token_bytes[:2] == [0, 0]
    assert not {0, 1} & set(ids) and tokenizer.encode(text, special=True) == [*tokenizer.encode(TEXT), 1]
    assert tokenizer.decode_bytes([1, 999]) == b'<|endoftext|>?'
    theirs.no_truncation()
    theirs.no_padding()
    assert [0, *tokenizer.encode(TEXT)] == theirs.encode(TEXT).ids


def test_every_byte_is_a_token_of_one_byte(tmp_path):
    byte_level().save(str(tmp_path / 'tokenizer.json'))
    tokenizer = make_tokenizer(tokenizer_file(tmp_path / 'tokenizer.json'))
    for text in map(chr, range(1, 300)):
        assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


def test_tokens_of_sentencepiece_have_their_blanks_and_bytes():
    tokenizers = pytest.importorskip('tokenizers')
    names = [
        '<unk>',
        '</s>',
        '\u2581',
        'a',
        'b',
        '\u2581a',
        'ab',
        '\u2581ab',
        *(f'<0x{i:02X}>' for i in range(256)),
    ]
    vocabulary = {name: i for i, name in enumerate(names)}
    merges = [('a', 'b'), ('\u2581', 'ab')]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, merges, unk_token='<unk>', byte_fallback=True)
    )
    made.normalizer = tokenizers.normalizers.Replace(' ', '\u2581')
    made.add_special_tokens(['<unk>', '</s>'])
    tokenizer = HuggingFace(made.to_str())
    ids = tokenizer.encode('ab ab \u00e9')
    assert tokenizer.decode_bytes(ids) == 'ab ab \u00e9'.encode() and ids[:2] == [6, 7]
    assert [tokenizer.token_bytes[i] for i in ids] == [2, 3, 1, 1, 1]
    assert tokenizer.eot_token == 1 and tokenizer.token_bytes[:2] == [0, 0]


@pytest.mark.parametrize(
    'content, told',
    [
        ('{', 'is no tokenizer.json'),
        ('[]', 'expected a tokenizer.json of the tokenizers library'),
        ('{"kind": "byte"}', 'expected a tokenizer.json of the tokenizers library'),
        ('{"model": 3}', 'tokenizer.json cannot be read'),
    ],
)
def test_a_file_that_is_no_tokenizer_is_told(tmp_path, content, told):
    pytest.importorskip('tokenizers')
    (tmp_path / 'a.json').write_text(content)
    with pytest.raises(ValueError, match=told):
        choose_tokenizer(str(tmp_path / 'a.json'), None)


def test_a_tokenizer_of_another_kind_is_refused():
    tokenizers = pytest.importorskip('tokenizers')
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece({'[UNK]': 0, '##a': 1}, unk_token='[UNK]'))
    with pytest.raises(ValueError, match='expected a byte-level or SentencePiece tokenizer'):
        HuggingFace(made.to_str())


@pytest.mark.parametrize('name', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32'])
@pytest.mark.parametrize('errors', ['strict', 'surrogateescape'])
def test_a_byte_order_mark_tells_the_encoding_and_is_no_text(tmp_path, name, errors):
    mark = {'utf-16-le': codecs.BOM_UTF16_LE, 'utf-16-be': codecs.BOM_UTF16_BE}.get(name, b'')
    (tmp_path / 'a').write_bytes(mark + TEXT.replace('\n', '\r\n').encode(name))
    assert read_text(tmp_path / 'a', errors) == TEXT.replace('\n', '\r\n')


def test_text_in_no_known_encoding_is_told(tmp_path):
    (tmp_path / 'a').write_bytes(b'caf\xe9')
    with pytest.raises(ValueError, match='a is not UTF-8 .*save it as UTF-8'):
        read_text(tmp_path / 'a')
    (tmp_path / 'a').write_bytes(codecs.BOM_UTF16_LE + b'a')
    with pytest.raises(ValueError, match='a is not UTF-16'):
        read_text(tmp_path / 'a', 'surrogateescape')


def test_tokens_without_text_are_written_as_ids():
    tokenizer = make_tokenizer(json.loads(json.dumps(Numbers(9).spec)))
    assert tokenizer.encode('3 8\n0') == [3, 8, 0] and tokenizer.decode_bytes([3, 8]) == b' 3 8'
    assert tokenizer.token_bytes == [0] * 9 and 'no text is known' in tokenizer.note
    for text in ('9', '-1', 'a', '1.5'):
        with pytest.raises(ValueError, match=f"text='{text}', expected ids below 9"):
            tokenizer.encode(text)


def test_names_of_tokenizers():
    assert isinstance(choose_tokenizer('byte', None), Bytes)
    made = choose_tokenizer('char', lambda: ['ba', 'c'])
    assert isinstance(made, Characters) and made.chars == ['\n', 'a', 'b', 'c']
    with pytest.raises(ValueError, match="tokenizer='wordpiece', expected one of the kinds char, byte"):
        make_tokenizer(dict(kind='wordpiece'))


def test_a_tokenizer_that_is_not_known_is_told_with_those_that_are():
    pytest.importorskip('tiktoken')
    told = "tokenizer='foo', expected byte, char, FILE.json or an encoding of tiktoken: .*gpt2"
    with pytest.raises(ValueError, match=told):
        choose_tokenizer('foo', None)


def test_ids_become_text_again():
    tokenizer = Bytes()
    ids = tokenizer.encode('naïve')
    assert tokenizer.decode(ids) == tokenizer.decode(torch.tensor(ids)) == 'naïve'
    assert tokenizer.decode(ids[:3]) == 'na\ufffd'
