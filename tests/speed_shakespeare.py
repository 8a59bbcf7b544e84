"""
Times config/train_shakespeare_char_cpu.py, the whole process with an empty compile cache, in turns with a
plain eager float32 loop of nanoGPT's CPU recipe: 2,000 steps, 9 evaluations of 2 x EVAL_ITERS batches.

    python tests/speed_shakespeare.py --rounds=3
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
CONFIG = 'config/train_shakespeare_char_cpu.py'
STEPS, EVALUATIONS, EVAL_ITERS = 2000, 9, 20


class Plain(nn.Module):
    """4 layers, 128 wide, of torch's own parts."""

    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(65, 128), nn.Embedding(64, 128)
        layer = dict(dropout=0.0, activation='gelu', batch_first=True, norm_first=True, bias=False)
        self.h = nn.ModuleList(nn.TransformerEncoderLayer(128, 4, 512, **layer) for _ in range(4))
        self.ln_f = nn.LayerNorm(128, bias=False)
        self.register_buffer('mask', nn.Transformer.generate_square_subsequent_mask(64))

    def forward(self, idx, targets):
        x = self.wte(idx) + self.wpe.weight
        for layer in self.h:
            x = layer(x, src_mask=self.mask, is_causal=True)
        return F.cross_entropy((self.ln_f(x) @ self.wte.weight.T).flatten(0, 1), targets.flatten())


def plain_seconds(steps=200):
    """(seconds per step, seconds per evaluated batch) of the eager loop."""
    model, batch = Plain(), torch.randint(65, (12, 65))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    for i in range(steps + 10):
        if i == 10:
            start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        model(batch[:, :-1], batch[:, 1:]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    per_step = (time.perf_counter() - start) / steps
    with torch.no_grad():
        start = time.perf_counter()
        for _ in range(steps):
            model(batch[:, :-1], batch[:, 1:])
    return per_step, (time.perf_counter() - start) / steps


def our_seconds(dtype):
    """(seconds of the whole process, its validation loss)."""
    with tempfile.TemporaryDirectory() as folder:
        env = dict(os.environ, TORCHINDUCTOR_CACHE_DIR=f'{folder}/cache')
        start = time.perf_counter()
        command = [sys.executable, 'train.py', CONFIG, f'--out_dir={folder}/out', f'--dtype={dtype}']
        out = subprocess.run(command, env=env, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        line = next(line for line in out.splitlines() if line.startswith('step '))
        return time.perf_counter() - start, float(line.split('val loss ')[1].split(',')[0])


if __name__ == '__main__':
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--dtype', default='auto', help='of our run')
    args, ratios = parser.parse_args(), []
    for _ in range(args.rounds):
        (step, evaluated), (ours, loss) = plain_seconds(), our_seconds(args.dtype)
        plain = STEPS * step + EVALUATIONS * 2 * EVAL_ITERS * evaluated
        ratios.append(plain / ours)
        print(
            f'plain: {1000 * step:.1f} ms a step, {1000 * evaluated:.1f} ms an evaluated batch, {plain:.0f}'
            f' s in all; ours: {ours:.1f} s to validation loss {loss}; {ratios[-1]:.2f} times as fast',
            flush=True,
        )
    print(f'median of {len(ratios)}: {statistics.median(ratios):.2f} times as fast')
