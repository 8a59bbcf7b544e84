"""What several test files use: sizes of a tiny run, random weights, and a transformer written out by hand."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    '--n_embd=16 --n_head=2 --block_size=8 --n_prelude=1 --n_block=1 --n_coda=1 --n_loop=2 --batch_size=4 '
    '--device=cpu --dtype=float32 --compile=False --max_iters=12 --eval_interval=4 --eval_iters=2 '
    '--learning_rate=1e-2 --warmup_iters=2 --sample_tokens=0'
).split()


def randomize(model, seed=0):
    """Random weights everywhere: zero biases, unit norms and [I 0] of an initialised model hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.copy_(0.2 * noise if p.dim() > 1 else 1 + 0.1 * noise)
    return model


def script(name, *argv, **environment):
    """Starts a script as a user does, its output in .stdout."""
    env = dict(os.environ, OMP_NUM_THREADS='1', **environment)
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([sys.executable, str(ROOT / name), *argv], env=env, cwd=ROOT, **pipe)


def read_log(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / 'log.jsonl').read_text().splitlines()]


def load(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Whether two checkpoints' values are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def by_hand(weights, c, idx, n_loop=None, cut=None):
    """Logits (B, T, V) of a state dict, the equations written out. cut: detach the state before that loop."""

    def norm(x, name):
        if name + '.weight' not in weights:
            return x
        scale, shift = weights[name + '.weight'], weights.get(name + '.bias', 0.0)
        eps = c.norm_eps or dict(layernorm=1e-5, rmsnorm=1e-6)[c.norm]
        if c.norm == 'layernorm':
            x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * scale + shift

    def linear(x, name):
        return x @ weights[name + '.weight'].T + weights.get(name + '.bias', 0.0)

    def block(x, name):
        B, T, C = x.shape
        D = C // c.n_head
        q, k, v = linear(norm(x, name + 'ln_1'), name + 'attn.c_attn').split(C, dim=-1)
        out = []
        for h in range(c.n_head):
            one = [y[..., h * D : (h + 1) * D] for y in (q, k, v)]
            for i in (0, 1):
                if c.pos == 'rope':
                    angle = torch.arange(T)[:, None] * c.rope_base ** (-torch.arange(0, D, 2).float() / D)
                    turn = torch.complex(angle.cos().to(x.dtype), angle.sin().to(x.dtype))  # float32 tables
                    turned = torch.complex(one[i][..., : D // 2], one[i][..., D // 2 :]) * turn
                    one[i] = torch.cat((turned.real, turned.imag), dim=-1)
                if c.qk_norm:
                    one[i] = one[i] / (one[i].pow(2).mean(-1, keepdim=True) + (c.norm_eps or 1e-6)).sqrt()
            scores = one[0] @ one[1].transpose(1, 2) / math.sqrt(D)
            scores = scores + torch.full((T, T), -math.inf, dtype=x.dtype).triu(1)
            out.append(torch.exp(scores - scores.logsumexp(-1, keepdim=True)) @ one[2])
        x = x + linear(torch.cat(out, dim=-1), name + 'attn.c_proj')
        y = linear(norm(x, name + 'ln_2'), name + 'mlp.c_fc')
        y = F.gelu(y, approximate='tanh' if c.mlp == 'gelu_tanh' else 'none')
        return x + linear(y, name + 'mlp.c_proj')

    x = weights['transformer.wte.weight'][idx]
    if c.pos == 'learned':
        x = x + weights['transformer.wpe.weight'][: idx.size(1)]
    e = norm(x, 'transformer.norm_emb')
    for i in range(c.n_prelude):
        e = block(e, f'transformer.prelude.{i}.')
    s = e
    if c.state_init == 'zero':
        s = torch.zeros_like(e)
    if c.state_init == 'random':
        table = torch.randn(c.block_size, c.n_embd, generator=torch.Generator().manual_seed(0))
        s = (c.state_std or c.n_embd**-0.5) * table[: idx.size(1)].to(e.dtype).expand_as(e)
    for i in range(n_loop or c.n_loop):
        s = s.detach() if i == cut else s
        u = linear(torch.cat((e, s), dim=-1), 'inject') if c.input_injection == 'inject' else s
        for j in range(c.n_block):
            u = block(u, f'transformer.recur.{j}.')
        s = norm(u, 'norm_recur')
    for i in range(c.n_coda):
        s = block(s, f'transformer.coda.{i}.')
    return norm(s, 'transformer.ln_f') @ weights['lm_head.weight'].T
