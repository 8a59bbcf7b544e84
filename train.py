"""
Trains a looped transformer, or a plain GPT, in one process or many.

    python train.py config/quickstart.py --batch_size=32
    torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2_looped.py

Batches, dropout and noise are functions of (seed, step, place in the global batch): a run killed and resumed
is the run that was not, any number of processes trains on the same batches, and evaluation changes nothing.
"""

import contextlib
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from configurator import LOCAL_RANK, ROOT, command, configure, peak_memory, setup, tell
from count import training_flops
from data.dataset import Split, find_data, make_tokenizer, read_meta
from generate import stream
from model import GPT, GPTConfig, check, check_least, load_checkpoint
from storage import (
    Log,
    Signals,
    find_checkpoint,
    git_commit,
    largest_of_ranks,
    move_aside,
    on_first_rank,
    open_out_dir,
    save_checkpoint,
    set_broken_aside,
)


@dataclass
class TrainConfig:
    # output
    out_dir: str = 'out'  # checkpoints (ckpt.pt last, prev.pt the one before, best.pt) and log.jsonl
    eval_interval: int = 2000  # steps between evaluations; each saves a checkpoint
    log_interval: int = 1  # steps between lines
    eval_iters: int = 200  # batches per evaluated split, evenly spread; 0 = all of val, and as many of train
    eval_only: bool = False  # evaluate and leave
    always_save_checkpoint: bool = True  # accepted for nanoGPT's sake: ckpt.pt is always the last
    init_from: str = 'scratch'  # scratch, resume, auto (either), or weights: a path, gpt2[-xl], ouro:FOLDER
    sample_tokens: int = 200  # tokens of the sample printed at the end; 0 = none
    wandb_log: bool = False  # log to Weights & Biases as well
    wandb_project: str = 'nanoloop'  # of wandb_log
    wandb_run_name: str = 'run'  # of wandb_log
    # data
    dataset: str = 'pystdlib'  # a folder of data/, or a path with a slash
    gradient_accumulation_steps: int = 1  # micro-batches per step, over all processes together
    batch_size: int = 12  # sequences per micro-batch
    baseline: str = ''  # what looping is worth: same_params (one loop), same_flops (as many plain layers)
    # optimizer (AdamW)
    learning_rate: float = 6e-4  # the highest
    max_iters: int = 600000  # steps
    weight_decay: float = 0.1  # of matrices; not of the injection, which starts as the identity
    beta1: float = 0.9  # of the mean of gradients
    beta2: float = 0.95  # of the mean of their squares
    grad_clip: float = 1.0  # largest norm of the gradient; 0 = any
    max_bad_steps: int = 3  # so many steps in a row without a finite gradient end the run
    patience: int = 0  # stop after so many evaluations without a new best loss; 0 = never
    # learning rate
    decay_lr: bool = True  # False = constant after the warm-up
    lr_schedule: str = 'cosine'  # cosine, or linear: constant, then down over the last warmdown_frac
    warmup_iters: int = 2000  # steps of linear rise
    warmdown_frac: float = 0.2  # share of lr_decay_iters, for lr_schedule linear
    lr_decay_iters: int | None = None  # steps until min_lr; None = max_iters
    min_lr: float = 6e-5  # the lowest
    # machine
    device: str = 'auto'  # auto, cpu, cuda, cuda:N, mps
    dtype: str = 'auto'  # of matrix products: auto, float32, bfloat16, float16
    compile: bool | str = 'auto'  # compile the blocks: auto, True, False
    backend: str = 'auto'  # between processes: auto, nccl, gloo
    seed: int = 1337  # of weights, batches, dropout and noise
    deterministic: bool = False  # deterministic kernels only, slower on a GPU
    peak_flops: float | None = None  # FLOP/s of the device, for mfu; None = as configurator.py's table says

    def __post_init__(self):
        """Raises ValueError for a value outside its range."""
        check_least(self, 1, 'eval_interval', 'log_interval', 'gradient_accumulation_steps', 'batch_size')
        check_least(self, 1, 'max_bad_steps', 'peak_flops')
        check_least(self, 0, 'eval_iters', 'sample_tokens', 'max_iters', 'warmup_iters', 'lr_decay_iters')
        check_least(self, 0, 'weight_decay', 'grad_clip', 'patience', 'seed', 'learning_rate', 'min_lr')
        for key in ('beta1', 'beta2', 'warmdown_frac'):
            check(0 <= getattr(self, key) < 1, key, getattr(self, key), 'at least 0 and below 1')
        check(self.seed < 2**63, 'seed', self.seed, 'below 2**63')
        lowest = self.min_lr <= self.learning_rate or not self.decay_lr
        check(lowest, 'min_lr', self.min_lr, f'at most learning_rate={self.learning_rate}')
        wanted = 'same_params, same_flops or nothing'
        check(self.baseline in BASELINE, 'baseline', self.baseline, wanted)
        check(self.lr_schedule in SCHEDULE, 'lr_schedule', self.lr_schedule, f'one of {", ".join(SCHEDULE)}')


# -----------------------------------------------------------------------------
# baseline, schedule, objective, optimizer

ONCE = dict(n_loop=1, bptt_k=None)
PLAIN = dict(ONCE, input_injection='passthrough', state_init='prelude', state_std=None)
BASELINE = {  # the model that a looped one is to be compared with, applied after all other keys
    '': lambda c: {},
    'same_params': lambda c: ONCE,
    'same_flops': lambda c: dict(PLAIN, n_block=c.n_block * c.n_loop),
}

SCHEDULE = {  # share of the way from min_lr to learning_rate, `left` steps before the end of `warm` + `rest`
    'cosine': lambda left, warm, rest, c: 0.5 * (1 - math.cos(math.pi * left / rest)),
    'linear': lambda left, warm, rest, c: min(1.0, left / max(1e-9, c.warmdown_frac * (warm + rest))),
}


def lr_at(step, c):
    """The learning rate of a step; the first step is 0."""
    if step < c.warmup_iters:
        return c.learning_rate * (step + 1) / (c.warmup_iters + 1)
    if not c.decay_lr:
        return c.learning_rate
    end = c.max_iters if c.lr_decay_iters is None else c.lr_decay_iters
    rest = max(1, end - c.warmup_iters)
    share = SCHEDULE[c.lr_schedule](min(rest, max(0, end - step)), c.warmup_iters, rest, c)
    return c.min_lr + share * (c.learning_rate - c.min_lr)


class Objective(nn.Module):
    """The loss of a batch, a weighting of the model's loss table: the last iteration's mean over targets."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx, targets):
        ce, _ = self.model.table(idx, targets, rows=(-1,))
        return ce.sum() / (targets != -1).sum().clamp(min=1)


def make_optimizer(model, c):
    """AdamW in two groups: matrices decay; norms, biases and injection do not. Returns it and both groups."""
    decay, other = {}, {}
    for name, p in model.named_parameters():
        if name.startswith('exit_gate.'):
            # this loss teaches it nothing, and DDP waits for every gradient that is asked for
            p.requires_grad_(False)
            continue
        (decay if p.dim() >= 2 and not name.startswith('inject.') else other)[name] = p
    groups = [dict(params=[*decay.values()], weight_decay=c.weight_decay), dict(params=[*other.values()])]
    options = dict(lr=c.learning_rate, betas=(c.beta1, c.beta2), weight_decay=0.0, fused=True)
    return torch.optim.AdamW(groups, **options), (decay, other)


# -----------------------------------------------------------------------------
# batches and steps


def draw(split, c, m, step, micro):
    """Micro-batch `micro` of this rank as (idx, targets, seed): its place in the global batch decides all.

    idx, targets: (B, T) on the CPU; seed: for the default generator, which dropout and noise draw from.
    """
    g = micro * m.world + m.rank
    data, noise = np.random.SeedSequence((c.seed, step, g)).spawn(2)
    x, y = split.draw(np.random.default_rng(data), c.batch_size)
    return torch.from_numpy(x), torch.from_numpy(y), int(noise.generate_state(1, np.uint64)[0] >> 1)


def draw_ahead(split, c, m, step):
    """Yields the micro-batches of this rank from a step on; while one is used the next is read."""
    micros = range(c.gradient_accumulation_steps // m.world)
    places = ((later, micro) for later in itertools.count(step) for micro in micros)
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(draw, split, c, m, *next(places))
        while True:
            batch, ahead = ahead.result(), reader.submit(draw, split, c, m, *next(places))
            yield batch


def train_step(objective, optimizer, scaler, batches, c, m, stopped=lambda: False):
    """One optimizer step: this rank's micro-batches, clipping of the reduced gradient, update.

    batches yields draw's triples. Returns this rank's mean loss and the gradient's norm before clipping, as
    floats; there is no update if the norm is not finite. None if stopped() between micro-batches.
    """
    micros = c.gradient_accumulation_steps // m.world
    total = torch.zeros((), device=m.device)
    for micro in range(micros):
        if micro and stopped():
            return None
        *pair, seed = next(batches)
        if m.kind == 'cuda':
            pair = [x.pin_memory() for x in pair]
        idx, targets = (x.to(m.device, non_blocking=m.kind == 'cuda') for x in pair)
        objective.require_backward_grad_sync = micro == micros - 1  # DDP reduces the gradient once per step
        torch.manual_seed(seed)
        with m.autocast():
            loss = objective(idx, targets) / micros
        scaler.scale(loss).backward()
        total += loss.detach()
    scaler.unscale_(optimizer)
    params = [p for group in optimizer.param_groups for p in group['params']]
    norm = nn.utils.clip_grad_norm_(params, c.grad_clip or math.inf)
    loss, norm = torch.stack((total, norm)).tolist()  # the one place where the host waits for the device
    if math.isfinite(norm) or scaler.is_enabled():  # the scaler leaves out the update by itself
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


@torch.no_grad()
def evaluate(model, splits, c, m, token_bytes, stopped=lambda: False):
    """{split: {loss, ppl, bpb}} over fixed windows, the same for any number of processes; None if stopped().

    Bits per byte is taken over targets that stand for bytes: token_bytes, per id, is 0 for special tokens.
    """
    n = c.eval_iters * c.batch_size or len(splits['val'].fixed())
    bytes_of, result = torch.tensor(token_bytes, dtype=torch.float64), {}
    model.eval()
    for name, split in splits.items():
        windows = split.fixed(n)
        sums = torch.zeros(4, dtype=torch.float64)
        for i in range(0, len(windows), c.batch_size * m.world):  # as many rounds on every rank
            if stopped():
                model.train()
                return None
            mine = windows[i + m.rank * c.batch_size :][: c.batch_size]
            if not mine:
                continue
            x, y = (torch.from_numpy(a) for a in split.stack(mine, c.batch_size))
            with m.autocast():
                ce, _ = model.table(x.to(m.device), y.to(m.device))
            ce, counted = ce[0].cpu().double(), y != -1
            size = bytes_of[y.clamp(min=0)] * counted
            sums += torch.stack((ce.sum(), counted.sum(), ce[size > 0].sum(), size.sum()))
        if m.cpu_group:
            dist.all_reduce(sums, group=m.cpu_group)
        nll, tokens, nll_of_bytes, size = sums.tolist()
        check(tokens, 'dataset', c.dataset, f'targets that count in {name}, its mask leaves none')
        loss, bits = nll / tokens, nll_of_bytes / math.log(2)
        result[name] = dict(loss=loss, ppl=math.exp(min(loss, 700)), bpb=bits / size if size else math.nan)
    model.train()
    return result


# -----------------------------------------------------------------------------
# the run


def prepare_data(c, m):
    """The data set's folder and meta. pystdlib, which needs no download, is prepared if it is missing."""
    folder = find_data(c.dataset)
    if c.dataset == 'pystdlib' and LOCAL_RANK == 0 and not (folder / 'meta.json').exists():
        tell('preparing data/pystdlib, the standard library of this Python')
        status = subprocess.run([sys.executable, folder / 'prepare.py']).returncode
        if status:
            sys.exit(status)
    largest_of_ranks(m, 0)  # wait for it
    return folder, read_meta(folder)


def build_model(c, meta, checkpoint):
    """From scratch as c says, or the checkpoint's model with the given keys. vocab_size is the data's."""
    keys = {field.name for field in fields(GPTConfig)}
    if checkpoint is None:
        vocab = {} if 'vocab_size' in c.given else dict(vocab_size=meta['vocab_size'])
        return GPT(GPTConfig(**{key: c[key] for key in keys} | vocab))
    model, _ = load_checkpoint(checkpoint, **{key: c[key] for key in keys & c.given})
    ours, theirs = meta['tokenizer'], checkpoint.get('tokenizer') or meta['tokenizer']
    wanted = f'one in the tokens of the checkpoint: {model.config.vocab_size} of kind {theirs["kind"]}'
    check(ours == theirs, 'dataset', c.dataset, f'{wanted}, not {meta["vocab_size"]} of kind {ours["kind"]}')
    return model


class Run:
    """A run: its model, data, optimizer, step (updates made) and best validation loss.

    checkpoint: None, the weights to begin with, or, if resuming, the state to go on from.
    """

    def __init__(self, c, m, signals, checkpoint, resuming):
        n, world = c.gradient_accumulation_steps, m.world
        wanted = f'a multiple of the {world} processes: {world}, {2 * world}, {4 * world}, ...'
        check(n % world == 0, 'gradient_accumulation_steps', n, wanted)
        self.c, self.m, self.stopped = c, m, signals.stopped
        folder, self.meta = prepare_data(c, m)
        self.model = build_model(c, self.meta, checkpoint).to(m.device)
        c.update(asdict(self.model.config))
        self.splits = {s: Split(folder, self.meta, s, c.block_size, c.vocab_size) for s in ('train', 'val')}
        if m.compile:
            for block in self.model.blocks():
                block.compile()
        self.state = checkpoint if resuming else {}
        self.step = self.state.get('iter_num', 0)
        self.best = self.state.get('best_val_loss', math.inf)
        self.evaluated = self.state.get('evaluated', 0)  # the step of the last evaluation
        self.stale = self.state.get('stale', 0)  # evaluations since the best
        self.saved = self.step if resuming else None
        alike = -largest_of_ranks(m, -self.step) == largest_of_ranks(m, self.step)
        check(alike, 'out_dir', c.out_dir, 'a folder that all machines share')
        self.bad = 0  # steps in a row without an update
        self.lock = self.log = None
        self.first = self.step

    def close(self):
        """Closes the log and lets another run into out_dir."""
        for file in (self.lock, self.log and self.log.file):
            if file:
                file.close()

    def say(self, text):
        if self.m.rank == 0:
            tell(text)

    def start(self):
        """Opens out_dir, makes the optimizer and prints what will be trained."""
        c, m, state = self.c, self.m, self.state
        on_first_rank(m, self.open)
        self.optimizer, groups = make_optimizer(self.model, c)
        self.scaler = torch.amp.GradScaler(m.kind, enabled=m.dtype == torch.float16)
        if state:
            old_groups = state['optimizer']['param_groups']
            for then, now in zip(old_groups, self.optimizer.param_groups, strict=True):
                then.update(now | dict(params=then['params']))  # as the keys say now
            self.optimizer.load_state_dict(state['optimizer'])
            if state['scaler'] and self.scaler.is_enabled():
                self.scaler.load_state_dict(state['scaler'])
            for now, then, what in (
                (c, state['config'], 'changed'),
                (self.machine(), state['machine'], 'not bit-exact'),
            ):
                for key in sorted(now.keys() & then.keys() - {'init_from', 'out_dir'}):
                    if now[key] != then[key]:
                        self.say(f'{what}: {key} was {then[key]}, is {now[key]}')
            self.say(f'resuming at step {self.step}')
        self.git = git_commit()
        self.state = None  # lets go of its memory
        self.objective = Objective(self.model)
        if m.world > 1:
            self.objective = DistributedDataParallel(self.objective)
            self.objective.broadcast_buffers = False  # the noise table is the same everywhere
        self.tokens = c.gradient_accumulation_steps * c.batch_size * c.block_size
        self.flops = training_flops(self.model)
        micros = f'{c.gradient_accumulation_steps} x {c.batch_size} x {c.block_size}'
        layers = f'{self.model.config.depth} ({c.n_prelude} + {c.n_block} x {c.n_loop} + {c.n_coda})'
        self.say(f'tokens per iteration will be: {self.tokens:,} ({micros}, over {m.world} process(es))')
        self.say(f'number of parameters: {self.model.num_params() / 1e6:.2f}M')
        self.say(f'executed layers: {layers}, training FLOPs per token: {self.flops:.4g}')
        for kind, group in zip(('decayed', 'non-decayed'), groups, strict=True):
            size = sum(p.numel() for p in group.values())
            self.say(f'num {kind} parameter tensors: {len(group)}, with {size:,} parameters')

    def open(self):
        """Locks out_dir, moves what must not be overwritten out of the way, and opens the log."""
        out_dir = Path(self.c.out_dir)
        self.lock = open_out_dir(out_dir)
        set_broken_aside(out_dir) if self.state else move_aside(out_dir)
        self.log = Log(self.c, self.state)

    def machine(self):
        """What a bit-exact resume needs to be the same."""
        m, version = self.m, str(torch.__version__)
        return dict(device=m.kind, dtype=str(m.dtype), compile=m.compile, processes=m.world, torch=version)

    def save(self, best=False):
        """Saves on the first rank, the others wait. Raises Mistake instead if the weights are not finite."""
        finite = nn.utils.get_total_norm(list(self.model.parameters())).isfinite().item()
        kept = 'none' if self.saved is None else f'step {self.saved}'
        wanted = f'a lower one, the weights are not finite; the last good checkpoint: {kept}'
        check(finite, 'learning_rate', self.c.learning_rate, wanted)
        checkpoint = dict(
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            model_args=asdict(self.model.config),
            iter_num=self.step,
            best_val_loss=self.best,
            evaluated=self.evaluated,
            stale=self.stale,
            config=dict(self.c),
            rng=dict(seed=self.c.seed),  # all there is: randomness is a function of it and the place
            machine=self.machine(),
            tokenizer=self.meta['tokenizer'],
            loops_trained=[self.c.n_loop],
            git=self.git,
            format_version=1,
        )
        self.say(f'saving checkpoint to {self.c.out_dir}')
        on_first_rank(self.m, lambda: save_checkpoint(Path(self.c.out_dir), checkpoint, self.log, best))
        self.saved = self.step

    def evaluate(self):
        """Evaluates, and unless that is all logs and saves. Returns False if a signal came first."""
        c, start = self.c, time.time()
        losses = evaluate(self.model, self.splits, c, self.m, self.meta['token_bytes'], self.stopped)
        if losses is None:
            return False
        train, val = losses['train'], losses['val']
        text = f'step {self.step}: train loss {train["loss"]:.4f}, val loss {val["loss"]:.4f}, '
        text += f'val ppl {val["ppl"]:.2f}, val bpb {val["bpb"]:.4f}, took {time.time() - start:.1f}s'
        if c.eval_only:
            self.say(text)
            return True
        check(math.isfinite(val['loss']), 'learning_rate', c.learning_rate, f'a lower one: {text}')
        better, self.evaluated = val['loss'] < self.best, self.step
        self.best, self.stale = min(val['loss'], self.best), 0 if better else self.stale + 1
        if self.m.rank == 0:
            record = {f'val/{key}': value for key, value in val.items()}
            self.log.write(text, {'iter': self.step, 'train/eval_loss': train['loss'], **record})
        self.save(best=better)
        return True

    def train(self):
        """Steps, evaluations and checkpoints until max_iters. Returns False if a signal ended it, saved."""
        c, whole = self.c, False
        self.start()
        batches = draw_ahead(self.splits['train'], c, self.m, self.step)
        clock, since = time.time(), self.step
        while not self.stopped():
            due = self.step % c.eval_interval == 0 or self.step >= c.max_iters
            if due and self.step > self.evaluated:
                try:
                    if not self.evaluate():
                        continue
                except Exception:
                    if self.m.world > 1 or not self.stopped():
                        raise
                    continue  # a signal has reached the compiler, too
                clock, since = time.time(), self.step
            whole = self.step >= c.max_iters or 0 < c.patience <= self.stale
            if whole:
                break
            lr = lr_at(self.step, c)
            for group in self.optimizer.param_groups:
                group['lr'] = lr
            result = train_step(self.objective, self.optimizer, self.scaler, batches, c, self.m, self.stopped)
            if result is None:
                continue
            self.judge(*result)
            self.step += 1
            if (self.step - 1) % c.log_interval == 0:
                seconds = (time.time() - clock) / (self.step - since)
                clock, since = time.time(), self.step
                self.log_step(*result, lr, seconds)
        if self.saved != self.step:
            self.save()
        return whole

    def judge(self, loss, norm):
        """Counts steps without an update. Raises ValueError at max_bad_steps in a row."""
        # float16 finds the scale of its loss by overflowing
        if math.isfinite(norm) or (self.scaler.is_enabled() and self.scaler.get_scale() >= 1):
            self.bad = 0
            return
        self.bad += 1
        self.say(f'iter {self.step}: the gradient is not finite (loss {loss:.4g}), the step is skipped')
        kept = f'step {self.saved} in {self.c.out_dir}' if self.saved is not None else 'none'
        wanted = f'a finite gradient at iter {self.step}, {self.bad} steps were skipped in a row; '
        wanted += f'try a lower one; the last good checkpoint: {kept}'
        check(self.bad < self.c.max_bad_steps, 'learning_rate', self.c.learning_rate, wanted)

    def log_step(self, loss, norm, lr, seconds):
        """Logs the step that was made last; seconds: per step since the last line."""
        c, m, step = self.c, self.m, self.step - 1
        if m.cpu_group:
            losses = torch.tensor(loss, dtype=torch.float64)
            dist.all_reduce(losses, group=m.cpu_group)
            loss = losses.item() / m.world
        if m.rank > 0:
            return
        rate, ms = self.tokens / seconds, 1000 * seconds
        mfu = self.flops * rate / (m.peak * m.world) if m.peak else None
        left = timedelta(seconds=min(10**9, round(seconds * (c.max_iters - self.step))))
        eta = left if step > self.first else '?'  # the first step compiles
        text = f'iter {step}: loss {loss:.4f}, time {ms:.2f}ms, mfu {f"{mfu:.2%}" if mfu else "n/a"}'
        text += f', grad {norm:.2f}, lr {lr:.1e}, tok/s {rate:,.0f}, loops {c.n_loop}, eta {eta}'
        record = {'iter': step, 'train/loss': loss, 'train/grad_norm': norm, 'lr': lr, 'mfu': mfu}
        self.log.write(text, record | {'train/ms': ms, 'train/tok_per_sec': rate, 'train/loops': c.n_loop})

    def show(self, signals):
        """Prints a short sample, until a signal comes."""
        try:
            tokenizer = make_tokenizer(self.meta['tokenizer'])
        except (ValueError, OSError) as error:
            self.say(f'no sample: {error}')
            return
        idx = torch.tensor([[tokenizer.start]], device=self.m.device)
        generator, ids = torch.Generator(self.m.device).manual_seed(self.c.seed), []
        self.model.eval()
        with torch.compiler.set_stance('force_eager'), self.m.autocast():
            for token in stream(self.model, idx, self.c.sample_tokens, temperature=0.8, generator=generator):
                ids.append(int(token))
                if signals.number:
                    break
        text = tokenizer.decode_bytes(ids).decode('utf-8', 'replace')
        self.say(f'a sample of {len(ids)} tokens:\n---------------\n{text}\n---------------')


def resumed(c, checkpoint):
    """c, with the checkpoint's values for the keys that were not given now."""
    resumable = 'format_version' in checkpoint
    check(resumable, 'init_from', c.init_from, 'a path: that file has no state to resume')
    free = c.keys() - c.given - {'init_from'}
    kept = {key: value for key, value in checkpoint['config'].items() if key in free}
    c.update(kept, out_dir=c.out_dir)
    return c


@command
def main(argv):
    began = time.time()
    c = configure((TrainConfig, GPTConfig), argv)
    checkpoint = find_checkpoint(c.init_from, c.out_dir, {key: c[key] for key in c.given})
    resuming = checkpoint is not None and c.init_from in ('resume', 'auto')
    if resuming:
        c = resumed(c, checkpoint)
    settings = c.build(TrainConfig)
    c.update(BASELINE[c.baseline](c))
    layers = c.n_prelude + c.n_block * c.n_loop + c.n_coda
    work = c.max_iters * c.gradient_accumulation_steps * c.batch_size * c.block_size * layers * c.n_embd
    m = setup(settings, work)
    with Signals(m) as signals, contextlib.closing(Run(c, m, signals, checkpoint, resuming)) as run:
        del checkpoint
        run.say(m.line)
        whole = run.evaluate() if c.eval_only else run.train()
        if whole and not c.eval_only:
            memory, minutes = peak_memory(m) / 2**20, (time.time() - began) / 60
            spent = f'peak memory {memory:,.0f} MiB, total time {minutes:.1f} min'
            run.say(f'best val loss {run.best:.4f}, {spent}')
            if m.rank == 0 and c.sample_tokens:
                run.show(signals)
                run.say(f'more: python {os.path.relpath(ROOT / "sample.py")} --out_dir={c.out_dir}')
        if m.world > 1:
            dist.destroy_process_group()
        if not whole:
            saved = f' at step {run.step}, saved; the same command with --init_from=resume goes on'
            run.say(f'stopped by {signal.Signals(signals.agreed).name}{"" if c.eval_only else saved}')
            sys.exit(128 + signals.agreed)


if __name__ == '__main__':
    main()
