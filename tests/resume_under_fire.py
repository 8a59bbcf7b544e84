"""
Kills a run with SIGKILL at random moments, a third of them while a checkpoint is written, restarts it with
the same command and compares the end with that of a run never killed: weights, optimizer and log, to the bit.

    python tests/resume_under_fire.py --kills=20
"""

import random
import signal
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
from helpers import TINY, load, read_log, same, script  # noqa: E402

from nanoloop.prepare import write_text  # noqa: E402
from nanoloop.tokenizer import Bytes  # noqa: E402

HARD = '--eval_interval=3 --dropout=0.1 --gradient_accumulation_steps=4'.split()
HARD += ['--init_from=auto', '--input_injection=inject_random', '--optimizer=muon', '--loop_warmup=60']
HARD += ['--loop_sampling=poisson', '--loop_max=4']


def survive(folder, kills, seed, steps=240):
    """Trains twice in folder, once killed `kills` times. Raises AssertionError if the ends differ."""
    dice = random.Random(seed)
    text = folder / 'input.txt'
    text.write_bytes(np.random.default_rng(0).integers(97, 105, 5000, dtype=np.uint8).tobytes())
    write_text(folder / 'data', [text], Bytes(), 'random')
    argv = [f'--dataset={folder}/data', *TINY, *HARD, f'--max_iters={steps}']
    calm = script('train.py', *argv, f'--out_dir={folder}/calm')
    moments = sorted(dice.sample(range(5, steps - 20), kills))
    stormy, at = folder / 'stormy', []
    for moment in moments:
        run = script('train.py', *argv, f'--out_dir={stormy}')
        while run.poll() is None and progress(stormy) < moment:
            time.sleep(0.002)
        if dice.random() < 1 / 3:  # wait for a save to begin
            while run.poll() is None and not (stormy / 'ckpt.pt.tmp').exists():
                pass
        else:
            time.sleep(dice.random() * 0.05)
        at.append(f'{progress(stormy)}{"w" * (stormy / "ckpt.pt.tmp").exists()}')
        run.send_signal(signal.SIGKILL)
        run.communicate()
        assert run.returncode == -signal.SIGKILL, f'the run ended before it was killed: {run.returncode}'
    last = script('train.py', *argv, f'--out_dir={stormy}')
    print(f'killed after steps {" ".join(at)} (w: while writing)')
    for run in (last, calm):
        out, _ = run.communicate()
        assert run.returncode == 0, out
    a, b = (load(folder / name / 'ckpt.pt') for name in ('calm', 'stormy'))
    for key in ('model', 'optimizer', 'iter_num', 'best_val_loss', 'stale', 'evaluated'):
        assert same(a[key], b[key]), f'{key} differs'
    logs = [read_log(folder / name) for name in ('calm', 'stormy')]
    logs = [[{k: v for k, v in x.items() if 'ms' not in k and 'tok' not in k} for x in log] for log in logs]
    assert logs[0] == logs[1], 'the logs differ'
    assert [line['iter'] for line in logs[0] if 'lr' in line] == list(range(steps))


def progress(out_dir):
    """The number of the last step in the log, -1 before the first."""
    try:
        lines = (out_dir / 'log.jsonl').read_text().splitlines()
        return int(lines[-1].split(',')[0].split(':')[1])
    except (OSError, IndexError, ValueError):
        return -1


if __name__ == '__main__':
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        survive(Path(folder), args.kills, args.seed)
    print(f'{args.kills} kills, and the run ends as if there had been none')
