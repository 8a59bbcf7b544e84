"""
Optimizers, their parameter groups, and the learning rate schedule.

An optimizer is an entry of OPTIMIZER. It takes the groups that it names, AdamW the others. For Muon, see
muon.py, there is one matrix per nn.Linear: queries, keys and values of c_attn are orthogonalised together,
unlike in looped nanochat.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from nanoloop.checks import check
from nanoloop.muon import Muon
from nanoloop.parallel import shard_state

# -----------------------------------------------------------------------------
# the learning rate over a run


def cosine(left, after_warmup, run, c):
    """See SCHEDULE."""
    return 0.5 * (1 - math.cos(math.pi * left / after_warmup))


def linear(left, after_warmup, run, c):
    """See SCHEDULE."""
    return min(1.0, left / max(1e-9, c.warmdown_frac * run))


# (left, after_warmup, run, c) -> s, for the learning rate min_lr + s (learning_rate - min_lr). left: steps
# until the end of the decay; after_warmup: steps from the warm-up to that end; run: steps from 0 to that end
SCHEDULE = {'cosine': cosine, 'linear': linear}


def lr_at(step, c, last_step=None):
    """Returns the learning rate of a step, from 0 on. last_step: the number of steps; None = max_iters."""
    if step < c.warmup_iters:
        return c.learning_rate * (step + 1) / (c.warmup_iters + 1)
    if not c.decay_lr:
        return c.learning_rate
    if c.lr_decay_iters is not None:
        last_step = c.lr_decay_iters
    elif last_step is None:
        last_step = c.max_iters
    after_warmup = max(1, last_step - c.warmup_iters)
    left = min(after_warmup, max(0, last_step - step))
    share = SCHEDULE[c.lr_schedule](left, after_warmup, c.warmup_iters + after_warmup, c)
    return c.min_lr + share * (c.learning_rate - c.min_lr)


def decay_share_at(step, c, last_step):
    """Returns the weight decay of a step as a share of weight_decay.

    It changes linearly to weight_decay_end at last_step; looped nanochat's falls to 0.
    """
    if c.weight_decay_end is None:
        return 1.0
    return 1 + min(1.0, step / max(1, last_step)) * (c.weight_decay_end / c.weight_decay - 1)


# -----------------------------------------------------------------------------
# parameter groups


class Group(NamedTuple):
    """A group of parameters."""

    parts: tuple = ()  # names of the Linear and Embedding layers whose weights are in the group
    lr_key: str = 'learning_rate'  # the key with its learning rate; if that is None, learning_rate is used


# biases, and what table entries add without naming a group (see LoopPart in model.py), are `vectors`
GROUPS = {
    'matrices': Group(('c_attn', 'c_fc', 'c_proj'), 'matrix_lr'),
    'injection': Group(lr_key='matrix_lr'),  # not decayed: most schemes of INIT start it as [I 0]
    'embedding': Group(('wte', 'wpe', 'ngrams'), 'embedding_lr'),
    'head': Group(('lm_head',), 'head_lr'),
    'gate': Group(('exit_gate',)),
    'vectors': Group(),
}


def group_names(model):
    """Returns {parameter's name: its group} of a model, each in exactly one.

    Raises RuntimeError with the name of a parameter that belongs to no group, or for a module that names a
    group or a parameter that does not exist.
    """
    part_groups = {part: name for name, group in GROUPS.items() for part in group.parts}
    groups, of_entries = {}, set()  # of_entries: names of the parameters in modules made by a table's entry
    for prefix, module in model.named_modules():
        start = f'{prefix}.' if prefix else ''
        if hasattr(module, 'entry') or hasattr(module, 'init'):  # made by a table's entry
            inside, named = dict(module.named_parameters()), getattr(module, 'groups', {})
            wrong = [f'parameter {name}' for name in named if name not in inside]
            wrong += [f'group {group}' for group in named.values() if group not in GROUPS]
            if wrong:
                raise RuntimeError(f'groups of {type(module).__name__}: there is no {", ".join(wrong)}')
            of_entries |= {start + name for name in inside}
            for name, group in named.items():  # what contains a module comes before it, and decides
                groups.setdefault(start + name, group)
        for name, _ in module.named_parameters(recurse=False):
            plain = name == 'bias' or start + name in of_entries
            group = groups.setdefault(
                start + name, 'vectors' if plain else part_groups.get(prefix.rpartition('.')[2])
            )
            if group is None:
                raise RuntimeError(f'{start}{name} belongs to no group of nanoloop/optimizer.py')
    return groups


# -----------------------------------------------------------------------------
# optimizers


class Optimizer(NamedTuple):
    """An optimizer: what it takes, and how it is made."""

    build: Callable  # (parameter groups with lr and weight_decay, c) -> a torch.optim.Optimizer
    takes: tuple  # the groups that it takes; AdamW takes the others
    decays: tuple  # the groups that are decayed by weight_decay, in a run with this optimizer
    moments: int  # float32 numbers that it keeps for every parameter, for --plan
    scales_with_width: bool = False  # lr_width applies to its learning rates, as to AdamW's
    before_step: Callable = lambda optimizer, step: None  # changes it before a step, by the step's number


def adamw(groups, c):
    options = dict(lr=c.learning_rate, betas=(c.beta1, c.beta2), eps=c.adam_eps, weight_decay=0.0)
    return torch.optim.AdamW(groups, fused=True, **options)


def muon(groups, c):
    return Muon(groups, momentum=momentum_at(0), weight_decay=0.0)


def momentum_at(step):
    """Returns Muon's momentum, which rises over 300 steps as in FLT and looped nanochat."""
    return 0.85 + 0.1 * min(1.0, step / 300)


def raise_momentum(optimizer, step):
    for group in optimizer.param_groups:
        group['momentum'] = momentum_at(step)


# fmt: off
OPTIMIZER = {
    'adamw': Optimizer(adamw, takes=tuple(GROUPS), decays=('matrices', 'embedding', 'head', 'gate'),
                       moments=2, scales_with_width=True),
    'muon': Optimizer(muon, takes=('matrices', 'injection'), decays=('matrices',),
                      moments=1, before_step=raise_momentum),
}
# fmt: on


def make_optimizers(model, c):
    """Makes the optimizers of the parameters that require a gradient: c.optimizer, and AdamW for the rest.

    Returns them and a line of text per group. lr_ratio of a group: its rate / learning_rate.
    Raises UserError for a key that would have no effect, RuntimeError for a parameter in no group.
    """
    chosen, names = OPTIMIZER[c.optimizer], group_names(model)
    for wrong in {*chosen.takes, *chosen.decays} - GROUPS.keys():
        raise RuntimeError(f'optimizer {c.optimizer}: there is no group {wrong!r}, only {", ".join(GROUPS)}')
    check(
        c.head_lr is None or not model.config.tie_weights,
        'head_lr',
        c.head_lr,
        'None with tie_weights: the head is the embedding',
    )
    members = {group: [] for group in GROUPS}
    for name, p in model.named_parameters():
        if p.requires_grad:
            members[names[name]].append(p)
    groups, lines = {chosen: [], OPTIMIZER['adamw']: []}, []
    for name, params in members.items():
        if not params:
            continue
        rule = chosen if name in chosen.takes else OPTIMIZER['adamw']
        lr = getattr(c, GROUPS[name].lr_key)
        lr = c.learning_rate if lr is None else lr
        if c.lr_width is not None and rule.scales_with_width:
            lr *= math.sqrt(c.lr_width / model.config.n_embd)
        decay = c.weight_decay if name in chosen.decays else 0.0
        lr_ratio = lr / (c.learning_rate or 1.0)
        groups[rule].append(dict(params=params, decay=decay, weight_decay=decay, lr=lr, lr_ratio=lr_ratio))
        lines.append(describe_group(name, params, decay, rule, lr))
    optimizers = []
    for rule, param_groups in groups.items():
        if param_groups:
            optimizers.append(rule.build(param_groups, c))
            optimizers[-1].before_step = rule.before_step
    return optimizers, lines


def describe_group(name, params, decay, rule, lr):
    """Returns the line to print about a parameter group."""
    kind = 'decayed' if decay else 'non-decayed'
    count = f'{len(params)}, with {sum(p.numel() for p in params):,} parameters'
    optimizer = next(optimizer for optimizer, entry in OPTIMIZER.items() if entry is rule)
    return f'num {kind} parameter tensors: {count} ({name}, {optimizer}, learning rate {lr:g})'


def prepare_step(optimizers, step, lr, decay_share=1.0):
    """Sets the learning rates and weight decays of a step, and calls before_step, which sets Muon's momentum.

    lr: for a group with the ratio 1. decay_share: see decay_share_at.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = lr * group['lr_ratio']
            group['weight_decay'] = decay_share * group['decay']
        optimizer.before_step(optimizer, step)


def step_if_finite(optimizers, grad_norm):
    """Makes a step of every optimizer, unless grad_norm, a tensor (), is not finite: then nothing changes.

    Returns a tensor (), whether weights were changed. A fused AdamW decides that on the device: a GradScaler
    tells it in the same way. For another optimizer the host has to know, and waits for the device.
    """
    finite = grad_norm.isfinite()
    for optimizer in optimizers:
        if getattr(optimizer, '_step_supports_amp_scaling', False):
            optimizer.found_inf = 1.0 - finite.float()
            optimizer.step()
            del optimizer.found_inf
        elif finite:
            optimizer.step()
    return finite


def load_optimizers(optimizers, state, c):
    """Loads the optimizers' states; learning rates and the like are those of the current keys.

    Raises UserError if the checkpoint is of another optimizer or has other parameter groups.
    """
    saved = state['optimizer'] if isinstance(state['optimizer'], list) else [state['optimizer']]
    sizes = [[len(group['params']) for group in part['param_groups']] for part in saved]
    same = sizes == [[len(group['params']) for group in optimizer.param_groups] for optimizer in optimizers]
    for key, may_differ in (('optimizer', False), ('objective', same)):
        old = state['config'].get(key)
        expected = f'{old!r} as in the checkpoint, to go on; init_from=PATH takes its weights alone'
        check(may_differ or c[key] == old, key, c[key], expected)
    for optimizer, part in zip(optimizers, saved, strict=True):
        for old, new in zip(part['param_groups'], optimizer.param_groups, strict=True):
            old.update(new | dict(params=old['params']))
        optimizer.load_state_dict(shard_state(optimizer, part))
