import io
from dataclasses import fields

import pytest

from bench import BenchConfig
from configurator import ROOT, configure
from model import GPTConfig
from sample import SampleConfig
from train import TrainConfig

KEYS = (TrainConfig, GPTConfig)


def read(*argv, keys=KEYS):
    return configure(keys, argv, out=io.StringIO())


def test_files_compose_and_flags_win(tmp_path):
    (tmp_path / 'a.py').write_text('import math\nn_head = 4\nn_embd = n_head * 32\n_half = n_embd // 2\nout_dir = "a"')
    (tmp_path / 'b.py').write_text('def double(x):\n    return 2 * x\nn_embd = double(n_embd)\nmax_iters = 1e3')
    c = read(f'{tmp_path}/a.py', f'{tmp_path}/b.py', '--out_dir=b', '--learning_rate=1')
    assert (c.n_head, c.n_embd, c.max_iters, c.out_dir, c.learning_rate) == (4, 256, 1000, 'b', 1.0)
    assert type(c.max_iters) is int and type(c.learning_rate) is float
    assert c.given == {'n_head', 'n_embd', 'max_iters', 'out_dir', 'learning_rate'}


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


@pytest.mark.parametrize(
    'argv, told',
    [
        (['--leanring_rate=1'], "unknown key 'leanring_rate', did you mean 'learning_rate'?"),
        (['--zzzz=1'], "unknown key 'zzzz', see --help"),
        (['--max_iters=ten'], "max_iters='ten', expected int"),
        (['--max_iters=1.5'], "max_iters='1.5', expected int"),
        (['--max_iters'], "argument='--max_iters', expected --key=value"),
        (['--max_iters', '10'], '--key=value'),
        (['-max_iters=10'], '--key=value'),
        (['--dropout=None'], "dropout='None', expected float"),
        (['--eval_only=1'], "eval_only='1', expected bool"),
        (['config/nowhere.py'], 'there is no config file config/nowhere.py'),
    ],
)
def test_mistakes_on_the_command_line_are_told(argv, told):
    with pytest.raises(ValueError) as error:
        read(*argv)
    assert told in str(error.value)


@pytest.mark.parametrize(
    'text, told',
    [
        ('leanring_rate = 1', "a.py: unknown key 'leanring_rate', did you mean 'learning_rate'?"),
        ('learning_rate = "fast"', "learning_rate='fast', expected float"),
        ('max_iters = \n', 'a.py, line 1: SyntaxError'),
        ('n_head = 2\nn_embd = 1 / 0', 'a.py, line 2: ZeroDivisionError'),
        ('x = 1', "unknown key 'x'"),
    ],
)
def test_mistakes_in_a_file_are_told_with_its_name(tmp_path, text, told):
    (tmp_path / 'a.py').write_text(text)
    with pytest.raises(ValueError) as error:
        read(f'{tmp_path}/a.py')
    assert told in str(error.value)


@pytest.mark.parametrize('keys', [KEYS, (SampleConfig,), (BenchConfig, *KEYS)])
def test_help_lists_every_key_with_its_comment(capsys, keys):
    with pytest.raises(SystemExit) as stop:
        read('--help', keys=keys)
    assert not stop.value.code
    lines = capsys.readouterr().out.splitlines()
    for cls in keys:
        for field in fields(cls):
            told = [line.split('  ') for line in lines if line.startswith(f'  --{field.name}=')]
            assert len(told) == 1 and told[0][-1], field.name


def test_no_two_dataclasses_share_a_key():
    names = [field.name for cls in (BenchConfig, *KEYS) for field in fields(cls)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize('path', sorted((ROOT / 'config').glob('*.py')), ids=lambda path: path.stem)
def test_every_config_file_is_valid_and_says_how_to_run_it(path):
    c = read(str(path))
    c.build(TrainConfig)
    c.build(GPTConfig)
    assert f'train.py config/{path.name}' in path.read_text()
