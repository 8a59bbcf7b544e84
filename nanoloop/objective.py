"""
The objective of a step: a loss rule over the model's loss table, and the number of loops.

    loss = sum over loops r and tokens t of  W[r, t] CE[r, t]   (+ a regulariser), per target that counts

A loss rule (OBJECTIVE) sets the weights of the loops, except `gate`, which trains the exit gate alone. The
batch sets the weights of the tokens, of sampled tokens to their advantage for example. A target of -1
(padding, a prompt) does not count; a target with weight 0 still counts in the divisor.

References: end, step, few: github.com/FuRuF-11/FullyLoopedTransformer; exit, gate: Ouro, arXiv:2510.25741;
drawn loops: Huginn, arXiv:2502.05171; growing loops: github.com/LoopedLMs/looped_nanochat.

Shapes: B rows, T positions, R loops that are read out.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from model import GPTConfig, upcast
from nanoloop.checks import check
from nanoloop.count import flops
from nanoloop.known_weights import weighted_loss
from nanoloop.parallel import whole_weights
from nanoloop.randomness import random_generator

GATE_SLOPE, GATE_MIN_GAIN = 50.0, 0.005  # of the label in ouro_stage2, in 1/nat and nats
POISSON_SIGMA = 0.5  # standard deviation of the logarithm of poisson's rate

# -----------------------------------------------------------------------------
# loss rules


def exit_distribution(gates):
    """Returns the probability of exiting after each loop: p_r = g_r prod_{j<r} (1 - g_j).

    The last loop takes what is left. gates: (R, B, T), the gate's probabilities in [0, 1]. Returns (R, B, T),
    which sum to 1 over R. Source: Ouro, section 3.2.
    """
    p, survival = [], torch.ones_like(gates[0])  # survival: the probability that no gate has exited yet
    for gate in gates[:-1]:  # no cumprod: its backward pass makes the host wait for the device
        p.append(gate * survival)
        survival = survival * (1 - gate)
    return torch.stack([*p, survival])


def expected_exit_loop(p):
    """Returns the mean loop of exiting, counted from 1, (B, T). p: (R, B, T), see exit_distribution."""
    loop = torch.arange(1, len(p) + 1, device=p.device)[:, None, None]  # (R, 1, 1)
    return (loop * p).sum(dim=0)


def mean_of_loops(ce, gates, loops, c):
    """Returns the mean of ce over the loops that are read out, (B, T), and nothing to log."""
    return ce.mean(dim=0), {}


def ouro_stage1(ce, gates, loops, c):
    """Returns sum_r p_r CE_r - beta H(p), p = exit_distribution(gates), and values to log. Each (B, T)."""
    p = exit_distribution(gates)
    task = (p * ce).sum(dim=0)
    entropy = -torch.xlogy(p, p.clamp(min=1e-10)).sum(dim=0)
    return task - c.beta * entropy, dict(task_loss=task, entropy=entropy, exit_loop=expected_exit_loop(p))


def ouro_stage2(ce, gates, loops, c):
    """Returns the gate's cross-entropy (B, T): it learns to go on where another loop lowers a token's loss.

    The label of 1 - g_r, for r = 2..R, is sigmoid(GATE_SLOPE (gain - GATE_MIN_GAIN)) with the gain max(0,
    ce_{r-1} - ce_r). With gate_ahead it is the label of 1 - g_{r-1}, which decides whether loop r is run. The
    sum over r is divided by R, as in the paper.
    """
    gain = (ce[:-1] - ce[1:]).clamp(min=0)  # (R - 1, B, T)
    label = torch.sigmoid(GATE_SLOPE * (gain - GATE_MIN_GAIN))
    g = (gates[:-1] if c.gate_ahead else gates[1:]).clamp(1e-7, 1 - 1e-7)
    loss = -(label * torch.log1p(-g) + (1 - label) * g.log()).sum(dim=0) / len(ce)
    p = exit_distribution(gates)
    return loss, dict(task_loss=(p * ce).sum(dim=0), exit_loop=expected_exit_loop(p))


class LossRule(NamedTuple):
    """How the loss table becomes a loss per token."""

    loops: Callable  # n_loop -> the loops that are read out, a tuple of indices from 0 on
    # (ce (R, B, T), gates (R, B, T), loops, c) -> the loss of every token (B, T), and what else to log,
    # {name: (B, T)}; gates: None unless trains_gate; c: the run's keys
    loss: Callable
    trains_gate: bool = False  # it trains the exit gate, which must exist
    trains_model: bool = True  # it trains everything else
    # the loss is a sum of ce with fixed weights: then the head is computed once, see known_weights.py
    linear: bool = False
    min_loops: int = 1  # it means nothing with fewer loops


OBJECTIVE = {
    'end': LossRule(lambda n: (n - 1,), mean_of_loops, linear=True),
    'step': LossRule(lambda n: tuple(range(n)), mean_of_loops, linear=True),
    'few': LossRule(lambda n: tuple(range(2 * n // 3, n)), mean_of_loops, linear=True),
    'exit': LossRule(lambda n: tuple(range(n)), ouro_stage1, trains_gate=True, min_loops=2),
    'gate': LossRule(
        lambda n: tuple(range(n)), ouro_stage2, trains_gate=True, trains_model=False, min_loops=2
    ),
}


def check_linear(rule, loops, c):
    """Raises ValueError unless the loss of a rule is a sum of ce with fixed weights."""
    generator = torch.Generator().manual_seed(0)  # of its own: a run's noise does not depend on this
    a, b = torch.rand(2, len(loops), 2, 3, generator=generator).unbind()  # (R, B, T) each
    loss, loss_a, loss_b = (rule.loss(ce, None, loops, c)[0] for ce in (a + 2 * b, a, b))
    if rule.trains_gate or not torch.allclose(loss, loss_a + 2 * loss_b, atol=1e-5):
        raise ValueError('it is not linear in ce, which linear=True says')


def try_rule(name, rule, n_loop, c):
    """Calls a loss rule once. Raises RuntimeError, with its name, for a mistake of its author."""
    hint = ''
    try:
        loops = rule.loops(n_loop)
        rising = isinstance(loops, tuple) and loops == tuple(sorted(set(loops)))
        if not (rising and loops and 0 <= loops[0] <= loops[-1] < n_loop):
            raise IndexError(f'loops={loops!r}, expected rising indices of {n_loop} loops')
        ce = torch.ones(len(loops), 2, 3)  # (R, B, T)
        hint = '' if rule.trains_gate else '; its gates are None without trains_gate'
        loss, extra = rule.loss(ce, 0.5 * ce if rule.trains_gate else None, loops, c)
        results = dict(extra, loss=loss)
        if rule.linear:
            check_linear(rule, loops, c)
    except Exception as error:  # of any kind: it is its author's code
        raise RuntimeError(f'objective {name}: {type(error).__name__}: {error}{hint}') from error
    for what, x in results.items():
        shape = getattr(x, 'shape', None)  # of a number: None
        if shape != (2, 3):
            got = x if shape is None else f'shape {tuple(shape)}'
            raise RuntimeError(f'objective {name}: its {what} has {got}, not shape (B, T)')
    if 'loss' in extra:
        raise RuntimeError(f"objective {name}: a logged value cannot be called 'loss'")


def set_trained_parts(model, rule, dropout=True):
    """Prepares a model for a loss rule: the parameters that it trains require a gradient, the others do not.

    A rule that trains the gate alone gets the model in eval mode, since the noise of dropout would look like
    a gain between loops. The other rules get it in training mode, or in eval mode with dropout=False.
    """
    for name, p in model.named_parameters():  # DDP waits for all that require a gradient
        p.requires_grad_(rule.trains_gate if name.startswith('exit_gate.') else rule.trains_model)
    model.train(rule.trains_model and dropout)


@torch.enable_grad()
def loop_weights(rule, loops, shape, like, c):
    """Returns the weights (R, B, T) with which a linear rule sums ce into the loss, of like's dtype.

    shape: (B, T).
    """
    ce = like.new_zeros(len(loops), *shape, requires_grad=True)  # (R, B, T)
    return torch.autograd.grad(rule.loss(ce, None, loops, c)[0].sum(), ce)[0]


class TrainingLoss(nn.Module):
    """Computes the loss of a micro-batch, and what else to log of it.

    Both are sums over targets other than -1, divided by B T. All micro-batches and ranks have this
    divisor, so that their sums are exact. train_step then replaces it by the number of those targets.
    """

    def __init__(self, model, c):
        super().__init__()
        self.model, self.c, self.rule = model, c, OBJECTIVE[c.objective]

    def forward(self, idx, targets, n_loop, weights=None):
        """Returns the loss and {name: a number}, detached.

        idx, targets: (B, T), -1 = ignored. weights: (B, T), factors of the tokens' losses; a negative
        one lowers the token's probability; None = 1. The logged values are not weighted.
        """
        loops = self.rule.loops(n_loop)
        counted = targets != -1  # (B, T)
        of_tokens = counted if weights is None else counted * weights  # (B, T)
        if self.rule.linear and torch.is_grad_enabled():
            like = upcast(self.model.lm_head.weight)
            factors = loop_weights(self.rule, loops, targets.shape, like, self.c) * of_tokens  # (R, B, T)
            total, ce = weighted_loss(self.model, idx, targets, n_loop, loops, factors)  # ce: (R, B, T)
            _, extra = self.rule.loss(ce, None, loops, self.c)
        else:
            ce, gates = self.model.loss_table(idx, targets, n_loop, loops)  # (R, B, T) each
            # (B, T), {name: (B, T)}
            loss, extra = self.rule.loss(ce, gates if self.rule.trains_gate else None, loops, self.c)
            total = (loss * of_tokens).sum()
        if len(loops) > 1:
            extra |= {f'loss/loop_{i:02d}': nll for i, nll in zip(loops, ce, strict=True)}
        n = targets.numel()
        return total / n, {name: (x.detach() * counted).sum() / n for name, x in extra.items()}


def training_flops(model, c, n_loop):
    """Returns the FLOPs per token of a training step with n_loop loops."""
    rule = OBJECTIVE[c.objective]
    with whole_weights(model):  # counting calls parts of the model
        counted = flops(model, n_loop, len(rule.loops(n_loop)))
    return sum(counted['training' if rule.trains_model else 'forward'].values())


# -----------------------------------------------------------------------------
# the number of loops of a step


def poisson(target, random):
    """Draws Huginn's number of loops, which has a heavy tail: 1 + Poisson(exp(tau)).

    tau ~ N(ln target - sigma^2 / 2, sigma^2). The expectation is target + 1 and the median below it: 4 for a
    target of 4, 29 for one of 32.
    """
    generator = random()
    tau = generator.normal(math.log(target) - POISSON_SIGMA**2 / 2, POISSON_SIGMA)
    return 1 + generator.poisson(math.exp(tau))


def uniform(target, random):
    """Draws from 1 to 2 target - 1."""
    return random().integers(1, 2 * target)


class LoopSampling(NamedTuple):
    """How the number of loops of a step is drawn around a target."""

    draw: Callable  # (target, random) -> the number of loops; random() makes the step's numpy Generator
    largest: Callable  # target -> the largest number that can be drawn; an infinite one needs loop_max
    fixed: bool = False  # nothing is drawn: loop_max has no meaning


LOOP_SAMPLING = {
    'fixed': LoopSampling(lambda target, random: target, lambda target: target, fixed=True),
    'uniform': LoopSampling(uniform, lambda target: 2 * target - 1),
    'poisson': LoopSampling(poisson, lambda target: math.inf),
}
# progress, step / loop_warmup steps in [0, 1) -> the step's target number of loops, as a share of n_loop
LOOP_GROWTH = {
    'linear': lambda progress: progress,
    'sqrt': lambda progress: 1 - math.sqrt(1 - progress),
    'late': lambda progress: 0.0,  # one loop, and n_loop from then on
}


def growth_steps(c):
    """Returns how many steps the number of loops grows; a loop_warmup below 1 is a share of max_iters."""
    return c.loop_warmup * c.max_iters if c.loop_warmup < 1 else c.loop_warmup


def limit_loops(n, c):
    """Returns n, clamped to [min_loops of the objective, loop_max]."""
    return min(max(n, OBJECTIVE[c.objective].min_loops), c.loop_max or math.inf)


def loops_at(step, c):
    """Returns the number of loops of a step: a function of c and step alone, so the same on all ranks."""
    target, steps = c.n_loop, growth_steps(c)
    if step < steps:
        share = LOOP_GROWTH[c.loop_growth](step / steps)
        if not 0 <= share <= 1:
            raise RuntimeError(f'loop_growth {c.loop_growth}: {share} is no share of n_loop, from 0 to 1')
        target = max(1, math.ceil(target * share))
    random = functools.partial(random_generator, c.seed, step, stream='loops')
    return int(limit_loops(LOOP_SAMPLING[c.loop_sampling].draw(target, random), c))


def step_of_max_flops(c, step, flops_done, flops_of_step):
    """Returns the number of steps after which max_flops are spent, at most max_iters.

    step, flops_done: steps made and FLOPs spent so far. flops_of_step: number of loops -> FLOPs of a step.
    """
    for later in range(step, c.max_iters):
        if flops_done >= c.max_flops:
            return later
        flops_done += flops_of_step(loops_at(later, c))
    return c.max_iters


def check_loops(c, config):
    """Raises UserError if objective, number of loops and bptt_k do not go together.

    c: the run's keys; config: the model's GPTConfig.
    """
    rule, sampling = OBJECTIVE[c.objective], LOOP_SAMPLING[c.loop_sampling]
    for n in {rule.min_loops, max(rule.min_loops, c.n_loop)}:
        try_rule(c.objective, rule, n, c)
    bounded = sampling.largest(c.n_loop) < math.inf
    check(c.loop_max or bounded, 'loop_max', c.loop_max, f'a number with loop_sampling={c.loop_sampling}')
    meaningless = sampling.fixed and c.loop_max is not None
    check(not meaningless, 'loop_max', c.loop_max, f'None with loop_sampling={c.loop_sampling}')
    needed = f'at least {rule.min_loops} with objective={c.objective}'
    check(c.n_loop >= rule.min_loops, 'n_loop', c.n_loop, needed)
    check((c.loop_max or c.n_loop) >= c.n_loop, 'loop_max', c.loop_max, f'at least n_loop={c.n_loop}')
    check(not rule.trains_gate or config.exit_gate, 'exit_gate', False, f'True with objective={c.objective}')
    most = limit_loops(sampling.largest(c.n_loop), c)
    read = most - rule.loops(most)[0]  # the loops that must record a graph
    expected = f'None or at least {read}: objective={c.objective} reads out that many of {most} loops'
    enough = config.bptt_k is None or config.bptt_k >= read
    check(enough or not rule.trains_model, 'bptt_k', config.bptt_k, expected)
    GPTConfig(**dict(vars(config), n_loop=most))  # the model must accept the largest number of loops, too
