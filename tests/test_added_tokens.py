"""Special tokens that are added to a tokenizer: their ids, texts and bytes, on every kind of tokenizer."""

import json

import pytest

from nanoloop.added_tokens import SPECIAL, Added, chat_tokenizer, extends, split_spec
from nanoloop.tokenizer import Bytes, Characters, Numbers, Words, make_tokenizer

TEXT = 'hello <|bos|> world'


def byte_pairs(*special):
    """A byte-level BPE of the library tokenizers with these special tokens of its own."""
    tokenizers = pytest.importorskip('tokenizers')
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    options = dict(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([TEXT], tokenizers.trainers.BpeTrainer(special_tokens=[*special], **options))
    return make_tokenizer(dict(kind='tokenizers', json=made.to_str()))


BASES = {
    'byte': (Bytes, TEXT),
    'char': (lambda: Characters('\n <>abcdehlorsw|'), TEXT),
    'ids': (lambda: Numbers(9), ' 3 8 0'),
    'words': (lambda: Words(['hello', 'world', '<|bos|>']), ' hello <|bos|> world'),
    'tokenizers': (byte_pairs, TEXT),
    'own': (lambda: byte_pairs('<|endoftext|>', '<|user_end|>'), f'{TEXT}<|user_end|>'),
}


@pytest.mark.parametrize('kind', BASES)
def test_added_tokens_follow_every_kind_of_tokenizer(kind):
    make, text = BASES[kind]
    base, size = make(), len(make().token_bytes)
    tokenizer = make_tokenizer(json.loads(json.dumps(chat_tokenizer(base).spec)))
    missing = [name for name in SPECIAL if name not in base.special_ids]
    added = {name: size + i for i, name in enumerate(missing)}
    assert tokenizer.special_ids == base.special_ids | added and set(SPECIAL) <= tokenizer.special_ids.keys()
    assert tokenizer.token_bytes == base.token_bytes + [0] * len(missing)
    assert tokenizer.eot_token == tokenizer.special_ids['<|bos|>'] == size
    assert (tokenizer.text_errors, tokenizer.note) == (base.text_errors, base.note)
    assert tokenizer.encode(text) == base.encode(text)  # ordinary text, whatever is in it
    ids = tokenizer.special_ids
    written = f'<|bos|><|user_start|>{text.replace("<|bos|>", "")}<|user_end|>'
    expected = [size, ids['<|user_start|>'], *base.encode(text.replace('<|bos|>', ''), special=True)]
    assert tokenizer.encode(written, special=True) == [*expected, ids['<|user_end|>']]
    assert tokenizer.decode_bytes(tokenizer.encode(written, special=True)).split() == written.encode().split()
    assert tokenizer.decode_bytes([ids['<|output_end|>']]) == b'<|output_end|>'
    outside = len(tokenizer.token_bytes)
    assert tokenizer.decode_bytes([outside]) == base.decode_bytes([outside])


def test_a_tokenizer_with_all_tokens_of_conversations_is_taken_as_it_is():
    whole = byte_pairs(*SPECIAL)
    assert chat_tokenizer(whole) is whole and whole.eot_token == whole.special_ids['<|bos|>'] == 0
    chat = chat_tokenizer(Bytes())
    assert chat_tokenizer(chat) is chat


def test_missing_tokens_are_added_behind_those_that_were_added_before():
    some = Added(Bytes(), ['<|mine|>', '<|bos|>'])
    chat = chat_tokenizer(some)
    assert chat.special == ['<|mine|>', *SPECIAL] and chat.base is some.base
    assert chat.special_ids['<|mine|>'] == 256 and chat.eot_token == some.eot_token == 257
    assert Added(Bytes(), ['<|mine|>']).eot_token == Bytes.eot_token


def test_the_longest_of_two_tokens_that_begin_alike_is_meant():
    tokenizer = Added(Bytes(), ['<a', '<a>', '<a>>'])
    assert tokenizer.encode('<a>><a><a', special=True) == [258, 257, 256]


def test_one_tokenizer_extends_another_if_its_first_ids_are_the_others():
    chat, some = chat_tokenizer(Bytes()).spec, Added(Bytes(), SPECIAL[:3]).spec
    assert extends(chat, chat) and extends(chat, Bytes.spec) and extends(chat, some)
    assert not extends(Bytes.spec, chat) and not extends(some, chat)
    assert not extends(Added(Bytes(), SPECIAL[1:]).spec, some)
    assert not extends(chat_tokenizer(Characters('ab')).spec, Bytes.spec)
    nested = dict(kind='added', base=some, special=list(SPECIAL[3:]))
    assert split_spec(nested) == split_spec(chat) == (Bytes.spec, list(SPECIAL))
    assert make_tokenizer(nested).special_ids == chat_tokenizer(Bytes()).special_ids


@pytest.mark.parametrize('special', [[], ['a', 'a'], ['<|user_end|>'], [''], [3]])
def test_tokens_that_cannot_be_added_are_refused(special):
    with pytest.raises(ValueError, match='expected texts, none of them twice or a special token already'):
        Added(byte_pairs('<|user_end|>'), special)


def test_an_unknown_character_in_a_text_with_special_tokens_is_told():
    tokenizer = chat_tokenizer(Characters('ab'))
    assert tokenizer.encode('a<|bos|>b', special=True) == [0, 2, 1]
    with pytest.raises(ValueError, match="does not know: 'c'$"):
        tokenizer.encode('a<|bos|>c', special=True)
