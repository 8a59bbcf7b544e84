"""
Parameters and FLOPs of a model, counted by its structure: every layer as often as it is executed, backward
passes only where they happen. Matrix products and attention equal torch's FlopCounterMode, which counts a
window as full attention, since a dense mask computes it so; here a window counts as the keys it sees.
"""

import torch
from torch import nn

from model import Block


def sections(model):
    """{name: modules} of all parameters; tied weights belong to the embedding."""
    t = model.transformer
    parts = dict(
        embedding=[t.wte, t.wpe], prelude=t.prelude, inject=[model.inject], recur=t.recur, coda=t.coda
    )
    parts |= dict(
        norms=[t.norm_emb, model.norm_recur, t.ln_f], gate=[model.exit_gate], lm_head=[model.lm_head]
    )
    return {
        name: nn.ModuleList(module for module in modules if module is not None)
        for name, modules in parts.items()
    }


def parameters(model):
    """{section: parameters}, with total (shared ones once) and effective (the loop's as often as it runs)."""
    sizes, seen = {}, set()
    for name, part in sections(model).items():
        new = set(part.parameters()) - seen
        sizes[name], seen = sum(p.numel() for p in new), seen | new
    assert seen == set(model.parameters()), 'sections() misses a parameter'
    total = sum(sizes.values())
    again = (model.config.n_loop - 1) * (sizes['recur'] + sizes['inject'])
    return dict(sizes, total=total, effective=total + again)


def queries_from_state(model, block):
    """Says whether a block takes its attention's queries from the loop's state, by trying its hook."""
    if block.state_hook is None:
        return False
    x, state = (model.lm_head.weight.new_zeros(1, 1, model.config.n_embd) for _ in 'xs')
    with torch.enable_grad():
        _, query_source = block.state_hook(x.requires_grad_(), state)
    return query_source is not None and not query_source.requires_grad


def flops(model, n_loop=None, rows=1):
    """{forward, training: {matmul, attention, norm}}: FLOPs per token at T = block_size.

    A weight of a matrix costs 2 per use, attention 4 C w per layer with w keys in sight; backward costs twice
    that (once where the input carries no gradient), and only in the last bptt_k iterations. The weights of
    the blocks' norms count like a matrix's, as looped nanochat publishes it. rows: iterations read out.
    """
    c, parts = model.config, sections(model)
    n_loop = c.n_loop if n_loop is None else n_loop
    carried = min(n_loop, c.bptt_k or n_loop)

    def cost(*names):
        modules = [module for name in names for module in parts[name].modules()]
        blocks = [module for module in modules if isinstance(module, Block)]
        seen = (model.window if block.windowed else c.block_size for block in blocks)
        matrices = (module.weight.numel() for module in modules if isinstance(module, nn.Linear))
        norms = [m for block in blocks for name, m in block.named_children() if name not in ('attn', 'mlp')]
        vectors = (p.numel() for norm in norms for name, p in norm.named_parameters() if name != 'bias')
        return dict(matmul=2 * sum(matrices), attention=4 * c.n_embd * sum(seen), norm=2 * sum(vectors))

    once, loop, read = cost('prelude'), cost('inject', 'recur'), cost('coda', 'lm_head')
    forward = {kind: once[kind] + n_loop * loop[kind] + rows * read[kind] for kind in once}
    backward = {kind: 2 * (once[kind] + carried * loop[kind] + rows * read[kind]) for kind in once}
    if carried < n_loop or c.state_init == 'random':  # the first s to record a graph carries no gradient
        takers = sum(queries_from_state(model, block) for block in model.transformer.recur)
        backward['matmul'] -= 2 * takers * c.n_embd**2
    return dict(forward=forward, training={kind: forward[kind] + backward[kind] for kind in forward})
