"""
The loss where the weight of every token and loop is known before the forward pass.

The logits of all tokens do not fit into memory, so they are computed chunk by chunk. A chunk whose gradient
is made in the backward pass has to be computed there a second time. With a known weight its gradient is made
at once, while its logits exist: that saves a product with the head's matrix, a quarter of the head's FLOPs.
"""

import torch

from model import maybe_checkpoint


class WeightedNll(torch.autograd.Function):
    """Computes sum_{r, i} factors[r, i] nll(x_r[i], targets[i]), and its gradient at once, in chunks."""

    @staticmethod
    def forward(ctx, nll, chunk, targets, factors, weight, *xs):
        """Returns the sum, and every token's cross-entropy, (R, N).

        nll: (x (n, C), targets (n,)) -> (n,), of which `weight` is a parameter. chunk: most tokens at once.
        targets: (N,). factors: (R, N). xs: R head inputs, (N, C) each.
        """
        # the largest factor becomes 1: gradients in float16 could vanish otherwise
        unit = factors.abs().amax().clamp(min=torch.finfo(factors.dtype).tiny)
        grads, ce = [torch.empty_like(x) for x in xs], torch.empty_like(factors)
        grad_weight = torch.zeros_like(weight) if weight.requires_grad else None
        for r, x in enumerate(xs):
            for start in range(0, len(x), chunk):
                part = slice(start, start + chunk)
                ce[r, part], grads[r][part] = read_chunk(
                    nll, x[part], targets[part], factors[r, part] / unit, weight, grad_weight
                )
        ctx.save_for_backward(unit, grad_weight, *grads)
        ctx.mark_non_differentiable(ce)
        return (factors * ce).sum(), ce

    @staticmethod
    def backward(ctx, grad, _):
        unit, grad_weight, *grads = ctx.saved_tensors
        scale = grad * unit
        # in place: a copy of the head's gradient would be as large as the head
        return None, None, None, None, *(x if x is None else x.mul_(scale) for x in (grad_weight, *grads))


def read_chunk(nll, x, targets, factors, weight, grad_weight):
    """Returns the cross-entropies (n,) of a chunk, and the gradient (n, C) of their weighted sum at x (n, C).

    factors: (n,). The gradient at `weight` is added to grad_weight, unless that is None.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()  # (n, C)
        ce = nll(x.view_as(x), targets)  # (n,); a view: torch's FlopCounterMode cannot watch a leaf here
    wanted = (x,) if grad_weight is None else (x, weight)
    grad, *of_weight = torch.autograd.grad(ce, wanted, factors.to(ce.dtype))
    if of_weight:
        grad_weight.add_(of_weight[0])
    return ce.detach(), grad


def weighted_loss(model, idx, targets, n_loop, loops, factors):
    """Returns sum(factors * ce), and ce, without a graph, as GPT.loss_table returns it.

    idx, targets: (B, T), -1 = ignored. n_loop, loops: see GPT.loss_table. factors: (R, B, T), no graph.
    """
    states, attn_inputs = model.loop_states(idx, n_loop, loops)
    xs = [maybe_checkpoint(len(loops) > 1, model.run_coda, s, attn_inputs).flatten(0, 1) for s in states]
    rows = targets.flatten(), factors.flatten(1)  # (B T,), (R, B T)
    loss, ce = WeightedNll.apply(model.nll, model.head_chunk, *rows, model.lm_head.weight, *xs)
    return loss, ce.view_as(factors)
