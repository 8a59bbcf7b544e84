"""
The lines that a training run prints, and the records of log.jsonl.
"""

import math
import threading
import time
from datetime import timedelta

import torch

from nanoloop.datasets import name_source
from nanoloop.generate import stream
from nanoloop.objective import growth_steps
from nanoloop.parallel import whole_weights
from nanoloop.rates import matmul_rate
from nanoloop.tokenizer import make_tokenizer

MEASURED_FLOPS = 1e10  # FLOPs of a step; only above this is the speed of the CPU measured
LONG_STEP_S = 10.0  # a slower step gets a hint to try a smaller run


AFTER_SIGNAL = {  # what a run still does when a signal comes, by the first word of what it is doing
    'training': 'the run saves after this micro-batch',
    'evaluating': 'the run saves after this batch of the evaluation',
    'saving': 'the run ends when this checkpoint is saved',
    'sampling': 'the run ends after this token',
}


class Teller:
    """Prints lines, and what the run is doing whenever it has printed nothing for SILENCE_S seconds.

    print_line: prints a line; None = this process prints nothing.

    Lines come from one thread at a time: the watching thread has ended when the block is left.
    """

    SILENCE_S = 15.0

    def __init__(self, print_line):
        self.print_line, self.ended = print_line, threading.Event()
        self.last_line, self.doing, self.signal = time.monotonic(), None, ''
        self.now('')

    def hurry(self, signal):
        """Lets the watching thread say at once that a signal has come, and what it waits for."""
        self.signal = signal
        now = AFTER_SIGNAL.get(self.doing.partition(' ')[0], f'the run ends after {self.doing}')
        self.doing, self.progress, self.since = f'{signal}: {now}', '', time.monotonic()
        self.last_line = -math.inf

    def now(self, doing, progress=''):
        """Notes what the run is doing, and how far it is with the same thing."""
        if self.signal:  # what a run that is to end still does
            doing = f'{self.signal}: {doing}'
        if doing != self.doing:
            self.since = time.monotonic()
        self.doing, self.progress = doing, progress

    def __call__(self, text):
        self.last_line = time.monotonic()
        if self.print_line:
            self.print_line(text)

    def __enter__(self):
        self.thread = threading.Thread(target=self.watch, daemon=True)
        if self.print_line:
            self.thread.start()
        return self

    def __exit__(self, *failure):
        self.ended.set()
        if self.print_line:
            self.thread.join()

    def watch(self):
        """Runs in a thread until the end."""
        while not self.ended.wait(min(1.0, self.SILENCE_S)):
            silent, busy = (time.monotonic() - begin for begin in (self.last_line, self.since))
            if silent >= self.SILENCE_S:
                self(f'... {self.doing}{self.progress} ({busy:.0f} s so far)')


class Meter:
    """Measures seconds and FLOPs per step since the last reading."""

    def __init__(self, step, flops):
        self.reset(step, flops)

    def reset(self, step, flops):
        self.time, self.step, self.flops = time.monotonic(), step, flops

    def read(self, step, flops):
        """Returns (seconds per step, FLOPs per step) since the last call, and resets."""
        steps = step - self.step
        result = (time.monotonic() - self.time) / steps, (flops - self.flops) / steps
        self.reset(step, flops)
        return result


def describe_run(c, model, world, flops, row_tokens):
    """Yields lines on the size of the run and its model. flops: of a training step; row_tokens: of a row."""
    tokens = c.gradient_accumulation_steps * c.batch_size * row_tokens
    micro_batches = f'{c.gradient_accumulation_steps} x {c.batch_size} x {row_tokens}'
    layers = f'{model.config.depth} ({c.n_prelude} + {c.n_block} x {c.n_loop} + {c.n_coda})'
    yield f'tokens per iteration will be: {tokens:,} ({micro_batches}, over {world} process(es))'
    yield f'number of parameters: {model.get_num_params() / 1e6:.2f}M'
    yield f'executed layers: {layers}, training FLOPs per token: {flops / tokens:.4g}'


def describe_cost(m, flops, steps):
    """Yields a line on the time that a run takes at least, if it computes on a CPU. flops: of a step."""
    if m.kind != 'cpu' or m.world > 1 or flops < MEASURED_FLOPS or not steps:
        return
    rate = matmul_rate(m, size=1024)
    seconds = flops / rate
    least = f'{seconds:.2g}' if seconds < 10 else f'{seconds:,.0f}'
    run = timedelta(seconds=min(10**9, round(seconds * steps)))
    yield (
        f'a step computes {flops / 1e12:.3g} TFLOP, at least {least} s at the {rate / 1e12:.2g} '
        f'TFLOP/s of this CPU: {run} for {steps:,} steps'
    )
    if seconds > LONG_STEP_S:
        yield 'for a CPU this is large: python train.py config/quickstart.py takes minutes in all'


# key: (another key, the only value of that with which the key has an effect)
USED_WITH = {
    'beta': ('objective', 'exit'),
    'gate_ahead': ('objective', 'gate'),
    'warmdown_frac': ('lr_schedule', 'linear'),
    **dict.fromkeys(('lr_schedule', 'lr_decay_iters', 'min_lr'), ('decay_lr', True)),
}


def doubtful_keys(c, rule, last_step, left, random_weights):
    """Yields warnings about keys that may be mistakes.

    rule: the LossRule of c.objective. left: number of steps that are left until last_step.
    """
    if c.warmup_iters > last_step and left:
        rises = f'the learning rate rises until the last step, {last_step}'
        yield f'warning: warmup_iters={c.warmup_iters}: {rises}'
    if c.exit_gate and not rule.trains_gate:
        yield f'warning: objective={c.objective} does not train the exit gate'
    if not rule.trains_model and random_weights:
        result = 'leaves the model as it began, at random; see --init_from=PATH'
        yield f'warning: objective={c.objective} {result}'
    if growth_steps(c) > last_step and left:
        yield f'warning: loop_warmup={c.loop_warmup}: the last step, {last_step}, comes before all loops'
    for key, (other, used) in USED_WITH.items():
        if key in c.given and c[other] != used:
            yield f'warning: {key}={c[key]!r} changes nothing with {other}={c[other]!r}'
    if last_step < c.max_iters:
        yield f'max_flops={c.max_flops:.4g} are spent after {last_step:,} steps'


def other_measure(state, c, extra):
    """Returns why validation losses before and after resuming cannot be compared: a list of texts.

    state: the checkpoint; extra: Task.checkpoint_extra. Older checkpoints know their data set by its name
    only.
    """
    old, new, keys, before = state.get('data'), extra['data'], ['n_loop', 'block_size'], state['config']
    if old is None:
        keys.append('dataset')
    windows = [config['eval_iters'] * config['batch_size'] for config in (before, c)]
    if windows[0] != windows[1]:
        keys += ['eval_iters', 'batch_size']
    changed = [was_is(key, before[key], c[key]) for key in keys if before[key] != c[key]]
    if old is not None and old['sha256'] != new['sha256']:
        known = [f'{name_source(data["source"])} (sha256 {data["sha256"][:8]})' for data in (old, new)]
        changed.append(was_is('data', *known))
    return changed


def was_is(key, old, new):
    """Returns the text for a value that has changed."""
    return f'{key} was {old or repr(old)}, is {new or repr(new)}'  # '' is shown as such


def differences(c, machine, state, new_measure=()):
    """Yields lines on what differs from the run that saved `state`: keys, and what bit-exactness needs.

    machine: Machine.fingerprint(). new_measure: see other_measure.
    """
    pairs = (c, state['config'], 'changed'), (machine, state['machine'], 'not bit-exact')
    lines = [f'changed: {text}' for text in new_measure]
    for new, old, what in pairs:
        for key in sorted(new.keys() & old.keys() - {'init_from', 'weights', 'out_dir', 'eval_only'}):
            if new[key] != old[key]:
                lines.append(f'{what}: {was_is(key, old[key], new[key])}')
    yield from dict.fromkeys(lines)
    if new_measure and not c.eval_only:
        yield 'the best loss and the patience begin anew: earlier losses cannot be compared'


def resuming_line(step, last_step, limit):
    """Returns the line on where a resumed run goes on. limit: the key that decides its last step."""
    text = f'resuming at step {step} of {last_step}'
    if step > last_step:
        text += f': the run has made more steps than {limit} allows, nothing is left to do'
    elif step == last_step:
        text += ': nothing is left to do'
    return text if step < last_step else f'{text}, a larger {limit} goes on'


def evaluation_line(step, losses, seconds):
    """Returns the line and the record of an evaluation. losses: see ema.evaluate_weights."""
    shown, record = [], {'iter': step}
    for suffix, losses_of in losses.items():
        if 'train' in losses_of:
            record[f'train/eval_loss{suffix}'] = loss = losses_of['train']['loss']
            shown.append(f'train loss{suffix} {loss:.4f}')
        for key, value in losses_of['val'].items():
            record[f'val/{key}{suffix}'] = value
            shown.append(f'val {key}{suffix} {value:{".2f" if key == "ppl" else ".4f"}}')
    return f'step {step}: {", ".join(shown)}, took {seconds:.1f}s', record


def step_line(step, loss, grad_norm, extra, lr, n_loop, seconds, mfu, tokens, eta, flops_done):
    """Returns the line and the record of a training step.

    extra: further values to log, {name: float}. seconds, tokens: per step. mfu: None if unknown. eta: seconds
    to the end of the run; None if unknown. flops_done: training FLOPs of the run so far.
    """
    rate, ms = tokens / seconds, 1000 * seconds
    left = '?' if eta is None else timedelta(seconds=min(10**9, round(eta)))
    text = f'iter {step}: loss {loss:.4f}, time {ms:.2f}ms, mfu {"n/a" if mfu is None else f"{mfu:.2%}"}, '
    text += f'reward {extra["reward"]:.4f}, ' if 'reward' in extra else ''
    text += f'grad {grad_norm:.2f}, lr {lr:.1e}, tok/s {rate:,.0f}, loops {n_loop}, eta {left}'
    record = {'iter': step, 'train/loss': loss, 'train/grad_norm': grad_norm, 'lr': lr, 'mfu': mfu}
    record |= {'train/ms': ms, 'train/tok_per_sec': rate, 'train/loops': n_loop, 'train/flops': flops_done}
    return text, record | {f'train/{name}': value for name, value in extra.items()}


def sample_text(model, spec, n_tokens, seed, m, signals):
    """Returns a short sample as the lines that a run ends with; a signal ends it early.

    spec: what make_tokenizer takes. Sets the model to eval mode. Rank 0 samples, the others return ''.
    """
    with whole_weights(model):
        return '' if m.rank > 0 else sample_alone(model, spec, n_tokens, seed, m, signals)


def sample_alone(model, spec, n_tokens, seed, m, signals):
    """See sample_text."""
    try:
        tokenizer = make_tokenizer(spec)
    except (ValueError, OSError) as error:
        return f'no sample: {error}'
    idx, ids = torch.tensor([[tokenizer.eot_token]], device=m.device), []  # (1, 1)
    generator = torch.Generator(m.device).manual_seed(seed)
    model.eval()
    with torch.compiler.set_stance('force_eager'), m.autocast():
        for token in stream(model, idx, n_tokens, temperature=0.8, generator=generator):
            ids.append(int(token))
            if signals.number:
                break
    note = f' ({tokenizer.note})' if tokenizer.note else ''
    return f'a sample of {len(ids)} tokens{note}:\n---------------\n{tokenizer.decode(ids)}\n---------------'
