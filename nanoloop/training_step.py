"""
One training step: forward and backward passes of its micro-batches, clipping, and the optimizers' update.
"""

import collections
import functools
import math

import torch
from torch import nn

from nanoloop.checks import check
from nanoloop.optimizer import step_if_finite
from nanoloop.parallel import sum_over_ranks, sync_gradients, total_norm, whole_weights


class StepResult:
    """The result of one training step on this rank.

    Where a number is first read, the host waits for the device. changed: whether the step has changed
    weights, a tensor (), for which nobody waits. means: {name: tensor ()} of what is logged, `loss` among
    them. grad_norm: tensor (). rescale: factor of the means. values: further values to log, {name: float}.
    """

    def __init__(self, changed, means, grad_norm, rescale, values):
        self.changed, self.names, self.rescale, self.values = changed, list(means), rescale, values
        self.on_device = torch.stack([*means.values(), grad_norm])  # (number of means + 1,)

    @functools.cached_property
    def numbers(self):
        """(loss, gradient norm, {name: further value})."""
        *means, grad_norm = self.on_device.tolist()  # here the host waits for the device
        extra = {name: mean * self.rescale for name, mean in zip(self.names, means, strict=True)}
        return extra.pop('loss'), grad_norm, extra | self.values

    @property
    def loss(self):
        """The loss. The mean over ranks of this and of extra is that over the step's targets."""
        return self.numbers[0]

    @property
    def grad_norm(self):
        """The L2 norm of the gradient of all ranks, before clipping."""
        return self.numbers[1]

    @property
    def extra(self):
        """Further values to log, of the objective and the batches: {name: float}."""
        return self.numbers[2]


class BadSteps:
    """Counts the steps in a row whose gradient is not finite, which are skipped."""

    def __init__(self, c, scaler, say):
        self.c, self.scaler, self.say, self.n, self.waiting = c, scaler, say, 0, []

    def add(self, step, result):
        """Takes a StepResult, to be counted later: no number of it is read yet."""
        self.waiting.append((step, result))

    def count(self, saved):
        """Counts the steps since the last call. Raises UserError at max_bad_steps.

        saved: step of the last checkpoint.
        """
        waiting, self.waiting = self.waiting, []
        for step, result in waiting:
            self.count_step(step, result, saved)

    def count_step(self, step, result, saved):
        """See count."""
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
    no weight. The host does not wait for the device, unless an optimizer needs it (see step_if_finite).
    Returns None if stopped() became true between micro-batches. look: see diagnose.Look.
    """
    micros, sums, targets_counted = c.gradient_accumulation_steps // m.world, {}, 0
    values = collections.Counter()  # of the batches
    with whole_weights(training_loss):
        for micro in range(micros):
            if micro and stopped():
                return None
            batch = next(batches).to_device(m)
            targets_counted += batch.n_targets
            values.update({name: x / micros for name, x in batch.values.items()})
            if look and micro == 0:
                torch.manual_seed(batch.seed)
                look.before_first(batch.idx, batch.targets, batch.weights)
            sync_gradients(training_loss, micro == micros - 1)  # once per step
            torch.manual_seed(batch.seed)
            with m.autocast():
                loss, extra = training_loss(batch.idx, batch.targets, n_loop, batch.weights)
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
    if look:
        look.after_clipping()
    changed = step_if_finite(optimizers, grad_norm)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    scaler.update()  # a disabled scaler does nothing
    return StepResult(changed, sums, grad_norm, rescale, values)
