"""
A look inside a training step: how the loop's state moves, and where the gradient comes from.

`train.py --diagnose=100` looks at every 100th step and writes, into log.jsonl and wandb,

    hidden_norm/loop_KK            mean of tokens: L2 norm of what loop K's last block leaves, before the norm
    change/loop_KK                 |s_K - s_{K-1}| / |s_K|, and
    cosine/loop_KK                 the cosine between the two
    kl/loop_KK                     KL(last loop's prediction || loop K's), in nats
    loss/loop_KK                   cross-entropy read out after loop K
    grad_norm/block_BB/loop_KK     L2 norm of the loss's gradient at the output of block B in loop K, and of
    ... /attn/loop_KK, /mlp/...    its attention and its MLP
    grad_norm/block_BB/attn, /mlp  L2 norm of the step's gradient, after clipping, of the weights of a block,
    grad_norm/embed, /lm_head      counted through prelude, loop and coda; of the embedding, of the head

Source of the names: FLT's base_check, github.com/FuRuF-11/FullyLoopedTransformer.
"""

import contextlib
import functools

import torch

import model as model_file


def norms_of_weights(model):
    """{name: L2 norm} of the gradients that the weights hold."""
    parts = {'embed': model.transformer.wte, 'lm_head': model.lm_head}
    for i, block in enumerate(model.blocks()):
        parts |= {f'block_{i:02d}/attn': block.attn, f'block_{i:02d}/mlp': block.mlp}
    grads = {name: [p.grad for p in part.parameters() if p.grad is not None] for name, part in parts.items()}
    norms = {name: torch.nn.utils.get_total_norm(found).item() for name, found in grads.items() if found}
    return {f'grad_norm/{name}': norm for name, norm in norms.items()}


class Watch:
    """Hooks on the recurrent blocks, which keep norms and states of one forward pass, loop by loop."""

    def __init__(self, model, n_loop):
        self.model, self.n_loop, self.norms, self.states, self.hooks = model, n_loop, {}, [], []

    def __enter__(self):
        first, blocks = len(self.model.transformer.prelude), self.model.transformer.recur
        for i, block in enumerate(blocks):
            for module, name in ((block, ''), (block.attn, '/attn'), (block.mlp, '/mlp')):
                note = functools.partial(self.note, f'grad_norm/block_{first + i:02d}{name}', [])
                self.hooks.append(module.register_forward_hook(note))
        self.hooks.append(blocks[-1].register_forward_hook(functools.partial(self.hidden, [])))
        self.hooks.append(self.model.norm_recur.register_forward_hook(self.keep))
        return self

    def __exit__(self, *failure):
        for hook in self.hooks:
            hook.remove()

    def note(self, name, calls, module, args, output):
        """A tensor hook on the output: the gradient's norm, when it comes by. Truncated loops have none."""
        calls.append(1)
        if output.requires_grad:
            key = f'{name}/loop_{len(calls) - 1:02d}'
            output.register_hook(lambda grad: self.norms.update({key: model_file.upcast(grad).norm()}))

    def hidden(self, calls, module, args, output):
        calls.append(1)
        if len(calls) <= self.n_loop:  # beyond, a loop is computed once more for its backward pass
            norm = model_file.upcast(output.detach()).norm(dim=-1).mean()
            self.norms[f'hidden_norm/loop_{len(calls) - 1:02d}'] = norm

    def keep(self, module, args, output):
        self.states.append(model_file.upcast(output.detach()))


@torch.no_grad()
def movement(model, states, targets):
    """{name: value} of the states (R of (B, T, C)) after every loop: how they move and what they predict."""
    found, context = {}, model.attn_inputs(torch.arange(targets.size(1), device=targets.device))
    for k, (before, s) in enumerate(zip(states, states[1:], strict=False), start=1):
        found[f'change/loop_{k:02d}'] = ((s - before).norm(dim=-1) / s.norm(dim=-1)).mean()
        found[f'cosine/loop_{k:02d}'] = torch.cosine_similarity(s, before, dim=-1).mean()
    read = [model.run_coda(s, context).flatten(0, 1) for s in states]
    y, n = targets.flatten(), max(1, model_file.HEAD_CHUNK // (4 * model.config.vocab_size))
    counted = (y != -1).sum().clamp(min=1)
    for i in range(0, len(y), n):
        last = model_file.upcast(model.logits(read[-1][i : i + n])).log_softmax(dim=-1)
        for k, x in enumerate(read):
            p = model_file.upcast(model.logits(x[i : i + n])).log_softmax(dim=-1)
            nll = torch.nn.functional.nll_loss(p, y[i : i + n], ignore_index=-1, reduction='sum')
            kl = (last.exp() * (last - p)).sum(dim=-1)[y[i : i + n] != -1].sum()
            for key, value in ((f'loss/loop_{k:02d}', nll), (f'kl/loop_{k:02d}', kl)):
                found[key] = found.get(key, 0.0) + value / counted
    return found


def diagnose(objective, idx, targets, n_loop, autocast=contextlib.nullcontext, scale=1.0):
    """{name: number} of a micro-batch, by a forward and a backward pass of its own, which change no gradient.

    The gradients are of the mean over the targets that count. objective: objective.py's; idx, targets:
    (B, T); scale: of the loss, for float16. The caller seeds the default generator.
    """
    model, learners = objective.model, [p for p in objective.parameters() if p.requires_grad]
    with torch.compiler.set_stance('force_eager'), Watch(model, n_loop) as watch:
        with autocast():
            loss, _ = objective(idx, targets, n_loop)
        whole = scale * targets.numel() / max(1, int((targets != -1).sum()))
        torch.autograd.grad(loss * whole, learners, allow_unused=True)
    found = {name: x / scale if name.startswith('grad') else x for name, x in watch.norms.items()}
    mode = model.training
    with torch.compiler.set_stance('force_eager'), autocast():
        found |= movement(model.eval(), watch.states, targets)
    model.train(mode)
    return {name: float(value) for name, value in sorted(found.items())}
