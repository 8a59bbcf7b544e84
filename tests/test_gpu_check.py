"""runs/gpu_check.sh without a GPU: its commands have keys that exist, and its table says what failed."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT

from bench import BenchConfig
from configurator import configure
from model import GPTConfig
from runs.gpu_table import TESTS
from train import TrainConfig

# in place of python: notes its arguments, and fails where the window is measured; the table is the real one
PYTHON = f"""#!/usr/bin/env bash
[ "$1" = runs/gpu_table.py ] && exec {shlex.quote(sys.executable)} "$@"
printf '%q ' "$@" >>"$CALLS"
echo >>"$CALLS"
case "$*" in *--window_size=512*) printf 'a line\\nno such kernel\\n\\n'; exit 3 ;; esac
"""


def run_script(folder, **environment):
    """Runs gpu_check.sh. Returns its status, its table and the arguments of all calls of python."""
    (folder / 'bin').mkdir()
    (folder / 'bin' / 'python').write_text(PYTHON)
    (folder / 'bin' / 'python').chmod(0o755)
    path = f'{folder}/bin:{os.environ["PATH"]}'
    env = dict(os.environ, PATH=path, CALLS=f'{folder}/calls', OUT=f'{folder}/out', **environment)
    done = subprocess.run(
        ['bash', str(ROOT / 'runs' / 'gpu_check.sh')], env=env, capture_output=True, text=True
    )
    calls = [shlex.split(line) for line in (folder / 'calls').read_text().splitlines()]
    return done.returncode, (folder / 'out' / 'table.md').read_text(), calls


@pytest.mark.parametrize('environment', [dict(), dict(DEVICE='cpu', TINY='1')])
def test_every_command_has_keys_that_exist_and_a_failed_step_stops_no_other(tmp_path, environment):
    status, table, calls = run_script(tmp_path, **environment)
    benches = [argv for program, *argv in calls if program == 'bench.py']
    assert len(benches) == 6 and [argv[:2] for argv in calls[6:]] == [['-m', 'pytest']] * 3
    for argv in benches:
        keys = BenchConfig, TrainConfig, GPTConfig
        c = configure(keys, argv, say=None)
        for setting in (c, configure(keys, [*argv, *shlex.split(c.vs)], say=None)):
            for group in keys:
                setting.build(group)
        assert c.device == environment.get('DEVICE', 'cuda')
    rows = [line for line in table.splitlines() if 'FAILED: no such kernel' in line]
    assert status == 1 and len(rows) == 1 and 'windows of 512' in rows[0]


def test_every_test_of_a_gpu_is_in_one_group():
    """The words of -k, tried on the names of the functions."""
    script = (ROOT / 'runs' / 'gpu_check.sh').read_text()
    groups = dict(re.findall("^tests (\\w+) '(.*)'$", script, re.MULTILINE))
    assert tuple(groups) == TESTS
    names = re.findall(r'^def (test_\w+)', (ROOT / 'tests' / 'test_cuda.py').read_text(), re.MULTILINE)
    for name in names:
        words = {word: word in name for word in ('flex', 'decoding', 'exits')}
        assert sum(eval(words_of_k, {}, words) for words_of_k in groups.values()) == 1, name


def test_the_table_has_values_and_what_was_wanted(tmp_path):
    training = '"ms": {}, "mfu": 0.5, "memory_mib": 2048, "tflops_per_s": {}, "device": "H100"'
    this, other = ('{' + training.format(*numbers) + '}' for numbers in ((80, 400), (100, 320)))
    for step in (*TESTS, 'gpt2', 'looped', 'medium', 'window', 'recompute', 'decode'):
        (tmp_path / f'{step}.status').write_text('0')
        (tmp_path / f'{step}.jsonl').write_text(f'{this}\n{other}\n')
    decoding = '{"name": "cached", "rows": %d, "tokens_per_s": 1500, "mbu": 0.25, "device": "H100"}\n'
    (tmp_path / 'decode.jsonl').write_text(decoding % 1 + decoding % 64)
    measured = (
        '<properties><property name="value" value="0.4"/><property name="wanted" value="1"/></properties>'
    )
    cases = f'<testcase name="test_a_b[x]"/><testcase name="test_a_b[y]"/><testcase name="test_c">{measured}'
    (tmp_path / 'tests_training.xml').write_text(f'<testsuite>{cases}</testcase></testsuite>')
    for group in TESTS[1:]:
        (tmp_path / f'{group}.xml').write_text('<testsuite/>')
    command = [sys.executable, str(ROOT / 'runs' / 'gpu_table.py'), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    values = [tuple(part.strip() for part in line.split('|')[1:5]) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and values[2:4] == [
        ('a b', 'passed (2 cases)', 'passed', 'H100'),
        ('c', '0.4', '1', 'H100'),
    ]
    by_name = {name: value for name, value, *_ in values}
    assert by_name['a step of config/train_gpt2.py'] == '80.0 ms, MFU 50.0%, 2.0 GiB'
    assert (
        by_name['FLOP/s, looped / plain']
        == by_name['time, full attention / windows of 512 in 8,192']
        == '1.250'
    )
    assert by_name['decoding 64 rows'] == '1,500 tokens/s, MBU 25.0% (64 rows)'
    assert by_name['decoding one row, compiled'] == 'not measured'
