"""
Measures how much a busy program on the same CPU slows training, two ranks and sampling down.

    python tests/speed_beside_busy.py FOLDER [rounds]

FOLDER: a run to sample from. Each figure is the median over rounds: alone and beside one endless loop, with
nanoloop/shared_cpu.py and without it (GOMP_SPINCOUNT=300000 is libgomp's own default), all in turns.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = ['--max_iters=60', '--eval_interval=1000', '--eval_iters=1', '--log_interval=1', '--sample_tokens=0']
TRAIN = [str(ROOT / 'train.py'), str(ROOT / 'config/quickstart.py'), '--dtype=float32', '--compile=False']
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']


def run(command, env):
    return subprocess.run(
        [sys.executable, *command], env=env, capture_output=True, text=True, check=True, cwd=ROOT
    )


def train(env, launcher=(), flags=()):
    """Returns the milliseconds of a step of the quick start, the median of the last 40 of 60."""
    with tempfile.TemporaryDirectory() as folder:
        run([*launcher, *TRAIN, *STEPS, *flags, f'--out_dir={folder}/out'], env)
        lines = map(json.loads, (Path(folder) / 'out/log.jsonl').read_text().splitlines())
        return statistics.median([line['train/ms'] for line in lines if 'train/ms' in line][-40:])


def ranks(env):
    """Returns the same of two ranks with half of the batch each; torchrun gives each one thread."""
    return train(env, TORCHRUN, ['--gradient_accumulation_steps=2', '--batch_size=4'])


def sample(env, folder):
    """Returns the milliseconds of a token, of 3 samples of 400."""
    flags = ['--num_samples=3', '--stream=True', '--max_new_tokens=400', '--dtype=float32', '--stop=']
    out = run([str(ROOT / 'sample.py'), f'--init_from={folder}', *flags], env).stderr
    return 1000 / float(re.search(r'([\d,.]+) tokens/s', out)[1].replace(',', ''))


def main(folder, rounds='3'):
    programs = dict(training=train, ranks=ranks, sampling=lambda env: sample(env, folder))
    ways = {'as it is': {}, 'without': dict(GOMP_SPINCOUNT='300000')}
    figures = {}
    for _ in range(int(rounds)):
        for name, program in programs.items():
            for way, variables in ways.items():
                for busy in (False, True):
                    loop = subprocess.Popen([sys.executable, '-c', 'while True: pass']) if busy else None
                    try:
                        ms = program(dict(os.environ, **variables))
                    finally:
                        if loop:
                            loop.kill()
                            loop.wait()
                    figures.setdefault((name, way, busy), []).append(ms)
    for name in programs:
        for way in ways:
            alone, busy = (figures[name, way, busy] for busy in (False, True))
            print(
                f'{name}, {way}: {statistics.median(alone):.1f} ms alone, {statistics.median(busy):.1f} ms '
                f'beside a busy program, {statistics.median(busy) / statistics.median(alone):.2f} times, '
                f'n = {rounds}'
            )


if __name__ == '__main__':
    main(*sys.argv[1:])
