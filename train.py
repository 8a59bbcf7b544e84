"""
Trains a looped transformer (or a plain GPT) on one process or many.

    python train.py config/quickstart.py --batch_size=32
    torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2_looped.py

Batches, dropout and noise are functions of (seed, step, place in the global batch): a run that was killed and resumed is
the run that was not, any number of processes trains on the same global batches, and evaluation changes nothing.
"""

import contextlib
import fcntl
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from configurator import LOCAL_RANK, ROOT, command, configure, peak_memory, setup
from data.dataset import Split, make_tokenizer, read_meta
from model import GPT, GPTConfig, check, load_checkpoint, read_checkpoint, typed_fields


@dataclass
class TrainConfig:
    # output
    out_dir: str = 'out'  # checkpoints (ckpt.pt last, prev.pt the one before, best.pt) and log.jsonl
    eval_interval: int = 2000  # steps between evaluations, each of which saves a checkpoint
    log_interval: int = 1  # steps between lines
    eval_iters: int = 200  # batches per evaluated split, evenly spread over it; 0 = all of val, as many of train
    eval_only: bool = False  # evaluate and leave
    always_save_checkpoint: bool = True  # accepted for nanoGPT's sake, ckpt.pt is always the last
    init_from: str = 'scratch'  # scratch, resume, auto (resume if there is something to resume), or a checkpoint's path
    sample_tokens: int = 200  # length of the sample printed at the end, tokens; 0 = none
    wandb_log: bool = False  # log to Weights & Biases, too
    wandb_project: str = 'nanoloop'
    wandb_run_name: str = 'run'
    # data
    dataset: str = 'pystdlib'  # a folder of data/
    gradient_accumulation_steps: int = 1  # micro-batches per step, over all processes
    batch_size: int = 12  # sequences per micro-batch
    # optimizer: AdamW
    learning_rate: float = 6e-4  # the highest
    max_iters: int = 600000  # steps
    weight_decay: float = 0.1  # of matrices; the injection's is not decayed, it starts as the identity
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # largest norm of the gradient; 0 = any
    max_bad_steps: int = 3  # so many steps in a row with a loss or gradient that is not finite end the run
    patience: int = 0  # stop after so many evaluations without a new best loss; 0 = never
    # learning rate
    decay_lr: bool = True  # False = constant
    lr_schedule: str = 'cosine'  # cosine, or linear: constant, then down over the last warmdown_frac
    warmup_iters: int = 2000  # steps of linear rise
    warmdown_frac: float = 0.2  # of lr_schedule linear
    lr_decay_iters: int | None = None  # steps until min_lr; None = max_iters
    min_lr: float = 6e-5
    # machine
    device: str = 'auto'  # auto, cpu, cuda, cuda:N, mps
    dtype: str = 'auto'  # of matrix products: auto, float32, bfloat16, float16
    compile: bool | str = 'auto'  # compile the blocks
    backend: str = 'auto'  # of several processes: auto, nccl, gloo
    seed: int = 1337
    deterministic: bool = False  # only deterministic kernels, slower on a GPU
    peak_flops: float | None = None  # of the device, for mfu; None = from the table in bench.py

    def __post_init__(self):
        """Raises ValueError for a value of the wrong type or outside its range."""
        typed_fields(self)
        tables = dict(lr_schedule=SCHEDULE)
        for key, table in tables.items():
            check(getattr(self, key) in table, key, getattr(self, key), f'one of {", ".join(table)}')
        for key in ('eval_interval', 'log_interval', 'gradient_accumulation_steps', 'batch_size', 'max_bad_steps'):
            check(getattr(self, key) >= 1, key, getattr(self, key), 'at least 1')
        for key in ('eval_iters', 'sample_tokens', 'max_iters', 'weight_decay', 'grad_clip', 'patience', 'seed'):
            check(getattr(self, key) >= 0, key, getattr(self, key), 'at least 0')
        for key in ('learning_rate', 'min_lr', 'warmup_iters'):
            check(0 <= getattr(self, key) < math.inf, key, getattr(self, key), 'at least 0')
        for key in ('beta1', 'beta2'):
            check(0 <= getattr(self, key) < 1, key, getattr(self, key), 'at least 0 and below 1')
        check(0 <= self.warmdown_frac <= 1, 'warmdown_frac', self.warmdown_frac, 'from 0 to 1')
        decay = self.lr_decay_iters
        check(decay is None or decay >= 0, 'lr_decay_iters', decay, 'at least 0, or None for max_iters')


# -----------------------------------------------------------------------------
# schedule, objective, optimizer

SCHEDULE = {  # share of the way from min_lr to learning_rate, at x in [0, 1] between the warm-up and lr_decay_iters
    'cosine': lambda x, c: 0.5 * (1 + math.cos(math.pi * x)),
    'linear': lambda x, c: min(1.0, (1 - x) / c.warmdown_frac) if c.warmdown_frac else 1.0,
}


def lr_at(step, c):
    """The learning rate of a step (0 is the first)."""
    if step < c.warmup_iters:
        return c.learning_rate * (step + 1) / (c.warmup_iters + 1)
    if not c.decay_lr:
        return c.learning_rate
    end = c.max_iters if c.lr_decay_iters is None else c.lr_decay_iters
    x = min(1.0, (step - c.warmup_iters) / (end - c.warmup_iters)) if end > c.warmup_iters else 1.0
    return c.min_lr + SCHEDULE[c.lr_schedule](x, c) * (c.learning_rate - c.min_lr)


class Objective(nn.Module):
    """The loss of a batch: a weighting of the model's loss table. Here the last iteration's mean over all targets."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx, targets):
        ce, _ = self.model.table(idx, targets, rows=(-1,))
        return ce.sum() / (targets != -1).sum().clamp(min=1)


def make_optimizer(model, c, kind):
    """AdamW in two groups: matrices decay; norms, biases and the injection, which starts as the identity, do not."""
    named = dict(model.named_parameters())
    decay = {name: p for name, p in named.items() if p.dim() >= 2 and not name.startswith('inject.')}
    other = {name: p for name, p in named.items() if name not in decay}
    groups = [dict(params=list(decay.values()), weight_decay=c.weight_decay), dict(params=list(other.values()))]
    betas, fused = (c.beta1, c.beta2), kind in ('cpu', 'cuda')
    optimizer = torch.optim.AdamW(groups, lr=c.learning_rate, betas=betas, weight_decay=0.0, fused=fused)
    counts = [(len(group), sum(p.numel() for p in group.values())) for group in (decay, other)]
    return optimizer, counts


def draw(split, c, m, step, micro):
    """Micro-batch `micro` of this rank as (idx, targets, seed): its place in the global batch decides all of it.

    idx, targets: (B, T) on the CPU; seed: for the default generator, which dropout and noise draw from.
    """
    g = micro * m.world + m.rank
    data, noise = np.random.SeedSequence((c.seed, step, g)).spawn(2)
    x, y = split.draw(np.random.default_rng(data), c.batch_size)
    return torch.from_numpy(x), torch.from_numpy(y), int(noise.generate_state(1, np.uint64)[0] >> 1)


def draw_ahead(split, c, m, step):
    """Yields the micro-batches of this rank from a step on; while one is used the next one is read."""
    micros = c.gradient_accumulation_steps // m.world
    places = ((later, micro) for later in itertools.count(step) for micro in range(micros))
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(draw, split, c, m, *next(places))
        while True:
            batch, ahead = ahead.result(), pool.submit(draw, split, c, m, *next(places))
            yield batch


def train_step(objective, optimizer, scaler, batches, c, m, stopped=lambda: False):
    """One optimizer step: forward and backward of this rank's micro-batches, clipping of the reduced gradient, update.

    batches yields draw's triples. Returns this rank's mean loss and the norm of the gradient before clipping, as floats;
    no update is made if the norm is not finite. None if stopped() between micro-batches: nothing has changed then.
    """
    micros = c.gradient_accumulation_steps // m.world
    total = torch.zeros((), device=m.device)
    for micro in range(micros):
        if micro and stopped():
            return None
        idx, targets, seed = next(batches)
        if m.kind == 'cuda':
            idx, targets = idx.pin_memory(), targets.pin_memory()
        idx, targets = (x.to(m.device, non_blocking=True) for x in (idx, targets))
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
    if math.isfinite(norm) or scaler.is_enabled():  # the scaler leaves the update out by itself
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


# -----------------------------------------------------------------------------
# evaluation


@torch.no_grad()
def evaluate(model, splits, c, m, token_bytes, stopped=lambda: False):
    """{split: {loss, ppl, bpb}} over fixed windows, the same for every number of processes; None if stopped.

    Bits per byte counts the targets that stand for bytes, as token_bytes (per id) says; special tokens stand for none.
    """
    n_val = len(splits['val'].fixed())
    sizes, result = torch.tensor(token_bytes, dtype=torch.float64), {}
    model.eval()
    for name, split in splits.items():
        windows = split.fixed(c.eval_iters * c.batch_size or n_val)
        batches = [windows[i : i + c.batch_size] for i in range(0, len(windows), c.batch_size)]
        sums = torch.zeros(4, dtype=torch.float64)
        for i in range(m.rank, -(-len(batches) // m.world) * m.world, m.world):  # as many rounds on every rank
            if stopped():
                model.train()
                return None
            if i >= len(batches):
                continue
            x, y = (torch.from_numpy(a) for a in split.stack(batches[i], c.batch_size))
            with m.autocast():
                ce, _ = model.table(x.to(m.device), y.to(m.device))
            ce, count = ce[0].cpu().double(), sizes[y.clamp(min=0)] * (y != -1)
            sums += torch.stack((ce.sum(), (y != -1).sum(), ce[count > 0].sum(), count.sum()))
        if m.cpu_group:
            dist.all_reduce(sums, group=m.cpu_group)
        nll, tokens, nll_bytes, count = sums.tolist()
        loss = nll / max(1, tokens)
        bpb = nll_bytes / count / math.log(2) if count else math.nan
        result[name] = dict(loss=loss, ppl=math.exp(min(loss, 700)), bpb=bpb)
    model.train()
    return result


# -----------------------------------------------------------------------------
# files: checkpoints and the log


def replace_by_link(source, target):
    """Makes target the same file as source, at once. Where the file system has no links it becomes a copy."""
    new = target.with_name(target.name + '.tmp')
    new.unlink(missing_ok=True)
    try:
        os.link(source, new)
    except OSError:
        shutil.copyfile(source, new)
    os.replace(new, target)
    new.unlink(missing_ok=True)  # replacing a file by itself leaves the name behind


def save_checkpoint(out_dir, checkpoint, log, best):
    """Writes ckpt.pt so that at every moment it or prev.pt is whole, and best.pt if best. Raises OSError with the reason."""
    path, new = out_dir / 'ckpt.pt', out_dir / 'ckpt.pt.tmp'
    try:
        os.fsync(log)
        with open(new, 'wb') as file:
            torch.save(dict(checkpoint, log_bytes=os.fstat(log.fileno()).st_size), file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            replace_by_link(path, out_dir / 'prev.pt')
        os.replace(new, path)
        if best:
            replace_by_link(path, out_dir / 'best.pt')
        folder = os.open(out_dir, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (RuntimeError, OSError) as error:  # a full disk can be either: torch's zip writer has its own
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        kept = next((str(p) for p in (path, out_dir / 'prev.pt') if p.exists()), 'none yet')
        reason = str(error).strip().splitlines()[0]
        raise OSError(f'the checkpoint cannot be saved: {reason}; the last good one: {kept}') from None


def find_checkpoint(c):
    """The checkpoint that init_from names, None for scratch. Raises ValueError if there is none that loads."""
    if c.init_from == 'scratch':
        return None
    if c.init_from not in ('resume', 'auto') and not Path(c.init_from).is_dir():
        there = Path(c.init_from).exists()
        check(there, 'init_from', c.init_from, "scratch, resume, auto, or the path of a checkpoint or a run's folder")
        return read_checkpoint(c.init_from)
    folder = Path(c.out_dir if c.init_from in ('resume', 'auto') else c.init_from)
    paths = [path for name in ('ckpt.pt', 'prev.pt') if (path := folder / name).exists()]
    if not paths and c.init_from == 'auto':
        return None
    check(paths, 'init_from', c.init_from, f'a checkpoint in {folder}, there is none')
    for path in paths:
        try:
            return read_checkpoint(path)
        except ValueError as error:
            print(error, file=sys.stderr)
    raise ValueError(f'no checkpoint in {folder} can be read')


def move_aside(out_dir):
    """Moves a finished or broken-off run in out_dir to out_dir/run-N: starting from scratch deletes nothing."""
    files = [out_dir / name for name in ('ckpt.pt', 'prev.pt', 'best.pt', 'log.jsonl')]
    if not any(path.suffix == '.pt' and path.exists() for path in files):
        return
    n = next(n for n in range(1, 10**6) if not (out_dir / f'run-{n}').exists())
    (out_dir / f'run-{n}').mkdir()
    for path in files:
        if path.exists():
            os.replace(path, out_dir / f'run-{n}' / path.name)
    print(f'{out_dir} holds an earlier run, it is now in {out_dir / f"run-{n}"}')


def open_out_dir(out_dir):
    """Creates out_dir and locks it against a second run. Returns the lock, to be kept. Raises ValueError if it cannot be."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = open(out_dir / '.lock', 'w')
    except OSError as error:
        raise ValueError(f'out_dir={str(out_dir)!r} cannot be written: {error.strerror}') from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f'another run is training in out_dir={str(out_dir)!r}') from None
    return lock


class Log:
    """log.jsonl, one object per line, on the first rank; stdout and, if asked for, Weights & Biases get the same."""

    def __init__(self, c, m, checkpoint):
        self.file = self.wandb = None
        self.wandb_id = checkpoint.get('wandb_id') or uuid.uuid4().hex[:8]
        if m.rank == 0:
            self.file = open(Path(c.out_dir) / 'log.jsonl', 'ab', buffering=0)
            self.file.truncate(checkpoint.get('log_bytes', 0))  # steps after the checkpoint will be run again
        if m.rank == 0 and c.wandb_log:
            try:
                import wandb
            except ImportError:
                raise ValueError('wandb_log=True needs wandb: pip install wandb') from None
            name = dict(project=c.wandb_project, name=c.wandb_run_name, id=self.wandb_id)
            self.wandb = wandb.init(**name, resume='allow', config=dict(c))

    def write(self, text, record):
        if self.file:
            print(text, flush=True)
            plain = {key: number(value) for key, value in record.items()}
            self.file.write(json.dumps(plain).encode() + b'\n')
        if self.wandb:
            self.wandb.log(record, step=record['iter'])


def number(value):
    """JSON has no nan and no inf."""
    return value if not isinstance(value, float) or math.isfinite(value) else None


class Signals:
    """SIGTERM and SIGINT raise a flag that is read where a run can be saved. Repeats are ignored, since torchrun sends each
    several times; a Ctrl-C more than 2 s after the first signal kills."""

    def __init__(self, m):
        self.m, self.number, self.seen, self.first = m, 0, 0, 0.0

    def __enter__(self):
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.number and isinstance(error, Exception) and not isinstance(error, ValueError | OSError):
            # what a signal breaks that other processes got as well: a compiler, another rank
            print(f'stopped by {signal.Signals(self.number).name} ({kind.__name__})', file=sys.stderr)
            sys.exit(128 + self.number)

    def note(self, number, frame):
        if self.number and number == signal.SIGINT and time.monotonic() - self.first > 2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not self.number:
            self.number, self.first = number, time.monotonic()

    def stopped(self):
        """The signal that some rank got, 0 if none did. All ranks call this at the same places."""
        self.seen = largest_of_ranks(self.m, self.number)
        return self.seen


def largest_of_ranks(m, value):
    """The largest of all ranks' integers, agreed on between CPUs so that no device is waited for."""
    if m.cpu_group is None:
        return value
    value = torch.tensor([value])
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=m.cpu_group)
    return int(value)


def git_commit():
    """The commit of this repository, with a + if files differ from it; None outside of git."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        run = lambda *args: subprocess.check_output(('git', '-C', ROOT, *args), text=True, stderr=subprocess.DEVNULL)  # noqa: E731
        return run('rev-parse', 'HEAD').strip() + ('+' if run('status', '--porcelain', '-uno').strip() else '')


# -----------------------------------------------------------------------------
# the run


def prepare_data(c, m):
    """The folder of the data set and its meta. pystdlib, which needs no download, is prepared if it is missing."""
    folder = ROOT / 'data' / c.dataset
    if c.dataset == 'pystdlib' and LOCAL_RANK == 0 and not (folder / 'meta.json').exists():
        print('preparing data/pystdlib, the standard library of this Python', flush=True)
        subprocess.run([sys.executable, folder / 'prepare.py'], check=True)
    if m.cpu_group:
        dist.barrier(m.cpu_group)
    return folder, read_meta(folder)


def build_model(c, meta, checkpoint):
    """The model: from scratch as c says, or the checkpoint's with the keys that were given. vocab_size is the data's."""
    keys = [field.name for field in fields(GPTConfig)]
    if checkpoint is None:
        vocab = {} if 'vocab_size' in c.given else dict(vocab_size=meta['vocab_size'])
        return GPT(GPTConfig(**{key: c[key] for key in keys} | vocab))
    model, _ = load_checkpoint(checkpoint, **{key: c[key] for key in keys if key in c.given})
    theirs = checkpoint.get('tokenizer', meta['tokenizer'])
    check(theirs == meta['tokenizer'], 'dataset', c.dataset, 'one with the tokenizer of the checkpoint')
    return model


def resumed(c, checkpoint):
    """c with the checkpoint's values for all keys that were not given now; tells which given ones differ."""
    old = checkpoint['config']
    for key in sorted(c.given & set(old) - {'init_from', 'out_dir'}):
        if c[key] != old[key]:
            print(f'resuming with another {key}: {old[key]!r} -> {c[key]!r}')
    kept = {key: old[key] for key in c if key in old and key not in c.given | {'init_from', 'out_dir'}}
    result = type(c)(c, **kept)
    result.given = c.given
    return result


class Run:
    """A run and its state: model, optimizer, step (updates made), best validation loss, log. train() until max_iters."""

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
        state = checkpoint if resuming else {}
        self.step = state.get('iter_num', 0)
        self.evaluated, self.stale = state.get('evaluated', 0), state.get('stale', 0)  # see train
        self.best = state.get('best_val_loss', math.inf)
        self.state, self.bad = state, 0

    def say(self, text):
        if self.m.rank == 0:
            print(text, flush=True)

    def start(self):
        """Opens out_dir and the optimizer, and prints what will be trained."""
        c, m, state = self.c, self.m, self.state
        if m.rank == 0:
            self.lock = open_out_dir(Path(c.out_dir))
            move_aside(Path(c.out_dir)) if not state else None
        self.log = Log(c, m, state)
        self.optimizer, counts = make_optimizer(self.model, c, m.kind)
        self.scaler = torch.amp.GradScaler(m.kind, enabled=m.dtype == torch.float16)
        if state:
            self.optimizer.load_state_dict(state['optimizer'])
            self.scaler.load_state_dict(state['scaler'])
            differs = [key for key, value in self.machine().items() if state['machine'][key] != value]
            for key in differs:
                self.say(f'not bit-exact: {key} was {state["machine"][key]}, is {self.machine()[key]}')
            self.say(f'resuming at step {self.step}')
        self.saved, self.state = (self.step if state else None), None  # lets go of the checkpoint's memory
        self.objective = Objective(self.model)
        if m.world > 1:
            self.objective = DistributedDataParallel(self.objective)
        self.tokens = c.gradient_accumulation_steps * c.batch_size * c.block_size
        self.flops = self.model.flops()[1]
        shape = f'{c.n_prelude} + {c.n_block}x{c.n_loop} + {c.n_coda}'
        self.say(f'tokens per iteration will be: {self.tokens:,}')
        self.say(f'number of parameters: {self.model.num_params() / 1e6:.2f}M')
        self.say(f'executed layers: {self.model.config.depth} ({shape}), training FLOPs per token: {self.flops:.4g}')
        for kind, (tensors, size) in zip(('decayed', 'non-decayed'), counts, strict=True):
            self.say(f'num {kind} parameter tensors: {tensors}, with {size:,} parameters')

    def machine(self):
        m = self.m
        return dict(device=m.kind, dtype=str(m.dtype), compile=m.compile, world=m.world, torch=torch.__version__)

    def save(self, best=False):
        """Saves on the first rank; all ranks leave together, and end with status 1 if it failed."""
        failure = None
        if self.m.rank == 0:
            checkpoint = dict(
                model=self.model.state_dict(),
                optimizer=self.optimizer.state_dict(),
                scaler=self.scaler.state_dict(),
                model_args=asdict(self.model.config),
                iter_num=self.step,
                best_val_loss=self.best,
                config=dict(self.c),
                rng=dict(seed=self.c.seed),  # all there is: randomness is a function of it and the step
                tokenizer=self.meta['tokenizer'],
                loops_trained=[self.c.n_loop],
                evaluated=self.evaluated,
                stale=self.stale,
                machine=self.machine(),
                wandb_id=self.log.wandb_id,
                format_version=1,
                git=git_commit(),
            )
            self.say(f'saving checkpoint to {self.c.out_dir}')
            try:
                save_checkpoint(Path(self.c.out_dir), checkpoint, self.log.file, best)
            except OSError as error:
                failure = error
        if largest_of_ranks(self.m, int(failure is not None)):
            raise failure or SystemExit(1)
        self.saved = self.step

    def evaluate(self):
        """Evaluates, logs and saves. Returns False if a signal came first."""
        c, start = self.c, time.time()
        losses = evaluate(self.model, self.splits, c, self.m, self.meta['token_bytes'], self.stopped)
        if losses is None:
            return False
        train, val = losses['train'], losses['val']
        text = f'step {self.step}: train loss {train["loss"]:.4f}, val loss {val["loss"]:.4f}, val ppl {val["ppl"]:.2f}'
        text += f', val bpb {val["bpb"]:.4f}, took {time.time() - start:.1f}s'
        if c.eval_only:
            self.say(text)
            return True
        better, self.evaluated = val['loss'] < self.best, self.step
        self.best, self.stale = min(val['loss'], self.best), 0 if better else self.stale + 1
        record = {'train/eval_loss': train['loss']} | {f'val/{key}': value for key, value in val.items()}
        self.log.write(text, dict(iter=self.step, **record))
        self.save(best=better)
        return True

    def train(self):
        """Steps, evaluations and checkpoints until max_iters. Returns False if a signal ended it, after saving."""
        c, m = self.c, self.m
        self.start()
        batches = draw_ahead(self.splits['train'], c, m, self.step)
        clock, since, whole = time.time(), self.step, False
        while not self.stopped():
            due = self.step % c.eval_interval == 0 or self.step >= c.max_iters
            if due and self.step > self.evaluated:
                if not self.evaluate():
                    continue
                clock, since = time.time(), self.step
            whole = self.step >= c.max_iters or 0 < c.patience <= self.stale
            if whole:
                break
            lr = lr_at(self.step, c)
            for group in self.optimizer.param_groups:
                group['lr'] = lr
            result = train_step(self.objective, self.optimizer, self.scaler, batches, c, m, self.stopped)
            if result is None:
                continue
            self.judge(*result, lr)
            if self.step % c.log_interval == 0:
                seconds = (time.time() - clock) / (self.step + 1 - since)
                clock, since = time.time(), self.step + 1
                self.log_step(*result, lr, seconds)
            self.step += 1
        if self.saved != self.step:
            self.save()
        return whole

    def judge(self, loss, norm, lr):
        """Counts steps without an update; raises ValueError after max_bad_steps in a row."""
        scaled_too_far = self.scaler.is_enabled() and self.scaler.get_scale() >= 1  # float16: the scale is found this way
        if math.isfinite(norm) or scaled_too_far:
            self.bad = 0
            return
        self.bad += 1
        self.say(f'iter {self.step}: the gradient is not finite (loss {loss:.4g}), no update is made')
        if self.bad >= self.c.max_bad_steps:
            kept = f'step {self.saved} in {self.c.out_dir}' if self.saved else 'there is none yet'
            raise ValueError(
                f'iter {self.step}: {self.bad} steps in a row without a finite gradient at learning rate {lr:.2g}: '
                f'try a lower one; the last good checkpoint: {kept}'
            )

    def log_step(self, loss, norm, lr, seconds):
        c, m = self.c, self.m
        if m.cpu_group:
            mean = torch.tensor([loss], dtype=torch.float64)
            dist.all_reduce(mean, group=m.cpu_group)
            loss = mean.item() / m.world
        rate = self.tokens / seconds
        mfu = self.flops * rate / (m.peak * m.world) if m.peak else None
        eta = timedelta(seconds=round(seconds * (c.max_iters - self.step - 1)))
        record = dict(iter=self.step, loss=loss, lr=lr, mfu=mfu, ms=1000 * seconds)
        record.update({'train/loss': loss, 'train/grad_norm': norm, 'train/tok_per_sec': rate, 'train/loops': c.n_loop})
        self.log.write(
            f'iter {self.step}: loss {loss:.4f}, time {1000 * seconds:.2f}ms, mfu {f"{mfu:.2%}" if mfu else "n/a"}, '
            f'grad {norm:.2f}, lr {lr:.1e}, tok/s {rate:,.0f}, loops {c.n_loop}, eta {eta}',
            record,
        )

    def show(self):
        """A short sample, and how to get more."""
        c = self.c
        tokenizer = make_tokenizer(self.meta['tokenizer'])
        self.model.eval()
        idx = torch.full((1, 1), tokenizer.start, device=self.m.device)
        generator = torch.Generator(self.m.device).manual_seed(c.seed)
        with torch.compiler.set_stance('force_eager'), self.m.autocast():
            ids = self.model.generate(idx, c.sample_tokens, temperature=0.8, top_k=200, generator=generator)[0, 1:]
        print(f'--------------- a sample of {c.sample_tokens} tokens:')
        print(tokenizer.decode_bytes(ids.tolist()).decode('utf-8', 'replace'))
        print('---------------')


@command
def main(argv):
    began = time.time()
    c = configure((TrainConfig, GPTConfig), argv)
    checkpoint = find_checkpoint(c)
    resuming = checkpoint is not None and c.init_from in ('resume', 'auto')
    if resuming:
        check('format_version' in checkpoint, 'init_from', c.init_from, 'the path of the file: it is not of this train.py')
        c = resumed(c, checkpoint)
    m = setup(c.build(TrainConfig), c.max_iters)
    with Signals(m) as signals:
        run = Run(c, m, signals, checkpoint, resuming)
        del checkpoint
        run.say(m.line)
        whole = run.evaluate() if c.eval_only else run.train()
        if whole and not c.eval_only:
            memory, minutes = peak_memory(m) / 2**20, (time.time() - began) / 60
            run.say(f'best val loss {run.best:.4f}, peak memory {memory:,.0f} MiB, total time {minutes:.1f} min')
            if m.rank == 0 and c.sample_tokens:
                run.show()
                run.say(f'more samples: python {os.path.relpath(ROOT / "sample.py")} --out_dir={c.out_dir}')
    if m.world > 1:
        dist.destroy_process_group()
    if not whole:
        saved = '' if c.eval_only else f' at step {run.step}, saved; the same command with --init_from=resume goes on'
        run.say(f'stopped by {signal.Signals(signals.seen).name}{saved}')
        sys.exit(128 + signals.seen)


if __name__ == '__main__':
    main()
