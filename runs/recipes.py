"""
Trains every recipe of config/ for some steps, small, with 4 loops, on pystdlib, and prints a table of losses:
of the first step, as the objective counts it; at the end on 160 windows of the validation split; there after
every loop, on 160 others.

    python runs/recipes.py [--key=value ...]     train.py's keys; about 3 minutes on 2 CPU cores for 200 steps
    python runs/recipes.py --objectives=end,step,few,exit,gate --max_iters=300      each with each of these
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import command

# a Ctrl-C while the rest is imported is handled from here on
# isort: split
import torch

import train
from nanoloop import ROOT
from nanoloop.checkpoint import load_checkpoint
from nanoloop.checks import check
from nanoloop.datasets import Split, find_data, read_meta
from nanoloop.objective import OBJECTIVE

SMALL = (
    '--dataset=pystdlib --vocab_size=256 --block_size=64 --batch_size=8 --gradient_accumulation_steps=1 '
    '--n_loop=4 --loop_sampling=fixed --loop_max=None --bptt_k=None --max_iters=200 --eval_interval=100000 '
    '--eval_iters=20 --log_interval=1 --sample_tokens=0 --warmup_iters=20 --lr_schedule=linear --min_lr=0 '
    '--learning_rate=3e-3 --compile=False --wandb_log=False'
).split()
WIDTH = ['--n_embd=64', '--n_head=2', '--n_hidden=176', '--n_block=3']
OBJECTIVES = {
    name: [f'--objective={name}', f'--exit_gate={rule.trains_gate}'] for name, rule in OBJECTIVE.items()
}


@torch.no_grad()
def losses_by_loop(path):
    """Validation losses of a checkpoint after each of its loops."""
    model, _ = load_checkpoint(path)
    c, folder = model.config, find_data('pystdlib')
    split = Split(folder, read_meta(folder), 'val', c.block_size, c.vocab_size)
    x, y = (torch.from_numpy(a) for a in split.read_windows(split.eval_windows(160), 160))
    return model.eval().loss_table(x, y, loops=range(c.n_loop))[0].mean(dim=(1, 2)).tolist()


def row(path, argv):
    """(parameters, first loss, validation loss, losses by loop) of a recipe, trained."""
    width = ['--size=1'] if '\nsize = ' in path.read_text() else WIDTH
    with tempfile.TemporaryDirectory() as out_dir, contextlib.redirect_stdout(io.StringIO()) as said:
        train.main([str(path), *SMALL, *width, *argv, f'--out_dir={out_dir}'])
        log = [json.loads(line) for line in (Path(out_dir) / 'log.jsonl').read_text().splitlines()]
        by_loop = losses_by_loop(Path(out_dir) / 'ckpt.pt')
    size = said.getvalue().split('number of parameters: ')[1].split()[0]
    first = next(record['train/loss'] for record in log if 'train/loss' in record)
    return size, first, log[-1]['val/loss'], by_loop


@command
def main(argv):
    if {'-h', '--help'} & set(argv):
        return print(__doc__)
    chosen = next((arg for arg in argv if arg.startswith('--objectives=')), '--objectives=')
    argv = [arg for arg in argv if arg != chosen]
    names = [name for name in chosen.split('=')[1].split(',') if name]
    for name in names:
        check(name in OBJECTIVES, 'objectives', name, f'of {", ".join(OBJECTIVES)}')
    print(f'{"recipe":34} {"objective":9} {"parameters":>10} {"first":>7} {"val":>7}  after each loop')
    failed = []
    for path in sorted((ROOT / 'config').glob('train_*.py')):
        for name in names or ['']:
            try:
                size, first, last, by_loop = row(path, [*OBJECTIVES.get(name, ()), *argv])
            except SystemExit as stop:
                failed.append(f'{path.stem} {name}')
                if stop.code > 2:
                    raise
                continue
            loops = ' '.join(f'{loss:.3f}' for loss in by_loop)
            print(
                f'{path.stem:34} {name or "its own":9} {size:>10} {first:7.4f} {last:7.4f}  {loops}',
                flush=True,
            )
    check(not failed, 'keys', ' '.join(argv), f'what every recipe takes, refused by {", ".join(failed)}')


if __name__ == '__main__':
    main()
