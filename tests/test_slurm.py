"""The scripts for SLURM, run with programs that stand for SLURM's and record how they are called."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

# srun: a group of processes of its own, to which it passes signals on, as slurmstepd does
SRUN = """
while [[ "$1" == --* ]]; do shift; done
export SLURM_NODEID=3
set -m
"$@" &
again=1
trap 'again=1; kill -USR1 -- "-$!"' USR1
while [ -n "$again" ]; do again='' status=0; wait "$!" || status=$?; done
exit "$status"
"""
SCONTROL = """
echo "$@" >>"$LOG/scontrol"
case "$2" in
    hostnames) printf 'node-07\\nnode-08\\n' ;;
    job) echo "JobId=$3 JobState=${STATE:-RUNNING}" ;;
esac
"""
# torchrun or python: records its arguments and environment, and ends with STATUS, or as a signal says
WORKER = """
trap 'exit "${AFTER:-1}"' USR1
"$PYTHON" -c 'import json, os, sys; json.dump([sys.argv[1:], dict(os.environ)], open(sys.argv[1], "w"))' \\
    "$LOG/run" "${0##*/}" "$@"
[ -z "${SLEEP:-}" ] || { touch "$LOG/ready"; for _ in $(seq 400); do sleep 0.05; done; }
exit "${STATUS:-0}"
"""
JOB = dict(SLURM_JOB_ID='123456', SLURM_JOB_NODELIST='node-[07-08]', SLURM_JOB_NUM_NODES='2')
TASK = dict(SLURM_JOB_ID='500', SLURM_ARRAY_JOB_ID='500', SLURM_CPUS_PER_TASK='4')


def start(folder, script, *argv, **environment):
    """Starts a script of runs/ in the repository, with the programs above on its PATH."""
    (folder / 'bin').mkdir(exist_ok=True)
    for name, text in dict(srun=SRUN, scontrol=SCONTROL, torchrun=WORKER, python=WORKER).items():
        (folder / 'bin' / name).write_text(f'#!/usr/bin/env bash\n{text}')
        (folder / 'bin' / name).chmod(0o755)
    env = dict(
        PATH=f'{folder}/bin:/usr/bin:/bin', LOG=str(folder), SLURM_SUBMIT_DIR=str(ROOT), PYTHON=sys.executable
    )
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(['bash', str(ROOT / 'runs' / script), *argv], env=env | environment, **pipe)


def run(folder, script, *argv, **environment):
    """Runs it. Returns (status, arguments of the program, its environment, calls of scontrol, stderr)."""
    process = start(folder, script, *argv, **environment)
    _, err = process.communicate(timeout=20)
    return process.returncode, *record(folder), err


def record(folder):
    """Returns what the programs have recorded: the arguments, the environment, the calls of scontrol."""
    path = folder / 'run'
    (_, *argv), env = json.loads(path.read_text()) if path.exists() else ([None], {})
    calls = folder / 'scontrol'
    return argv, env, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize('name', ['slurm.sh', 'slurm_sweep.sh', 'stage.sh', 'requeue.sh', 'offline.sh'])
def test_the_scripts_are_bash(name):
    subprocess.run(['bash', '-n', str(ROOT / 'runs' / name)], check=True)


def test_a_job_starts_torchrun_on_every_node_without_a_network(tmp_path):
    options = dict(SLURM_GPUS_ON_NODE='4', SLURM_CPUS_ON_NODE='64', SHARED='/shared')
    status, argv, env, calls, err = run(tmp_path, 'slurm.sh', 'config/a.py', '--x=1 2', **JOB, **options)
    assert status == 0, err
    port = 16384 + 123456 % 16384
    assert argv == [
        'torchrun', '--nnodes=2', '--node_rank=3', '--nproc_per_node=4', '--master_addr=node-07',
        f'--master_port={port}', '--shutdown-timeout=100',
        '--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1', 'train.py', 'config/a.py', '--x=1 2',
        '--init_from=auto',
    ]  # fmt: skip
    expected = dict(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', WANDB_MODE='offline', OMP_NUM_THREADS='16')
    expected |= dict(TIKTOKEN_CACHE_DIR='/shared/tiktoken', HF_HOME='/shared/huggingface')
    assert {name: env.get(name) for name in expected} == expected
    assert calls == ['show hostnames node-[07-08]']  # what is done is not queued again


REQUEUED = ['show job 123456', 'requeue 123456']


@pytest.mark.parametrize(
    'status, state, calls',
    [
        (128 + signal.SIGUSR1, 'RUNNING', REQUEUED),
        (128 + signal.SIGTERM, 'RUNNING', REQUEUED),
        (128 + signal.SIGTERM, 'CANCELLED', REQUEUED[:1]),
        (128 + signal.SIGKILL, 'RUNNING', []),
        (1, 'RUNNING', []),
        (2, 'RUNNING', []),
    ],
)
def test_a_job_is_queued_again_if_it_has_saved_and_is_not_cancelled(tmp_path, status, state, calls):
    ended = run(tmp_path, 'slurm.sh', STATUS=str(status), STATE=state, **JOB)
    assert (ended[0], ended[3][1:]) == (status, calls)


@pytest.mark.parametrize('after, calls', [('1', REQUEUED), ('0', [])])
def test_the_signal_before_the_time_limit_reaches_torchrun_and_queues_the_job_again(tmp_path, after, calls):
    """torchrun ends with 1 then, as after an error; with 0 the run has come to its end."""
    process = start(tmp_path, 'slurm.sh', SLEEP='1', AFTER=after, **JOB)
    until = time.monotonic() + 10
    while not (tmp_path / 'ready').exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGUSR1)
    process.communicate(timeout=20)
    assert process.returncode == (138 if after == '1' else 0)
    assert record(tmp_path)[2][1:] == calls


def test_weights_to_begin_with_are_taken_until_there_is_a_checkpoint(tmp_path):
    flags = ['--init_from=gpt2', f'--out_dir={tmp_path}/out']
    assert run(tmp_path, 'slurm.sh', *flags, **JOB)[1][-2:] == flags
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'ckpt.pt').touch()
    assert run(tmp_path, 'slurm.sh', *flags, **JOB)[1][-3:] == [*flags, '--init_from=auto']
    status, *_, err = run(tmp_path, 'slurm.sh', '--init_from=gpt2', **JOB)
    assert status == 2 and 'needs a flag --out_dir=FOLDER' in err and err.count('\n') == 1


def test_a_task_of_a_sweep_is_one_configuration_with_a_folder_of_its_own(tmp_path):
    sizes = dict(LOOPS='1 4', SEEDS='7 8')
    seen = []
    for i in range(4):
        status, argv, env, _, err = run(
            tmp_path, 'slurm_sweep.sh', 'config/a.py', **TASK, **sizes, SLURM_ARRAY_TASK_ID=str(i)
        )
        assert status == 0 and env['HF_HUB_OFFLINE'] == '1' and env['OMP_NUM_THREADS'] == '4', err
        seen.append(argv)
    head = ['python', 'train.py', 'config/a.py']
    assert seen == [
        [*head, f'--n_loop={n}', f'--seed={s}', f'--out_dir=out-sweep/loops-{n}-seed-{s}', '--init_from=auto']
        for s in (7, 8)
        for n in (1, 4)
    ]
    status, *_, err = run(tmp_path, 'slurm_sweep.sh', **TASK, **sizes, SLURM_ARRAY_TASK_ID='4')
    assert status == 2 and err == 'slurm_sweep.sh: task 4, expected --array=0-3\n'


def test_a_task_of_a_sweep_alone_is_queued_again(tmp_path):
    options = dict(LOOPS='', SEEDS='5', OUT='o', SLURM_ARRAY_TASK_ID='0', STATUS='138')
    status, argv, _, calls, _ = run(tmp_path, 'slurm_sweep.sh', **TASK, **options)
    assert status == 138 and calls == ['show job 500_0', 'requeue 500_0']
    assert argv == ['python', 'train.py', '--seed=5', '--out_dir=o/seed-5', '--init_from=auto']


def stage(tmp_path, *argv, **environment):
    """Runs stage.sh in a repository whose data/toy/prepare.py makes a set in data/toy or data/notes."""
    for folder in ('runs', 'data/toy', 'bin'):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / 'runs' / 'stage.sh').write_text((ROOT / 'runs' / 'stage.sh').read_text())
    (tmp_path / 'data' / 'toy' / 'prepare.py').touch()
    python = tmp_path / 'bin' / 'python'
    python.write_text(
        '#!/bin/sh\nto=data/toy; [ "$2" != --name ] || to="data/$3"; mkdir -p "$to"\n'
        'echo "$@" >"$to/train.bin"; echo "$TIKTOKEN_CACHE_DIR $HF_HOME" >"$to/meta.json"; touch "$to/lock"\n'
    )
    python.chmod(0o755)
    env = dict(PATH=f'{tmp_path}/bin:/usr/bin:/bin', **environment)
    command = ['bash', 'runs/stage.sh', *argv]
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)


def test_staging_puts_a_set_into_the_shared_folder(tmp_path):
    shared = tmp_path / 'shared'
    ended = stage(tmp_path, 'toy', '--val_share', '0.1', SHARED='shared')
    assert ended.returncode == 0 and ended.stdout.startswith('staged '), ended.stderr
    assert sorted(path.name for path in (shared / 'data' / 'toy').iterdir()) == ['meta.json', 'train.bin']
    assert (shared / 'data/toy/train.bin').read_text() == 'data/toy/prepare.py --val_share 0.1\n'
    assert (shared / 'data/toy/meta.json').read_text() == f'{shared}/tiktoken {shared}/huggingface\n'
    assert 'is the same set already' in stage(tmp_path, 'toy', SHARED='shared').stdout
    assert stage(tmp_path, 'toy', '--name', 'notes', SHARED='shared').returncode == 0
    assert sorted(path.name for path in (shared / 'data').iterdir()) == ['notes', 'toy']


@pytest.mark.parametrize(
    'argv, environment', [(['toy'], {}), ([], dict(SHARED='s')), (['no'], dict(SHARED='s'))]
)
def test_staging_says_in_a_line_what_it_expects(tmp_path, argv, environment):
    ended = stage(tmp_path, *argv, **environment)
    assert ended.returncode == 2 and ended.stderr.startswith('stage.sh: ') and ended.stderr.count('\n') == 1
