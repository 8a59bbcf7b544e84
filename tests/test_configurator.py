import io
import re
import types
from dataclasses import fields

import pytest
import torch

import configurator
from bench import BenchConfig
from configurator import configure
from model import GPTConfig
from nanoloop import ROOT, machine
from nanoloop.objective import check_loops
from sample import SampleConfig
from train import TrainConfig

KEYS = (TrainConfig, GPTConfig)


def read(*argv, keys=KEYS):
    return configure(keys, argv, out=io.StringIO())


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
        (['--=1'], "unknown key '', see --help"),
        (['--max_iters=ten'], "max_iters='ten', expected int"),
        (['--max_iters=1.5'], "max_iters='1.5', expected int"),
        (['--max_iters'], "argument='--max_iters', expected --max_iters=value"),
        (['--max_iters', '10'], '--max_iters=value'),
        (['-max_iters=10'], '--key=value'),
        (['--dropout=None'], "dropout='None', expected float"),
        (['--eval_only=1'], "eval_only='1', expected True or False"),
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
            assert len(told) == 1 and told[0][-1].strip() and '--' not in told[0][-1], field.name


def test_no_two_dataclasses_share_a_key():
    names = [field.name for cls in (BenchConfig, *KEYS) for field in fields(cls)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize('path', sorted((ROOT / 'config').glob('*.py')), ids=lambda path: path.stem)
def test_every_config_file_is_valid_and_says_how_to_run_it(path):
    command = next(line for line in path.read_text().splitlines() if 'train.py config/' in line)
    files = re.findall(r'config/\w+\.py', command)
    assert files[-1] == f'config/{path.name}'
    c = read(*files)
    c.build(TrainConfig)
    check_loops(c, c.build(GPTConfig))


# -----------------------------------------------------------------------------
# the machine

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    'name, peak',
    [
        ('NVIDIA H100 80GB HBM3', 989e12),
        ('NVIDIA H100 PCIe', 756e12),
        ('NVIDIA H100 NVL', 835e12),
        ('NVIDIA H200', 989e12),
        ('NVIDIA A100-SXM4-80GB', 312e12),
        ('NVIDIA A100-SXM4-40GB MIG 1g.5gb', None),
        ('NVIDIA L4', 121e12),
        ('NVIDIA L40S', 362e12),
        ('NVIDIA L40', None),
        ('NVIDIA GeForce RTX 4090', 165e12),
        ('NVIDIA GeForce RTX 4090 Laptop GPU', None),
        ('NVIDIA GeForce RTX 3090 Ti', None),
        ('NVIDIA GeForce RTX 4090 D', None),
        ('Tesla T4', 65e12),
        ('NVIDIA T400', None),
    ],
)
def test_a_device_has_its_own_peak_or_none(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    m = types.SimpleNamespace(kind='cuda', device='cuda:0', dtype=BF16)
    assert machine.peak_flops(m) == peak
    m.dtype = torch.float32
    assert machine.peak_flops(m) is None


@pytest.mark.parametrize(
    'compile, kind, work, fault, chosen',
    [
        ('auto', 'cpu', 1e8, None, False),
        ('auto', 'cpu', 1e10, None, True),
        ('auto', 'cpu', 1e10, 'no compiler', False),
        ('auto', 'cuda', 1, None, True),
        ('auto', 'mps', 1e10, None, False),
        (True, 'cpu', 1, None, True),
        (False, 'cuda', 1e10, None, False),
    ],
)
def test_blocks_are_compiled_where_it_works_and_pays(monkeypatch, compile, kind, work, fault, chosen):
    monkeypatch.setattr(machine, 'compiler_fault', lambda kind: fault)
    assert machine.choose_compile(compile, kind, work)[0] is chosen


def test_asking_for_what_cannot_compile_is_refused(monkeypatch):
    monkeypatch.setattr(machine, 'compiler_fault', lambda kind: 'no compiler')
    with pytest.raises(ValueError, match='compile=True, expected False: no compiler'):
        machine.choose_compile(True, 'cpu', 1e10)


@pytest.mark.parametrize('rank, same, told', [(0, True, 1), (1, True, 0), (0, False, 1), (1, False, 1)])
def test_a_mistake_is_told_once_or_by_the_rank_that_met_it(call, monkeypatch, rank, same, told):
    monkeypatch.setattr(configurator, 'RANK', rank)

    @configurator.command
    def main(argv):
        mistake = configurator.UserError('no')
        mistake.same_on_all_ranks = same
        raise mistake

    status, _, err = call(main)
    assert status == 2 and err.count('\n') == told


def test_config_files_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read('config/quickstart.py').out_dir == 'out-quickstart'


def test_autocast_keeps_no_copies_of_weights():
    with machine.autocast('cpu', BF16):
        assert torch.is_autocast_enabled('cpu') and not torch.is_autocast_cache_enabled()
    with machine.autocast('cpu', torch.float32):
        assert not torch.is_autocast_enabled('cpu')


@pytest.mark.parametrize('has, dtype', [(True, BF16), (False, torch.float32)])
def test_bfloat16_is_chosen_where_the_cpu_has_it(monkeypatch, has, dtype):
    for feature in ('_is_avx512_bf16_supported', '_is_amx_tile_supported'):
        monkeypatch.setattr(torch.cpu, feature, lambda: has)
    assert machine.choose_dtype('auto', 'cpu')[0] == dtype


def test_setting_up_guards_against_silent_recompilation_and_turns_on_determinism(monkeypatch):
    monkeypatch.setattr(machine, 'compiler_fault', lambda kind: None)
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        m = machine.setup(TrainConfig(device='cpu', compile=True, deterministic=True))
        assert torch._dynamo.config.recompile_limit == 64 and torch._dynamo.config.fail_on_recompile_limit_hit
    assert m.compile and torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)


def test_memory_is_in_bytes():
    used = machine.peak_memory(types.SimpleNamespace(kind='cpu'))
    assert 2**26 < used < 2**37  # torch alone takes more than 64 MiB


@pytest.mark.parametrize('error, status', [(KeyboardInterrupt, 130), (BrokenPipeError, 141), (OSError, 1)])
def test_how_a_script_ends_is_in_its_status(call, monkeypatch, error, status):
    monkeypatch.setattr(configurator.os, 'dup2', lambda *_: None)

    @configurator.command
    def main(argv):
        raise error('no')

    assert call(main)[0] == status
