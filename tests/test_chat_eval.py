"""The tasks of chat models in eval.py: answers of models that are tables, and of real ones computed anew."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import TINY, randomize

import train
from eval import main
from model import GPT, GPTConfig
from nanoloop import chat_eval
from nanoloop.added_tokens import SPECIAL, Added, chat_tokenizer
from nanoloop.calculator import calculate
from nanoloop.chat_eval import CHATCORE, chat_task, chatcore, combine
from nanoloop.checks import UserError
from nanoloop.conversation import render, render_prompt
from nanoloop.decode import Stats
from nanoloop.early_exit import EarlyExit
from nanoloop.prepare import Writer
from nanoloop.results import csv_beside, read_csv
from nanoloop.scoring import Policy, score
from nanoloop.tokenizer import Bytes, Characters
from nanoloop.tool_use import make_calculator

CHAT = chat_tokenizer(Bytes())
M = SimpleNamespace(rank=0, world=1, cpu_group=None, autocast=torch.no_grad, to_device=lambda x: x)
QUESTIONS = [
    dict(question=f'{i} + 1?', choices=[str(i + (j == i % 4)) for j in range(4)], answer=i % 4)
    for i in range(9)
]
PROBLEMS = [
    dict(question=f'{i} + {i}?', answer=f'{i}+{i} = <<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}')
    for i in range(7)
]


FUNCTIONS = [
    dict(
        prompt=f'def f{i}(x):\n    """ x + {i} """\n',
        canonical_solution=f'    return x + {i}\n',
        test=f'def check(candidate):\n    assert candidate(1) == {i + 1}\n',
        entry_point=f'f{i}',
    )
    for i in range(2)
]


def write_rows(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Files of the tasks, {key: path}."""
    words = [a + b + c for a in 'bcdfgkl' for b in 'aeiou' for c in ('at', 'an', 'oo', 'ell')]
    (tmp_path / 'words.txt').write_text('\n'.join(words))
    (tmp_path / 'arc').mkdir()
    for part in ('easy', 'challenge'):
        write_rows(tmp_path / f'arc/{part}.jsonl', QUESTIONS[: 5 if part == 'easy' else 3])
    return dict(
        arc=str(tmp_path / 'arc'),
        mmlu=write_rows(tmp_path / 'mmlu.jsonl', QUESTIONS),
        gsm8k=write_rows(tmp_path / 'gsm8k.jsonl', PROBLEMS),
        humaneval=write_rows(tmp_path / 'humaneval.jsonl', FUNCTIONS),
        words=str(tmp_path / 'words.txt'),
    )


def keys(**changed):
    options = dict.fromkeys(('arc', 'mmlu', 'gsm8k', 'humaneval', 'words'), '')
    return SimpleNamespace(**options | dict(run_code=False, max_per_task=None, max_new_tokens=24) | changed)


def config(**changed):
    sizes = dict(
        vocab_size=265, block_size=512, n_embd=16, n_head=2, n_prelude=1, n_block=1, n_coda=1, n_loop=2
    )
    return GPTConfig(**dict(sizes, pos='rope') | changed)


def evaluate(name, files, tokenizer=None, **changed):
    """The Evaluation of a task."""
    (evaluation,) = chat_task(name, keys(**files, **changed), tokenizer or CHAT, config(), None)
    return evaluation


def answer_by_table(monkeypatch, table):
    """Lets models answer by a table, {prompt's ids: (answer's ids, whether it has ended)}."""

    def roll_out(model, prompts, max_new_tokens, stop, tool, temperature, n_loop, kv_budget, early_exit):
        answers, finished = zip(*(table[tuple(ids)] for ids in prompts), strict=True)
        stats = Stats()
        stats.loops_taken[early_exit or kv_budget or n_loop] += sum(map(len, answers))
        return SimpleNamespace(answers=answers, finished=finished, stats=stats)

    monkeypatch.setattr(chat_eval, 'roll_out', roll_out)


def reference(item, tokenizer):
    """The ids of a prompt and of its reference answer, without the end."""
    prompt, ids = render_prompt(item['messages'], tokenizer), render(item['messages'], tokenizer)[0]
    assert ids[: len(prompt)] == prompt
    return tuple(prompt), ids[len(prompt) : -1]


# -----------------------------------------------------------------------------
# choices


@pytest.mark.parametrize(
    'policy', [Policy(1), Policy(3), Policy(3, kv_budget=1), Policy(3, EarlyExit('diff', 0.3))]
)
def test_the_answer_is_the_most_likely_letter_and_no_other_token_counts(policy, files):
    evaluation, model = evaluate('mmlu', files), randomize(GPT(config()).eval(), seed=1)
    with torch.no_grad():  # so that the prompt decides
        [p.mul_(4) for p in model.transformer.parameters() if p.dim() > 1]
    (result,) = score(model, evaluation, [policy], M)
    letters, others = list(b'ABCD'), 0
    for record, item in zip(result.records, evaluation.items, strict=True):
        prompt = item.texts[0].ids[:-1]
        assert [text.ids for text in item.texts] == [[*prompt, letter] for letter in letters]
        row = QUESTIONS[record['index']]
        assert prompt == render_prompt(evaluation.items.task[record['index']]['messages'], CHAT)
        assert f'Question: {row["question"]}'.lower() in CHAT.decode(prompt).lower()
        assert record['gold'] == row['answer'] and record['correct'] == (record['answer'] == row['answer'])
        if policy.plain:
            with torch.no_grad():
                logits = model(torch.tensor([prompt]), n_loop=policy.n_loop)[0][0, -1]
            assert record['answer'] == int(logits[letters].argmax())
            others += int(logits.argmax()) not in letters
    assert len({record['answer'] for record in result.records}) > 1 and (others > 1 or not policy.plain)


def test_a_model_that_knows_the_choices_scores_exactly(files):
    for name, n in (('mmlu', 9), ('arc_easy', 5), ('arc_challenge', 3)):
        evaluation = evaluate(name, files)
        assert sorted(item.info['index'] for item in evaluation.items) == list(range(n))
        for known in (n, n // 2, 0):
            records = []
            for i, item in enumerate(evaluation.items):
                answer = (item.info['gold'] + (i >= known)) % 4
                ces = [np.array([0.5 if j == answer else 2.0]) for j in range(4)]
                records.append(item.info | evaluation.judge(item, ces, None))
            json.dumps(records)
            columns = evaluation.summarise(records)
            assert columns['accuracy'] == known / n and columns['centered'] == pytest.approx(
                (known / n - 0.25) / 0.75
            )
            p = known / n
            assert columns['accuracy_se'] == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))


def test_a_prompt_that_is_longer_than_the_context_keeps_its_end(files):
    (evaluation,) = chat_task('mmlu', keys(**files), CHAT, config(pos='learned', block_size=40), None)
    whole = evaluate('mmlu', files)
    for item, full in zip(evaluation.items, whole.items, strict=True):
        assert [text.ids for text in item.texts] == [text.ids[-41:] for text in full.texts]
        assert all(text.scored == slice(40, 41) for text in item.texts) and item.info['cut']
    records = [item.info | dict(correct=1) for item in evaluation.items]
    assert evaluation.summarise(records)['note'] == '9 of 9 longer than the context'
    assert whole.summarise([item.info | dict(correct=1) for item in whole.items])['note'] == ''


def test_the_same_questions_are_asked_every_time_and_fewer_are_the_first_ones(files):
    indices = [item.info['index'] for item in evaluate('mmlu', files).items]
    assert sorted(indices) == list(range(9)) != indices
    fewer = evaluate('mmlu', files, max_per_task=4)
    assert [item.info['index'] for item in fewer.items] == indices[:4]
    assert 'max_per_task=4 data=' in fewer.settings and fewer.settings != evaluate('mmlu', files).settings
    assert evaluate('gsm8k', files).settings.endswith('max_new_tokens=24')


def test_letters_that_the_tokenizer_does_not_know_are_told_before_any_question(files):
    class Few(Added):
        def encode(self, text, special=False):
            return Characters('\n abcdefghijklmnopqrstuvwxyzMCRQ').encode(text)

    for name in ('mmlu', 'gsm8k'):
        with pytest.raises(UserError, match="characters that the tokenizer does not know: .*'0' '1' '2'"):
            evaluate(name, files, Few(Bytes(), SPECIAL))


def test_a_letter_of_several_tokens_is_refused(files):
    class Long(Added):
        def encode(self, text, special=False):
            return super().encode(text) * (2 if text == 'C' else 1)

    with pytest.raises(
        UserError, match="tasks='mmlu', expected a model whose tokenizer has one token for each"
    ):
        evaluate('mmlu', files, Long(Bytes(), SPECIAL)).items[0]


# -----------------------------------------------------------------------------
# answers that are generated


def greedy(model, prompt, n_loop, max_new_tokens, stop, tool):
    """An answer computed anew from the whole text for every token."""
    ids, forced = [], []
    while len(ids) < max_new_tokens:
        if forced:
            ids.append(forced.pop(0))
            continue
        with torch.no_grad():
            token = int(model(torch.tensor([[*prompt, *ids]]), n_loop=n_loop)[0][0, -1].argmax())
        if token in stop:
            return ids, 1
        ids.append(token)
        forced += tool(ids)
    return ids, 0


def test_answers_are_those_of_a_full_forward_pass_with_the_results_of_the_tool(files):
    evaluation, model = evaluate('gsm8k', files), randomize(GPT(config()).eval(), seed=3)
    stop, tool = range(0, 265, 9), lambda ids: [65, 66, ids[-1]] if ids[-1] % 4 == 1 else []
    options = dict(max_new_tokens=12, stop=stop, tool=tool)
    policies, told, seen = [Policy(1), Policy(3)], [], []
    evaluation = evaluation._replace(judge=lambda item, ids, finished: dict(ids=ids, finished=int(finished)))
    for batch_tokens in (1, 90, 10**6):
        results = chat_eval.answer_items(
            model, evaluation, policies, M, batch_tokens, lambda *a: told.append(a), **options
        )
        seen.append([result.records for result in results])
        assert [result.mean_loops for result in results] == [1, 3] and told[-1] == (14, 14)
    assert seen[0] == seen[1] == seen[2]
    for policy, records in zip(policies, seen[0], strict=True):
        for item, record in zip(evaluation.items, records, strict=True):
            expected = greedy(model, item.texts[0].ids, policy.n_loop, 12, stop, tool)
            assert (record['ids'], record['finished']) == expected and record['index'] == item.info['index']
    assert {record['finished'] for records in seen[0] for record in records} == {0, 1}


def test_ranks_share_the_answers(files, monkeypatch):
    evaluation, model = evaluate('gsm8k', files), randomize(GPT(config()).eval())
    options = dict(batch_tokens=200, tell=lambda *a: None, max_new_tokens=3, stop=(), tool=None)
    policies, parts = [Policy(1), Policy(2, EarlyExit('diff', 0.3))], []
    alone = chat_eval.answer_items(model, evaluation, policies, M, **options)

    def keep(m, part):
        parts.append(part)
        raise InterruptedError

    for world in (2, 9):  # of 9 two have no question
        parts.clear()
        monkeypatch.setattr(chat_eval, 'gather', keep)
        for rank in range(world):
            m = SimpleNamespace(**vars(M) | dict(rank=rank, world=world))
            with pytest.raises(InterruptedError):
                chat_eval.answer_items(model, evaluation, policies, m, **options)
        monkeypatch.setattr(chat_eval, 'gather', lambda m, part: parts)
        together = chat_eval.answer_items(model, evaluation, policies, m, **options)
        assert [result.records for result in together] == [result.records for result in alone]
        assert [r.mean_loops for r in together] == pytest.approx([r.mean_loops for r in alone])


@pytest.mark.parametrize('name', ['gsm8k', 'humaneval', 'spellingbee', 'simplespelling'])
def test_a_model_that_knows_the_answers_scores_exactly(name, files, monkeypatch):
    evaluation, tokenizer, table = evaluate(name, files, run_code=True), CHAT, {}
    task, n = evaluation.items.task, len(evaluation.items)
    known = [i for i in range(n) if i % 3 == 0]
    for i in range(n):
        prompt, ids = reference(task[i], tokenizer)
        table.setdefault(prompt, (ids, True) if i in known else (tokenizer.encode('#### 1000'), i % 2 == 0))
    answer_by_table(monkeypatch, table)
    policies = [Policy(2), Policy(9), Policy(9, kv_budget=3), Policy(9, early_exit=4)]
    result, *others = evaluation.score(None, evaluation, policies, M, 4096, lambda *a: None)
    assert [r.mean_loops for r in (result, *others)] == [2, 9, 3, 4]
    assert all(other.records == result.records for other in others)
    json.dumps(result.records)
    right = [table[tuple(item.texts[0].ids)][0][-4:] != list(b'1000') for item in evaluation.items]
    assert [bool(record['correct']) for record in result.records] == right and 0 < sum(right) < n
    columns = evaluation.summarise(result.records)
    assert columns['accuracy'] == columns['centered'] == sum(right) / n
    cut = sum(not table[tuple(item.texts[0].ids)][1] for item in evaluation.items)
    assert columns['note'] == f'{cut} of {n} answers did not end' * (cut > 0)
    assert columns['tokens'] == sum(len(table[tuple(item.texts[0].ids)][0]) for item in evaluation.items)


def test_the_calculator_is_given_where_a_task_has_it(files):
    for name, given in (('gsm8k', True), ('spellingbee', True), ('simplespelling', False)):
        options = evaluate(name, files).score.keywords
        assert (options['tool'] is not None) == given and options['stop'] == (260, 256)


def test_the_calculator_writes_its_result_behind_a_call():
    tokenizer = CHAT
    tool, special = make_calculator(tokenizer), {key[2:-2]: i for key, i in tokenizer.special_ids.items()}
    start, end = special['python_start'], special['python_end']
    call = [*b'so ', start, *b'12*4', end]
    result = [special['output_start'], *calculate('12*4').encode(), special['output_end']]
    assert tool(call) == result and bytes(result[1:-1]) == b'48'
    for ids in (
        [],
        [end],
        call[:-1],
        [*call, 65],
        [*call, *result],
        [start, *b'import os', end],
        [start, end],
    ):
        assert tool(ids) == []
    assert tool([*call, *result, start, *b"'bee'.count('e')", end])[1:-1] == list(b'2')
    assert tool([start, *b'1+', *call]) == result  # the last start counts
    with pytest.raises(UserError, match='no token <|python_start|>'):
        make_calculator(SimpleNamespace(special_ids={}, spec=dict(kind='byte')))


# -----------------------------------------------------------------------------
# ChatCORE


def test_chatcore_is_the_mean_of_centered_accuracies_and_names_what_is_missing(files):
    told = []
    evaluations = chatcore(keys(**files), CHAT, config(), told.append)
    assert [e.name for e in evaluations] == ['arc_easy', 'arc_challenge', 'mmlu', 'gsm8k', 'spellingbee']
    (line,) = told
    assert line.startswith('chatcore: humaneval is left out: ') and '--run_code=True' in line
    rows = []
    for evaluation, accuracy in zip(evaluations, (0.25, 1.0, 0.7, 0.5, 0.0), strict=True):
        baseline = 0.25 if evaluation.items.task.kind == 'choice' else 0.0
        centered = (accuracy - baseline) / (1 - baseline)
        rows.append(
            dict(task=evaluation.name, accuracy=accuracy, accuracy_se=0.03, centered=centered, items=10.0)
        )
    columns = combine(rows)
    assert columns['centered'] == pytest.approx((0 + 1 + 0.6 + 0.5 + 0) / 5) and columns['items'] == 50
    error = math.sqrt(3 * 0.04**2 + 2 * 0.03**2) / 5
    assert columns['note'] == f'partial: 5 of 6 tasks, without humaneval; standard error {error:.4f}'
    whole = combine([*rows, dict(task='humaneval', accuracy=0.1, accuracy_se=0.0, centered=0.1, items=1.0)])
    assert 'partial' not in whole['note'] and whole['centered'] == pytest.approx(2.2 / 6)
    assert {row['task'] for row in rows} | {'humaneval'} == set(CHATCORE)


def test_chatcore_leaves_out_what_cannot_be_had_and_refuses_a_file_that_cannot_be_read(
    files, tmp_path, monkeypatch
):
    def unreachable(path, *args, **load):
        raise ConnectionError('no network')

    monkeypatch.setattr('nanoloop.tasks.sources.HubDocuments', unreachable)
    told = []
    evaluations = chatcore(keys(gsm8k=files['gsm8k'], words=files['words']), CHAT, config(), told.append)
    assert [e.name for e in evaluations] == ['gsm8k', 'spellingbee'] and len(told) == 4
    assert 'mmlu is left out: cais/mmlu cannot be reached (no network)' in told[2]
    (tmp_path / 'bad.jsonl').write_text('{}\n')
    for path, expected in (
        (f'{tmp_path}/bad.jsonl', 'row 1'),
        (f'{tmp_path}/none', 'a file or folder that exists'),
    ):
        with pytest.raises(UserError, match=expected):
            chatcore(keys(gsm8k=path), CHAT, config(), told.append)
    easy = write_rows(tmp_path / 'arc_easy.jsonl', QUESTIONS)
    assert [e.name for e in chatcore(keys(arc=easy, words=files['words']), CHAT, config(), told.append)] == [
        'arc_easy',
        'spellingbee',
    ]
    with pytest.raises(UserError, match='no token'):
        chatcore(
            keys(**files), SimpleNamespace(special_ids={}, spec=dict(kind='byte')), config(), told.append
        )


# -----------------------------------------------------------------------------
# the script


def test_eval_measures_chat_tasks_for_loops_and_policies(call, files, tmp_path):
    (tmp_path / 'data').mkdir()
    writer = Writer(tmp_path / 'data', CHAT, 'random ids')
    for split in ('train', 'val'):
        writer.add(split, np.arange(600) % 265)
    writer.finish()
    out = f'--out_dir={tmp_path}/out'
    train.main([f'--dataset={tmp_path}/data', out, *TINY, '--pos=rope', '--max_iters=1', '--eval_iters=1'])
    flags = [out, '--device=cpu', '--dtype=float32', *(f'--{key}={path}' for key, path in files.items())]
    flags += ['--loops=1,2', '--kv_budget=1', '--max_per_task=3', '--max_new_tokens=4']
    flags += ['--tasks=mmlu,simplespelling,chatcore', f'--items={tmp_path}/items.jsonl']
    status, first, err = call(main, *flags)
    assert status == 0, err
    assert 'chatcore: humaneval is left out' in err
    rows = read_csv(csv_beside(dict(path=f'{tmp_path}/out/ckpt.pt')))
    tasks = ['mmlu', 'simplespelling', 'arc_easy', 'arc_challenge', 'gsm8k', 'spellingbee', 'chatcore']
    policies = [('1', ''), ('2', ''), ('2', 'kv_budget=1')]
    assert [(r['task'], r['loops'], r['policy']) for r in rows] == [(t, *p) for t in tasks for p in policies]
    assert all(
        row['items'] == ('15' if row['task'] == 'chatcore' else '3') and row['centered'] for row in rows
    )
    assert first.count('mmlu') == 4  # a line for each policy, and one against one loop
    assert 'partial: 5 of 6 tasks, without humaneval' in rows[-1]['note']
    assert len((tmp_path / 'items.jsonl').read_text().splitlines()) == 6 * 3 * 3
    assert (
        call(main, *flags)[1] == first
        and len(read_csv(csv_beside(dict(path=f'{tmp_path}/out/ckpt.pt')))) == 21
    )
    for wrong, told in (
        ('--mmlu=none.csv', 'expected a file or folder that exists'),
        ('--max_new_tokens=0', 'max_new_tokens=0, expected at least 1'),
        ('--run_code=2', "run_code='2', expected True or False"),
    ):
        status, _, err = call(main, *flags, wrong)
        assert status == 2 and told in err
