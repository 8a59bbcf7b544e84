"""
Plans a run on N GPUs without having one: memory of a GPU, bytes on the wire, time of a step.

    python bench.py config/train_ouro_1_4b.py --plan=64

Parameters and FLOPs are those of nanoloop/count.py, activations those of nanoloop/activations.py.
runs/README.md says what is assumed, and has a table of Ouro on 8 to 1,024 GPUs.

Two ways to share a run (WAYS) are planned:

    ddp     every GPU has all weights; the gradients are averaged by a ring all-reduce, once per step
    fsdp    FSDP2: a GPU keeps 1/N of weights, gradients and optimizer states. The weights are gathered once
            per step and kept until its last backward pass, so that loops and micro-batches share them. The
            gradients are summed over the micro-batches and reduce-scattered once per step

Weights, gradients and what is sent are float32. GB = 1e9 bytes, GiB = 2^30 bytes.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from model import GPT, HEAD_CHUNK
from nanoloop.activations import Activations, activations
from nanoloop.checks import check
from nanoloop.count import parameters, section_flops, sections
from nanoloop.machine import DTYPES, MORE_LOGITS, PEAK_FLOPS
from nanoloop.objective import LOOP_SAMPLING, OBJECTIVE, limit_loops, set_trained_parts, training_flops
from nanoloop.optimizer import OPTIMIZER, group_names

FLOAT = 4  # bytes of a float32
NODE = 8  # GPUs of a node
AVERAGE = 'average of the weights'  # the row of the key ema


class Gpu(NamedTuple):
    """A GPU and its links; PEAK_FLOPS of nanoloop/machine.py has its FLOP/s. Links: from the data sheets."""

    memory: float  # GiB that CUDA reports, rounded down
    nvlink: float  # GB/s to the other GPUs of its node, in one direction
    infiniband: float  # Gb/s to other nodes, in one direction, of the adapter that every GPU has


# fmt: off
GPUS = {'H100': Gpu(79, 450, 400), 'H200': Gpu(139, 450, 400), 'B200': Gpu(178, 900, 400),
        'A100': Gpu(79, 300, 200)}
# fmt: on

# -----------------------------------------------------------------------------
# memory


def trained_parameters(model, rule):
    """Returns [(name, parameter)] of what a loss rule trains."""
    set_trained_parts(model, rule)
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def optimizer_bytes(model, c):
    """Returns the bytes of the optimizers' states: c.optimizer for the groups that it takes, else AdamW."""
    names, takes = group_names(model), OPTIMIZER[c.optimizer].takes
    return sum(
        p.numel() * FLOAT * OPTIMIZER[c.optimizer if names[name] in takes else 'adamw'].moments
        for name, p in trained_parameters(model, OBJECTIVE[c.objective])
    )


# -----------------------------------------------------------------------------
# the wire


class Wire(NamedTuple):
    """Bytes that a GPU sends, and receives."""

    inside: float  # to a GPU of its node
    across: float  # to another node

    def times(self, n):
        return Wire(n * self.inside, n * self.across)

    def seconds(self, nvlink, infiniband):
        """Returns the time if both kinds of links are busy together. nvlink: GB/s; infiniband: Gb/s."""
        return max(self.inside / (nvlink * 1e9), self.across / (infiniband * 1e9 / 8))


def ring(n_bytes, n_gpus, node=NODE):
    """Returns the Wire of an all-gather or a reduce-scatter of n_bytes over a ring of n_gpus.

    Every GPU sends (N - 1) / N of the bytes. A ring leaves a node from one of its GPUs; there is a ring for
    every GPU, which leaves the node there. So of several nodes 1 / node of a GPU's bytes go across.
    """
    sent = n_bytes * (n_gpus - 1) / n_gpus
    across = sent / node if n_gpus > node else 0.0
    return Wire(sent - across, across)


class Way(NamedTuple):
    """A way to share a run among GPUs. P: parameters; trained: those with a gradient; n: GPUs."""

    # (P, trained, bytes of the optimizer states, bytes of the average, n) -> {what: bytes of a GPU}
    memory: Callable
    wires: Callable  # (P, trained, n) -> (Wire of gathering weights, Wire of reducing gradients), of a step


def ddp_memory(P, trained, state, average, n):
    """Returns {what: bytes} of DDP. It reduces the gradients in buckets, which are a second copy of them."""
    return {
        'weights': FLOAT * P,
        'gathered weights': 0.0,
        'gradients': FLOAT * trained,
        'buckets, or whole gradients': FLOAT * trained * (n > 1),
        'optimizer states': float(state),
        AVERAGE: float(average),
    }


def fsdp_memory(P, trained, state, average, n):
    """Returns {what: bytes} of FSDP2.

    Gathered weights and whole gradients stay until the step's last backward pass: its pass through the first
    loop is the last that needs a loop's weights and adds to their gradients.
    """
    return {
        'weights': FLOAT * P / n,
        'gathered weights': FLOAT * P * (n > 1),
        'gradients': FLOAT * trained / n,
        'buckets, or whole gradients': FLOAT * trained * (n > 1),
        'optimizer states': state / n,
        AVERAGE: average / n,
    }


WAYS = {
    'ddp': Way(ddp_memory, lambda P, trained, n: (Wire(0.0, 0.0), ring(FLOAT * trained, n).times(2))),
    'fsdp': Way(fsdp_memory, lambda P, trained, n: (ring(FLOAT * P, n), ring(FLOAT * trained, n))),
}

# -----------------------------------------------------------------------------
# the plan


def check_share(c, n_gpus):
    """Raises UserError unless n_gpus are whole nodes, or fewer than one, and can share a step evenly.

    The line names flags that work, with the same tokens per step if there are any.
    """
    whole = n_gpus <= NODE or n_gpus % NODE == 0
    check(whole, 'plan', n_gpus, f'at most {NODE} GPUs, or a multiple of {NODE}: whole nodes')
    n, B = c.gradient_accumulation_steps, c.batch_size
    rows = n * B
    size = next((size for size in range(B, 0, -1) if rows % (size * n_gpus) == 0), None)
    if size:
        same = f'--batch_size={size} ' * (size != B)
        hint = f'{same}--gradient_accumulation_steps={rows // size} has the same tokens per step'
    else:
        near = n_gpus * max(1, round(n / n_gpus))
        hint = f'--gradient_accumulation_steps={near} has {near / n:.2f} times the tokens per step'
    check(n % n_gpus == 0, 'gradient_accumulation_steps', n, f'a multiple of the {n_gpus} GPUs: {hint}')


class Plan(NamedTuple):
    """The figures of a plan that do not depend on the way; see plan_run."""

    n_gpus: int
    parameters: int
    trained: int  # of the parameters
    state: int  # bytes of the optimizers' states
    average: int  # bytes of the average of the weights, 0 without ema
    activations: Activations
    step_flops: float  # of all GPUs
    step_tokens: int
    steps: int
    seconds: float  # of a step's computation
    forward_window: float  # seconds of the forward pass that gathering can hide behind
    backward_window: float  # seconds of the backward pass that reducing can hide behind
    ends: float  # share of embedding and head in the parameters


def peak_of(c, dtype):
    """Returns the FLOP/s of one GPU. Raises UserError for a dtype whose rate is not known."""
    low = dtype != torch.float32
    check(low or c.peak_flops, 'peak_flops', c.peak_flops, f'the FLOP/s of one {c.gpu} with dtype=float32')
    return c.peak_flops or PEAK_FLOPS[c.gpu]


def plan_run(c, config, n_gpus):
    """Returns the Plan of a run on n_gpus. c: the keys of train.py and bench.py; config: its GPTConfig.

    Every step is counted with n_loop loops, its memory with the most that can be drawn.

    Gathering can hide behind the forward pass of prelude and first loop in the first micro-batch: the other
    loops have the weights already. Reducing can hide behind the backward pass of the same parts in the last
    micro-batch, in which the last term is added to the gradient of a loop's weights.
    """
    check_share(c, n_gpus)
    dtype = torch.bfloat16 if c.dtype == 'auto' else DTYPES.get(c.dtype)
    check(dtype, 'dtype', c.dtype, f'auto or one of {", ".join(DTYPES)}')
    speed = peak_of(c, dtype) * c.plan_mfu  # FLOP/s of one GPU
    largest = limit_loops(LOOP_SAMPLING[c.loop_sampling].largest(c.n_loop), c)
    with torch.device('meta'):
        model = GPT(config)
    parts, sizes = sections(model), parameters(model)
    once = section_flops(model, *(parts[name] for name in ('prelude', 'inject', 'recur')))  # per token
    window = sum(once.values()) * c.batch_size * c.block_size / speed
    tokens = c.gradient_accumulation_steps * c.batch_size * c.block_size
    flops = training_flops(model, c, c.n_loop) * tokens
    trained = sum(p.numel() for _, p in trained_parameters(model, OBJECTIVE[c.objective]))
    return Plan(
        n_gpus=n_gpus,
        parameters=sizes['total'],
        trained=trained,
        state=optimizer_bytes(model, c),
        average=FLOAT * trained if c.ema else 0,
        activations=activations(config, c, dtype, largest),
        step_flops=flops,
        step_tokens=tokens,
        steps=c.max_iters if c.max_flops is None else min(c.max_iters, math.ceil(c.max_flops / flops)),
        seconds=flops / n_gpus / speed,
        forward_window=window,
        backward_window=2 * window * OBJECTIVE[c.objective].trains_model,
        ends=(sizes['embedding'] + sizes['lm_head']) / sizes['total'],
    )


def memory_of(plan, way):
    """Returns {what: bytes of a GPU} of a way."""
    parts = WAYS[way].memory(plan.parameters, plan.trained, plan.state, plan.average, plan.n_gpus)
    if not plan.average:
        del parts[AVERAGE]
    saved, copies, peak = plan.activations
    activations = {'activations': saved - copies, 'weights cast for their uses': copies}
    return parts | activations | {'temporary': peak - saved}


class Communication(NamedTuple):
    """What a GPU sends in a step, and the time that it takes."""

    wire: Wire
    seconds: float
    exposed: float  # seconds of it that no computation hides, if all that can be hidden is


def communication(plan, way, nvlink, infiniband):
    """Returns the Communication of a way. nvlink: GB/s; infiniband: Gb/s.

    Embedding and head are not hidden: they are gathered before anything is computed, and reduced last.
    """
    wires = WAYS[way].wires(plan.parameters, plan.trained, plan.n_gpus)
    times = [wire.seconds(nvlink, infiniband) for wire in wires]
    windows = plan.forward_window, plan.backward_window
    exposed = [max(t - window, t * plan.ends) for t, window in zip(times, windows, strict=True)]
    wire = Wire(*(sum(part) for part in zip(*wires, strict=True)))
    return Communication(wire, sum(times), sum(exposed))


def describe_plan(plan, c):
    """Returns lines of text: the run, and a table with a column for every way."""
    micros, (saved, copies, _) = c.gradient_accumulation_steps // plan.n_gpus, plan.activations
    micro_tokens = c.batch_size * c.block_size
    per_token = (saved - copies) / micro_tokens
    chunk = min(micro_tokens, MORE_LOGITS * max(1, HEAD_CHUNK // c.vocab_size))
    return [
        f'{plan.n_gpus:,} {c.gpu}: {plan.step_tokens:,} tokens per step, '
        f'a GPU has {micros:,} micro-batches of {c.batch_size:,} x {c.block_size:,}',
        f'{plan.parameters:,} parameters, {plan.trained:,} trained; {plan.step_flops:.4e} FLOPs per step',
        f'activations: {per_token:,.0f} bytes per token, without compiling',
        f'logits at once: {chunk:,} x {c.vocab_size:,}, {FLOAT * chunk * c.vocab_size / 2**20:,.0f} MiB in '
        'float32; they and their gradients are in `temporary`',
        *memory_lines(plan, GPUS[c.gpu].memory),
        *time_lines(plan, c),
    ]


def table_row(name, values, digits=2):
    """Returns a line of a table."""
    return f'  {name:34}' + ''.join(f'{value:12,.{digits}f}' for value in values)


def table_head(name):
    """Returns the line above the columns of the ways."""
    return f'{name:36}' + ''.join(f'{way:>12}' for way in WAYS)


def memory_lines(plan, available):
    """Returns lines on the memory of a GPU, which has `available` GiB."""
    parts = [memory_of(plan, way) for way in WAYS]
    rows = [table_row(name, [part[name] / 2**30 for part in parts]) for name in parts[0]]
    sums = [sum(part.values()) / 2**30 for part in parts]
    rows = [table_head('memory of a GPU, GiB'), *rows, table_row(f'sum, of {available:g}', sums)]
    over = ' and '.join(way for way, size in zip(WAYS, sums, strict=True) if size > available)
    less = '--recompute=True, a smaller batch_size and, with fsdp, more GPUs take less'
    return [*rows, f'does not fit: {over}; {less}'] if over else rows


def time_lines(plan, c):
    """Returns lines on what is sent, the time of a step, MFU and the time of the run."""
    gpu = GPUS[c.gpu]
    nvlink, infiniband = c.nvlink or gpu.nvlink, c.infiniband or gpu.infiniband
    sent = [communication(plan, way, nvlink, infiniband) for way in WAYS]
    unit, unit_seconds = ('days', 86400) if plan.steps * plan.seconds > 2 * 86400 else ('hours', 3600)
    rows = [
        table_head('sent by a GPU per step, GB'),
        table_row(f'inside its node, at {nvlink:g} GB/s', [x.wire.inside / 1e9 for x in sent], 3),
        table_row(f'to other nodes, at {infiniband:g} Gb/s', [x.wire.across / 1e9 for x in sent], 3),
        table_head('time of a step, s'),
        table_row(f'computation, at {c.plan_mfu:.1%} MFU', [plan.seconds for _ in sent], 4),
        table_row('communication', [x.seconds for x in sent], 4),
        table_row('communication not hidden, at best', [x.exposed for x in sent], 4),
    ]
    for name, waits in (
        ('with communication hidden, at best', [x.exposed for x in sent]),
        ('with no communication hidden', [x.seconds for x in sent]),
    ):
        seconds = [plan.seconds + wait for wait in waits]
        rows += [
            table_head(name),
            table_row('MFU, %', [100 * c.plan_mfu * plan.seconds / t for t in seconds]),
            table_row('tokens per second', [plan.step_tokens / t for t in seconds], 0),
            table_row(f'{unit} for {plan.steps:,} steps', [plan.steps * t / unit_seconds for t in seconds]),
        ]
    return rows
