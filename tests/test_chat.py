"""Chat without a terminal or a server: the cache between turns, answers in one batch, what fits in view."""

import random

import pytest
import torch
from chatting import GREEDY, TOKENIZER, Script, chat_model, from_the_beginning, question, run
from decoding import IDX, dividing_threshold, expected, gated

from model import POS
from nanoloop import kv_cache
from nanoloop.chat.answer import Answer, Pieces, Policy
from nanoloop.chat.chat_model import ChatModel
from nanoloop.chat.conversation import Conversation, TextFormat, Turn
from nanoloop.chat.engine import MAX_POLICIES, Call, Engine, Full
from nanoloop.chat.rows import Rows, common_prefix
from nanoloop.chat.settings import Settings
from nanoloop.checks import UserError
from nanoloop.conversation import render, render_prompt
from nanoloop.early_exit import EarlyExit
from nanoloop.tokenizer import Bytes

# -----------------------------------------------------------------------------
# rows: what a text has in common with its row is not computed again


@pytest.mark.parametrize('rule', [None, 'diff'])
@pytest.mark.parametrize('pos', POS)
def test_texts_that_are_edited_get_the_predictions_of_a_text_read_from_its_beginning(pos, rule, monkeypatch):
    """Rows of a cache that soon begins anew, or overwrites its first tokens, against the definition."""
    monkeypatch.setattr(kv_cache, 'PREFILL_CHUNK', 5)
    model, options = gated(pos=pos, n_loop=3), {}
    if rule:
        options = dict(rule=rule, threshold=dividing_threshold(model, rule, IDX[0, :12]))
    early_exit = EarlyExit(rule, options['threshold']) if rule else None
    rows, dice, texts = Rows(model, 2, early_exit=early_exit), random.Random(1), [[], []]
    saved = 0
    for turn in range(6):
        for row, text in enumerate(texts):
            if turn:
                text = text[: dice.choice([len(text), len(text) - 2, len(text) - 4, len(text) // 2])]
            text = text + IDX[dice.randrange(3), : dice.choice([1, 3, 9])].tolist()
            saved += rows.n_known(row, text)
            x, loops = rows.read(row, text)
            if row == turn % 2:
                check(model, text, x, loops, options)
            texts[row] = text
        for _ in range(dice.choice([1, 4])):
            new = [dice.randrange(23) for _ in texts]
            x, loops = rows.append([1, 0], new[::-1])
            texts = [[*text, token] for text, token in zip(texts, new, strict=True)]
        for i, row in enumerate((1, 0)):
            check(model, texts[row], x[i : i + 1], loops[i], options)
    assert max(map(len, texts)) > 18 and saved > 10  # block_size is 12, the cache of rope has 16 columns


def check(model, text, x, loops, options):
    """Fails unless x (1, C) and loops are those of the last token of a text."""
    right = expected(model, torch.tensor(text), **options)
    with torch.inference_mode():
        logits = model.logits(x)[0]
    torch.testing.assert_close(logits, right.logits[-1], rtol=1e-9, atol=1e-9)
    assert loops == (right.loops[-1] if right.loops else model.config.n_loop)


def test_a_turn_computes_its_new_tokens_only():
    model, text = gated(pos='rope'), IDX[0].tolist()
    rows = Rows(model, 1)
    for length in (4, 9, 10):
        rows.read(0, text[:length])
        assert rows.n_computed == length
    rows.append([0], [text[10]])
    rows.read(0, [*text[:11], 3])
    assert rows.n_computed == 12
    rows.read(0, [*text[:11], 3])  # the prediction of the last token is needed, too
    assert rows.n_computed == 13


def test_a_text_takes_the_row_that_knows_it_and_spares_the_others():
    rows = Rows(gated(pos='rope', block_size=64), 3)
    first, second = IDX[0].tolist(), IDX[0, :5].tolist() + IDX[1].tolist()
    row = rows.take(first)
    rows.read(row, first)
    rows.release(row)
    assert rows.take(second) != row  # it has five tokens of `first`, and would lose 35
    assert rows.take([*first, 1, 2]) == row


def test_rows_that_grow_keep_their_tokens():
    model, text = gated(pos='rope'), IDX[0, :9].tolist()
    rows, again = Rows(model, 5, n_rows=1), Rows(model, 5, n_rows=1)
    rows.read(rows.take(text), text)
    for n_rows in (2, 4, 5):
        row = rows.take([n_rows])
        assert row and len(rows.ids) == n_rows
        rows.read(row, [n_rows])
        rows.take([n_rows, 1]) if n_rows == 4 else None
    torch.testing.assert_close(rows.append([0], [3])[0], again.read(0, [*text, 3])[0])
    assert len(rows.ids) == len(rows.decoder.cache.lengths) == 5 and len(again.ids) == 1


@pytest.mark.parametrize('n_answer', [3, 40])
def test_a_question_that_is_asked_again_is_not_computed_again(n_answer):
    """Also after an answer that is longer than the question."""
    chat = chat_model(block_size=256)
    engine, settings, before = Engine(chat.model), Settings(max_new_tokens=n_answer, temperature=0), 0
    for new_tokens in (len(chat.prompt(question('How many?'), settings)[0]), 1, 1):
        run(engine, chat.answer(question('How many?'), settings)[0])
        (rows,) = engine.rows.values()
        assert rows.n_computed - before == new_tokens + n_answer - 1
        before = rows.n_computed
    assert sum(map(bool, rows.ids)) == 1


def test_a_row_that_failed_is_computed_anew(monkeypatch):
    model, text = gated(pos='rope'), IDX[0, :9].tolist()
    rows = Rows(model, 2)
    right, _ = rows.read(0, text)
    x, _ = rows.read(1, text[:8])
    real = rows.decoder.coda
    monkeypatch.setattr(rows.decoder, 'coda', lambda *args: 1 / 0)
    for compute in (lambda: rows.append([1], [text[8]]), lambda: rows.read(1, text)):
        with pytest.raises(ZeroDivisionError):
            compute()
    monkeypatch.setattr(rows.decoder, 'coda', real)
    torch.testing.assert_close(rows.read(1, text)[0], right)


# -----------------------------------------------------------------------------
# turns


@pytest.mark.parametrize(
    'pos, rule', [('learned', None), ('none', 'diff'), ('rope', None), ('rope', 'kl'), ('rope', 'gate')]
)
def test_turns_with_a_kept_cache_get_the_answers_of_one_pass_over_the_conversation(pos, rule):
    """Past the window, too: the answers run out of view, and the oldest turns leave it."""
    chat = chat_model(pos=pos, exit_gate=True, n_loop=3)
    settings = GREEDY
    if rule:
        ids = render_prompt([dict(role='user', content='How many loops?')], TOKENIZER)
        threshold = dividing_threshold(chat.model, rule, torch.tensor(ids))
        settings = Settings(max_new_tokens=12, temperature=0, exit=rule, exit_threshold=threshold)
    conversation, engine, n_left, loops = Conversation('Be short.'), Engine(chat.model, max_batch=2), 0, set()
    for text in ('How many loops?', 'And now?', 'Why?', 'Say it again, please.'):
        conversation.turns.append(Turn('user', text))
        answer, n_dropped = chat.answer(conversation, settings)
        run(engine, answer)
        assert answer.tokens == from_the_beginning(chat, answer.ids[: answer.n_prompt], settings)
        conversation.turns.append(Turn('assistant', '', answer.tokens))
        n_left, loops = max(n_left, n_dropped), loops | set(answer.loops)
    assert n_left and len(loops) > bool(rule)


def test_a_second_turn_computes_no_token_of_the_first_again():
    chat = chat_model(block_size=256)
    conversation, engine = Conversation(), Engine(chat.model)
    for text in ('How many?', 'Why?', 'Really?'):
        conversation.turns.append(Turn('user', text))
        (answer,) = run(engine, chat.answer(conversation, GREEDY)[0])
        conversation.turns.append(Turn('assistant', '', answer.tokens))
    (rows,) = engine.rows.values()
    assert rows.n_computed == len(answer.ids) - 1  # its last token was not needed


@pytest.mark.parametrize('draft', ['How many loops', 'How many loops?', 'What'])
def test_a_question_that_was_read_while_it_was_typed_gets_the_same_answer(draft):
    chat = chat_model(block_size=256)
    drafted, asked = (Conversation(turns=[Turn('user', text)]) for text in (draft, 'How many loops?'))
    engine, answer = Engine(chat.model), chat.answer(asked, GREEDY)[0]
    ids = chat.prompt(drafted, GREEDY)[0]
    assert engine.read_ahead(answer.policy, ids) == len(ids)
    run(engine, answer)
    assert answer.tokens == from_the_beginning(chat, answer.ids[: answer.n_prompt])
    (rows,) = engine.rows.values()
    same = common_prefix(ids, answer.ids[: answer.n_prompt - 1])
    expected = len(ids) + len(answer.ids) - 1 - (same if draft != 'What' else 0)
    assert rows.n_computed == expected and len(rows.free) == rows.max_rows
    assert (engine.n_answers, engine.n_tokens) == (1, len(answer.tokens))


def test_no_answer_waits_for_a_question_that_is_being_typed():
    chat = chat_model()
    engine = Engine(chat.model)
    answer = chat.answer(Conversation(turns=[Turn('user', 'How many?')]), GREEDY)[0]
    engine.submit(answer)
    assert engine.waiting and engine.read_ahead(answer.policy, [1, 2, 3]) == 0
    engine.step()
    assert engine.active and engine.read_ahead(answer.policy, [1, 2, 3]) == 0


def test_a_question_that_is_being_typed_takes_no_cache_from_another_policy():
    engine = Engine(chat_model().model)
    for n_loop in range(1, 5):
        assert engine.read_ahead(Policy(n_loop), [1, 2, 3]) == (3 if n_loop <= MAX_POLICIES else 0)
    assert list(engine.rows) == [Policy(n_loop) for n_loop in range(1, MAX_POLICIES + 1)]


def test_a_prompt_is_rendered_as_in_training_and_loses_its_oldest_turns():
    chat = chat_model(block_size=80)
    contents = ['How many loops?', 'Four.', 'Why?', 'It is deep.', 'And now?']
    roles = ['user', 'assistant'] * 2 + ['user']
    messages = [dict(role=role, content=text) for role, text in zip(roles, contents, strict=True)]
    system = dict(role='system', content='Be short.')
    conversation = Conversation.of_messages([system, *messages])
    whole = render_prompt([system, *messages], TOKENIZER)
    for room, n_dropped in ((80 - len(whole), 0), (81 - len(whole), 2), (50, 4)):
        ids, dropped = conversation.prompt(chat.form, 80, room)
        assert dropped == n_dropped and len(ids) <= 80 - room
        assert ids == render_prompt([system, *messages[n_dropped:]], TOKENIZER)
    with pytest.raises(
        UserError, match='the message with the system text has 23 tokens, expected at most 20'
    ):
        conversation.prompt(chat.form, 80, 60)
    assert conversation.messages() == [system, *messages]


def test_a_conversation_ends_at_its_context():
    chat = chat_model(block_size=256)
    chat = ChatModel(chat.model, TOKENIZER, context=40)
    engine, settings = Engine(chat.model, max_tokens=40), Settings(max_new_tokens=200, temperature=0)
    (answer,) = run(engine, chat.answer(question('How many loops?'), settings)[0])
    assert len(answer.ids) == 40 and answer.finish == 'length'
    (rows,) = engine.rows.values()
    assert rows.decoder.cache.capacity == 40
    with pytest.raises(UserError, match='expected at most 30: the model sees 40'):
        chat.answer(question('a' * 30), settings)


def test_an_answer_that_was_interrupted_ends_in_the_next_prompt():
    chat = chat_model()
    conversation = Conversation(turns=[Turn('user', 'a'), Turn('assistant', 'b', [98]), Turn('user', 'c')])
    messages = [dict(role=turn.role, content=turn.content) for turn in conversation.turns]
    assert conversation.prompt(chat.form, 64, 0)[0] == render_prompt(messages, TOKENIZER)
    for end in (chat.form.answer_end, [TOKENIZER.special_ids['<|user_start|>']]):
        conversation.turns[1] = Turn('assistant', 'b', [98, *end])
        assert conversation.prompt(chat.form, 64, 0)[0] == render_prompt(messages, TOKENIZER)
    messages[1]['content'] = [dict(type='python', text='1+')]
    conversation.turns[1] = Turn('assistant', '', [IDS['python_start'], *b'1+'])  # stopped in a call
    assert conversation.prompt(chat.form, 64, 0)[0] == render_prompt(messages, TOKENIZER)


def test_a_base_model_continues_the_text():
    chat = chat_model(text=True)
    assert chat.form.name == 'text' and chat_model().form.name == 'chat'
    assert TextFormat(Bytes()).stop == frozenset()
    conversation = Conversation('S', [Turn('user', 'ab'), Turn('assistant', 'cd'), Turn('user', 'ef')])
    assert bytes(conversation.prompt(chat.form, 64, 0)[0]) == b'Sabcdef'
    assert bytes(conversation.prompt(chat.form, 6, 0)[0]) == b'Sef'
    (answer,) = run(Engine(chat.model), chat.answer(question('a'), GREEDY)[0])  # a prompt of one token
    assert answer.tokens == from_the_beginning(chat, [97])


# -----------------------------------------------------------------------------
# an answer in pieces


IDS = {name: TOKENIZER.special_ids[f'<|{name}|>'] for name in ('python_start', 'python_end', 'assistant_end')}


def scripted(chat, tokens, **options):
    """Returns the Answer to a question that consists of given tokens."""
    options = dict(max_tokens=40) | options
    return Answer([1, 2], chat.form, Script(tokens), Policy(2), **options)


def test_the_calculator_answers_inside_an_answer():
    chat = chat_model()
    tokens = [*b'It is ', IDS['python_start'], *b'6*7', IDS['python_end'], *b'.', IDS['assistant_end']]
    (answer,) = run(Engine(chat.model), scripted(chat, tokens))
    content = [dict(type='text', text='It is '), dict(type='python', text='6*7')]
    content += [dict(type='python_output', text='42'), dict(type='text', text='.')]
    messages = [dict(role='user', content=''), dict(role='assistant', content=content)]
    ids, mask = render(messages, TOKENIZER)
    assert answer.tokens == ids[4:] and [n > 0 for n in answer.loops] == [m > 0 for m in mask[4:]]
    pieces = answer.take_pieces()
    for part in content:
        assert part['text'] == ''.join(piece.text for piece in pieces if piece.kind == part['type']) or (
            part['type'] == 'text'
        )
    assert sum((piece.tokens for piece in pieces), []) == answer.tokens and answer.finish == 'stop'
    assert sum((piece.loops for piece in pieces), []) == answer.loops and answer.mean_loops() == 2
    assert not answer.take_pieces()


def test_forced_tokens_are_read_before_the_next_one_is_predicted():
    chat = chat_model()
    tokens = [IDS['python_start'], *b'6*7', IDS['python_end'], *b'.', IDS['assistant_end']]
    engine = Engine(chat.model)
    (answer,) = run(engine, scripted(chat, tokens))
    (rows,) = engine.rows.values()
    assert rows.ids[0] == answer.ids[:-1] and rows.n_computed == len(answer.ids) - 1


def test_an_answer_ends_at_its_stops_and_at_its_most_tokens():
    chat = chat_model()
    for stops, finish, text in ((['cd'], 'stop', 'ab'), (['xx'], 'length', 'abcde'), ([], 'length', 'abcde')):
        (answer,) = run(Engine(chat.model), scripted(chat, b'abcdefgh', max_tokens=5, stops=stops))
        assert (answer.finish, ''.join(piece.text for piece in answer.take_pieces())) == (finish, text)
    tokens = [IDS['python_start'], *b'10**2', IDS['python_end']]
    (answer,) = run(
        Engine(chat.model), scripted(chat, [*b'a', IDS['python_start'], *b'99*9', *tokens[-1:]], max_tokens=8)
    )
    assert answer.finish == 'length' and len(answer.tokens) == 7  # without half of the result


def test_stops_are_looked_for_in_the_models_text_only():
    chat = chat_model()
    tokens = [IDS['python_start'], *b'7/2', IDS['python_end'], *b'a.b']
    (answer,) = run(Engine(chat.model), scripted(chat, tokens, stops=['.']))
    texts = [(piece.kind, piece.text) for piece in answer.take_pieces() if piece.text]
    assert ''.join(text for kind, text in texts if kind == 'python_output') == '3.5'
    assert texts[-1] == ('text', 'a') and answer.finish == 'stop'


def test_a_character_of_several_tokens_is_one_piece():
    pieces = Pieces(chat_model().form, [])
    assert pieces.add(0xC3, 2) == [] and pieces.add(0xA9, 3) == [('text', 'é', [0xC3, 0xA9], [2, 3])]
    assert pieces.add(0xC3, 1) == [] and pieces.rest() == [('text', '\ufffd', [0xC3], [1])]


# -----------------------------------------------------------------------------
# the engine


def mixed_answers(chat):
    """Returns answers with unlike prompts, depths and samplers, the same ones in every call."""
    several = [
        GREEDY, Settings(max_new_tokens=9, temperature=0, n_loop=5), Settings(max_new_tokens=20, seed=3),
        Settings(max_new_tokens=7, temperature=0, exit='diff', exit_threshold=0.5),
    ]  # fmt: skip
    texts = ['How many?', 'Why?', 'a', 'This is a question that is longer than the others.', 'How much?']
    return [chat.answer(question(texts[i % 5]), several[i % 4])[0] for i in range(10)]


@pytest.mark.parametrize('pos', ['learned', 'rope'])
def test_an_answer_does_not_depend_on_the_others(pos):
    chat = chat_model(pos=pos, block_size=72, n_loop=3)
    alone = [run(Engine(chat.model), answer)[0].tokens for answer in mixed_answers(chat)]
    for max_batch in (1, 3, 8):
        answers = run(Engine(chat.model, max_batch), *mixed_answers(chat))
        assert [answer.tokens for answer in answers] == alone
    assert len({tuple(tokens) for tokens in alone}) > 5


def test_answers_with_one_policy_share_a_batch():
    chat, sizes = chat_model(), []
    engine = Engine(chat.model, max_batch=4)
    answers = [chat.answer(question('abcd'[i]), GREEDY)[0] for i in range(4)]
    for answer in answers:
        engine.submit(answer)
        engine.step()
    (rows,) = engine.rows.values()
    real = rows.decoder.read
    rows.decoder.read = lambda idx, *args, **keys: sizes.append(tuple(idx.shape)) or real(idx, *args, **keys)
    engine.step()
    assert sizes == [(4, 1)]


def test_a_cancelled_answer_frees_its_place():
    chat = chat_model()
    engine = Engine(chat.model, max_batch=1, max_waiting=2)
    first, second, third = (chat.answer(question(text), GREEDY)[0] for text in 'abc')
    engine.submit(first)
    engine.step()
    engine.submit(second)
    engine.submit(third)
    with pytest.raises(Full):
        engine.submit(chat.answer(question('d'), GREEDY)[0])
    first.cancelled = second.cancelled = True
    engine.step()
    assert (first.finish, second.finish) == ('cancelled', 'cancelled') and not engine.waiting
    assert [answer for answer, _ in engine.active] == [third]
    run(engine, chat.answer(question('d'), GREEDY)[0])
    assert third.tokens == from_the_beginning(chat, third.ids[: third.n_prompt])


def test_an_error_ends_the_answers_of_its_batch_only():
    chat, told = chat_model(), []
    engine = Engine(chat.model, say=told.append)
    good = chat.answer(question('a'), Settings(max_new_tokens=5, temperature=0, n_loop=4))[0]
    bad, beside = (chat.answer(question(text), GREEDY)[0] for text in 'ab')
    bad.sampler = Script([])  # raises StopIteration
    run(engine, good, bad, beside, call := Call(lambda: 1 / 0), other := Call(lambda: 'done'))
    assert [job.finish for job in (good, bad, call, other)] == ['length', 'error', 'error', 'stop']
    assert isinstance(bad.error, StopIteration) and isinstance(call.error, ZeroDivisionError)
    assert other.result == 'done' and len(told) == 2 and 'ZeroDivisionError' in told[0]
    assert beside.tokens == from_the_beginning(chat, beside.ids[: beside.n_prompt])
    (again,) = run(engine, chat.answer(question('b'), GREEDY)[0])
    assert again.tokens == from_the_beginning(chat, again.ids[: again.n_prompt])


def test_a_prediction_that_is_not_finite_ends_its_answer_only(monkeypatch):
    chat, told = chat_model(), []
    engine, real = Engine(chat.model, say=told.append), chat.model.logits
    good, bad = (chat.answer(question(text), GREEDY)[0] for text in 'ab')

    def logits(x):
        values = real(x).clone()
        if len(values) == 2:
            values[0] = torch.nan  # a new text's comes first
        return values

    monkeypatch.setattr(chat.model, 'logits', logits)
    run(engine, good, bad)
    assert (good.finish, bad.finish) == ('length', 'error') and isinstance(bad.error, FloatingPointError)


def test_a_top_p_below_all_numbers_takes_the_most_likely_token():
    chat = chat_model()
    tiny = Settings(max_new_tokens=12, temperature=1, top_p=1e-300, top_k=None)
    (answer,) = run(Engine(chat.model), chat.answer(question('a'), tiny)[0])
    assert answer.tokens == from_the_beginning(chat, answer.ids[: answer.n_prompt])


def test_calls_and_new_prompts_leave_the_running_answers_their_steps():
    chat, made = chat_model(), []
    engine = Engine(chat.model, max_batch=4)
    answer, *others = (chat.answer(question(text), GREEDY)[0] for text in 'abc')
    engine.submit(answer)
    engine.step()
    calls = [Call(lambda i=i: made.append(i)) for i in range(4)]
    for job in (*calls, *others):
        engine.submit(job)
    calls[1].cancelled = True
    for n in (1, 2, 3):
        engine.step()
        assert len(made) == n and len(answer.tokens) == n + 1
        assert sum(len(other.tokens) > 0 for other in others) == min(n, 2)
    assert made == [0, 2, 3]


def test_an_answer_that_waits_for_a_cache_is_overtaken_but_not_for_ever(monkeypatch):
    monkeypatch.setattr('nanoloop.chat.engine.MAX_OVERTAKEN', 5)
    chat = chat_model()
    engine, begun = Engine(chat.model, max_batch=8), []
    deep = [Settings(max_new_tokens=40, temperature=0, n_loop=n) for n in (1, 2, 3)]
    short = Settings(max_new_tokens=2, temperature=0, n_loop=3)
    for settings in deep:
        engine.submit(chat.answer(question('a'), settings)[0])
    fourth = chat.answer(question('a'), Settings(max_new_tokens=2, temperature=0, n_loop=4))[0]
    engine.submit(fourth)
    while not fourth.finish:
        other = chat.answer(question('b'), short)[0]
        engine.submit(other)
        engine.step()
        begun.append(other)
    n_before = sum(bool(other.tokens) for other in begun)
    assert 4 <= n_before < len(begun) - 10  # then it waited alone for the long ones


def test_nobody_waits_for_an_engine_that_has_ended(monkeypatch):
    chat, told = chat_model(), []
    engine = Engine(chat.model)
    answer = chat.answer(question('a'), GREEDY, notify=lambda: told.append(1))[0]
    waiting = chat.answer(question('b'), GREEDY)[0]
    engine.submit(answer)
    engine.submit(waiting)
    monkeypatch.setattr(engine, 'leave', lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.run()
    assert engine.closed and answer.finish == waiting.finish == 'cancelled' and told
    with pytest.raises(Full):
        engine.submit(waiting)


def test_few_caches_exist_at_once_and_more_policies_wait():
    chat = chat_model(n_loop=2)
    engine = Engine(chat.model, max_batch=8)
    answers = [
        chat.answer(question('a'), Settings(max_new_tokens=4, temperature=0, n_loop=n))[0]
        for n in range(1, 8)
    ]
    n_caches = []
    real = engine.admit
    engine.admit = lambda: real() or n_caches.append(len(engine.rows))
    run(engine, *answers)
    assert max(n_caches) == 3 and [set(answer.loops) for answer in answers] == [{n} for n in range(1, 8)]


def test_predictions_of_every_loop_end_with_what_was_said():
    chat = chat_model(n_loop=3)
    (answer,) = run(Engine(chat.model), chat.answer(question('How many?'), GREEDY)[0])
    predictions = chat.predictions(answer.ids, answer.n_prompt, answer.policy)
    assert len(predictions) == len(answer.tokens) and all(len(token['loops']) == 3 for token in predictions)
    for token in predictions:
        assert token['loops'][-1][0][0] == token['text']  # greedy
        assert [best[0][0] for best in token['loops']][token['kept'] - 1 :] == [token['text']] * (
            4 - token['kept']
        )


@pytest.mark.parametrize(
    'keys, message',
    [
        (dict(exit='kl'), 'exit_threshold'), (dict(exit_threshold=0.1), 'exit_threshold'),
        (dict(top_k=0), 'top_k'), (dict(temperature=-1), 'temperature'), (dict(seed=2**63), 'seed'),
        (dict(n_loop='4'), 'n_loop'),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        Settings(**keys)


def test_an_exit_that_the_model_has_not_is_refused():
    with pytest.raises(UserError, match='no exit gate'):
        Settings(exit='gate', exit_threshold=0.5).policy(chat_model().model)
