"""The tasks of a chat model: their items from every kind of file, and their judges, on small made sets."""

import json
import re
import subprocess
import sys

import pytest
from helpers import ROOT

from nanoloop.checks import UserError
from nanoloop.tasks import TASKS, make_task, sources, spelling
from nanoloop.tasks.humaneval import make_program
from nanoloop.tasks.sources import Unavailable

PROBLEMS = [
    dict(question='2 boxes of 24 and 2 more?', answer='2*24 = <<2*24=48>>48\n48+2 = <<48+2=50>>50.\n#### 50'),
    dict(question='A car of $2,500, half off?', answer='It is $<<2500*.5=1250>>1250.\n#### 1,250'),
    dict(question='5 - 8?', answer='5 - 8 is minus three.\n#### -3'),
]
FUNCTIONS = [
    dict(
        task_id='x/0',
        prompt='import math\n\n\ndef half(x):\n    """ Half of x. """\n',
        canonical_solution='    return x / 2\n',
        test='def check(candidate):\n    assert candidate(4) == 2\n',
        entry_point='half',
    )
]
WORDS = [a + b + c for a in 'bcdfgkl' for b in 'aeiou' for c in ('at', 'an', 'oo', 'ell')]
ARC = dict(question='Which is hot?', choices=dict(text=['ice', 'fire', 'rain'], label=['A', 'B', 'C']))
ARC['answerKey'] = 'B'


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)


@pytest.fixture
def options(tmp_path):
    """Files for all tasks."""
    (tmp_path / 'words.txt').write_text('\n'.join(WORDS))
    return dict(
        gsm8k=write_rows(tmp_path / 'gsm8k.jsonl', PROBLEMS),
        humaneval=write_rows(tmp_path / 'humaneval.jsonl', FUNCTIONS),
        mmlu=write_rows(tmp_path / 'mmlu.jsonl', [dict(question='1 + 1?', choices=list('3201'), answer=1)]),
        arc=write_rows(tmp_path / 'arc.jsonl', [ARC]),
        words=str(tmp_path / 'words.txt'),
    )


def reply(item):
    """The text of an item's reference answer."""
    content = item['messages'][-1]['content']
    return content if isinstance(content, str) else ''.join(part['text'] for part in content)


@pytest.mark.parametrize('name', TASKS)
def test_every_task_accepts_its_own_answers_and_no_other(name, options):
    task = make_task(name, dict(options, run_code=True))
    assert task.name == name and len(task) > 0 and task.kind in ('choice', 'text') and 0 <= task.baseline < 1
    for i in range(min(len(task), 8)):
        item = task[i]
        assert item == make_task(name, options)[i] and [m['role'] for m in item['messages']] == [
            'user',
            'assistant',
        ]
        assert task.judge(item, reply(item)) is True and task.reward(item, reply(item)) == 1.0
        assert task.judge(item, '') is False and task.reward(item, 'nothing') == 0.0
    with pytest.raises(IndexError):
        task[len(task)]
    with pytest.raises(UserError, match="split='val', expected train or test"):
        make_task(name, options, 'val')


def test_tasks_need_no_torch():
    code = 'import sys; import nanoloop.tasks; assert not {"torch", "datasets"} & sys.modules.keys()'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


def test_an_unknown_task_is_told_with_those_that_exist():
    with pytest.raises(UserError, match="task='gsm', expected one of arc_easy, .*simplespelling"):
        make_task('gsm', {})


# -----------------------------------------------------------------------------
# choices

FORMS = dict(
    hub=ARC,
    published=dict(
        question=dict(
            stem='Which is hot?',
            choices=[dict(text=t, label=n) for t, n in zip(('ice', 'fire', 'rain'), 'ABC', strict=True)],
        ),
        answerKey='B',
    ),  # fmt: skip
    numbered=dict(question='Which is hot?', choices=['ice', 'fire', 'rain'], answer=1),
    lettered=dict(question='Which is hot?', choices=['ice', 'fire', 'rain'], answer=' B '),
    core=dict(query='Question: Which is hot?', choices=['ice', 'fire', 'rain'], gold=1),
    packed=dict(train=dict(question='Which is hot?', choices=['ice', 'fire', 'rain'], answer='1')),
)


@pytest.mark.parametrize('form', FORMS)
def test_a_choice_is_the_same_item_in_all_forms(form, tmp_path):
    item = make_task('arc_easy', dict(arc=write_rows(tmp_path / 'a.jsonl', [FORMS[form]])))[0]
    assert item['messages'][0]['content'] == (
        'Multiple Choice question: Which is hot?\n- ice=A\n- fire=B\n- rain=C\n\n'
        'Respond only with the letter of the correct answer.'
    )
    assert (item['letters'], item['answer'], item['messages'][1]['content']) == (('A', 'B', 'C'), 'B', 'B')


def test_labels_that_are_digits_are_not_numbers_from_0(tmp_path):
    row = dict(question='?', choices=dict(text=['a', 'b'], label=['1', '2']), answerKey='1')
    item = make_task('arc_easy', dict(arc=write_rows(tmp_path / 'a.jsonl', [row])))[0]
    assert (item['letters'], item['answer']) == (('1', '2'), '1')


@pytest.mark.parametrize('titles', ['question,choice0,choice1,choice2,choice3,answer\n', ''])
@pytest.mark.parametrize('answer', ['2', 'C'])
def test_mmlu_is_read_from_csv_with_and_without_titles(titles, answer, tmp_path):
    (tmp_path / 'law_test.csv').write_text(f'{titles}"Which, of\nthese?",a,"b, c",d,e,{answer}\n')
    task = make_task('mmlu', dict(mmlu=str(tmp_path)))
    assert len(task) == 1 and task[0]['answer'] == 'C'
    assert task.rows[0] == ('Which, of\nthese?', ('a', 'b, c', 'd', 'e'), tuple('ABCD'), 'C')


@pytest.mark.parametrize(
    'row, told',
    [
        (dict(question='?', choices=['a'], answer=0), 'a question and its choices'),
        (dict(question=3, choices=['a', 'b'], answer=0), 'a question and its choices'),
        (dict(question='?', choices=['a', 2], answer=0), 'a question and its choices'),
        (dict(question='?', choices='ab', answer=0), 'a question and its choices'),
        (dict(question='?', choices=dict(text=['a', 'b'], label=['A', 'A']), answerKey='A'), 'a label each'),
        (dict(question='?', choices=dict(text=['a', 'b'], label=['A']), answerKey='A'), 'a label each'),
        (dict(question='?', choices=['a', 'b'], answer=2), 'one of A B or a number from 0'),
        (dict(question='?', choices=['a', 'b'], answer=-1), 'one of A B or a number from 0'),
        (dict(question='?', choices=['a', 'b'], answer=True), 'one of A B or a number from 0'),
        (dict(question='?', choices=['a', 'b'], answer='C'), 'one of A B or a number from 0'),
        (dict(question='?', choices=['a', 'b']), 'one of A B or a number from 0'),
        (dict(messages=[]), 'a question and its choices'),
    ],
)
def test_a_row_that_is_no_question_with_choices_is_told_by_file_and_number(row, told, tmp_path):
    path = write_rows(tmp_path / 'a.jsonl', [ARC, row])
    with pytest.raises(UserError, match=rf'a.jsonl, row 2: expected .*{told}') as error:
        make_task('mmlu', dict(mmlu=path))
    assert '\n' not in str(error.value)


# -----------------------------------------------------------------------------
# files


def test_the_files_of_a_folder_belong_to_the_split_in_their_names(tmp_path):
    for name in ('train', 'test', 'train_socratic', 'latest'):
        write_rows(tmp_path / f'main/{name}.jsonl', [dict(question=name, answer='#### 1')])
    write_rows(tmp_path / '.cache/test.jsonl', [dict(question='hidden', answer='#### 1')])
    for split in ('train', 'test'):
        assert [row[0] for row in make_task('gsm8k', dict(gsm8k=str(tmp_path)), split).rows] == [split]
    # without the split, what is not of the other one
    (tmp_path / 'main/test.jsonl').unlink()
    assert [row[0] for row in make_task('gsm8k', dict(gsm8k=str(tmp_path))).rows] == ['latest']
    (tmp_path / 'main/latest.jsonl').unlink()
    with pytest.raises(Unavailable, match='expected files with test in their names; a single file'):
        make_task('gsm8k', dict(gsm8k=str(tmp_path)))
    # a file that is named is taken for both
    file = str(tmp_path / 'main/train.jsonl')
    assert make_task('gsm8k', dict(gsm8k=file)).rows == make_task('gsm8k', dict(gsm8k=file), 'train').rows


def test_the_parts_of_arc_are_told_apart_by_the_names_of_files(tmp_path):
    for part in ('ARC-Easy', 'ARC-Challenge'):
        write_rows(tmp_path / f'{part}/test.jsonl', [dict(ARC, question=part)])
    for task, part in (('arc_easy', 'ARC-Easy'), ('arc_challenge', 'ARC-Challenge')):
        assert [row[0] for row in make_task(task, dict(arc=str(tmp_path))).rows] == [part]
        assert [row[0] for row in make_task(task, dict(arc=str(tmp_path / part))).rows] == [part]
    with pytest.raises(Unavailable, match='expected files with challenge test'):
        make_task('arc_challenge', dict(arc=str(tmp_path / 'ARC-Easy/test.jsonl')))


def test_a_folder_with_all_of_mmlu_and_its_subjects_is_read_once(tmp_path):
    pyarrow = pytest.importorskip('pyarrow')
    from pyarrow import parquet

    rows = [
        dict(question=f'{i}?', choices=['a', 'b', 'c', 'd'], answer=i % 4, subject='law') for i in range(6)
    ]
    for folder, name, part in (
        ('all', 'test', rows),
        ('law', 'test', rows),
        ('all', 'auxiliary_train', rows[:2]),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        parquet.write_table(
            pyarrow.Table.from_pylist(part), tmp_path / folder / f'{name}-00000-of-00001.parquet'
        )
    assert [row[3] for row in make_task('mmlu', dict(mmlu=str(tmp_path))).rows] == list('ABCDAB')
    assert len(make_task('mmlu', dict(mmlu=str(tmp_path)), 'train')) == 2


@pytest.mark.parametrize(
    'name, content, told',
    [
        ('missing.jsonl', None, "gsm8k='.*missing.jsonl', expected a file or folder that exists"),
        ('a.txt', 'x', 'expected a file .jsonl or .parquet'),
        ('a.jsonl', '', 'a file with rows, it has none'),
        ('a.jsonl', '{"question"', 'line 1 is no JSON'),
        ('a.jsonl', '{"question": "?"}\n', 'a.jsonl, row 1: answer=None, expected a text'),
        (
            'a.jsonl',
            '{"question": "?", "answer": "it is 3"}\n',
            'row 1: answer=.*expected a solution that ends',
        ),
        ('a.csv', 'x,y\n', 'a.csv, row 1: expected a question, two choices or more'),
        ('a.csv', 'question,a,b,answer\n', 'a file with rows, it has none'),
    ],
)
def test_a_file_that_is_none_of_the_task_is_told_in_a_line(name, content, told, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=told) as error:
        make_task('gsm8k', dict(gsm8k=str(tmp_path / name)))
    assert '\n' not in str(error.value) and not isinstance(error.value, Unavailable)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='expected a folder with files .jsonl or .parquet or .csv'):
        make_task('gsm8k', dict(gsm8k=str(tmp_path / 'empty')))


@pytest.mark.parametrize(
    'name, path, config, splits',
    [
        ('arc_easy', 'allenai/ai2_arc', 'ARC-Easy', ('train', 'test')),
        ('arc_challenge', 'allenai/ai2_arc', 'ARC-Challenge', ('train', 'test')),
        ('mmlu', 'cais/mmlu', 'all', ('auxiliary_train', 'test')),
        ('gsm8k', 'openai/gsm8k', 'main', ('train', 'test')),
        ('humaneval', 'openai/openai_humaneval', 'openai_humaneval', (None, 'test')),
    ],
)
def test_without_a_file_the_hub_is_read_and_told_when_it_cannot_be_reached(
    name, path, config, splits, monkeypatch
):
    rows = dict(gsm8k=PROBLEMS, humaneval=FUNCTIONS).get(name, [ARC])
    opened = []

    class Documents:
        def __init__(self, *args, **load):
            self.asked = (args[0], load['name'])

        def open(self, split):
            opened.append((*self.asked, split))
            return rows

    monkeypatch.setattr(sources, 'HubDocuments', Documents)
    for split, expected in zip(('train', 'test'), splits, strict=True):
        if expected is None:
            with pytest.raises(UserError, match="split='train', expected test"):
                make_task(name, {}, split)
        else:
            assert len(make_task(name, {}, split)) == len(rows)
            assert opened[-1] == (path, config, expected)

    def offline(self, split):
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(Documents, 'open', offline)
    with pytest.raises(UserError, match=f"{path} cannot be reached .*hub.*: without a network, --\\w+=FILE"):
        make_task(name, {})


# -----------------------------------------------------------------------------
# GSM8K


def test_annotations_become_tool_calls_and_nothing_else_changes(options):
    task = make_task('gsm8k', options)
    parts = task[0]['messages'][1]['content']
    assert [(part['type'], part['text']) for part in parts] == [
        ('text', '2*24 = '),
        ('python', '2*24'),
        ('python_output', '48'),
        ('text', '48\n48+2 = '),
        ('python', '48+2'),
        ('python_output', '50'),
        ('text', '50.\n#### 50'),
    ]
    assert task[2]['messages'][1]['content'] == [dict(type='text', text=PROBLEMS[2]['answer'])]
    signs = dict(text='{}', python='<<{}=', python_output='{}>>')
    for item, row in zip(task, PROBLEMS, strict=True):
        joined = (signs[part['type']].format(part['text']) for part in item['messages'][1]['content'])
        assert ''.join(joined) == row['answer']


@pytest.mark.parametrize('row', [0, 1, 2])
@pytest.mark.parametrize(
    'change',
    [
        lambda a: a,
        lambda a: re.sub('<<.*?>>', '', a),
        lambda a: f'{a}0',
        lambda a: f'{a}.',
        lambda a: f'{a}.0',
        lambda a: f'{a},',
        lambda a: f'{a} dollars',
        lambda a: f'{a}\n#### 7',
        lambda a: f'#### 7\n{a}',
        lambda a: a.replace('#### ', '#### $'),
        lambda a: a.replace('#### ', '####'),
        lambda a: a.replace('#### ', '####  '),
        lambda a: a.replace('#### ', '#### -'),
        lambda a: a.replace('#### ', '#### 0'),
        lambda a: a.replace('####', '###'),
        lambda a: a.replace(',', ''),
        lambda a: a.replace('#### 50', '#### 5,0'),
        lambda a: re.sub('#### .*', '#### x', a),
        lambda a: re.sub('#### .*', '', a),
        lambda a: '',
    ],
)
def test_gsm8k_is_judged_as_by_its_authors(row, change, options):
    def published(text):
        found = re.compile(r'#### (\-?[0-9\.\,]+)').search(text)
        return found.group(1).strip().replace(',', '') if found else '[invalid]'

    task, answer = make_task('gsm8k', options), PROBLEMS[row]['answer']
    expected = published(change(answer)) == published(answer)
    assert task.judge(task[row], change(answer)) == expected


# -----------------------------------------------------------------------------
# words


def test_words_of_the_test_split_are_never_trained_on(options):
    for name in ('spellingbee', 'simplespelling'):
        tasks = [make_task(name, options, split) for split in ('train', 'test')]
        train, test = (set(task.rows) for task in tasks)
        assert train | test == set(WORDS) and not train & test and 0 < len(test) < len(train) / 4
        for task, words in zip(tasks, (train, test), strict=True):
            questions = [task[i]['messages'][0]['content'].lower() for i in range(200)]
            assert all(any(word in question for word in words) for question in questions)
            assert len(set(questions)) >= len(test)


def test_the_letters_of_a_word_are_counted(options):
    task, counts = make_task('spellingbee', options), set()
    for i in range(200):
        item = task[i]
        parts = {part['type']: part['text'] for part in item['messages'][1]['content']}
        word, letter = re.fullmatch(r"'(\w+)'\.count\('(\w)'\)", parts['python']).groups()
        question = item['messages'][0]['content']
        assert re.search(rf'\b{word}\b', question) and re.search(rf'\b{letter}\b', question)
        assert item['answer'] == parts['python_output'] == str(word.count(letter))
        counts.add(item['answer'])
        assert not task.judge(item, f'#### {int(item["answer"]) + 1}')
        assert task.judge(item, f'so\n#### {item["answer"]}\n')
    assert {'0', '1', '2'} <= counts
    assert spelling.count_letter('bee', 'e')[0]['text'].split('\n\n')[2] == '1:b\n2:e yes, 1\n3:e yes, 2'


def test_spelling_is_right_only_letter_by_letter(options):
    task = make_task('simplespelling', options)
    item = task[5]
    word = item['messages'][0]['content'].split()[-1]
    assert task.judge(item, f' {word}:{",".join(word)}\n')
    assert not task.judge(item, word) and not task.judge(item, ','.join(word) + ',')


def test_lines_that_are_no_words_are_left_out(tmp_path):
    (tmp_path / 'a.txt').write_text(
        '\n'.join([*WORDS, "it's", 'two words', 'caf\u00e9', 'x2', '', ' BIG \r'])
    )
    words = [
        w
        for s in ('train', 'test')
        for w in make_task('spellingbee', dict(words=str(tmp_path / 'a.txt')), s).rows
    ]
    assert sorted(words) == sorted([*WORDS, 'big'])
    (tmp_path / 'b.txt').write_text('1\n2\n')
    with pytest.raises(
        UserError, match="words='.*b.txt', expected a file with a word of English on each line"
    ):
        make_task('simplespelling', dict(words=str(tmp_path / 'b.txt')))
    with pytest.raises(UserError, match="words='.*none.txt', expected a file that exists"):
        make_task('simplespelling', dict(words=str(tmp_path / 'none.txt')))


def test_the_list_of_words_is_downloaded_once(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    (tmp_path / 'list').write_text('\n'.join(WORDS))
    monkeypatch.setattr(spelling, 'WORDS_URL', (tmp_path / 'list').as_uri())
    first = make_task('spellingbee', {}).rows
    (tmp_path / 'list').unlink()
    assert make_task('spellingbee', {}).rows == first
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'other'))
    with pytest.raises(UserError, match='cannot be reached .*--words=FILE names'):
        make_task('spellingbee', {})
    assert not (tmp_path / 'other').exists()


# -----------------------------------------------------------------------------
# HumanEval


@pytest.mark.parametrize(
    'answer, expected',
    [
        ('    return x / 2\n', '{prompt}    return x / 2\n'),
        ('def half(x):\n    return x / 2', '{head}def half(x):\n    return x / 2'),
        ('Here:\n```python\ndef half(x):\n    return 1\n```\nDone.', '{head}def half(x):\n    return 1'),
        ('```\ndef half(x):\n    return 1', '{head}def half(x):\n    return 1'),
        ('```py\n    return 1\n```', '{prompt}    return 1'),
        ('def halfway(x):\n    return 1', '{prompt}def halfway(x):\n    return 1'),
    ],
)
def test_the_program_of_an_answer_has_the_imports_of_the_prompt(answer, expected):
    prompt = FUNCTIONS[0]['prompt']
    assert make_program(prompt, answer, 'half') == expected.format(prompt=prompt, head='import math\n\n\n')


def test_code_runs_only_when_it_is_allowed(options):
    task = make_task('humaneval', options)
    with pytest.raises(Unavailable, match='--run_code=True allows it'):
        task.judge(task[0], '    return x / 2\n')
    with pytest.raises(Unavailable, match='--run_code=True allows it'):
        TASKS['humaneval'].check_judge(options)
    TASKS['humaneval'].check_judge(dict(run_code=True))
