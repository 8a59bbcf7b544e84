"""
Muon, kellerjordan.github.io/posts/muon: the step of a matrix is its momentum, orthogonalised.

torch's Muon orthogonalises in bfloat16. A CPU that has no units for it computes such products many times
slower than in float32, so there they are made in float32.
"""

import math

import torch

from nanoloop.machine import choose_dtype
from nanoloop.parallel import is_sharded, part_like

LONG = 3  # a matrix (m, n) is long from n = LONG m on


def factor_of(gram, coefficients):
    """Returns a I + b gram + c gram^2, (m, m). gram: (m, m)."""
    a, b, c = coefficients
    factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)  # (m, m)
    factor.diagonal().add_(a)
    return factor


def orthogonalise(x, coefficients, steps, eps):
    """Returns x (m, n) with all its singular values near 1, in the precision of x: float32 or float64.

    Newton-Schulz: x / |x| first, and then `steps` times a x + b (x x^T) x + c (x x^T)^2 x. The published
    coefficients (a, b, c) give singular values between 0.7 and 1.2 after 5 steps.

    A step is a product P x with P = a I + b (x x^T) + c (x x^T)^2, (m, m), after which x x^T is P (x x^T) P.
    So of a long x only the product of all P is multiplied by x: 0.5 to 0.75 of the time, and in float32 an
    error of up to 1e-3 in 5 steps. More steps would lose more, and go one by one.
    """
    a, b, c = coefficients
    wide = x if len(x) <= x.size(1) else x.T  # (m, n) with m <= n: x x^T is the smaller product
    wide = wide / wide.norm().clamp(min=eps)
    if wide.size(1) < LONG * len(wide) or steps > 5:
        for _ in range(steps):
            gram = wide @ wide.T  # (m, m)
            wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)  # (m, n)
    else:
        gram = wide @ wide.T  # (m, m)
        product = factor = factor_of(gram, coefficients)  # (m, m) each
        for _ in range(steps - 1):
            gram = factor @ gram @ factor  # (m, m)
            factor = factor_of(gram, coefficients)  # (m, m)
            product = factor @ product  # (m, m)
        wide = product @ wide  # (m, n)
    return wide if wide.shape == x.shape else wide.T


class Muon(torch.optim.Muon):
    """torch's Muon, which takes float32 where a device has no fast bfloat16. Its state is that of torch's."""

    @torch.no_grad()
    def step(self):
        """Makes a step, as torch's Muon with Nesterov's momentum and its original scale of the rate."""
        kind = self.param_groups[0]['params'][0].device.type
        if choose_dtype('auto', kind)[0] == torch.bfloat16:
            return super().step()
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is not None:
                    self.move(p, group)

    def move(self, p, group):
        """Makes the step of one matrix p (m, n) of a parameter group."""
        state, momentum = self.state[p], group['momentum']
        if 'momentum_buffer' not in state:
            state['momentum_buffer'] = torch.zeros_like(p)
        average = state['momentum_buffer'].lerp_(p.grad, 1 - momentum)  # (m, n)
        update = p.grad.lerp(average, momentum)
        whole = update.full_tensor() if is_sharded(update) else update
        whole = orthogonalise(whole, group['ns_coefficients'], group['ns_steps'], group['eps'])
        update = part_like(whole, p)
        p.mul_(1 - group['lr'] * group['weight_decay'])
        p.add_(update, alpha=-group['lr'] * math.sqrt(max(1.0, len(p) / p.size(1))))
