"""
Trains a looped transformer, or a plain GPT, in one process or many.

    python train.py config/quickstart.py --batch_size=32
    torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2_looped.py

Batches, dropout and noise are functions of (seed, step, place in the global batch): a run killed and resumed
is the run that was not, any number of processes trains on the same batches, and evaluation changes nothing.
"""

import contextlib
import functools
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

from configurator import command, configure, print_error, print_line
from model import GPT, GPTConfig
from nanoloop import LOCAL_RANK, RANK, ROOT
from nanoloop.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint, set_broken_aside
from nanoloop.checks import check, check_least
from nanoloop.count import flops
from nanoloop.datasets import Split, find_data, read_meta
from nanoloop.diagnose import diagnose, norms_of_weights
from nanoloop.generate import stream
from nanoloop.machine import Signals, peak_memory, setup
from nanoloop.objective import OBJECTIVE, SAMPLING, Objective, check_loops, loops_at
from nanoloop.optimizer import OPTIMIZER, SCHEDULE, lr_at, make_optimizers, set_rates
from nanoloop.parallel import max_over_ranks, rank0_first, sum_over_ranks
from nanoloop.run_folder import Log, git_commit, move_aside, open_out_dir
from nanoloop.tokenizer import make_tokenizer


@dataclass
class TrainConfig:
    # output
    out_dir: str = 'out'  # checkpoints (ckpt.pt last, prev.pt the one before, best.pt) and log.jsonl
    eval_interval: int = 2000  # steps between evaluations; each saves a checkpoint
    log_interval: int = 1  # steps between lines
    eval_iters: int = 200  # batches per evaluated split, evenly spread; 0 = all of val, and as many of train
    eval_only: bool = False  # evaluate and leave
    diagnose: int = 0  # steps between looks at states and gradients, see diagnose.py; 0 = none
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
    # objective
    objective: str = 'end'  # what learns: end (last loop), step (all), few (last third), exit, gate (Ouro)
    beta: float = 0.1  # of objective exit: the weight of the exits' entropy
    gate_ahead: bool = False  # of objective gate: the gate of a loop learns whether the next one improves
    loop_sampling: str = 'fixed'  # loops of a step: n_loop; or uniform: 1 to 2 n_loop - 1; or poisson
    loop_max: int | None = None  # more are cut down to it; poisson, with its mean of n_loop + 1, needs it
    loop_warmup: int = 0  # steps N over which n_loop grows from 1, as n_loop (1 - sqrt(1 - step / N))
    max_flops: float | None = None  # end when so many are spent, if max_iters does not come first
    # optimizer
    optimizer: str = 'adamw'  # or muon: it takes the matrices of blocks and injection, AdamW the rest
    learning_rate: float = 6e-4  # the highest
    matrix_lr: float | None = None  # of matrices in blocks and injection; None = learning_rate; Muon's: 0.02
    embedding_lr: float | None = None  # None = learning_rate
    head_lr: float | None = None  # of an untied head; None = learning_rate
    lr_width: int | None = None  # AdamW's rates are for this n_embd: times sqrt(lr_width / n_embd)
    max_iters: int = 600000  # steps
    weight_decay: float = 0.1  # of matrices, with muon of those in blocks alone; never of the injection
    beta1: float = 0.9  # of AdamW's mean of gradients
    beta2: float = 0.95  # of their squares' mean
    adam_eps: float = 1e-8  # added to the root of the latter
    grad_clip: float = 1.0  # largest norm of the gradient; 0 = any
    max_bad_steps: int = 3  # so many steps in a row without a finite gradient end the run
    patience: int = 0  # stop after so many evaluations without a new best loss; 0 = never, as with gate
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
        check_least(self, 1, 'max_bad_steps', 'peak_flops', 'loop_max', 'max_flops', 'lr_width')
        check_least(self, 0, 'eval_iters', 'sample_tokens', 'max_iters', 'warmup_iters', 'lr_decay_iters')
        check_least(self, 0, 'weight_decay', 'grad_clip', 'patience', 'seed', 'learning_rate', 'min_lr')
        check_least(self, 0, 'matrix_lr', 'embedding_lr', 'head_lr', 'beta', 'loop_warmup', 'diagnose')
        check_least(self, 0, 'adam_eps')
        for key in ('beta1', 'beta2'):
            check(0 <= getattr(self, key) < 1, key, getattr(self, key), 'at least 0 and below 1')
        check(0 <= self.warmdown_frac <= 1, 'warmdown_frac', self.warmdown_frac, 'from 0 to 1')
        check(self.seed < 2**63, 'seed', self.seed, 'below 2**63')
        lowest = self.min_lr <= self.learning_rate or not self.decay_lr
        check(lowest, 'min_lr', self.min_lr, f'at most learning_rate={self.learning_rate}')
        others = [key for key in ('matrix_lr', 'embedding_lr', 'head_lr') if getattr(self, key)]
        wanted = f'above 0 with {" and ".join(others)}, whose schedule it is'
        check(self.learning_rate > 0 or not others, 'learning_rate', self.learning_rate, wanted)
        wanted = 'same_params, same_flops or nothing'
        check(self.baseline in BASELINE, 'baseline', self.baseline, wanted)
        tables = dict(lr_schedule=SCHEDULE, objective=OBJECTIVE, loop_sampling=SAMPLING, optimizer=OPTIMIZER)
        for key, table in tables.items():
            check(getattr(self, key) in table, key, getattr(self, key), f'one of {", ".join(table)}')


def unrolled(c):
    """The windows of a looped model's layers in the order of their execution."""
    layers = c.n_prelude + c.n_block + c.n_coda
    letters = ''.join(itertools.islice(itertools.cycle(c.window_pattern), layers))
    head, loop = letters[: c.n_prelude], letters[c.n_prelude : c.n_prelude + c.n_block]
    return head + loop * c.n_loop + letters[c.n_prelude + c.n_block :]


# what a looped model is to be compared with, applied after all other keys
ONCE = dict(n_loop=1, bptt_k=None, objective='end', loop_sampling='fixed', loop_max=None, loop_warmup=0)
PLAIN = dict(ONCE, input_injection='passthrough', state_init='prelude', state_std=None)
BASELINE = {
    '': lambda c: {},
    'same_params': lambda c: ONCE,
    'same_flops': lambda c: dict(PLAIN, n_block=c.n_block * c.n_loop, window_pattern=unrolled(c)),
}


def apply_baseline(c):
    """Sets c's keys to those of its baseline, and tells which change."""
    for key, value in BASELINE[c.baseline](c).items():
        if c[key] != value and RANK == 0:
            print_line(f'baseline {c.baseline}: {key} = {value!r}')
        c[key] = value


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


def train_step(objective, optimizers, scaler, batches, n_loop, c, m, stopped=lambda: False, look=None):
    """One optimizer step: this rank's micro-batches, clipping of the reduced gradient, update.

    batches yields draw's triples. Every target that counts weighs the same, whatever its micro-batch. look:
    called with a micro-batch before its pass, and without one when the gradient is clipped. Returns this
    rank's part of the loss, the gradient's norm before clipping and what else the objective logs, as floats;
    there is no update if the norm is not finite. None if stopped() between micro-batches.
    """
    micros, cuda = c.gradient_accumulation_steps // m.world, m.kind == 'cuda'
    sums, targets_seen = {}, 0
    for micro in range(micros):
        if micro and stopped():
            return None
        *pair, seed = next(batches)
        targets_seen += int((pair[1] != -1).sum())
        idx, targets = (
            x.pin_memory().to(m.device, non_blocking=True) if cuda else x.to(m.device) for x in pair
        )
        if look and micro == 0:
            torch.manual_seed(seed)
            look(idx, targets)
        objective.require_backward_grad_sync = micro == micros - 1  # DDP reduces the gradient once per step
        torch.manual_seed(seed)
        with m.autocast():
            loss, more = objective(idx, targets, n_loop)
        scaler.scale(loss / micros).backward()
        for name, x in dict(more, loss=loss.detach()).items():
            sums[name] = sums.get(name, 0.0) + x / micros
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    params = [p for optimizer in optimizers for group in optimizer.param_groups for p in group['params']]
    masked = targets.numel() * micros * m.world / max(1, sum_over_ranks(m, targets_seen))
    if masked != 1:
        torch._foreach_mul_([p.grad for p in params if p.grad is not None], masked)
    norm = nn.utils.clip_grad_norm_(params, c.grad_clip or math.inf)
    # here the host waits for the device
    *values, norm = torch.stack([*sums.values(), norm]).tolist()
    if look:
        look()
    for optimizer in optimizers:
        if math.isfinite(norm):
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()  # of a disabled scaler: nothing
    more = {name: value * masked for name, value in zip(sums, values, strict=True)}
    return more.pop('loss'), norm, more


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
                ce, _ = model.loss_table(x.to(m.device), y.to(m.device))
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
        print_line('preparing data/pystdlib, the standard library of this Python')
        status = subprocess.run([sys.executable, folder / 'prepare.py']).returncode
        if status:
            sys.exit(status)
    max_over_ranks(m, 0)  # wait for it
    return folder, read_meta(folder)


def build_model(c, meta, checkpoint):
    """From scratch as c says, or the checkpoint's model with the given keys. vocab_size is the data's."""
    keys = {field.name for field in fields(GPTConfig)}
    if checkpoint is None:
        c['vocab_size'] = c.vocab_size if 'vocab_size' in c.given else meta['vocab_size']
        return GPT(c.build(GPTConfig))
    model, _ = load_checkpoint(checkpoint, **{key: c[key] for key in keys & c.given})
    ours, theirs = meta['tokenizer'], checkpoint.get('tokenizer') or meta['tokenizer']
    wanted = f'one in the tokens of the checkpoint: {model.config.vocab_size} of kind {theirs["kind"]}'
    check(ours == theirs, 'dataset', c.dataset, f'{wanted}, not {meta["vocab_size"]} of kind {ours["kind"]}')
    return model


def has_gate(checkpoint):
    return any('exit_gate.' in name for name in checkpoint['model'])


def flops_of(model, c, n_loop):
    """FLOPs per token of a training step with n_loop loops."""
    aim = OBJECTIVE[c.objective]
    return sum(flops(model, n_loop, len(aim.rows(n_loop)))['forward' if aim.frozen else 'training'].values())


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
        self.tokens = c.gradient_accumulation_steps * c.batch_size * c.block_size  # of a step
        check_loops(c, self.model.config)
        self.splits = {s: Split(folder, self.meta, s, c.block_size, c.vocab_size) for s in ('train', 'val')}
        if m.compile:
            for block in self.model.blocks():
                block.compile()
        self.state, self.weights = checkpoint if resuming else {}, None
        if checkpoint is not None:
            gate = ', with a new exit gate' if c.exit_gate and not has_gate(checkpoint) else ''
            self.weights = f'weights of {c.init_from}, step {int(checkpoint.get("iter_num", 0))}{gate}'
        self.step = self.state.get('iter_num', 0)
        self.best = self.state.get('best_val_loss', math.inf)
        self.evaluated = self.state.get('evaluated', 0)  # the step of the last evaluation
        self.stale = self.state.get('stale', 0)  # evaluations since the best
        self.saved = self.step if resuming else None
        alike = -max_over_ranks(m, -self.step) == max_over_ranks(m, self.step)
        check(alike, 'out_dir', c.out_dir, 'a folder that all machines share')
        self.flops = functools.cache(lambda n_loop: flops_of(self.model, c, n_loop))  # of a token
        self.spent = self.state.get('flops', 0.0)
        self.loops = set(self.state.get('loops_trained', ()))
        self.end = c.max_iters if c.max_flops is None else self.last_step()
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
            print_line(text)

    def start(self):
        """Opens out_dir, makes the optimizer and prints what will be trained."""
        c, m, state = self.c, self.m, self.state
        rank0_first(m, self.open)
        self.objective = self.plain = Objective(self.model, c)
        self.optimizers, lines = make_optimizers(self.model, c)
        self.scaler = torch.amp.GradScaler(m.kind, enabled=m.dtype == torch.float16)
        if state:
            self.load_optimizers(state['optimizer'])
            if state['scaler'] and self.scaler.is_enabled():
                self.scaler.load_state_dict(state['scaler'])
            for now, then, what in (
                (c, state['config'], 'changed'),
                (self.machine(), state['machine'], 'not bit-exact'),
            ):
                for key in sorted(now.keys() & then.keys() - {'init_from', 'out_dir'}):
                    if now[key] != then[key]:
                        self.say(f'{what}: {key} was {then[key]}, is {now[key]}')
            limit = 'max_iters' if self.end == c.max_iters else 'max_flops'
            done = f', which is the last: a larger {limit} goes on' if self.step >= self.end else ''
            self.say(f'resuming at step {self.step}{done}')
        elif self.weights:
            self.say(self.weights)
        self.git = git_commit()
        self.state = None  # lets go of its memory
        if m.world > 1:
            self.objective = DistributedDataParallel(self.objective)
            self.objective.broadcast_buffers = False  # the noise table is the same everywhere
        micros = f'{c.gradient_accumulation_steps} x {c.batch_size} x {c.block_size}'
        layers = f'{self.model.config.depth} ({c.n_prelude} + {c.n_block} x {c.n_loop} + {c.n_coda})'
        self.say(f'tokens per iteration will be: {self.tokens:,} ({micros}, over {m.world} process(es))')
        self.say(f'number of parameters: {self.model.get_num_params() / 1e6:.2f}M')
        if c.vocab_size > 2 * self.meta['vocab_size']:
            self.say(f'vocab_size={c.vocab_size} is far above the {self.meta["vocab_size"]} of the data')
        self.say(f'executed layers: {layers}, training FLOPs per token: {self.flops(c.n_loop):.4g}')
        for line in lines:
            self.say(line)
        if c.warmup_iters > self.end:
            self.say(f'warmup_iters={c.warmup_iters}: the learning rate rises until the end, at {self.end}')
        if self.model.exit_gate and not OBJECTIVE[c.objective].gated:
            self.say(f'objective={c.objective} does not train the exit gate')
        if OBJECTIVE[c.objective].frozen and self.weights is None:
            self.say(f'objective={c.objective} leaves the model as it began, at random; see --init_from=PATH')
        if self.end < c.max_iters:
            self.say(f'max_flops={c.max_flops:.4g} are spent after {self.end:,} steps')

    def load_optimizers(self, states):
        """Takes over the optimizers' states; rates and the like are as the keys say now."""
        states, held = states if isinstance(states, list) else [states], self.optimizers
        sizes = [[len(group['params']) for group in state['param_groups']] for state in states]
        alike = sizes == [[len(group['params']) for group in o.param_groups] for o in held]
        for key in ('optimizer', 'objective'):
            now, then = self.c[key], self.state['config'].get(key)
            wanted = f'{then!r} as in the checkpoint, to go on; init_from=PATH takes its weights alone'
            check(alike or now == then, key, now, wanted)
        for optimizer, state in zip(held, states, strict=True):
            for then, now in zip(state['param_groups'], optimizer.param_groups, strict=True):
                then.update(now | dict(params=then['params']))
            optimizer.load_state_dict(state)

    def last_step(self):
        """The number of steps after which max_flops are spent, no more than max_iters."""
        c, spent = self.c, self.spent
        for step in range(self.step, c.max_iters):
            if spent >= c.max_flops:
                return step
            spent += self.flops(loops_at(step, c)) * self.tokens
        return c.max_iters

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
        """Saves on the first rank, the others wait. Raises UserError if the weights are not finite."""
        finite = nn.utils.get_total_norm(list(self.model.parameters())).isfinite().item()
        kept = 'none' if self.saved is None else f'step {self.saved}'
        wanted = f'a lower one, the weights are not finite; the last good checkpoint: {kept}'
        check(finite, 'learning_rate', self.c.learning_rate, wanted)
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        checkpoint = dict(
            model=self.model.state_dict(),
            optimizer=states if len(states) > 1 else states[0],
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
            loops_trained=sorted(self.loops) or [self.c.n_loop],
            flops=self.spent,
            git=self.git,
            format_version=1,
        )
        self.say(f'saving checkpoint to {self.c.out_dir}')
        rank0_first(self.m, lambda: save_checkpoint(Path(self.c.out_dir), checkpoint, self.log, best))
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
        frozen = OBJECTIVE[c.objective].frozen  # the model's loss says nothing of the gate's training
        better, self.evaluated = frozen or val['loss'] < self.best, self.step
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
        clock, since, spent = time.time(), self.step, self.spent
        while not self.stopped():
            due = self.step % c.eval_interval == 0 or self.step >= self.end
            if due and self.step > self.evaluated:
                try:
                    if not self.evaluate():
                        continue
                except Exception:
                    if self.m.world > 1 or not self.stopped():
                        raise
                    continue  # a signal has reached the compiler, too
                clock, since, spent = time.time(), self.step, self.spent
            whole = self.step >= self.end or 0 < c.patience <= self.stale
            if whole:
                break
            lr, n_loop = lr_at(self.step, c, self.end), loops_at(self.step, c)
            set_rates(self.optimizers, self.step, lr)
            looks = c.diagnose and self.step % c.diagnose == 0 and self.m.rank == 0
            look = functools.partial(self.look, n_loop) if looks else None
            held = self.objective, self.optimizers, self.scaler
            result = train_step(*held, batches, n_loop, c, self.m, self.stopped, look)
            if result is None:
                continue
            loss, norm, more = result
            self.judge(loss, norm)
            self.step += 1
            self.spent += self.flops(n_loop) * self.tokens
            self.loops.add(n_loop)
            if (self.step - 1) % c.log_interval == 0:
                cost = (time.time() - clock) / (self.step - since), (self.spent - spent) / (self.step - since)
                clock, since, spent = time.time(), self.step, self.spent
                self.log_step(loss, norm, more, lr, n_loop, *cost)
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

    def look(self, n_loop, *batch):
        """train_step's look: at a micro-batch, then at the gradient; logs what was found."""
        if batch:
            scale = self.scaler.get_scale()
            self.found = diagnose(self.plain, *batch, n_loop, self.m.autocast, scale)
            return
        self.found |= norms_of_weights(self.model)
        last = f'/loop_{n_loop - 1:02d}'
        names = [f'hidden_norm{last}', f'change{last}', f'cosine{last}', 'kl/loop_00']
        text = ', '.join(f'{name} {self.found[name]:.4g}' for name in names if name in self.found)
        self.log.write(f'look {self.step}: {text}', {'iter': self.step, **self.found})

    def log_step(self, loss, norm, more, lr, n_loop, seconds, flops):
        """Logs the step that was made last; seconds and FLOPs: per step since the last line."""
        m, step = self.m, self.step - 1
        if m.cpu_group:
            losses = torch.tensor([loss, *more.values()], dtype=torch.float64)
            dist.all_reduce(losses, group=m.cpu_group)
            loss, *rest = (losses / m.world).tolist()
            more = dict(zip(more, rest, strict=True))
        if m.rank > 0:
            return
        rate, ms = self.tokens / seconds, 1000 * seconds
        mfu = flops / seconds / (m.peak * m.world) if m.peak else None
        left = timedelta(seconds=min(10**9, round(seconds * (self.end - self.step))))
        eta = left if step > self.first else '?'  # the first step compiles
        text = f'iter {step}: loss {loss:.4f}, time {ms:.2f}ms, mfu {f"{mfu:.2%}" if mfu else "n/a"}'
        text += f', grad {norm:.2f}, lr {lr:.1e}, tok/s {rate:,.0f}, loops {n_loop}, eta {eta}'
        record = {'iter': step, 'train/loss': loss, 'train/grad_norm': norm, 'lr': lr, 'mfu': mfu}
        record |= {
            'train/ms': ms,
            'train/tok_per_sec': rate,
            'train/loops': n_loop,
            'train/flops': self.spent,
        }
        self.log.write(text, record | {f'train/{name}': value for name, value in more.items()})

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
    fresh = checkpoint is None or resuming
    check(fresh or not c.baseline, 'baseline', c.baseline, f'none with the weights of {c.init_from}')
    apply_baseline(c)
    layers = c.n_prelude + c.n_block * c.n_loop + c.n_coda
    work = c.max_iters * c.gradient_accumulation_steps * c.batch_size * c.block_size * layers * c.n_embd
    m = setup(settings, work)
    with (
        Signals(m, print_error) as signals,
        contextlib.closing(Run(c, m, signals, checkpoint, resuming)) as run,
    ):
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
