"""CORE: rendering, spans, few-shot draws and scores, on tasks made by hand with a model that is a table."""

import json
import math
import random
import types
import zipfile

import numpy as np
import pytest

from model import GPTConfig
from nanoloop import core as module
from nanoloop import core_bundle
from nanoloop.core import combine, core
from nanoloop.tables import read_jsonl
from nanoloop.tokenizer import Bytes, Characters, HuggingFace

pytest.importorskip('yaml')

CHOICES = [
    dict(query='2 + 2 =', choices=['4', '5', '22'], gold=0),
    dict(query='The sky is', choices=['green', 'blue'], gold=1),
    dict(query='A cat', choices=['barks', 'purrs'], gold=1),
    dict(query='Snow is', choices=['white', 'hot'], gold=0),
]
SCHEMAS = [
    dict(
        context_options=['The cup fell as the cup', 'The cup fell as Ann'], continuation='was round.', gold=0
    ),
    dict(context_options=['Ann sang to Bo as Ann', 'Ann sang to Bo as Bo'], continuation='slept.', gold=1),
]
COMPLETIONS = [
    dict(context='  one two\n', continuation='three'),
    dict(context='a b', continuation='c d'),
    dict(context='x', continuation='y'),
]
TASKS = {
    'choices': dict(icl_task_type='multiple_choice', rows=CHOICES, baseline='40'),
    'schemas': dict(icl_task_type='schema', rows=SCHEMAS, baseline='50'),
    'texts': dict(
        icl_task_type='language_modeling',
        rows=COMPLETIONS,
        baseline='0',
        num_fewshot=[2, 5],
        continuation_delimiter='\nAnswer: ',
    ),
}


@pytest.fixture
def bundle(tmp_path):
    """bundle(tasks) writes a bundle of {label: entry of core.yaml, its rows and baseline} and returns it."""

    def write(tasks):
        lines, table = ['icl_tasks:'], ['Eval Task,Random baseline,"a, comma"', 'other,n/a,x']
        for label, task in tasks.items():
            entry = dict(label=label, dataset_uri=f'a/{label}.jsonl', num_fewshot=[0]) | task
            rows, baseline = entry.pop('rows'), entry.pop('baseline')
            lines.append('- ' + json.dumps(entry))  # JSON is YAML
            table.append(f'{label},{baseline},x')
            (tmp_path / 'eval_data/a').mkdir(parents=True, exist_ok=True)
            text = ''.join(json.dumps(row) + '\n' for row in rows or [])
            if rows is not None:
                (tmp_path / f'eval_data/a/{label}.jsonl').write_text(text)
        (tmp_path / 'core.yaml').write_text('\n'.join(lines))
        (tmp_path / 'eval_meta_data.csv').write_text('\n'.join(table))
        return tmp_path

    return write


def keys(folder, **changed):
    return types.SimpleNamespace(
        **dict(core_dir=str(folder), max_per_task=None, fewshot_seeds='1234') | changed
    )


def load(folder, tokenizer=None, say=None, config=None, **changed):
    """The Evaluations of a bundle."""
    config = config or GPTConfig(block_size=64, pos='rope', n_embd=32, n_head=2)
    return core(keys(folder, **changed), tokenizer or Bytes(), config, say or (lambda line: None))


def answer(evaluation, model):
    """The records of all items by a lookup model: (text, scored text) -> (cross-entropies, predicted ids)."""
    records = []
    for item in evaluation.items:
        found = [model(bytes(t.ids).decode(), bytes(t.ids[t.scored]).decode()) for t in item.texts]
        ces, predicted = zip(*found, strict=True)
        judged = evaluation.judge(item, list(map(np.array, ces)), list(map(np.array, predicted)))
        records.append(item.info | judged)
    return records


def shuffled(rows):
    rows = list(rows)
    random.Random(1337).shuffle(rows)
    return rows


def test_every_choice_is_scored_where_they_differ_and_the_least_mean_wins(bundle):
    (evaluation,) = load(bundle({'choices': TASKS['choices']}))
    rows, cost = shuffled(CHOICES), {'4': 2.0, '5': 3.0, 'green': 1.0, 'purrs': 4.0, 'white': 5.0, 'hot': 5.0}
    texts, scored = [], []

    def model(text, part):
        texts.append(text)
        scored.append(part)
        # the longer choice has the larger sum and the smaller mean
        return [cost.get(part, 1.5)] * len(part), [0] * len(part)

    records = answer(evaluation, model)
    assert texts == [f'\n{row["query"]} {choice}' for row in rows for choice in row['choices']]
    assert scored == [choice for row in rows for choice in row['choices']]
    # wrong: 22 at 1.5 beats 4 at 2, green beats blue, barks beats purrs; of equals it is the first
    right = {'2 + 2 =': 0, 'The sky is': 0, 'A cat': 0, 'Snow is': 1}
    assert [record['correct'] for record in records] == [right[row['query']] for row in rows]
    sky = next(record for record, row in zip(records, rows, strict=True) if row['query'] == 'The sky is')
    assert sky['losses'] == [1.0, 1.5] and sky['gold'] == 1 and sky['answer'] == 0
    json.dumps(records)
    columns = evaluation.summarise(records)
    assert columns['accuracy'] == 0.25 and columns['items'] == 4 and columns['note'] == ''
    assert columns['accuracy_se'] == pytest.approx(math.sqrt((3 * 0.25**2 + 0.75**2) / 3 / 4))
    assert columns['centered'] == pytest.approx((0.25 - 0.4) / 0.6) and 'seed_sd' not in columns


def test_a_schema_scores_the_common_end_behind_each_context(bundle):
    (evaluation,) = load(bundle({'schemas': TASKS['schemas']}))
    rows, seen = shuffled(SCHEMAS), []

    def model(text, part):
        seen.append((text, part))
        return [2.0 if 'as Ann' in text else 1.0] * len(part), [0] * len(part)

    records = answer(evaluation, model)
    # the tokens that all texts have in common at their end: p and the blank of 'cup ' are not among them
    ends = {SCHEMAS[0]['continuation']: ' was round.', SCHEMAS[1]['continuation']: ' slept.'}
    expected = [
        (f'\n{c} {row["continuation"]}', ends[row['continuation']])
        for row in rows
        for c in row['context_options']
    ]
    assert seen == expected
    assert evaluation.summarise(records)['accuracy'] == 1.0


def test_every_token_of_a_continuation_must_be_the_most_likely_one(bundle):
    (evaluation,) = load(bundle({'texts': TASKS['texts']}))
    rows, seen = shuffled(COMPLETIONS), []

    def model(text, part):
        seen.append((text, part))
        wrong = part.endswith('c d')
        return [0.5] * len(part), list(part.encode())[:-1] + [0 if wrong else ord(part[-1])]

    records = answer(evaluation, model)
    assert [record['correct'] for record in records] == [int(row is not COMPLETIONS[1]) for row in rows]
    assert [part for _, part in seen] == [' ' + row['continuation'] for row in rows]
    for i, (text, _) in enumerate(seen):  # the published procedure, written out
        others = [j for j in range(3) if j != i]
        shots = random.Random(1234 + i).sample(others, 2)
        prompt = ''.join(
            f'{rows[j]["context"].strip()}\nAnswer: {rows[j]["continuation"]}\n\n' for j in shots
        )
        assert text == f'\n{prompt}{rows[i]["context"].strip()}\nAnswer: {rows[i]["continuation"]}'
    assert records[0]['predicted'] == records[0]['target'] or rows[0] is COMPLETIONS[1]


@pytest.mark.parametrize('n, k', [(5, 3), (30, 10), (200, 10), (200, 3)])
def test_shots_are_drawn_by_the_published_procedure(n, k):
    task = core_bundle.Task('a', None, 'multiple_choice', k, ' ', 0.0)
    questions = module.Questions(task, [dict(CHOICES[0])] * n, [1234, 7], Bytes(), None)
    for seed in (1234, 7):
        for i in range(n):
            others = [j for j in range(n) if j != i]
            assert questions.draw_shots(i, seed) == random.Random(seed + i).sample(others, k)


def test_questions_are_shuffled_then_cut_and_rendered_when_asked_for(bundle, monkeypatch):
    rows = [dict(context=f'n{i}', continuation=f'{i}') for i in range(30)]
    task = dict(TASKS['texts'], rows=rows)
    (evaluation,) = load(bundle({'texts': task}), max_per_task=7, fewshot_seeds='1,5')
    expected = shuffled(rows)[:7]
    assert len(evaluation.items) == 14
    infos = [item.info for item in evaluation.items]
    assert [(info['index'], info['seed']) for info in infos] == [(i, s) for i in range(7) for s in (1, 5)]
    texts = [bytes(item.texts[0].ids).decode().split('\n')[-2:] for item in evaluation.items]
    assert (
        texts[::2] == texts[1::2] == [[row['context'], f'Answer: {row["continuation"]}'] for row in expected]
    )
    shots = [bytes(item.texts[0].ids).decode() for item in evaluation.items]
    assert shots[::2] != shots[1::2]
    assert len(evaluation.items[3::4]) == 3 and evaluation.items[-1].info['index'] == 6
    with pytest.raises(IndexError):
        evaluation.items[14]
    calls = []
    monkeypatch.setattr(Bytes, 'encode', lambda self, text: calls.append(text) or [1, 2])
    load(bundle({'texts': task}))
    assert len(calls) == 1  # that its letters are known


def test_several_seeds_give_a_mean_and_a_deviation_also_of_core(bundle):
    tasks = {'texts': TASKS['texts'], 'choices': TASKS['choices']}
    texts, choices = load(bundle(tasks), fewshot_seeds='3,9')
    right = iter([1, 0, 1, 1, 1, 0])  # seeds 3 and 9 of three questions

    def model(text, part):
        return [0.5] * len(part), list(part.encode()) if next(right) else [0] * len(part)

    columns = texts.summarise(answer(texts, model))
    assert columns['accuracy'] == pytest.approx(4 / 6) and columns['items'] == 3
    assert columns['seed_sd'] == pytest.approx(np.std([1, 1 / 3], ddof=1))
    assert columns['accuracy_se'] == pytest.approx(np.std([0.5, 1, 0.5], ddof=1) / math.sqrt(3))
    assert 'fewshot_seeds=3,9' in texts.settings and 'seeds' not in choices.settings
    others = choices.summarise(answer(choices, lambda text, part: ([1.0] * len(part), [0] * len(part))))
    assert others['accuracy'] == 0.5 and 'seed_sd' not in others  # the first of equals
    rows = [dict(columns, task='core/texts'), dict(others, task='core/choices')]
    result = combine(rows)
    centered = (0.5 - 0.4) / 0.6
    assert result['centered'] == pytest.approx((4 / 6 + centered) / 2) and result['items'] == 7
    assert result['seed_sd'] == pytest.approx(np.std([(1 + centered) / 2, (1 / 3 + centered) / 2], ddof=1))
    error = math.hypot(columns['accuracy_se'], others['accuracy_se'] / 0.6) / 2
    assert result['note'] == f'standard error {error:.4f}'
    as_text = [{key: str(value) for key, value in row.items()} for row in rows]  # as a csv has them
    assert combine(as_text) == pytest.approx(result)


def test_a_task_that_is_missing_is_named_and_never_counted(bundle):
    missing = dict(TASKS['choices'], rows=None)
    lines, tasks = [], {'first': missing, 'schemas': TASKS['schemas'], 'last': missing}
    (evaluation,) = load(bundle(tasks), say=lines.append)
    assert [line.split(':')[0] for line in lines] == ['core', 'core'] and 'last is left out' in lines[1]
    columns = evaluation.summarise(
        answer(evaluation, lambda text, part: ([1.0] * len(part), [0] * len(part)))
    )
    result = combine([dict(columns, task='core/schemas')])
    assert result['centered'] == columns['centered'] == 0.0
    assert result['note'].startswith('partial: 1 of 3 tasks, without first, last; standard error')
    # its file came later: the older row names it still
    both = [dict(columns, task='core/schemas'), dict(columns, task='core/last', note='without first')]
    assert 'partial: 2 of 3 tasks, without first;' in combine(both)['note']
    with pytest.raises(ValueError, match='expected a folder with the questions of at least one task'):
        load(bundle({'absent': missing}))


def test_a_task_that_the_tokenizer_cannot_encode_is_left_out(bundle):
    lines, letters = [], sorted(set(''.join(map(json.dumps, CHOICES))) | {'\n', ' '})
    folder = bundle({'choices': TASKS['choices'], 'schemas': TASKS['schemas']})
    assert [e.name for e in load(folder, Characters(letters), lines.append)] == ['core/choices']
    assert lines[0].startswith('core: schemas is left out: characters that the tokenizer does not know')


def test_a_prompt_that_is_too_long_for_learned_positions_loses_its_start(bundle):
    folder = bundle({'texts': TASKS['texts'], 'choices': TASKS['choices']})
    whole = load(folder)
    for size in (24, 12, 3):
        config = GPTConfig(block_size=size, pos='learned', n_embd=32, n_head=2)
        for evaluation, reference in zip(load(folder, config=config), whole, strict=True):
            for item, full in zip(evaluation.items, reference.items, strict=True):
                for text, long in zip(item.texts, full.texts, strict=True):
                    assert text.ids == long.ids[-size:] and text.scored.stop == len(text.ids)
                    gone = len(long.ids) - len(text.ids)
                    assert text.scored.start == max(1, long.scored.start - gone)
                cut = any(
                    t.ids[t.scored] != u.ids[u.scored] for t, u in zip(item.texts, full.texts, strict=True)
                )
                assert item.info.get('cut', False) == cut
    texts = load(folder, config=GPTConfig(block_size=3, pos='learned', n_embd=32, n_head=2))[0]
    records = answer(texts, lambda text, part: ([0.5] * len(part), list(part.encode())))
    # ' y' is two tokens, and fits behind one more; of the others the start is not seen
    assert sum(record['correct'] for record in records) == 1
    assert '2 of 3 longer than the context' in texts.summarise(records)['note']


def merging_tokenizer():
    """A byte-level BPE in which ': t' and 'ab' are single tokens."""
    tokenizers = pytest.importorskip('tokenizers')
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [('a', 'b'), ('\u0120', 't'), (':', '\u0120t')]
    names = ['<|endoftext|>', *alphabet, *(x + y for x, y in merges)]
    bpe = tokenizers.models.BPE({name: i for i, name in enumerate(names)}, merges)
    made = tokenizers.Tokenizer(bpe)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(['<|endoftext|>'])
    return HuggingFace(made.to_str())


def test_a_token_of_prompt_and_continuation_is_scored_whole(bundle):
    rows = [dict(context='Q:', continuation='ten'), dict(context='Q', continuation='ten')]
    task = dict(TASKS['texts'], rows=rows, num_fewshot=[0], continuation_delimiter=' ')
    same = dict(query='say', choices=['a', 'ab', 'a'], gold=1)
    starts = dict(query='say', choices=['t', 'tt'], gold=1)
    choices = dict(TASKS['choices'], rows=[starts, same])
    tokenizer = merging_tokenizer()
    texts, several = load(bundle({'texts': task, 'choices': choices}), tokenizer)
    found = {item.info.get('merged', False): item for item in texts.items}
    scored = {flag: tokenizer.decode(item.texts[0].ids[item.texts[0].scored]) for flag, item in found.items()}
    assert scored == {False: ' ten', True: ': ten'}
    assert found[True].texts[0].ids[: found[True].texts[0].scored.start] == [0, *tokenizer.encode('Q')]
    record = texts.judge(found[True], [np.ones(3)], [np.array(found[True].info['target'])])
    assert record['correct'] == 1
    assert '1 of 1 scored with the token before' in texts.summarise([found[True].info | record])['note']
    for item in several.items:  # at least one token of each
        parts = [tokenizer.decode(text.ids[text.scored]) for text in item.texts]
        assert parts == (['a', 'ab', 'a'] if len(parts) == 3 else [' t', ' tt'])
        assert item.info.get('merged', False) == (len(parts) == 2)


def test_contexts_of_very_unlike_length_and_like_ones():
    score = module.score_suffix
    assert score([[0, 1, 8, 9], [0, *range(20, 60), 8, 9]]) == (
        [([0, 1, 8, 9], 2), ([0, *range(20, 60), 8, 9], 41)],
        False,
    )
    assert score([[0, 5], [0, 5]]) == ([([0, 5], 1)] * 2, False)
    assert score([[0, 5], [0, 6, 7]]) == ([([0, 5], 1), ([0, 6, 7], 2)], True)
    assert module.score_continuation([[0, 5], [0, 5]]) == ([([0, 5], 1)], False)


def test_a_task_without_mistakes_has_no_error():
    perfect = dict(task='core/a', accuracy=1.0, accuracy_se=0.0, centered=1.0, items=9)
    other = dict(task='core/b', accuracy=0.5, accuracy_se=0.1, centered=0.0, items=9)
    result = combine([perfect, other])
    assert result == dict(centered=0.5, items=18, note='standard error 0.1000')


def test_a_line_of_json_ends_at_a_newline_only(tmp_path):
    rows = [dict(text='a\u2028b\x85c'), dict(text='d')]
    (tmp_path / 'b.jsonl').write_text(json.dumps(dict(text='\U0001f600')))  # as two escapes
    assert read_jsonl(tmp_path / 'b.jsonl') == [dict(text='\U0001f600')]
    text = '\n\n'.join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / 'a.jsonl').write_text(text)
    assert [row['text'] for row in read_jsonl(tmp_path / 'a.jsonl')] == ['a\u2028b\x85c', 'd']


def test_what_decides_the_items_is_in_the_settings(bundle):
    first = load(bundle(TASKS))
    assert [e.settings for e in load(bundle(TASKS))] == [e.settings for e in first]
    changed = dict(TASKS, choices=dict(TASKS['choices'], baseline='41'))
    changed['schemas'] = dict(TASKS['schemas'], continuation_delimiter='  ')
    changed['texts'] = dict(TASKS['texts'], rows=[*COMPLETIONS[:2], dict(context='x', continuation='z')])
    others = load(bundle(changed))
    assert not {e.settings for e in first} & {e.settings for e in others}


@pytest.mark.parametrize(
    'changed, told',
    [
        (dict(max_per_task=2), 'max_per_task=2, expected more than the 2 shots of texts'),
        (dict(core_dir='/nowhere'), "core_dir='/nowhere', expected a folder"),
    ],
)
def test_wrong_keys_are_told(bundle, changed, told):
    with pytest.raises(ValueError, match=told):
        load(bundle(TASKS), **changed)


@pytest.mark.parametrize(
    'name, text, told',
    [
        ('core.yaml', None, 'expected a folder with core.yaml'),
        ('core.yaml', 'icl_tasks: [', 'core.yaml is no YAML: while parsing'),
        ('core.yaml', '- a', 'core.yaml: expected icl_tasks, a list of tasks'),
        ('core.yaml', 'icl_tasks: []', 'core.yaml: expected icl_tasks, a list of tasks'),
        ('core.yaml', 'icl_tasks: [{"label": 3}]', 'task 1: label=3, expected a text'),
        ('core.yaml', b'\xff', 'core.yaml is not UTF-8'),
        ('eval_meta_data.csv', None, 'expected a folder with eval_meta_data.csv'),
        ('eval_meta_data.csv', 'a,b\n1,2\n', 'expected the columns Eval Task and Random baseline, got a, b'),
        ('eval_meta_data.csv', f'Eval Task,Random baseline\n{"a" * 200_000}', 'is no table: field larger'),
        ('eval_meta_data.csv', '', 'expected the columns Eval Task and Random baseline, got'),
        ('eval_meta_data.csv', 'Eval Task,Random baseline\nq,1\n', 'expected a row for the task texts'),
        (
            'eval_meta_data.csv',
            'Eval Task,Random baseline\ntexts,x\n',
            "baseline of texts='x', expected perc",
        ),
        ('eval_meta_data.csv', 'Eval Task,Random baseline\ntexts\n', 'baseline of texts=None, expected perc'),
        ('eval_meta_data.csv', 'Eval Task,Random baseline\ntexts,100\n', "='100', expected percent"),
        ('eval_data/a/texts.jsonl', '{"a": 1}\n\n{', 'line 3 is no JSON'),
        ('eval_data/a/texts.jsonl', '[1]', r'line 1: expected an object .*, got \[1\]'),
        (
            'eval_data/a/texts.jsonl',
            r'{"context": "\ud83d\ude00 \ud83d"}',
            'line 1: expected texts, it has half',
        ),
        ('eval_data/a/texts.jsonl', '', 'has 0 questions, expected more than its 2 shots'),
        ('eval_data/a/texts.jsonl', '{"continuation": "a"}', 'question 1: expected context, a text'),
        ('eval_data/a/texts.jsonl', '{"context": "a", "continuation": " "}', 'a text that is not blank'),
    ],
)
def test_a_broken_bundle_is_told_in_one_line(bundle, name, text, told):
    folder = bundle({'texts': TASKS['texts']})
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=told) as error:
        load(folder)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    'entry, row, told',
    [
        (dict(icl_task_type='essay'), {}, "icl_task_type='essay', expected one of multiple_choice, schema"),
        (dict(num_fewshot=10), {}, r'num_fewshot=10, expected a list .* such as \[10\]'),
        (dict(num_fewshot=[]), {}, 'num_fewshot='),
        (dict(num_fewshot=[-1]), {}, 'num_fewshot='),
        (dict(dataset_uri=None), {}, 'dataset_uri=None, expected a text'),
        (dict(label='a, b'), {}, "label='a, b', expected letters, digits"),
        ({}, dict(choices='ab'), 'question 1: expected choices, a list of two or more texts'),
        ({}, dict(choices=['a', 3]), 'question 1: expected choices, a list of two or more texts'),
        ({}, dict(gold=2), 'question 1: expected gold, the index of the right one of 2 choices'),
        ({}, dict(gold=True), 'question 1: expected gold'),
        ({}, dict(query=None), 'question 1: expected query, a text'),
    ],
)
def test_a_wrong_type_is_told_with_its_place(bundle, entry, row, told):
    task = dict(TASKS['choices'], rows=[dict(CHOICES[1], **row)]) | entry
    with pytest.raises(ValueError, match=told):
        load(bundle({'choices': task}))


def test_a_label_stands_for_one_task(bundle):
    with pytest.raises(ValueError, match="label='a', expected a label for each task"):
        load(bundle({'b': dict(TASKS['choices'], label='a'), 'a': TASKS['choices']}))


@pytest.mark.parametrize('content', ['whole', 'other', 'cut', None])
def test_the_bundle_is_downloaded_whole_or_not_at_all(bundle, tmp_path, monkeypatch, content):
    folder = bundle({'choices': TASKS['choices']})
    archive, lines = tmp_path / 'a.zip', []
    if content:
        with zipfile.ZipFile(archive, 'w') as file:
            for path in ('core.yaml', 'eval_meta_data.csv', 'eval_data/a/choices.jsonl'):
                file.write(folder / path, f'{"eval_bundle" if content == "whole" else "b"}/{path}')
    if content == 'cut':
        archive.write_bytes(archive.read_bytes()[:-30])
    monkeypatch.setattr(core_bundle, 'BUNDLE_URL', archive.as_uri())
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    if content == 'whole':
        assert [e.name for e in load('', say=lines.append)] == ['core/choices']
        archive.unlink()
        assert [e.name for e in load('', say=lines.append)] == ['core/choices'] and len(lines) == 1
    else:
        told = {'other': 'has no eval_bundle/core.yaml', 'cut': 'came incomplete', None: 'cannot be reached'}
        with pytest.raises(ValueError, match=f'{told[content]}.*--core_dir=FOLDER'):
            load('', say=lines.append)
        assert [path.name for path in (tmp_path / 'cache/nanoloop').iterdir()] == ['.lock']
