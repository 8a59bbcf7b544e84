"""Keys come from config files and flags, --help lists them, and a script's end is in its exit status."""

import errno
import functools
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Annotated

import pytest
from helpers import script

import configurator
from bench import BenchConfig
from configurator import configure, printable
from export import ExportConfig
from model import GPTConfig
from nanoloop import ROOT
from nanoloop.checks import AtLeast, Derives, OneOf, check, settle_fields
from nanoloop.datasets import read_meta_json
from nanoloop.objective import check_loops
from nanoloop.rl import RLConfig
from sample import SampleConfig
from train import TrainConfig

KEYS = (TrainConfig, RLConfig, GPTConfig)
COLORS = {'red': 0, 'blue': 1}


@dataclass
class Small:
    # first section
    count: Annotated[int, AtLeast(1)] = 3  # number of things
    color: Annotated[str, OneOf(COLORS, {'crimson': dict(color='red', bright=True)})] = 'red'  # what it has
    bright: bool = False
    # second section
    share: Annotated[
        float,  # a part
        AtLeast(0),
    ] = 0.5  # of the whole
    long_name: str | None = (
        # this explanation is so long
        'none'  # that it takes two lines
    )
    limit: Annotated[int, AtLeast(0)] | None = None  # None = no limit
    double: Annotated[int, Derives(lambda value: dict(count=2 * value))] | None = None  # sets count

    # this is no section, nor is what stands in a method
    def __post_init__(self):
        # not a section
        settle_fields(self)
        check(self.share <= 1, 'share', self.share, 'at most 1')


def read(*argv, keys=KEYS):
    return configure(keys, argv, say=None)


# -----------------------------------------------------------------------------
# values


def test_a_file_takes_over_the_keys_of_another(tmp_path):
    (tmp_path / 'a.py').write_text('n_head = 4\nn_embd = n_head * 32')
    (tmp_path / 'b.py').write_text("n_loop = 3\ninclude('a.py')\nn_embd = n_embd + 64")
    c = read(str(tmp_path / 'b.py'), '--n_loop=5')
    assert (c.n_head, c.n_embd, c.n_loop) == (4, 192, 5) and {'n_head', 'n_embd', 'n_loop'} <= c.given
    (tmp_path / 'c.py').write_text("\ninclude('nowhere.py')")
    with pytest.raises(ValueError, match='c.py, line 2: FileNotFoundError'):
        read(str(tmp_path / 'c.py'))


def test_files_compose_and_flags_win(tmp_path):
    first = 'import math\nn_head = 4\nn_embd = n_head * 32\n_half = n_embd // 2\nout_dir = "a"'
    (tmp_path / 'a.py').write_text(first)
    (tmp_path / 'b.py').write_text('def double(x): return 2 * x\nn_embd = double(n_embd)\nmax_iters = 1e3')
    c = read(f'{tmp_path}/a.py', f'{tmp_path}/b.py', '--out_dir=b', '--learning_rate=1')
    assert (c.n_head, c.n_embd, c.max_iters, c.out_dir, c.learning_rate) == (4, 256, 1000, 'b', 1.0)
    assert type(c.max_iters) is int and type(c.learning_rate) is float
    assert c.given == {'n_head', 'n_embd', 'max_iters', 'out_dir', 'learning_rate'}


def test_files_and_flags_apply_from_left_to_right(tmp_path):
    (tmp_path / 'a.py').write_text('n_embd = 2 * n_embd')
    assert read('--n_embd=5', f'{tmp_path}/a.py').n_embd == 10
    assert read(f'{tmp_path}/a.py', '--n_embd=5').n_embd == 5


def test_a_functions_of_a_file_reads_what_the_file_has_assigned(tmp_path):
    (tmp_path / 'a.py').write_text('_n = 3\ndef _triple():\n    return _n * n_head\nn_embd = _triple()')
    assert read(f'{tmp_path}/a.py', keys=(GPTConfig,)).n_embd == 36


def test_a_key_set_to_its_default_counts_as_given(tmp_path):
    (tmp_path / 'a.py').write_text('n_loop = 4')
    assert read(f'{tmp_path}/a.py').given == {'n_loop'}


@pytest.mark.parametrize(
    'flag, value',
    [
        ('--max_iters=1e3', 1000),
        ('--dropout=0', 0.0),
        ('--bptt_k=None', None),
        ('--bptt_k=2', 2),
        ('--wandb_run_name=123', '123'),
        ('--norm=123', '123'),
        ("--norm='rmsnorm'", "'rmsnorm'"),
        ('--out_dir=a=b', 'a=b'),
        ('--compile=False', False),
        ('--compile=auto', 'auto'),
        ('--eval_only=true', True),
        ('--max_iters=10_000', 10000),
        ('--out_dir=', ''),
        ('--lr_decay_iters=None', None),
    ],
)
def test_values_are_read_as_their_keys_say(flag, value):
    key = flag[2:].split('=')[0]
    assert read(flag)[key] == value and type(read(flag)[key]) is type(value)


def test_changes_are_printed_and_only_by_rank_0(tmp_path, capsys, monkeypatch):
    (tmp_path / 'a.py').write_text('n_loop = 3')
    argv = f'{tmp_path}/a.py', '--n_head=2'
    configure(KEYS, argv)
    expected = f'Overriding config with {argv[0]}:\n    n_loop = 3\nOverriding: n_head = 2\n'
    assert configurator.shown('token', 'abc') == '(given)' and len(configurator.shown('x', 'a' * 999)) == 203
    assert capsys.readouterr().out == expected
    monkeypatch.setattr(configurator, 'RANK', 1)
    configure(KEYS, argv)
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize(
    'argv, message',
    [
        (['--leanring_rate=1'], "unknown key 'leanring_rate', did you mean 'learning_rate'?"),
        (['--=1'], "unknown key '', see --help"),
        (['--max_iters=ten'], "max_iters='ten', expected int"),
        (['--max_iters=1.5'], "max_iters='1.5', expected int"),
        (['--max_iters={[]: 1}'], "max_iters='{[]: 1}', expected int"),
        (['--max_iters'], "argument='--max_iters', expected --max_iters=value"),
        (['--max_iters', '10'], '--max_iters=value'),
        (['-max_iters=10'], '--key=value'),
        (['--dropout=None'], "dropout='None', expected float"),
        (['--eval_only=1'], "eval_only='1', expected True or False"),
        (['config/nowhere.py'], 'there is no config file config/nowhere.py'),
        (
            ['config/train_fl.py'],
            'there is no config file config/train_fl.py (did you mean config/train_flt.py?)',
        ),
        (['quickstart'], 'there is no config file quickstart (did you mean config/quickstart.py?)'),
        (['n_loop=2'], 'there is no config file n_loop=2 (did you mean --n_loop=2?)'),
    ],
)
def test_a_wrong_command_line_is_refused(argv, message):
    with pytest.raises(ValueError) as error:
        read(*argv)
    assert message in str(error.value)


@pytest.mark.parametrize(
    'text, message',
    [
        ('leanring_rate = 1', "a.py, line 1: unknown key 'leanring_rate', did you mean 'learning_rate'?"),
        ('learning_rate = "fast"', "learning_rate='fast', expected float"),
        ('max_iters = \n', 'a.py, line 1: SyntaxError: invalid syntax'),
        ('n_head = 2\nn_embd = 1 / 0', 'a.py, line 2: ZeroDivisionError'),
        ('def f():\n    return 1 / 0\nn_embd = f()', 'a.py, line 2: ZeroDivisionError'),
        (
            'n_head = 2\n\nx = 1',
            "a.py, line 3: unknown key 'x', see --help; a name of your own begins with _, as in _x",
        ),
        ('n_steps = 9\nmax_iters = n_steps', "a.py, line 1: unknown key 'n_steps', see --help"),
        ("include('b.py')", "b.py, line 2: unknown key 'n_embed', did you mean 'n_embd'?"),
        ('import math\nn_head = math', 'a.py, line 2: n_head=the module math, expected int'),
        ('import math as n_head', 'a.py, line 1: n_head=the module math, expected int'),
        ('def n_head():\n    return 4', 'a.py, line 1: n_head=the function n_head, expected int'),
    ],
)
def test_a_wrong_file_is_refused_with_its_name(tmp_path, text, message):
    (tmp_path / 'a.py').write_text(text)
    (tmp_path / 'b.py').write_text('n_head = 2\nn_embed = 4')
    with pytest.raises(ValueError) as error:
        read(f'{tmp_path}/a.py')
    assert message in str(error.value)


def test_a_wrong_flag_is_told_before_a_file_is_printed(capsys):
    with pytest.raises(ValueError, match='max_iter'):
        configure(KEYS, ['config/quickstart.py', '--max_iter=3'])
    assert capsys.readouterr().out == ''


def test_config_files_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read('config/quickstart.py').out_dir == 'out-quickstart'


# -----------------------------------------------------------------------------
# the dict is the truth, the dataclass validates it and derives values


def test_a_derived_value_is_copied_back():
    c = read('--double=4', keys=(Small,))
    assert c.count == 3
    assert c.build(Small).count == 8 and c.count == 8


def test_a_given_value_is_never_replaced_silently():
    c = read('--double=4', '--count=3', keys=(Small,))  # 3 is also the default: only `given` tells
    with pytest.raises(ValueError, match='count=3, expected 8 with the other keys'):
        c.build(Small)


def test_an_alias_stands_for_other_values():
    c = read('--color=crimson', keys=(Small,))
    c.build(Small)
    assert (c.color, c.bright) == ('red', True)


@pytest.mark.parametrize(
    'flag, message', [('--count=0', 'at least 1'), ('--color=green', 'one of red, blue')]
)
def test_the_dataclass_refuses_what_is_out_of_bounds(flag, message):
    c = read(flag, keys=(Small,))
    with pytest.raises(ValueError, match=message):
        c.build(Small)


def test_no_two_dataclasses_share_a_key():
    names = [field.name for cls in (BenchConfig, *KEYS) for field in fields(cls)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize('path', sorted((ROOT / 'config').glob('*.py')), ids=lambda path: path.stem)
def test_every_config_file_is_valid_and_says_how_to_run_it(path):
    commands = [line for line in path.read_text().splitlines() if 'train.py config/' in line]
    files = [re.findall(r'config/\w+\.py', command) for command in commands]
    own = next(names for names in files if names[-1] == f'config/{path.name}')
    c = read(*own)
    c.build(TrainConfig)
    c.build(RLConfig)
    check_loops(c, c.build(GPTConfig))


# -----------------------------------------------------------------------------
# --help


def help_of(capsys, keys, width=100):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setenv('COLUMNS', str(width))
        read('--help', keys=keys)
    assert not stop.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize('keys', [KEYS, (SampleConfig,), (BenchConfig, *KEYS)])
def test_help_lists_every_key_with_its_comment(capsys, keys):
    lines = help_of(capsys, keys).splitlines()
    for cls in keys:
        for field in fields(cls):
            entries = [line.split('  ') for line in lines if line.startswith(f'  --{field.name}=')]
            assert len(entries) == 1 and entries[0][-1].strip() and '--' not in entries[0][-1], field.name


def test_help_reads_fields_of_any_layout(capsys):
    out = help_of(capsys, (Small,))
    expected = """
first section
  --count=3                         number of things
  --color='red'                     what it has; one of red, blue, crimson
  --bright=False
second section
  --share=0.5                       a part of the whole
  --long_name='none'                this explanation is so long that it takes two lines
  --limit=None                      None = no limit
  --double=None                     sets count
"""
    assert out == f'{__doc__}{expected}'


def test_help_takes_choices_from_the_table(capsys, monkeypatch):
    monkeypatch.setitem(COLORS, 'green', 2)
    assert 'one of red, blue, green' in help_of(capsys, (Small,))


def test_help_fits_the_terminal(capsys):
    wide, narrow = (help_of(capsys, (Small,), width) for width in (100, 60))
    assert wide.split() == narrow.split()
    keys = narrow.split('first section')[1].splitlines()
    assert 40 < max(map(len, keys)) <= 60
    assert ' ' * 36 + 'long that it takes two' in keys


def test_configuring_needs_no_torch():
    code = 'import sys, configurator; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


# -----------------------------------------------------------------------------
# the end of a script


@pytest.mark.parametrize(
    'rank, same, parallel, lines',
    [(0, True, True, 1), (1, True, True, 0), (0, False, True, 1), (1, False, True, 1), (1, True, False, 1)],
)
def test_a_users_error_is_printed_once_or_by_the_rank_that_met_it(
    call, monkeypatch, rank, same, parallel, lines
):
    monkeypatch.setattr(configurator, 'RANK', rank)

    @functools.partial(configurator.command, parallel=parallel)
    def main(argv):
        error = configurator.UserError('no\n  way')
        error.same_on_all_ranks = same
        raise error

    status, _, err = call(main)
    assert status == 2 and err == 'test_configurator.py: no way\n' * lines


class OutOfMemoryError(RuntimeError):
    """Has the name of torch's."""


@pytest.mark.parametrize(
    'error, status, message',
    [
        (KeyboardInterrupt(), 130, ''),
        (BrokenPipeError(), 141, ''),
        (OSError('disk full'), 1, 'test_configurator.py: disk full\n'),
        (MemoryError(), 1, 'test_configurator.py: out of memory\n'),
        (OutOfMemoryError('GPU full'), 1, 'test_configurator.py: GPU full\n'),
        (RuntimeError("can't allocate memory"), 1, "test_configurator.py: can't allocate memory\n"),
    ],
)
def test_the_end_of_a_script_is_in_its_status(call, monkeypatch, error, status, message):
    monkeypatch.setattr(configurator.os, 'dup2', lambda *_: None)

    @configurator.command
    def main(argv):
        raise error

    assert call(main) == (status, '', message)


@pytest.mark.parametrize('error', [RuntimeError, ValueError, AssertionError])
def test_an_error_of_the_program_keeps_its_traceback(error):
    @configurator.command
    def main(argv):
        raise error('a bug')

    with pytest.raises(error, match='a bug'):
        main([])


@pytest.mark.parametrize('number', [errno.EIO, errno.ENOSPC, errno.EPIPE, errno.EBADF])
def test_a_run_goes_on_when_nothing_can_be_printed(monkeypatch, number):
    def fail(*args, **keys):
        raise OSError(number, 'no')

    discarded = []
    monkeypatch.setattr(configurator, 'print', fail, raising=False)
    monkeypatch.setattr(configurator, 'discard', discarded.append)
    configurator.print_line('a'), configurator.print_error('b')
    configure(KEYS, ['--n_loop=3'], configurator.print_line)
    assert discarded == [sys.stdout, sys.stderr, sys.stdout]


def run_python(code, **options):
    """Runs Python code in the repository, with stdout and stderr piped unless the options say otherwise."""
    pipe = subprocess.PIPE
    options = dict(stdout=pipe, stderr=pipe, text=True, cwd=ROOT) | options
    return subprocess.run([sys.executable, '-c', code], **options)


PRINTS_X = "import configurator; configurator.command(lambda argv: print('x'))()"


def test_a_script_whose_text_is_lost_ends_with_a_line():
    closed = run_python(PRINTS_X, preexec_fn=lambda: os.close(1))
    assert (closed.returncode, closed.stderr) == (
        1,
        '<string>: stdout cannot be written: Bad file descriptor\n',
    )
    if os.path.exists('/dev/full'):
        with open('/dev/full', 'w') as full:
            run = run_python(PRINTS_X, stdout=full)
        assert (run.returncode, run.stderr) == (1, '<string>: [Errno 28] No space left on device\n')


def test_what_is_for_a_closed_stderr_does_not_go_to_stdout():
    code = "import configurator as c; c.command(lambda argv: c.print_error('e'))()"
    run = run_python(code, preexec_fn=lambda: os.close(2))
    assert (run.returncode, run.stdout) == (0, '')


@pytest.mark.parametrize('terminal', [True, False])
def test_control_characters_are_pictures_on_a_terminal(monkeypatch, terminal):
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: terminal, raising=False)
    raw = 'a\tb\n\x1b[2J\r\x00\x7f\x9b\xe9'
    assert printable(raw) == ('a\tb\n\u241b[2J\u240d\u2400\u2421\ufffd\xe9' if terminal else raw)


def test_a_stream_without_a_character_shows_another():
    environment = dict(os.environ, PYTHONIOENCODING='ascii')
    code = "import configurator; configurator.command(lambda argv: print('\\u00e4'))()"
    run = dict(env=environment, cwd=ROOT, capture_output=True, text=True)
    assert subprocess.run([sys.executable, '-c', code], **run).stdout == '?\n'


def test_files_of_windows_are_read(tmp_path):
    text = 'n_loop = 3\r\nout_dir = "\u00e4"\r\n'
    (tmp_path / 'a.py').write_bytes(b'\xef\xbb\xbf' + text.encode())
    assert (read(f'{tmp_path}/a.py').n_loop, read(f'{tmp_path}/a.py').out_dir) == (3, '\u00e4')
    meta = dict.fromkeys(('vocab_size', 'dtype', 'tokenizer', 'splits'), 3)
    (tmp_path / 'meta.json').write_bytes(json.dumps(meta).encode('utf-8-sig'))
    assert read_meta_json(tmp_path / 'meta.json')['vocab_size'] == 3
    (tmp_path / 'b.py').write_bytes(text.encode('utf-16'))
    with pytest.raises(ValueError, match='b.py, line .*: SyntaxError'):
        read(f'{tmp_path}/b.py')


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'a.py').write_text("dataset = '~/data'")
    config = read('~/a.py', '--out_dir=~/a+~/b,~/c', '--wandb_run_name=~', '--init_from=ouro:~/d')
    home = str(tmp_path)
    assert config.out_dir == f'{home}/a+{home}/b,{home}/c' and config.dataset == f'{home}/data'
    assert config.init_from == f'ouro:{home}/d' and config.wandb_run_name == '~'
    assert read('--to=~/e', keys=(ExportConfig,)).to == f'{home}/e'


NO_SCRIPTS = 'model.py configurator.py nanoloop/generate.py'.split()


@pytest.mark.parametrize('name', NO_SCRIPTS)
def test_a_file_that_is_no_script_says_so(name, tmp_path):
    """generate.py imports the model first."""
    run = subprocess.run([sys.executable, ROOT / name], cwd=tmp_path, capture_output=True, text=True)
    expected = 'is no script: see train.py, sample.py, bench.py, export.py and plot.py\n'
    assert run.returncode == 1 and run.stderr == f'{name.split("/")[-1]} {expected}'


def test_garbage_is_collected_rarely_and_not_at_the_end(tmp_path):
    (tmp_path / 'sitecustomize.py').write_text(
        "import gc\ngc.freeze = lambda: print('at the end', gc.get_threshold()[0])"
    )
    out = script('plot.py', '--help', PYTHONPATH=str(tmp_path)).communicate()[0]
    assert out.endswith('at the end 50000\n')


def test_printing_goes_on_without_a_reader():
    code = (
        'import sys, time; from configurator import print_line\n'
        'print_line("first"); sys.stdin.readline(); print_line("lost"); print_line("too")\n'
        'print("end", file=sys.stderr)'
    )
    pipe = subprocess.PIPE
    run = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe)
    assert run.stdout.readline() == b'first\n'
    run.stdout.close()
    run.stdin.write(b'go\n')
    run.stdin.close()
    assert run.stderr.read() == b'end\n' and run.wait() == 0
