"""
Early exit: a token leaves the loop as soon as a rule says so, while text is generated.

After every loop the rule computes one number per token, its statistic. The token exits where the statistic is
below the threshold, or, if the rule says `above`, where it is at least the threshold.

To add a rule, write its statistic and add an entry to EXIT. sample.py, bench.py and the tests take it up.
The statistic reads ExitInputs, in which logits and gate are there only if the entry says that it needs them.

References: Huginn, arXiv:2502.05171 (kl, diff); Ouro's Q-exit, arXiv:2510.25741 (gate).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from model import upcast
from nanoloop.checks import check


class ExitInputs(NamedTuple):
    """The inputs of a statistic after a loop, for T tokens of n rows. logits, gate: None unless declared."""

    previous: torch.Tensor | None  # (n, T, C) state before the loop; None in the first loop without s_0
    s: torch.Tensor  # (n, T, C) state after the loop
    logits: torch.Tensor | None  # (n, T, V) prediction after the loop, in float32; for needs_logits
    gate: torch.Tensor | None  # (n, T) exit gate's probability after the loop; for needs_gate
    memory: torch.Tensor | None  # what the statistic returned for these tokens one loop before; at first None


class ExitRule(NamedTuple):
    """All that the program knows about an exit rule."""

    statistic: Callable  # ExitInputs -> (statistic (n, T), memory: a tensor (n, T, ...) or None)
    advised: float  # a threshold to begin with
    unit: str  # what the threshold is measured in
    needs_logits: bool = False  # coda and head run after every loop
    needs_gate: bool = False  # the model needs an exit gate
    above: bool = False  # a token exits at or above the threshold instead of below it
    never: float | None = None  # at this threshold, or beyond it, no token exits, whatever the rounding

    @property
    def advice(self):
        """Says which threshold to try, for error messages."""
        return f'try {self.advised:g} ({self.unit})'

    def exits(self, value, threshold):
        """Returns which tokens exit, a bool tensor of the shape of value, their statistic."""
        if self.never is not None and (threshold >= self.never if self.above else threshold <= self.never):
            return torch.zeros_like(value, dtype=torch.bool)
        return value >= threshold if self.above else value < threshold


def kl(x):
    """Returns KL(p_{i-1} || p_i) of the predictions of consecutive loops, in nats, and log p_i as memory.

    The first loop's prediction is compared with the uniform distribution.
    """
    log_p = x.logits.log_softmax(dim=-1)  # (n, T, V)
    last = torch.full_like(log_p, -math.log(log_p.size(-1))) if x.memory is None else x.memory
    return (last.exp() * (last - log_p)).sum(dim=-1), log_p


def diff(x):
    """Returns |s - previous| / |s|, the relative change of the state. It has no memory."""
    change = x.s if x.previous is None else x.s - x.previous
    return upcast(change).norm(dim=-1) / upcast(x.s).norm(dim=-1), None


def gate(x):
    """Returns the probability of having exited, 1 - prod_{j<=i} (1 - g_j), and the product as memory."""
    survival = (1 - x.gate) * (1.0 if x.memory is None else x.memory)  # (n, T)
    return 1 - survival, survival


EXIT = {
    'kl': ExitRule(kl, 0.001, 'nats', needs_logits=True, never=0.0),
    'diff': ExitRule(diff, 0.1, 'relative change of the state', never=0.0),
    'gate': ExitRule(gate, 0.5, 'probability of having exited', needs_gate=True, above=True, never=1.0),
}


class EarlyExit:
    """A rule of EXIT with a threshold: a token leaves the loop by it, after at least min_loops loops."""

    def __init__(self, name, threshold, min_loops=1):
        check(name in EXIT, 'exit', name, f'one of {", ".join(EXIT)}')
        self.name, self.threshold, self.min_loops = name, threshold, min_loops
        self.rule = EXIT[name]

    def check_model(self, model, n_loop):
        """Raises UserError if the model lacks a gate, the rule a threshold, or if n_loop is too small."""
        others = ' or '.join(name for name, rule in EXIT.items() if not rule.needs_gate)
        has_gate = model.exit_gate is not None or not self.rule.needs_gate
        check(has_gate, 'exit', self.name, f'{others}: the model has no exit gate')
        self.check_threshold()
        check(self.min_loops <= n_loop, 'min_loops', self.min_loops, f'at most n_loop={n_loop}')

    def check_threshold(self):
        """Raises UserError without a threshold: each rule has a unit of its own."""
        expected = f'a number with exit={self.name}: {self.rule.advice}'
        check(self.threshold is not None, 'exit_threshold', None, expected)

    def __call__(self, model, i, previous, s, x, memory):
        """Returns which tokens exit after loop i, (n, T), and the statistic's memory for the next loop.

        i: the loop, from 0 on, or (n, 1), one for each row; previous, s: states before and after the loop,
        (n, T, C), previous may be None; x: the head's input (n, T, C), not read unless the rule needs logits;
        memory: what this returned one loop before.
        """
        logits = upcast(model.logits(x)) if self.rule.needs_logits else None
        probability = model.exit_probability(s) if self.rule.needs_gate else None
        inputs = ExitInputs(previous, s, logits, probability, memory)
        try:
            value, memory = self.rule.statistic(inputs)
        except (AttributeError, TypeError, ValueError) as error:  # it read None, or returned one value
            expected = 'needs_logits and needs_gate must say what it reads; it returns (statistic, memory)'
            raise RuntimeError(f'exit rule {self.name}: {error}; {expected}') from error
        for what, x, fits in (
            ('statistic', value, value.shape == s.shape[:2] and value.is_floating_point()),
            ('memory', memory, memory is None or memory.shape[:2] == s.shape[:2]),
        ):
            if not fits:
                got = f'{what} is {tuple(x.shape)}, {x.dtype}'
                raise RuntimeError(f'exit rule {self.name}: its {got}, expected floats of shape (n, T)')
        return self.rule.exits(value, self.threshold) & (i + 1 >= self.min_loops), memory


def make_early_exit(c):
    """Returns the EarlyExit of the keys exit, exit_threshold and min_loops of c, None for exit=''.

    Raises UserError for keys that do not go together.
    """
    if not c.exit:
        check(c.exit_threshold is None, 'exit_threshold', c.exit_threshold, 'None without an exit')
        check(c.min_loops == 1, 'min_loops', c.min_loops, '1 without an exit')
        return None
    early_exit = EarlyExit(c.exit, c.exit_threshold, c.min_loops)
    if not early_exit.rule.needs_gate:  # else the model is asked first
        early_exit.check_threshold()
    return early_exit
