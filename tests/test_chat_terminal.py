"""chat.py in the terminal: answers, commands, Ctrl-C."""

import signal
import sys

import pytest
import torch
from chatting import TOKENIZER, Script, chat_model, from_the_beginning
from decoding import dividing_threshold
from helpers import script

import chat
from nanoloop.chat.settings import Settings
from nanoloop.chat.terminal import COMMANDS, Terminal, shade
from nanoloop.conversation import read_conversations, render_prompt

GREEDY = Settings(max_new_tokens=12, temperature=0)


class Talk:
    """A Terminal with what it has written and said."""

    def __init__(self, model=None, settings=GREEDY, **options):
        self.written, self.said = [], []
        self.terminal = Terminal(
            model or chat_model(), settings, write=self.written.append, say=self.said.append, **options
        )

    def __call__(self, *lines):
        """Reads lines. Returns what was written and said since the last call, two texts."""
        self.written.clear(), self.said.clear()
        lines = [*lines, None]
        self.terminal.talk(lambda: lines.pop(0))
        return ''.join(self.written), '\n'.join(self.said)


def test_a_conversation_goes_on_and_begins_anew():
    talk = Talk()
    first, told = talk('How many loops?')
    assert (
        first.endswith('\n')
        and '[12 tokens, ' in told
        and '2.00 loops per token, cut: max_new_tokens]' in told
    )
    second, _ = talk('How many loops?')
    assert len(talk.terminal.conversation.turns) == 4
    assert talk('/reset', 'How many loops?')[0] == first != second


def test_loops_and_exits_are_turned_while_talking():
    talk = Talk()
    assert '5.00 loops per token' in talk('/loops 5', 'Why?')[1]
    text, told = talk('/exit kl', '/exit diff 0.9', 'Why?')
    assert "exit = 'kl', exit_threshold = 0.001" in told and "exit = 'diff', exit_threshold = 0.9" in told
    loops = float(told.rpartition('[')[2].split()[4])
    assert 1 <= loops < 5
    assert '5.00 loops per token' in talk('/exit off', 'Why?')[1]
    assert '2.00 loops per token' in talk('/loops none', 'Why?')[1]
    told = talk('/temperature 0.5', '/top_k none', '/tokens 3', 'Why?', '/help')[1]
    assert '[3 tokens' in told and 'temperature = 0.5, top_k = None' in told
    assert all(f'\n/{name}' in f'\n{told}' for name in COMMANDS)


@pytest.mark.parametrize(
    'line, message',
    [
        ('/foo', "command='/foo', expected one of /loops, "),
        ('/', "command='/', expected one of /loops, "),
        ('/ 3', "command='/3', expected one of /loops, "),
        ('/loops {[]:1}', "n_loop='{[]:1}', expected int or None"),
        ('/temperature 1' + '0' * 400, 'a number is too large'),
        ('/loops 1 2', "command='/loops 1 2', expected /loops N"),
        ('/lens 0', "expected an answer first"),
        ('/loops 0', 'n_loop=0, expected at least 1'),
        ('/loops two', "n_loop='two', expected int or None"),
        ('/exit gate 0.5', 'the model has no exit gate'),
        ('/exit kk 1', "exit='kk', expected off or one of "),
        ('/exit kl few', "exit_threshold='few', expected float"),
        ('/temperature -1', 'temperature=-1'),
        ('/lens', "command='/lens', expected an answer first"),
        ('/depth', "command='/depth', expected a terminal"),
        ('/save a.jsonl', "command='/save', expected a conversation first"),
        ('x' * 60, 'the message has '),
    ],
)
def test_what_is_wrong_is_told_in_a_line_and_changes_nothing(line, message):
    talk = Talk()
    before = talk.terminal.settings
    written, told = talk(line)
    assert message in told and '\n' not in told and not written
    assert talk.terminal.settings == before and not talk.terminal.conversation.turns


def test_the_colour_of_a_token_tells_its_loops():
    model, ids = chat_model(), render_prompt([dict(role='user', content='Why?')], TOKENIZER)
    threshold = dividing_threshold(model.model, 'diff', torch.tensor(ids), n_loop=6)
    exits = dict(n_loop=6, exit='diff', exit_threshold=threshold)
    talk = Talk(model, Settings(max_new_tokens=24, temperature=0, **exits), colours=True)
    plain, _ = talk('Why?')
    assert '\x1b' not in plain
    shown, legend = talk('/depth')
    loops = talk.terminal.last.loops
    assert legend.count('\x1b[0m') == 6 and len(set(loops)) > 1
    for piece in talk.terminal.last_pieces:
        if piece.text and len(piece.loops) == 1:
            assert shade(piece.text, piece.loops[0], 6) in shown
    assert len({shade('x', n, 6) for n in range(1, 7)}) == 6
    assert '\x1b' not in talk('/depth off', 'Why?')[0] and '\x1b' in talk('/depth on', 'Why?')[0]
    assert talk('/reset', '/loops 500', '/depth on')[1].count('\x1b[0m') == 8


def test_the_lens_shows_every_loop_of_the_newest_answer():
    talk = Talk()
    talk('Why?', '/loops 3', 'Why?')
    for command, n in (('/lens', 10), ('/lens 4', 4), ('/lens 100', 12)):
        lines = talk(command)[1].splitlines()
        assert len([line for line in lines if '%' in line]) == 3 * n and max(map(len, lines)) <= 140
    assert "lens='0', expected a number of tokens from 1 to 100" in talk('/lens 0')[1]


def test_a_base_models_text_goes_on_after_an_empty_line():
    talk = Talk(chat_model(text=True))
    assert talk('')[0] == ''  # nothing to go on from
    first, more = talk('abc')[0], talk('')[0]
    whole = from_the_beginning(talk.terminal.chat, [*b'abc'], Settings(max_new_tokens=24, temperature=0))
    assert TOKENIZER.decode(talk.terminal.last.ids) == TOKENIZER.decode([*b'abc', *whole])
    assert first and more and len(Talk()('')[0]) == 0


def test_a_value_is_told_without_a_new_one():
    talk = Talk()
    assert talk('/loops', '/temperature', '/tokens')[1].splitlines() == [
        'n_loop = None', 'temperature = 0.0', 'max_new_tokens = 12'
    ]  # fmt: skip


def test_a_saved_conversation_is_data_for_training(tmp_path):
    model = chat_model()
    talk = Talk(model, Settings(max_new_tokens=40), system='Be short.')
    ids = {
        name: TOKENIZER.special_ids[f'<|{name}|>'] for name in ('python_start', 'python_end', 'assistant_end')
    }
    tokens = [*b'It is ', ids['python_start'], *b'6*7', ids['python_end'], *b'.', ids['assistant_end']]
    real = model.answer

    def answer(*args):
        made, n_dropped = real(*args)
        made.sampler = Script(tokens)
        return made, n_dropped

    model.answer = answer
    written, _ = talk('6 * 7?')
    assert written == 'It is [calculator: 6*7 = 42].\n'
    path = tmp_path / 'talk.jsonl'
    talk(f'/save {path}')
    content = [dict(type='text', text='It is '), dict(type='python', text='6*7')]
    content += [dict(type='python_output', text='42'), dict(type='text', text='.')]
    messages = [dict(role='system', content='Be short.'), dict(role='user', content='6 * 7?')]
    assert read_conversations(path) == [[*messages, dict(role='assistant', content=content)]]
    saved = path.read_bytes()
    assert 'a new name: this file exists' in talk(f'/save {path}')[1] and path.read_bytes() == saved
    assert 'expected a file in a folder that exists' in talk('/save /nowhere/a.jsonl')[1]
    assert 'expected a name that ends in .jsonl' in talk('/save a.txt')[1]
    assert 'expected a file in a folder that exists' in talk('/save ~nouser/a.jsonl')[1]
    assert 'cannot be written' in talk(f'/save {tmp_path}/{"a" * 250}.jsonl')[1]


def test_control_characters_of_a_model_do_not_reach_the_terminal():
    model = chat_model()
    real = model.answer

    def answer(*args):
        made, n_dropped = real(*args)
        made.sampler = Script([27, 91, 97, TOKENIZER.special_ids['<|assistant_end|>']])
        return made, n_dropped

    model.answer = answer
    assert Talk(model, clean=lambda text: text.replace('\x1b', '?'))('Why?')[0] == '?[a\n'


@pytest.mark.parametrize('error', [RuntimeError, FloatingPointError, MemoryError])
def test_an_answer_that_fails_leaves_the_conversation(error):
    talk = Talk()
    first, _ = talk('Why?')
    run_loops = talk.terminal.engine.advance
    talk.terminal.engine.advance = lambda *args: (_ for _ in ()).throw(error('out of memory'))
    assert 'the answer failed: out of memory' in talk('And now?')[1]
    talk.terminal.engine.advance = run_loops
    assert len(talk.terminal.conversation.turns) == 2 and talk('And now?')[0]


def test_ctrl_c_ends_the_answer_and_not_the_program():
    talk, before = Talk(), signal.getsignal(signal.SIGINT)
    whole, _ = talk('Why?')
    talk('/reset')
    write = talk.terminal.write
    talk.terminal.write = lambda text: (
        write(text) or (len(talk.written) == 2 and signal.raise_signal(signal.SIGINT))
    )
    part, told = talk('Why?')
    assert whole.startswith(part.rstrip('\n')) and len(part) < len(whole) and 'interrupted]' in told
    talk.terminal.write = write
    assert signal.getsignal(signal.SIGINT) is before
    assert '[12 tokens' in talk('And now?')[1]  # the next prompt has the part that was said


def test_old_turns_leave_the_view_and_it_is_told():
    told = Talk(settings=Settings(max_new_tokens=16, temperature=0))(
        'One two three?', 'Four five six?', 'Why?'
    )[1]
    assert 'of the oldest turns do not fit in view any more' in told


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A checkpoint of a tiny chat model."""
    model, path = chat_model().model, tmp_path_factory.mktemp('chat') / 'ckpt.pt'
    state = dict(model=model.state_dict(), model_args=vars(model.config), iter_num=3, config={})
    torch.save(state | dict(tokenizer=TOKENIZER.spec), path)
    return str(path)


OPTIONS = ['--max_new_tokens=9', '--temperature=0', '--device=cpu', '--dtype=float32']


def test_a_single_question_prints_the_answer_alone(call, saved):
    status, out, err = call(chat.main, f'--init_from={saved}', '--prompt=Why?', *OPTIONS)
    talk = Talk(settings=Settings(max_new_tokens=9, temperature=0), clean=chat.printable)
    assert status == 0 and out == talk('Why?')[0] and '[9 tokens' in err and 'step 3, n_loop 2' in err


def test_questions_are_read_from_stdin(call, saved, monkeypatch, tmp_path):
    (tmp_path / 'lines').write_text('Why?\n/loops 3\n\nWhy?\n/quit\nnot read\n')
    monkeypatch.setattr(sys, 'stdin', open(tmp_path / 'lines'))
    status, out, err = call(chat.main, f'--init_from={saved}', *OPTIONS)
    assert status == 0 and err.count('tokens/s') == 2 and '3.00 loops' in err and 'not read' not in out


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--port=9000'], 'port=9000, expected 8000 without web=True'),
        (['--web=True', '--prompt=a'], "prompt='a', expected '' with web=True"),
        (['--prompt=' + 'a' * 99], 'the message has 103 tokens'),
        (['--exit=gate', '--exit_threshold=0.5'], 'the model has no exit gate'),
        (['--exit=kl'], 'exit_threshold=None'),
        (['--tempreture=1'], "did you mean 'temperature'?"),
        (['--web=True', '--host=no.such.host.invalid'], "host='no.such.host.invalid', port=8000: "),
        (['--web=True', '--host=ä..b'], "host='ä..b', port=8000: "),
        (['--web=True', '--port=70000'], 'port=70000, expected at least 0 and at most 65535'),
        (['--web=True', '--token=a b'], "token='a b', expected letters and digits"),
    ],
)
def test_mistakes_end_in_a_line(call, saved, flags, message):
    status, out, err = call(chat.main, f'--init_from={saved}', *flags, '--device=cpu')
    assert status == 2 and not out and message in err.splitlines()[-1]


def test_a_conversation_that_is_piped_ends_at_ctrl_c(saved):
    process = script(
        'chat.py', f'--init_from={saved}', '--prompt=Why?', '--max_new_tokens=1000000', *OPTIONS[1:]
    )
    for line in process.stdout:
        if 'n_loop 2' in line:
            break
    process.stdout.read(3)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=20)[0]
    assert process.returncode == 130 and 'interrupted]' in rest and 'Traceback' not in rest
