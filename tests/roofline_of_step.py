"""
Where an eager float32 training step stands against the matrix products in it, and against our own step.

    python tests/roofline_of_step.py [--rounds=7] [--key=value ...]      keys of bench.py: --n_embd=192, ...

The steps, in turns: a plain GPT of torch's functions, as nanoGPT computes it (fused attention, AdamW); ours,
eager; ours, compiled. Then a profile of the plain step by kinds of operations, and two floors: the products
of the step, each alone at its own shape, the best of 20 or more calls, and attention as profiled. The first
one has torch's products; the second one has for each product the faster of torch's and oneDNN's, both in the
layouts that they like best. A step of these products and this attention can hardly be faster. Best times are
compared with the best plain step; and, as products in a step take longer than alone, the ratio of the two
floors' products is also applied to what they take in the step.
"""

import functools
import math
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import command, configure

# isort: split
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from bench import BenchConfig, Setting
from model import GPTConfig
from nanoloop.machine import setup
from nanoloop.onednn import onednn_linear
from train import TrainConfig

MODEL = (
    'config/train_shakespeare_char.py --device=cpu --dtype=float32 --vocab_size=65 --dropout=0 '
    '--batch_size=12 --steps=4 --warmup=2 --rounds=7'
).split()
KINDS = {  # of operations: beginnings of their names behind aten::
    'products': ('mm', 'bmm'),
    'attention': ('_scaled_dot_product',),
    'norms': ('native_layer_norm',),
    'activation': ('gelu',),
    'head and loss': ('_log_softmax', 'nll_loss'),
    'sums and copies': ('add', 'copy_', 'cat', 'sum', 'fill_', 'zero_', 'mul', 'clone'),
    'embedding': ('embedding', 'index_select'),
    'clipping, optimizer': ('_fused_adamw', '_foreach', 'linalg_vector_norm'),
}


class Layer(nn.Module):
    """A layer of GPT-2 without biases."""

    def __init__(self, C, n_head):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        self.qkv, self.out = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.up, self.down = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (  # (B, n_head, T, C / n_head) each
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            for part in self.qkv(self.ln_1(x)).split(C, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class Plain(nn.Module):
    """The step of a plain GPT, of the sizes of c. seconds: see bench.Setting."""

    def __init__(self, c):
        super().__init__()
        torch.manual_seed(0)
        n_layer = c.n_prelude + c.n_block * c.n_loop + c.n_coda
        self.c, self.seconds, self.name = c, [], 'plain, eager'
        self.wte, self.wpe = nn.Embedding(c.vocab_size, c.n_embd), nn.Embedding(c.block_size, c.n_embd)
        self.layers = nn.Sequential(*(Layer(c.n_embd, c.n_head) for _ in range(n_layer)))
        self.ln_f = nn.LayerNorm(c.n_embd, bias=False)
        nn.init.normal_(self.wte.weight, std=0.02)
        self.batch = torch.randint(c.vocab_size, (c.batch_size, c.block_size + 1))
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, betas=(0.9, 0.99), fused=False)
        self.run(2)

    def loss(self, idx, targets):
        x = self.ln_f(self.layers(self.wte(idx) + self.wpe.weight))
        return F.cross_entropy(F.linear(x, self.wte.weight).flatten(0, 1), targets.flatten())

    def run(self, steps):
        start = time.perf_counter()
        for _ in range(steps):
            self.optimizer.zero_grad(set_to_none=True)
            self.loss(self.batch[:, :-1], self.batch[:, 1:]).backward()
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            self.optimizer.step()
        return (time.perf_counter() - start) / steps


def profiled(plain):
    """Returns ({kind: ms of a step}, {(name, shapes): calls of a step}) of the plain step."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        plain.run(3)
    ms, products = Counter(), Counter()
    for event in profiler.key_averages(group_by_input_shape=True):
        name = event.key.removeprefix('aten::')
        kind = next((kind for kind, starts in KINDS.items() if name.startswith(starts)), 'other')
        ms[kind] += event.self_cpu_time_total / 3e3
        if name in KINDS['products']:
            products[name, str(event.input_shapes)] += event.count // 3
    return ms, products


def seconds_of_products(products, rounds):
    """Returns (seconds, seconds, FLOPs) of the products of a step, each alone at its own shape.

    The seconds are those of torch's products, and of the faster of torch's and oneDNN's.
    """
    total, fastest, flops = 0.0, 0.0, 0
    for (name, shapes), calls in products.items():
        a, b = (torch.randn(shape) for shape in eval(shapes)[-2:] if len(shape) > 1)  # noqa: S307
        functions = [functools.partial(getattr(torch, name), a, b)]
        if name == 'mm':
            functions.append(functools.partial(onednn_linear, a, b.T.contiguous(), None))
        seconds = [[] for _ in functions]
        for _ in range(max(20, 3 * rounds)):
            for function, times in zip(functions, seconds, strict=True):  # in turns
                start = time.perf_counter()
                function()
                times.append(time.perf_counter() - start)
        best = [min(times) for times in seconds]
        total, fastest = total + calls * best[0], fastest + calls * min(best)
        flops += calls * 2 * math.prod(a.shape) * b.shape[-1]
    return total, fastest, flops


@command
def main(argv):
    c = configure((BenchConfig, TrainConfig, GPTConfig), [*MODEL, *argv])
    c.build(BenchConfig)  # which checks its keys
    contenders = [Plain(c)]
    for compile in (False, True):
        setting = configure(
            (BenchConfig, TrainConfig, GPTConfig), [*MODEL, *argv, f'--compile={compile}'], say=None
        )
        m = setup(setting)
        contenders.append(Setting(setting, m, f'ours, {"compiled" if compile else "eager"}'))
    for _ in range(c.rounds):
        for contender in contenders:
            contender.seconds.append(contender.run(c.steps))
    print(m.line)
    plain = contenders[0]
    for contender in contenders:
        ratios = [a / b for a, b in zip(plain.seconds, contender.seconds, strict=True)]
        print(
            f'{contender.name}: {1000 * statistics.median(contender.seconds):.1f} ms per step, plain / this '
            f'{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}, n = {len(ratios)})'
        )
    ms, products = profiled(plain)
    whole = sum(ms.values())
    print('the plain step, profiled: ' + ', '.join(f'{kind} {n / whole:.1%}' for kind, n in ms.most_common()))
    *both, flops = seconds_of_products(products, c.rounds)
    for of, seconds in zip(("torch's", "the faster of torch's and oneDNN's"), both, strict=True):
        floor, in_step = (
            1000 * seconds + ms['attention'],
            ms['products'] * seconds / both[0] + ms['attention'],
        )
        print(
            f'floor: products, {of}, {1000 * seconds:.1f} ms ({flops / seconds / 1e12:.3f} TFLOP/s), '
            f'attention {ms["attention"]:.1f} ms: best plain step, {1000 * min(plain.seconds):.1f} ms, / it '
            f'{1000 * min(plain.seconds) / floor:.3f}; as they are in the step: {whole / in_step:.3f}'
        )


if __name__ == '__main__':
    main()
