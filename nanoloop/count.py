"""
Counts a model's parameters and FLOPs by its structure: every layer as often as it is executed, backward
passes only where they happen.

Matrix products and attention equal torch's FlopCounterMode, which counts a window as full attention: a dense
mask computes it so, flex attention does not (windows.py). Here a window counts as window_size keys, one fewer
than it sees, however it is computed.
"""

import torch
from torch import nn

from model import Block


def sections(model):
    """Returns {section: nn.ModuleList} of all parameters; a tied head belongs to the embedding."""
    t = model.transformer
    # fmt: off
    parts = dict(
        embedding=[t.wte, t.wpe, t.ngrams],
        prelude=[*t.prelude, model.start],
        inject=[model.inject, model.update],  # what a loop has beside its blocks
        recur=t.recur,
        coda=t.coda,
        norms=[t.norm_emb, model.norm_recur, t.ln_f],
        gate=[model.exit_gate],
        lm_head=[model.lm_head],
    )
    # fmt: on
    return {
        name: nn.ModuleList(module for module in modules if module is not None)
        for name, modules in parts.items()
    }


def parameters(model):
    """Returns {section: number of parameters}, `total`, and `effective`: the loop's count n_loop times.

    Shared parameters count once. Raises RuntimeError with the name of a parameter that is in no section.
    """
    sizes, counted = {}, set()
    for name, section in sections(model).items():
        new = set(section.parameters()) - counted
        sizes[name] = sum(p.numel() for p in new)
        counted |= new
    for name, p in model.named_parameters():
        if p not in counted:
            raise RuntimeError(f'no section of nanoloop/count.py holds {name}')
    total = sum(sizes.values())
    repeated = (model.config.n_loop - 1) * (sizes['recur'] + sizes['inject'])
    return dict(sizes, total=total, effective=total + repeated)


def flops(model, n_loop=None, loops_read=1):
    """Returns {forward, training: {matmul, attention, norm: FLOPs per token}} at T = block_size.

    A weight of a matrix costs 2 FLOPs per use, and attention 4 C w per layer with w keys in sight
    (block_size, as without a causal mask, or window_size). A backward
    pass costs twice that, once where the input carries no gradient, and happens in the last bptt_k loops
    only. The weights of the blocks' norms count like those of a matrix, as looped nanochat publishes it.

    n_loop: None = config.n_loop. loops_read: number of loops after which coda and head run.
    """
    c, parts = model.config, sections(model)
    n_loop = c.n_loop if n_loop is None else n_loop
    with_graph = min(n_loop, c.bptt_k or n_loop)  # loops with a backward pass
    once, loop, read = (
        section_flops(model, *(parts[name] for name in names))
        for names in (['prelude'], ['inject', 'recur'], ['coda', 'lm_head'])
    )
    forward = {kind: once[kind] + n_loop * loop[kind] + loops_read * read[kind] for kind in once}
    backward = {kind: 2 * (once[kind] + with_graph * loop[kind] + loops_read * read[kind]) for kind in once}
    if with_graph < n_loop or not state_has_gradient(model):
        # the state that enters the first loop with a graph carries no gradient: queries taken from it cost
        # less
        blocks = sum(queries_from_state(model, block) for block in model.transformer.recur)
        backward['matmul'] -= 2 * blocks * c.n_embd**2
    return dict(forward=forward, training={kind: forward[kind] + backward[kind] for kind in forward})


def section_flops(model, *modules):
    """Returns {matmul, attention, norm: FLOPs per token} of one forward pass through modules."""
    c, parts = model.config, [part for module in modules for part in module.modules()]
    blocks = [part for part in parts if isinstance(part, Block)]
    keys_in_sight = (model.window if block.windowed else c.block_size for block in blocks)
    matrices = (part.weight.numel() for part in parts if isinstance(part, nn.Linear))
    norms = [part for block in blocks for name, part in block.named_children() if name not in ('attn', 'mlp')]
    # biases are added, not multiplied: they count nowhere
    norm_weights = (p.numel() for norm in norms for name, p in norm.named_parameters() if name != 'bias')
    return dict(
        matmul=2 * sum(matrices), attention=4 * c.n_embd * sum(keys_in_sight), norm=2 * sum(norm_weights)
    )


def zero_state(model, requires_grad):
    """Returns zeros (1, 1, C) with the dtype and device of the model's weights."""
    weight = model.lm_head.weight  # (V, C)
    options = dict(dtype=weight.dtype, device=weight.device, requires_grad=requires_grad)
    return torch.zeros(1, 1, weight.size(1), **options)


@torch.enable_grad()
def state_has_gradient(model):
    """Returns whether s_0 depends on e, by computing one. True if there is no s_0."""
    e, was_training = zero_state(model, True), model.start.training
    s = model.start.eval()(
        e, torch.zeros(1, dtype=torch.long, device=e.device)
    )  # in training it may draw numbers
    model.start.train(was_training)
    return s is None or s.requires_grad


@torch.enable_grad()
def queries_from_state(model, block):
    """Says whether a block takes its attention's queries from the loop's state, by calling its hook."""
    if block.state_hook is None:
        return False
    _, query_source = block.state_hook(zero_state(model, True), zero_state(model, False))
    return query_source is not None and not query_source.requires_grad
