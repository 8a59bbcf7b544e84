"""WikiText and LAMBADA by both conventions of each, with models that are tables, counted by hand."""

import json
import math
import re
import types

import numpy as np
import pytest

from model import GPTConfig
from nanoloop import perplexity as module
from nanoloop.perplexity import detokenise, lambada, lambada_bos, rolling_windows, wikitext, wikitext_rows
from nanoloop.tokenizer import Bytes, Characters

PAGES = [
    ' = A page = \n \n It is 3 @.@ 5 m \u2013 long , " it " said . \n \n = = Part = = \n \n ( b ) \n ',
    " = Another = \n \n The dog 's end \n",
]
RAW = ' \n' + '\n'.join(PAGES)
EXAMPLES = ['one two  three', 'a b "c"', 'word', 'x y z\n']


def evaluate(load, tokenizer=None, model=None, pos='rope', block_size=16, **keys):
    """The Evaluation, its records and its columns, by a lookup model: ids -> (cross-entropies, predicted)."""
    c = types.SimpleNamespace(**dict(wikitext='', lambada='', max_per_task=None) | keys)
    config = GPTConfig(block_size=block_size, pos=pos, n_embd=32, n_head=2)
    (evaluation,) = load(c, tokenizer or Bytes(), config, None)
    model = model or (lambda ids: (np.full(len(ids), 0.5), ids))
    records = []
    for item in evaluation.items:
        (text,) = item.texts
        ces, predicted = model(np.array(text.ids[text.scored]))
        judged = evaluation.judge(item, [np.array(ces, dtype=np.float64)], [np.array(predicted)])
        records.append(item.info | judged)
    json.dumps(records)
    return evaluation, records, evaluation.summarise(records)


def cost(ids):
    """A cross-entropy for every byte, and what it predicts: the byte itself unless it is an a."""
    ids = np.asarray(ids)
    return ids % 7 / 10, np.where(ids == ord('a'), 0, ids)


@pytest.mark.parametrize('n', [0, 1, 4, 5, 9, 10, 11, 23])
@pytest.mark.parametrize('size', [1, 5])
def test_rolling_windows_score_every_token_once_with_as_much_context_as_fits(n, size):
    ids = list(range(100, 100 + n))
    windows = rolling_windows(ids, 7, size)
    assert [i for text in windows for i in text.ids[text.scored]] == ids
    assert windows == [] or (windows[0].ids[0] == 7 and windows[0].scored.start == 1)
    sequence = [7, *ids]
    for text in windows:
        end = sequence.index(text.ids[-1]) + 1
        assert text.ids == sequence[max(0, end - size - 1) : end] and text.scored.start >= 1
    assert len(windows) == math.ceil(n / size)


def test_pages_are_detokenised_and_measured_by_their_own_words_and_bytes(tmp_path):
    (tmp_path / 'a.txt').write_text(RAW)
    evaluation, records, columns = evaluate(wikitext, model=cost, wikitext=str(tmp_path / 'a.txt'))
    texts = [
        '= A page =\n\nIt is 3.5 m \u2013 long, "it" said.\n\n== Part ==\n\n(b)\n',
        " = Another =\n\nThe dog's end\n",
    ]
    assert detokenise(PAGES[0]).strip() == texts[0].strip()
    assert detokenise(PAGES[1]) == texts[1]
    texts = list(map(detokenise, PAGES))
    assert bytes(evaluation.items[0].texts[0].ids) == b'\n' + texts[0].encode()[:16]
    nll = [cost(list(text.encode()))[0].sum() for text in texts]
    words = sum(len(re.split(r'\s+', page)) for page in PAGES)
    assert words == 28 + 9  # with '' in front of the first and behind the last blank
    assert columns['ppl'] == pytest.approx(math.exp(sum(nll) / words))
    assert columns['bpb'] == pytest.approx(sum(nll) / math.log(2) / len(''.join(PAGES).encode()))
    tokens = [len(text.encode()) for text in texts]
    assert columns['loss'] == pytest.approx(sum(nll) / sum(tokens)) and columns['tokens'] == sum(tokens)
    assert columns['items'] == 2 and 'lm-evaluation-harness' in columns['note']
    assert columns['loss_se'] > 0 and len(records) == sum(math.ceil(n / 16) for n in tokens)


# what lm-evaluation-harness makes of each, in its order
@pytest.mark.parametrize(
    'text, expected',
    [
        ("the dogs ' tail", "the dogs' tail"),
        ('1 @,@ 000 @.@ 5 well @-@ known', '1,000.5 well-known'),
        ('a : b ; c . d ! e ? f , g', 'a: b; c. d! e? f, g'),
        ('( a ) [ b ] { c } " d " \' e \'', '(a) [b] {c} "d" \'e\''),
        ('= = = = four = = = =', '==== four ===='),
        ('20 \u00b0 C', '20\u00b0C'),
        ('a \n b', 'a\nb'),
        ('the N year', 'the 1 year'),
        ("Bo 's", "Bo's"),
    ],
)
def test_signs_lose_the_blanks_around_them(text, expected):
    assert detokenise(text) == expected


def test_lines_are_one_sequence_cut_into_blocks(tmp_path):
    (tmp_path / 'a.txt').write_text(RAW)
    tokenizer = Characters(sorted({*RAW, '^'}))
    tokenizer.eot_token = tokenizer.ids['^']
    flags = dict(tokenizer=tokenizer, wikitext=str(tmp_path / 'a.txt'))
    evaluation, _, columns = evaluate(wikitext_rows, model=cost, **flags)
    lines = RAW.split('\n')[:-1]
    sequence = ''.join('^' + (f'{line}\n' if line.strip() else '') for line in lines)
    for size in range(3, 25):  # the tail is dropped, however long it is
        blocks = [sequence[i : i + size + 1] for i in range(0, len(sequence) - size, size)]
        assert (len(sequence) - 1) // size == len(blocks) > 2
        items = evaluate(wikitext_rows, block_size=size, **flags)[0].items
        assert [tokenizer.decode(item.texts[0].ids) for item in items] == blocks
    assert all(item.texts[0].scored == slice(1, 17) for item in evaluation.items)
    ids = tokenizer.encode(sequence)[1 : 1 + 16 * len(evaluation.items)]
    assert columns['loss'] == pytest.approx(cost(ids)[0].mean()) and columns['tokens'] == len(ids)
    assert columns['ppl'] == pytest.approx(math.exp(columns['loss'])) and 'per token' in columns['note']
    assert len(evaluate(wikitext_rows, **flags, max_per_task=3)[0].items) == 3
    with pytest.raises(ValueError, match='expected a text of more than block_size=999 tokens'):
        evaluate(wikitext_rows, block_size=999, **flags)


def test_tables_of_lines_and_of_pages_have_the_pages_of_the_raw_text(tmp_path):
    pyarrow = pytest.importorskip('pyarrow')
    from pyarrow import parquet

    lines = [f'{line}\n' if line.strip() else '' for line in RAW.split('\n')[:-1]]  # as the hub has them
    pages = [PAGES[0], PAGES[1]]
    (tmp_path / 'raw').write_text(RAW)
    (tmp_path / 'lines.jsonl').write_text(''.join(json.dumps(dict(text=line)) + '\n' for line in lines))
    parquet.write_table(pyarrow.table(dict(page=pages)), tmp_path / 'pages.parquet')
    text, expected, _ = module.read_wikitext(tmp_path / 'raw')
    assert (text, expected) == (RAW, pages)
    assert module.read_wikitext(tmp_path / 'lines.jsonl')[:2] == (RAW, pages)
    assert module.read_wikitext(tmp_path / 'pages.parquet')[:2] == (RAW[2:], pages)
    first, other = (evaluate(wikitext, wikitext=str(tmp_path / name))[0] for name in ('raw', 'lines.jsonl'))
    assert [item.texts for item in first.items] == [item.texts for item in other.items]
    assert len(evaluate(wikitext, wikitext=str(tmp_path / 'raw'), max_per_task=1)[1]) < len(first.items)


@pytest.fixture
def examples(tmp_path):
    path = tmp_path / 'lambada.jsonl'
    path.write_text(''.join(json.dumps(dict(text=text)) + '\n' for text in EXAMPLES))
    return str(path)


def test_the_last_word_is_scored_by_both_conventions(examples):
    evaluation, records, columns = evaluate(lambada, model=cost, lambada=examples)
    texts = [item.texts[0] for item in evaluation.items]
    # blanks in front of the word belong to it; a word alone has the end-of-text token in front
    targets = ['  three', ' "c"', 'word', ' z\n']
    assert [bytes(text.ids[text.scored]).decode() for text in texts] == targets
    assert [bytes(text.ids).decode() for text in texts] == [*EXAMPLES[:2], '\nword', EXAMPLES[3]]
    nll = [cost(list(target.encode()))[0].sum() for target in targets]
    tokens = sum(map(len, targets))
    assert columns['ppl'] == pytest.approx(math.exp(sum(nll) / 4)) and columns['tokens'] == tokens
    assert columns['loss'] == pytest.approx(sum(nll) / tokens) and columns['accuracy'] == 1.0
    assert 'no BOS' in columns['note'] and records[0]['predicted'] == list(b'  three')

    evaluation, _, columns = evaluate(lambada_bos, model=cost, lambada=examples)
    assert [bytes(item.texts[0].ids).decode() for item in evaluation.items] == [f'\n{t}' for t in EXAMPLES]
    assert [bytes(i.texts[0].ids[i.texts[0].scored]).decode() for i in evaluation.items] == targets
    assert columns['ppl'] == pytest.approx(math.exp(sum(nll) / tokens)) and 'with BOS' in columns['note']
    assert evaluation.name == 'lambada_bos'


def test_a_word_is_right_if_all_its_tokens_are_the_most_likely_ones(examples):
    def model(ids):
        return np.ones(len(ids)), np.where(ids == ord('h'), 0, ids)  # of three only the h is wrong

    _, records, columns = evaluate(lambada, model=model, lambada=examples)
    assert [record['correct'] for record in records] == [0, 1, 1, 1]
    assert columns['accuracy'] == 0.75 and columns['accuracy_se'] == pytest.approx(0.25)


def test_a_long_context_loses_its_start_with_learned_positions(examples):
    for pos, size, lengths in (('rope', 4, [14, 7, 5, 6]), ('learned', 4, [5, 5, 5, 5])):
        evaluation, records, _ = evaluate(lambada, lambada=examples, pos=pos, block_size=size)
        assert [len(item.texts[0].ids) for item in evaluation.items] == lengths  # the last is only a target
        assert [record['correct'] for record in records] == [int(pos == 'rope'), 1, 1, 1]


def test_a_word_that_merges_with_its_context_is_scored_whole(tmp_path):
    class Merging(Bytes):
        def encode(self, text):
            return [sum(part.encode()) for part in re.findall(': t|.', text)]

    (tmp_path / 'a.jsonl').write_text('{"text": "Q: t"}\n')
    evaluation, _, _ = evaluate(lambada, tokenizer=Merging(), lambada=str(tmp_path / 'a.jsonl'))
    text = evaluation.items[0].texts[0]
    assert text.ids == [ord('Q'), sum(b': t')] and text.scored == slice(1, 2)


def test_the_file_of_core_is_taken_as_well(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"context": "one two", "continuation": "three"}\n')
    evaluation, _, _ = evaluate(lambada, lambada=str(tmp_path / 'a.jsonl'))
    text = evaluation.items[0].texts[0]
    assert bytes(text.ids) == b'one two three' and bytes(text.ids[text.scored]) == b' three'
    assert evaluation.settings == evaluate(lambada, lambada=str(tmp_path / 'a.jsonl'))[0].settings
    (tmp_path / 'a.jsonl').write_text('{"context": "one two", "continuation": "four"}\n')
    assert evaluation.settings != evaluate(lambada, lambada=str(tmp_path / 'a.jsonl'))[0].settings


@pytest.mark.parametrize(
    'load, name, text, told',
    [
        (lambada, 'a.txt', 'x', "lambada='.*', expected a file .jsonl or .parquet"),
        (lambada, 'a.jsonl', '', 'expected a file with rows'),
        (lambada, 'a.jsonl', '{"page": "a"}', 'row 1: text=None, expected a text that is not blank'),
        (lambada, 'a.jsonl', '{"text": " "}', "row 1: text=' ', expected a text that is not blank"),
        (lambada, 'a.jsonl', '{"text": "a b"}\n{"text": 3}', 'row 2: text=3, expected a text'),
        (lambada, 'a.jsonl', '{', 'line 1 is no JSON'),
        (lambada, 'a.parquet', 'x', 'a.parquet cannot be read'),
        (lambada, 'b.jsonl', None, 'cannot be read: No such file'),
        (lambada, 'b.parquet', None, 'cannot be read: '),
        (wikitext, 'a.txt', ' \n', 'expected a file with text, it is blank'),
        (wikitext, 'a.jsonl', '{"x": "a"}', 'expected a file with page or text, it has x'),
        (wikitext, 'a.jsonl', '{"page": "a"}\n{"page": 3}', 'row 2: page=3, expected a text'),
        (wikitext, 'b.txt', None, 'cannot be read: No such file'),
        (wikitext_rows, 'b.txt', None, 'cannot be read: No such file'),
    ],
)
def test_a_wrong_file_is_told_in_one_line(tmp_path, load, name, text, told):
    if name.endswith('.parquet'):
        pytest.importorskip('pyarrow')
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=told) as error:
        evaluate(load, wikitext=str(tmp_path / name), lambada=str(tmp_path / name))
    assert len(str(error.value).splitlines()) == 1


def test_the_hub_is_read_by_datasets_and_told_when_it_cannot_be_reached(monkeypatch):
    class Documents:
        def __init__(self, path, column, name):
            self.column = column

        def texts(self, splits):
            assert splits == ['test']
            return {'page': PAGES, 'text': EXAMPLES}[self.column]

    monkeypatch.setattr(module, 'HubDocuments', Documents)
    assert evaluate(wikitext)[2]['items'] == 2 and len(evaluate(lambada)[1]) == 4
    assert 'data=EleutherAI/lambada_openai' in evaluate(lambada)[0].settings

    def offline(self, splits):
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(Documents, 'texts', offline)
    for load, key in ((wikitext, 'wikitext'), (wikitext_rows, 'wikitext'), (lambada, 'lambada')):
        with pytest.raises(ValueError, match=f"Couldn't reach the hub.*: without a network, --{key}=FILE"):
            evaluate(load)
