"""
Trains every recipe of config/ for some steps, small, on pystdlib, and prints the table of their losses.

    python runs/recipes.py [--key=value ...]     about 3 minutes on 2 CPU cores; the keys are train.py's
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from configurator import ROOT

SMALL = (
    '--dataset=pystdlib --vocab_size=256 --block_size=64 --batch_size=8 --gradient_accumulation_steps=1 '
    '--n_loop=4 --max_iters=200 --eval_interval=200 --eval_iters=20 --log_interval=1 --sample_tokens=0 '
    '--learning_rate=3e-3 --min_lr=0 --warmup_iters=20 --wandb_log=False'
).split()
WIDTH = ['--n_embd=64', '--n_head=2', '--n_hidden=176', '--n_block=3']


def main(argv):
    print(f'{"recipe":24} {"parameters":>10} {"first loss":>10} {"val loss":>10}')
    lowered = True
    for path in sorted((ROOT / 'config').glob('train_*.py')):
        width = ['--size=1'] if 'size = ' in path.read_text().replace('_size = ', '') else WIDTH
        with tempfile.TemporaryDirectory() as out_dir, contextlib.redirect_stdout(io.StringIO()) as said:
            train.main([str(path), *SMALL, *width, *argv, f'--out_dir={out_dir}'])
            log = [json.loads(line) for line in (Path(out_dir) / 'log.jsonl').read_text().splitlines()]
        size = said.getvalue().split('number of parameters: ')[1].split()[0]
        first, last = log[0]['train/loss'], log[-1]['val/loss']
        print(f'{path.stem:24} {size:>10} {first:10.4f} {last:10.4f}', flush=True)
        lowered &= last < first
    sys.exit(0 if lowered else 1)


if __name__ == '__main__':
    main(sys.argv[1:])
