"""
One training step: forward and backward passes of its micro-batches, clipping, and the optimizers' update.
"""

import collections
import math
from typing import NamedTuple

import torch
from torch import nn

from nanoloop.checks import check
from nanoloop.parallel import sum_over_ranks, sync_gradients, total_norm, whole_weights


class StepResult(NamedTuple):
    """The result of one training step on this rank."""

    loss: float  # the mean over ranks of this and of extra is that over the step's targets
    grad_norm: float  # of the gradient of all ranks, before clipping
    extra: dict  # further values to log, of the objective and the batches: {name: float}


class BadSteps:
    """Counts the steps in a row whose gradient is not finite, which are skipped."""

    def __init__(self, c, scaler, say):
        self.c, self.scaler, self.say, self.n = c, scaler, say, 0

    def count(self, step, result, saved):
        """Counts a StepResult. Raises UserError at max_bad_steps. saved: step of the last checkpoint."""
        # float16: overflows are normal while the loss scale is searched, so they are not counted
        if math.isfinite(result.grad_norm) or (self.scaler.is_enabled() and self.scaler.get_scale() >= 1):
            self.n = 0
            return
        self.n += 1
        loss = f'(loss {result.loss:.4g})'
        self.say(f'iter {step}: the gradient is not finite {loss}, the step is skipped')
        last = 'none' if saved is None else f'step {saved} in {self.c.out_dir}'
        expected = f'a finite gradient at iter {step}, {self.n} steps were skipped in a row; '
        expected += f'try a lower one; the last good checkpoint: {last}'
        check(self.n < self.c.max_bad_steps, 'learning_rate', self.c.learning_rate, expected)


def train_step(training_loss, optimizers, scaler, batches, n_loop, c, m, stopped=lambda: False, look=None):
    """Makes one optimizer step of this rank's next micro-batches. Returns a StepResult.

    Every target but -1 has the same weight in all micro-batches. A step whose gradient is not finite changes
    no weight. Returns None if stopped() became true between micro-batches. look: see diagnose.Look.
    """
    micros, sums, targets_counted = c.gradient_accumulation_steps // m.world, {}, 0
    values = collections.Counter()  # of the batches
    with whole_weights(training_loss):
        for micro in range(micros):
            if micro and stopped():
                return None
            batch = next(batches)
            targets_counted += int((batch.targets != -1).sum())
            values.update({name: x / micros for name, x in batch.values.items()})
            idx, targets = m.to_device(batch.idx), m.to_device(batch.targets)  # (B, T) each
            weights = None if batch.weights is None else m.to_device(batch.weights)
            if look and micro == 0:
                torch.manual_seed(batch.seed)
                look.before_first(idx, targets, weights)
            sync_gradients(training_loss, micro == micros - 1)  # once per step
            torch.manual_seed(batch.seed)
            with m.autocast():
                loss, extra = training_loss(idx, targets, n_loop, weights)
            scaler.scale(loss / micros).backward()
            for name, x in dict(extra, loss=loss.detach()).items():
                sums[name] = sums.get(name, 0.0) + x / micros
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    params = [p for optimizer in optimizers for group in optimizer.param_groups for p in group['params']]
    # losses were divided by the number of all targets; this corrects it to the targets other than -1
    rescale = batch.targets.numel() * micros * m.world / max(1, sum_over_ranks(m, targets_counted))
    if rescale != 1:
        torch._foreach_mul_([p.grad for p in params if p.grad is not None], rescale)
    grad_norm = total_norm([p.grad for p in params if p.grad is not None])
    nn.utils.clip_grads_with_norm_(params, c.grad_clip or math.inf, grad_norm)
    # here the host waits for the device
    *means, grad_norm = torch.stack([*sums.values(), grad_norm]).tolist()
    if look:
        look.after_clipping()
    for optimizer in optimizers:
        if math.isfinite(grad_norm):
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()  # a disabled scaler does nothing
    extra = {name: mean * rescale for name, mean in zip(sums, means, strict=True)}
    return StepResult(extra.pop('loss'), grad_norm, extra | values)
