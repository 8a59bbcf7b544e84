"""
What a step trains on: an objective, which weighs the model's loss table, and a number of loops.

    loss = sum over loops r and tokens t of  W[r, t] CE[r, t]   (+ a regulariser), per target that counts

References: end, step, few: github.com/FuRuF-11/FullyLoopedTransformer; exit, gate: Ouro, arXiv:2510.25741;
sampled loops: Huginn, arXiv:2502.05171; growing loops: github.com/LoopedLMs/looped_nanochat.

Shapes: B sequences, T positions, R loops read out.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from model import GPTConfig
from nanoloop.checks import check

SIGMA = 0.5  # of the logarithm of poisson's rate
SHARPNESS, WORTH = 50.0, 0.005  # of the gate's label: how sure it is of an improvement beyond so many nats

# -----------------------------------------------------------------------------
# objectives


def exit_distribution(gates):
    """Probability to leave after each loop: p_r = g_r prod_{j<r} (1 - g_j); the last loop takes the rest.

    gates: (R, B, T), probabilities to stop. Returns (R, B, T), summing to 1 over R. Source: Ouro, sec. 3.2.
    """
    p, left = [], torch.ones_like(gates[0])
    for gate in gates[:-1]:  # a cumprod would make the host wait in its backward pass
        p, left = [*p, gate * left], left * (1 - gate)
    return torch.stack([*p, left])


def exit_loop(p):
    """The expected loop of leaving, counted from 1: (B, T), of exit_distribution's p."""
    return (torch.arange(1, len(p) + 1, device=p.device)[:, None, None] * p).sum(dim=0)


def mean(ce, gates, c):
    """The mean of the loops read out."""
    return ce.mean(dim=0), {}


def expected(ce, gates, c):
    """Ouro's stage I: the expectation over the learned exits, minus beta times their entropy."""
    p = exit_distribution(gates)
    task, entropy = (p * ce).sum(dim=0), -torch.xlogy(p, p.clamp(min=1e-10)).sum(dim=0)
    return task - c.beta * entropy, dict(task_loss=task, entropy=entropy, exit_loop=exit_loop(p))


def gate(ce, gates, c):
    """Ouro's stage II: the gate learns to go on where the loss of its token falls by going on.

    Loop r = 2..R has the label sigmoid(SHARPNESS (ce_{r-1} - ce_r - WORTH)), improvements below 0 taken as 0,
    for 1 - g_r, or with gate_ahead for 1 - g_{r-1}, which decides whether r is run. The sum over r is divided
    by R, as in the paper.
    """
    better = (ce[:-1] - ce[1:]).clamp(min=0)
    label = torch.sigmoid(SHARPNESS * (better - WORTH))
    g = (gates[:-1] if c.gate_ahead else gates[1:]).clamp(1e-7, 1 - 1e-7)
    loss = -(label * torch.log1p(-g) + (1 - label) * g.log()).sum(dim=0) / len(ce)
    p = exit_distribution(gates)
    return loss, dict(task_loss=(p * ce).sum(dim=0), exit_loop=exit_loop(p))


class Aim(NamedTuple):
    """An objective."""

    rows: Callable  # n_loop -> the loops read out
    loss: Callable  # (ce, gates, c) -> the loss of every token, (B, T), and what else to log, {name: (B, T)}
    gated: bool = False  # it needs an exit gate, and two loops, and teaches it
    frozen: bool = False  # it teaches nothing else


OBJECTIVE = {
    'end': Aim(lambda n: (n - 1,), mean),
    'step': Aim(lambda n: tuple(range(n)), mean),
    'few': Aim(lambda n: tuple(range(2 * n // 3, n)), mean),
    'exit': Aim(lambda n: tuple(range(n)), expected, gated=True),
    'gate': Aim(lambda n: tuple(range(n)), gate, gated=True, frozen=True),
}


class Objective(nn.Module):
    """The loss of a micro-batch and what else to log of it. Both are sums over the targets that count,
    divided by all B T: with the same divisor everywhere, sums over micro-batches and ranks stay exact.

    Only what the objective teaches asks for a gradient: DDP waits for all that are asked for.
    """

    def __init__(self, model, c):
        super().__init__()
        self.model, self.c, self.aim = model, c, OBJECTIVE[c.objective]
        for name, p in model.named_parameters():
            p.requires_grad_(self.aim.gated if name.startswith('exit_gate.') else not self.aim.frozen)

    def forward(self, idx, targets, n_loop):
        """idx, targets: (B, T), -1 = ignored. Returns the loss and {name: a number}, detached."""
        if self.aim.frozen:
            self.model.eval()  # loops are compared: dropout would be taken for improvement
        rows = self.aim.rows(n_loop)
        ce, gates = self.model.loss_table(idx, targets, n_loop, rows)
        loss, more = self.aim.loss(ce, gates, self.c)

        def share(x):
            return (x * (targets != -1)).sum() / targets.numel()

        if len(rows) > 1:
            more |= {f'loss/loop_{row:02d}': nll for row, nll in zip(rows, ce, strict=True)}
        return share(loss), {name: share(x.detach()) for name, x in more.items()}


# -----------------------------------------------------------------------------
# loops


def poisson(mean, random):
    """Huginn's, with a heavy tail: 1 + Poisson(exp(tau)), tau ~ N(ln mean - SIGMA^2/2, SIGMA^2).

    Its expectation is mean + 1, its median below it: 4 of mean 4, 29 of mean 32.
    """
    return 1 + random.poisson(math.exp(random.normal(math.log(mean) - SIGMA**2 / 2, SIGMA)))


SAMPLING = {  # the loops of a step, (target, random) -> n, and the most of them by the target
    'fixed': (lambda target, random: target, lambda target: target),
    'uniform': (lambda target, random: random().integers(1, 2 * target), lambda target: 2 * target - 1),
    'poisson': (lambda target, random: poisson(target, random()), lambda target: math.inf),
}


def limited(n, c):
    """n within what objective and loop_max allow."""
    return min(max(n, 1 + OBJECTIVE[c.objective].gated), c.loop_max or math.inf)


def loops_at(step, c):
    """The number of loops of a step, the same on all ranks: a function of c and step alone.

    Over the first loop_warmup steps the target grows from 1 to n_loop: n_loop (1 - sqrt(1 - step / W)).
    """
    target = c.n_loop
    if step < c.loop_warmup:
        target = max(1, math.ceil(target * (1 - math.sqrt(1 - step / c.loop_warmup))))
    key = functools.partial(np.random.SeedSequence, (c.seed, step), spawn_key=(2,))  # 0 and 1 are a batch's
    draw, _ = SAMPLING[c.loop_sampling]
    return int(limited(draw(target, lambda: np.random.default_rng(key())), c))


def check_loops(c, config):
    """Raises ValueError if objective, loops and truncation do not go together; config: GPTConfig."""
    aim, sampled, (_, most) = OBJECTIVE[c.objective], c.loop_sampling != 'fixed', SAMPLING[c.loop_sampling]
    check(c.loop_max or c.loop_sampling != 'poisson', 'loop_max', c.loop_max, 'a number with poisson')
    check(sampled or c.loop_max is None, 'loop_max', c.loop_max, f'None with loop_sampling={c.loop_sampling}')
    check(c.n_loop > aim.gated, 'n_loop', c.n_loop, f'at least 2 with objective={c.objective}')
    check((c.loop_max or c.n_loop) >= c.n_loop, 'loop_max', c.loop_max, f'at least n_loop={c.n_loop}')
    check(not aim.gated or config.exit_gate, 'exit_gate', False, f'True with objective={c.objective}')
    most = limited(most(c.n_loop), c)
    read = most - aim.rows(most)[0]
    wanted = f'None or at least {read}: objective={c.objective} reads out as many of {most} loops'
    check(aim.frozen or config.bptt_k is None or config.bptt_k >= read, 'bptt_k', config.bptt_k, wanted)
    GPTConfig(**dict(vars(config), n_loop=most))
