"""
Diagnostics of a training step: how the loop's state moves, and where the gradient comes from.

`train.py --diagnose=100` computes them at every 100th step and writes them to log.jsonl and wandb:

    hidden_norm/loop_KK            L2 norm of the last block's output in loop K, before norm and update,
                                   mean over tokens
    change/loop_KK                 |s_K - s_{K-1}| / |s_K|, s_K the state after loop K, from loop_01 on, and
    cosine/loop_KK                 the cosine between the two states
    kl/loop_KK                     KL(last loop's prediction || loop K's), in nats
    loss/loop_KK                   cross-entropy of the prediction after loop K
    grad_norm/block_BB/loop_KK     L2 norm of the loss's gradient at the output of block B in loop K, and at
    ... /attn/loop_KK, /mlp/...    the outputs of its attention and its MLP
    grad_norm/block_BB/attn, /mlp  L2 norm of the step's gradient, after clipping, of a block's weights
    grad_norm/embed, /lm_head      the same of the token embedding's and the head's weights
    grad_norm/ngrams               the same of the embeddings of n-grams, if there are any

Blocks are counted through prelude, loop and coda. Source of the names: FLT's base_check,
github.com/FuRuF-11/FullyLoopedTransformer.
"""

import contextlib
import functools

import torch
from torch.nn import functional as F

from model import upcast
from nanoloop.parallel import total_norm


class Look:
    """The diagnostics of one training step, which calls before_first and after_clipping.

    training_loss: a TrainingLoss without DDP. scale: what the loss is multiplied by, for float16. values: the
    results, {name: float}.
    """

    def __init__(self, training_loss, n_loop, autocast, scale):
        self.training_loss, self.n_loop, self.autocast, self.scale = training_loss, n_loop, autocast, scale
        self.values = {}

    def before_first(self, idx, targets, weights=None):
        """Computes the diagnostics that need a micro-batch. idx, targets: (B, T)."""
        self.values = diagnose(
            self.training_loss, idx, targets, self.n_loop, self.autocast, self.scale, weights
        )

    def after_clipping(self):
        """Computes the norms of the step's gradient."""
        self.values |= weight_grad_norms(self.training_loss.model)

    def line(self, step):
        """Returns a line with the main results."""
        last = f'/loop_{self.n_loop - 1:02d}'
        names = [f'hidden_norm{last}', f'change{last}', f'cosine{last}', 'kl/loop_00']
        values = ', '.join(f'{name} {self.values[name]:.4g}' for name in names if name in self.values)
        return f'look {step}: {values}'


def weight_grad_norms(model):
    """Returns {name: L2 norm of the gradient of a part's weights}."""
    parts = {'embed': model.transformer.wte, 'lm_head': model.lm_head}
    if model.transformer.ngrams is not None:
        parts['ngrams'] = model.transformer.ngrams
    for i, block in enumerate(model.blocks()):
        parts |= {f'block_{i:02d}/attn': block.attn, f'block_{i:02d}/mlp': block.mlp}
    norms = {}
    for name, part in parts.items():
        grads = [p.grad for p in part.parameters() if p.grad is not None]
        if grads:
            norms[f'grad_norm/{name}'] = total_norm(grads).item()
    return norms


class Watch:
    """Hooks on the recurrent blocks. They record norms and states of one forward pass, loop by loop."""

    def __init__(self, model, n_loop):
        self.model, self.n_loop = model, n_loop
        self.norms, self.states, self.hooks = {}, [], []

    def __enter__(self):
        first, blocks = len(self.model.transformer.prelude), self.model.transformer.recur
        for i, block in enumerate(blocks):
            for module, name in ((block, ''), (block.attn, '/attn'), (block.mlp, '/mlp')):
                hook = functools.partial(self.watch_gradient, f'grad_norm/block_{first + i:02d}{name}', [])
                self.hooks.append(module.register_forward_hook(hook))
        self.hooks.append(blocks[-1].register_forward_hook(functools.partial(self.record_norm, [])))
        self.hooks.append(self.model.update.register_forward_hook(self.record_state))
        return self

    def __exit__(self, *failure):
        for hook in self.hooks:
            hook.remove()

    def watch_gradient(self, name, calls, module, args, output):
        """Records the norm of the gradient at an output, once it is computed. Truncated loops have none."""
        calls.append(1)
        if output.requires_grad:
            key = f'{name}/loop_{len(calls) - 1:02d}'
            output.register_hook(lambda grad: self.norms.update({key: upcast(grad).norm()}))

    def record_norm(self, calls, module, args, output):
        calls.append(1)
        if len(calls) <= self.n_loop:  # later calls recompute a loop for the backward pass
            norm = upcast(output.detach()).norm(dim=-1).mean()
            self.norms[f'hidden_norm/loop_{len(calls) - 1:02d}'] = norm

    def record_state(self, module, args, output):
        self.states.append(upcast(output.detach()))  # (B, T, C)


@torch.no_grad()
def compare_states(model, states, targets):
    """Returns {name: value}: how the states after every loop, (B, T, C) each, move and what they predict."""
    values, attn_inputs = {}, model.attn_inputs(torch.arange(targets.size(1), device=targets.device))
    for k, (before, s) in enumerate(zip(states, states[1:], strict=False), start=1):
        values[f'change/loop_{k:02d}'] = ((s - before).norm(dim=-1) / s.norm(dim=-1)).mean()
        values[f'cosine/loop_{k:02d}'] = torch.cosine_similarity(s, before, dim=-1).mean()
    head_inputs = [model.run_coda(s, attn_inputs).flatten(0, 1) for s in states]  # (B T, C) each
    y, n = targets.flatten(), max(1, model.head_chunk // 4)
    counted = (y != -1).sum().clamp(min=1)
    for i in range(0, len(y), n):  # n tokens at once: every loop's logits of them exist together
        last = upcast(model.logits(head_inputs[-1][i : i + n])).log_softmax(dim=-1)  # (n, V)
        for k, x in enumerate(head_inputs):
            p = upcast(model.logits(x[i : i + n])).log_softmax(dim=-1)
            nll = F.nll_loss(p, y[i : i + n], ignore_index=-1, reduction='sum')
            kl = (last.exp() * (last - p)).sum(dim=-1)[y[i : i + n] != -1].sum()
            for key, value in ((f'loss/loop_{k:02d}', nll), (f'kl/loop_{k:02d}', kl)):
                values[key] = values.get(key, 0.0) + value / counted
    return values


def diagnose(training_loss, idx, targets, n_loop, autocast=contextlib.nullcontext, scale=1.0, weights=None):
    """Returns {name: number} of a micro-batch idx, targets (B, T).

    Runs its own forward and backward pass, without changing p.grad. Gradients are those of the mean loss over
    targets other than -1. training_loss: a TrainingLoss. scale: factor of the loss, for float16. The caller
    seeds torch's default generator.
    """
    model = training_loss.model
    with torch.compiler.set_stance('force_eager'), Watch(model, n_loop) as watch:
        with autocast():
            loss, _ = training_loss(idx, targets, n_loop, weights)
        params = [p for p in training_loss.parameters() if p.requires_grad]  # the whole ones, after use
        rescale = scale * targets.numel() / max(1, int((targets != -1).sum()))
        torch.autograd.grad(loss * rescale, params, allow_unused=True)
    values = {name: x / scale if name.startswith('grad') else x for name, x in watch.norms.items()}
    training = model.training
    with torch.compiler.set_stance('force_eager'), autocast():
        values |= compare_states(model.eval(), watch.states, targets)
    model.train(training)
    return {name: float(value) for name, value in sorted(values.items())}
