"""
How a step moves the weights: the optimizers, their groups, and the learning rate over a run.

Muon is torch's, kellerjordan.github.io/posts/muon: one matrix per nn.Linear, so that queries, keys and values
of c_attn are made orthogonal together, unlike in looped nanochat.
"""

import math

import torch

from nanoloop.checks import check

SCHEDULE = {  # share of the way from min_lr to learning_rate, `left` steps before the end of `warm` + `rest`
    'cosine': lambda left, warm, rest, c: 0.5 * (1 - math.cos(math.pi * left / rest)),
    'linear': lambda left, warm, rest, c: min(1.0, left / max(1e-9, c.warmdown_frac * (warm + rest))),
}
OPTIMIZER = ('adamw', 'muon')
GROUPS = {  # the key of the learning rate, whether Muon may take it, whether it decays: beside Muon, else
    'matrices': ('matrix_lr', True, True, True),
    'injection': ('matrix_lr', True, False, False),  # it starts as the identity, which decay would forget
    'embedding': ('embedding_lr', False, False, True),
    'head': ('head_lr', False, False, True),
    'gate': ('learning_rate', False, False, True),
    'vectors': ('learning_rate', False, False, False),
}
PARTS = {
    'inject': 'injection',
    'wte': 'embedding',
    'wpe': 'embedding',
    'lm_head': 'head',
    'exit_gate': 'gate',
}


def lr_at(step, c, end=None):
    """The learning rate of a step; the first step is 0. end: the run's last step, None = max_iters."""
    if step < c.warmup_iters:
        return c.learning_rate * (step + 1) / (c.warmup_iters + 1)
    if not c.decay_lr:
        return c.learning_rate
    end = c.lr_decay_iters if c.lr_decay_iters is not None else c.max_iters if end is None else end
    rest = max(1, end - c.warmup_iters)
    share = SCHEDULE[c.lr_schedule](min(rest, max(0, end - step)), c.warmup_iters, rest, c)
    return c.min_lr + share * (c.learning_rate - c.min_lr)


def momentum_at(step):
    """Muon's momentum, rising over 300 steps as in FLT and looped nanochat."""
    return 0.85 + 0.1 * min(1.0, step / 300)


def group_of(name, p):
    """The group of a parameter, by its name."""
    return PARTS.get(name.split('.')[-2], 'matrices') if p.dim() >= 2 else 'vectors'


def make_optimizers(model, c):
    """([AdamW] or [Muon, AdamW], a line of text per group) for the parameters that ask for a gradient.

    A group's lr_ratio is its learning rate by c.learning_rate.
    """
    members, sides, lines = {name: [] for name in GROUPS}, {True: [], False: []}, []
    for name, p in model.named_parameters():
        if p.requires_grad:
            members[group_of(name, p)].append(p)
    muon = c.optimizer == 'muon'
    own = c.head_lr is None or not model.config.tie_weights
    check(own, 'head_lr', c.head_lr, 'None with tie_weights: the head is the embedding')
    for name, params in members.items():
        key, takes, *decays = GROUPS[name]
        lr = getattr(c, key) if getattr(c, key) is not None else c.learning_rate
        if c.lr_width is not None and not (muon and takes):
            lr *= math.sqrt(c.lr_width / model.config.n_embd)
        decay = c.weight_decay if decays[not muon] else 0.0
        group = dict(params=params, weight_decay=decay, lr=lr, lr_ratio=lr / (c.learning_rate or 1.0))
        if params:
            sides[muon and takes].append(group)
            count = f'{len(params)}, with {sum(p.numel() for p in params):,} parameters'
            kind = 'decayed' if decay else 'non-decayed'
            side = f'{name}, {"Muon" if muon and takes else "AdamW"}, learning rate {lr:g}'
            lines.append(f'num {kind} parameter tensors: {count} ({side})')
    adamw = dict(lr=c.learning_rate, betas=(c.beta1, c.beta2), eps=c.adam_eps, weight_decay=0.0, fused=True)
    made = [torch.optim.Muon(sides[True], momentum=momentum_at(0), weight_decay=0.0)] if sides[True] else []
    return made + ([torch.optim.AdamW(sides[False], **adamw)] if sides[False] else []), lines


def set_rates(optimizers, step, lr):
    """lr: of the step, for a group with the ratio 1."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = lr * group['lr_ratio']
            if isinstance(optimizer, torch.optim.Muon):
                group['momentum'] = momentum_at(step)
