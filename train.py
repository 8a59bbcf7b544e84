"""
Trains a looped transformer, or a plain GPT, in one process or many.

    python train.py config/quickstart.py --batch_size=32
    torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2_looped.py

Batches, dropout and noise depend on (seed, step, micro-batch of the global batch) only. So a resumed run
equals an uninterrupted one. Any number of processes trains on the same batches. Evaluation does not change
training.
"""

import contextlib
import functools
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent))  # ours come first, also with python -P
from configurator import command, configure, print_error, print_line, printable

# a Ctrl-C while the rest is imported is handled from here on
# isort: split
import torch

from model import GPTConfig
from nanoloop import RANK, ROOT, report
from nanoloop.baselines import BASELINE, apply_baseline
from nanoloop.checkpoint import WEIGHTS, configure_checkpoint
from nanoloop.checkpoint_files import checkpoint_paths
from nanoloop.checks import (
    AtLeast,
    AtMost,
    Choice,
    Count,
    Name,
    NotNegative,
    Positive,
    Share,
    Size,
    StepsOrShare,
    check,
    settle_fields,
)
from nanoloop.count import parameters
from nanoloop.diagnose import Look
from nanoloop.ema import SUFFIX, evaluate_weights, make_average
from nanoloop.machine import CompileMode, peak_memory, setup
from nanoloop.number_lists import Numbers
from nanoloop.objective import (
    LOOP_GROWTH,
    LOOP_SAMPLING,
    OBJECTIVE,
    TrainingLoss,
    loops_at,
    set_trained_parts,
    step_of_max_flops,
    training_flops,
)
from nanoloop.optimizer import (
    OPTIMIZER,
    SCHEDULE,
    decay_share_at,
    load_optimizers,
    lr_at,
    make_optimizers,
    prepare_step,
)
from nanoloop.parallel import leave, max_over_ranks, on_rank0, reduce_sum, total_norm, wrap
from nanoloop.pretraining import find_initial_checkpoint, pretraining, settle_epochs
from nanoloop.rl import RLConfig, check_rl_keys, reinforcement
from nanoloop.run_folder import Log, append_evaluation, git_commit, open_out_dir
from nanoloop.saving import check_space, quarantine_broken, save_checkpoint, whole_states
from nanoloop.signals import Signals, exit_status, signal_name
from nanoloop.training_step import BadSteps, train_step


@dataclass
class TrainConfig:
    # output
    out_dir: Name = 'out'  # folder of the run: ckpt.pt (last), prev.pt (the one before), best.pt, log.jsonl
    eval_interval: Count = 2000  # steps between evaluations, plus the last step; each one after step 0 saves
    eval_at_start: bool = True  # also evaluate before the first step
    log_interval: Count = 1  # steps between lines that are printed and logged; max_bad_steps is checked there
    eval_iters: Size = 200  # evaluated windows of each split: this x batch_size; 0 = as many as val has
    eval_loops: Numbers(int, 1) = ''  # also log the val loss with so many loops, such as 1,2,4,8; '' = none
    eval_only: bool = False  # evaluate once and exit; a resumed run gets a line in eval.jsonl
    diagnose: Size = 0  # steps between diagnostics of the loop's states and gradients; 0 = none
    always_save_checkpoint: bool = True  # no effect (nanoGPT's key): every evaluation saves ckpt.pt
    init_from: Name = 'scratch'  # scratch, resume, auto (resume, else scratch), gpt2..gpt2-xl, a PATH
    weights: Choice(WEIGHTS) = 'raw'  # ema: the average of the weights of init_from=PATH, or with eval_only
    sample_tokens: Size = 200  # tokens of the sample printed at the end; 0 = none
    wandb_log: bool = False  # also log to Weights & Biases
    wandb_project: str = 'nanoloop'  # name of the project in Weights & Biases
    wandb_run_name: str = 'run'  # name of the run in Weights & Biases
    # data
    dataset: Name = 'pystdlib'  # name of a folder in data/, a path that contains a slash, mano:N or p_hop:N
    gradient_accumulation_steps: Count = 1  # micro-batches per step, summed over all processes
    batch_size: Count = 12  # rows (sequences) of a micro-batch, per process
    baseline: Choice(BASELINE) = ''  # train this instead: n_loop=1, or the loops unrolled; '' = off
    # objective
    objective: Choice(OBJECTIVE) = 'end'  # loss of the last loop, all, last third, by exits; or of the gate
    beta: NotNegative = 0.1  # objective=exit: beta times the entropy of the exits lowers the loss; 0 = none
    gate_ahead: bool = False  # objective=gate: the gate predicts if the next loop helps; False = this loop
    loop_sampling: Choice(LOOP_SAMPLING) = 'fixed'  # of a step: n_loop, 1 to 2 n_loop - 1, or mean n_loop + 1
    loop_max: Count | None = None  # most loops that are ever drawn; poisson needs a limit; None = no limit
    loop_warmup: StepsOrShare = 0  # steps over which n_loop grows; below 1: a share of max_iters; 0 = none
    loop_growth: Choice(LOOP_GROWTH) = 'sqrt'  # sqrt: 1 - sqrt(1 - t), slow at first; late: 1, then n_loop
    max_flops: Annotated[float, AtLeast(1)] | None = None  # end the run at this many FLOPs; None = no limit
    # optimizer
    optimizer: Choice(OPTIMIZER) = 'adamw'  # muon: block and injection matrices, AdamW: rest
    learning_rate: NotNegative = 6e-4  # peak learning rate, reached after the warm-up
    matrix_lr: NotNegative | None = None  # rate of block and injection matrices; None = learning_rate
    embedding_lr: NotNegative | None = None  # rate of all embeddings; None = learning_rate
    head_lr: NotNegative | None = None  # rate of the head, needs tie_weights=False; None = learning_rate
    lr_width: Count | None = None  # multiply AdamW's rates by sqrt(lr_width / n_embd); None = off
    max_iters: Size = 600000  # number of training steps
    epochs: Positive | None = None  # train on every row so often, instead of max_iters; None = off
    weight_decay: NotNegative = 0.1  # of all matrices but the injection's; muon: of the blocks' only; 0 = off
    weight_decay_end: NotNegative | None = None  # weight_decay falls or rises to it linearly; None = constant
    beta1: Share = 0.9  # AdamW beta1
    beta2: Share = 0.95  # AdamW beta2
    adam_eps: NotNegative = 1e-8  # AdamW epsilon
    grad_clip: NotNegative = 1.0  # largest L2 norm of the gradient; 0 = no clipping
    ema: Share | None = None  # decay of a moving average of the weights, such as 0.999; None or 0 = none
    max_bad_steps: Count = 3  # end the run after this many steps in a row with a non-finite gradient
    patience: Size = 0  # end the run after so many evaluations in a row without a better val loss; 0 = never
    # learning rate
    decay_lr: bool = True  # decay the learning rate; False = constant after the warm-up
    lr_schedule: Choice(SCHEDULE) = 'cosine'  # decay shape; linear keeps the peak first
    warmup_iters: Size = 2000  # steps of linear learning rate warm-up; 0 = none
    warmdown_frac: Annotated[float, AtLeast(0), AtMost(1)] = 0.2  # linear: share of the steps that decay
    lr_decay_iters: Size | None = None  # step at which the rate reaches min_lr; None = the last step
    min_lr: NotNegative = 6e-5  # learning_rate at the end of its decay; other rates shrink in proportion
    # machine
    device: str = 'auto'  # auto (cuda, else mps, else cpu), cpu, cuda, cuda:N or mps
    dtype: str = 'auto'  # type of matrix products: auto, float32, bfloat16 or float16
    compile: CompileMode = 'auto'  # the blocks; auto = if it pays off
    backend: str = 'auto'  # of torch.distributed: auto, nccl or gloo
    shard: bool = False  # FSDP2: each process keeps a share of weights, gradients and optimizer state
    seed: Size = 1337  # seed of weights, batches, dropout and noise
    deterministic: bool = False  # use deterministic kernels only, slower on a GPU
    peak_flops: Annotated[float, AtLeast(1)] | None = None  # FLOP/s of one device, for mfu; None = look it up

    def __post_init__(self):
        """Raises UserError for a value out of its bounds or in conflict with another one."""
        settle_fields(self)
        bounded = self.min_lr <= self.learning_rate or not self.decay_lr
        check(bounded, 'min_lr', self.min_lr, f'at most learning_rate={self.learning_rate}')
        without = self.loop_warmup == 0 and self.loop_growth != type(self).loop_growth
        check(not without, 'loop_growth', self.loop_growth, 'sqrt without a loop_warmup, whose shape it is')
        fits = self.weight_decay > 0 or self.weight_decay_end is None
        check(fits, 'weight_decay', self.weight_decay, 'above 0 with weight_decay_end')
        others = [key for key in ('matrix_lr', 'embedding_lr', 'head_lr') if getattr(self, key)]
        expected = f'above 0 with {" and ".join(others)}, whose schedule it is'
        check(self.learning_rate > 0 or not others, 'learning_rate', self.learning_rate, expected)


# -----------------------------------------------------------------------------
# the run


class Trainer:
    """A run: its steps, evaluations, log and checkpoints. It knows no data set.

    task: the model, a source of batches and an evaluate function, see nanoloop/pretraining.py. state: the
    checkpoint to go on from, {} for a new run. say: a report.Teller.
    """

    def __init__(self, task, c, m, signals, state, say):
        self.model, self.task, self.c, self.m, self.signals = task.model, task, c, m, signals
        self.say = say
        self.state, self.resuming, self.rule = state, bool(state), OBJECTIVE[c.objective]
        self.stopped = signals.stopped
        self.step = self.first_step = state.get('iter_num', 0)  # steps made, skipped ones included
        # why earlier validation losses cannot be compared with this run's
        self.new_measure = report.other_measure(state, c, task.checkpoint_extra) if state else []
        before = {} if self.new_measure else state
        self.best = before.get('best_val_loss', math.inf)
        self.evaluated = before.get('evaluated', -1 if c.eval_at_start else 0)  # step of the last evaluation
        self.evals_since_best = before.get('stale', 0)
        self.saved = self.step if state else None  # step of the last checkpoint
        same = -max_over_ranks(m, -self.step) == max_over_ranks(m, self.step)
        check(same, 'out_dir', c.out_dir, 'a folder that all machines share')
        self.row_tokens = task.row_tokens or c.block_size
        self.step_tokens = c.gradient_accumulation_steps * c.batch_size * self.row_tokens
        # n_loop -> FLOPs of a step, over all ranks
        self.flops = functools.cache(lambda n: training_flops(self.model, c, n) * self.step_tokens)
        self.flops_done = state.get('flops', 0.0)
        self.loops_trained = set(state.get('loops_trained', ()))
        self.last_step = c.max_iters
        if c.max_flops is not None:
            self.last_step = step_of_max_flops(c, self.step, self.flops_done, self.flops)
        steps = 'epochs' if c.epochs else 'max_iters'
        self.limit = steps if self.last_step == c.max_iters else 'max_flops'  # the key that ends it
        self.lock = self.log = self.average = None

    def open_folder(self):
        """Locks out_dir and makes the log, which takes the folder after the first step. Rank 0 only."""
        out_dir = Path(self.c.out_dir)
        idle = not (self.resuming or self.last_step) and checkpoint_paths(out_dir)
        check(not idle, self.limit, self.c[self.limit], f'one step or more: {out_dir} holds an earlier run')
        self.lock = open_out_dir(out_dir, self.say)
        check_space(out_dir, self.model)
        if self.resuming and (text := quarantine_broken(out_dir, self.state["path"])):
            again = f'up to {2 * self.state["config"]["eval_interval"]} steps are made again'
            self.say(f'{text}; the run goes on from prev.pt at step {self.step}, {again}')
        self.log = Log(self.c, self.state, self.say)

    def close(self):
        """Closes the log and lets another run into out_dir."""
        for file in filter(None, (self.lock, self.log and self.log.file)):
            file.close()

    def start(self):
        """Opens out_dir, makes loss and optimizers, restores their state, and prints what will be trained."""
        c, m = self.c, self.m
        parameters(self.model)  # every parameter is counted, or this ends the run
        set_trained_parts(self.model, self.rule, self.task.dropout)
        self.plain_loss = TrainingLoss(self.model, c)
        self.training_loss = wrap(self.plain_loss, m)
        self.optimizers, lines = make_optimizers(self.model, c)
        on_rank0(m, self.open_folder)
        self.scaler = m.scaler()
        self.bad_steps = BadSteps(c, self.scaler, self.say)
        if self.state:
            self.restore()
        elif self.task.origin:
            self.say(self.task.origin)
        self.average = make_average(self.model, c, self.state, self.say)
        self.git, self.state = git_commit(), None  # lets go of the checkpoint's memory
        left = max(0, self.last_step - self.step)
        cost = report.describe_cost(m, self.flops(c.n_loop), left)
        doubts = report.doubtful_keys(c, self.rule, self.last_step, left, not self.task.origin)
        for line in (*self.describe(), *lines, *cost, *doubts):
            self.say(line)
        if m.compile and left:
            self.say('the first evaluation and the first step compile the blocks, for 10 to 60 s each')

    def describe(self):
        """Returns lines on the sizes of the model and of a step."""
        flops = self.flops(self.c.n_loop)
        return report.describe_run(self.c, self.model, self.m.world, flops, self.row_tokens)

    def restore(self):
        """Loads the states of optimizers and scaler, and says what differs from the run that saved them."""
        state, c = self.state, self.c
        load_optimizers(self.optimizers, state, c)
        if state['scaler'] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state['scaler'])
        self.say_differences()
        self.say(report.resuming_line(self.step, self.last_step, self.limit))

    def say_differences(self):
        """Says what differs from the run that saved the checkpoint."""
        for line in report.differences(self.c, self.m.fingerprint(), self.state, self.new_measure):
            self.say(line)

    def train(self):
        """Trains until the last step, evaluating and saving. Returns False if a signal ended it before."""
        c, finished = self.c, False
        self.start()
        batches, meter = self.task.batches(self.step), report.Meter(self.step, self.flops_done)
        while not self.stopped():
            # evaluate the loss on both splits and write a checkpoint
            due = self.step % c.eval_interval == 0 or self.step >= self.last_step
            if due and self.step > self.evaluated:
                with self.signals.ignore_errors_after_signal():
                    self.evaluate_and_save()
                if self.step > self.evaluated or self.signals.agreed:
                    continue  # a signal came first
                meter.reset(self.step, self.flops_done)
            if finished := self.step >= self.last_step or 0 < c.patience <= self.evals_since_best:
                break
            # one step
            first = self.step == self.first_step
            self.say.now('training', f': step {self.step} of {self.last_step}')
            lr, n_loop = lr_at(self.step, c, self.last_step), loops_at(self.step, c)
            prepare_step(self.optimizers, self.step, lr, decay_share_at(self.step, c, self.last_step))
            look = self.look(n_loop)
            parts = self.training_loss, self.optimizers, self.scaler
            result = train_step(*parts, batches, n_loop, c, self.m, self.stopped, look)
            if result is None:
                continue  # a signal came first
            if look and self.m.rank == 0:
                self.log.write(look.line(self.step), {'iter': self.step, **look.values})
            self.bad_steps.add(self.step, result)
            if self.average:
                self.average.update(result.changed)
            self.step += 1
            self.signals.save_first()
            if first:
                on_rank0(self.m, lambda: self.log.open())
            self.flops_done += self.flops(n_loop)
            self.loops_trained.add(n_loop)
            if (self.step - 1) % c.log_interval == 0:
                self.bad_steps.count(self.saved)  # here the host waits for the device
                self.log_step(result, lr, n_loop, *meter.read(self.step, self.flops_done))
            if first:  # it compiles: its time says nothing of the others'
                meter.reset(self.step, self.flops_done)
        if self.saved != self.step:
            self.save()
        return finished

    def look(self, n_loop):
        """Returns the diagnostics of the next step, None if they are not due."""
        due = self.c.diagnose and self.step % self.c.diagnose == 0
        return Look(self.plain_loss, n_loop, self.m.autocast, self.scaler.get_scale()) if due else None

    def evaluate(self):
        """Returns the validation loss, a line and a record; None if a signal came first."""
        start, suffix = time.monotonic(), SUFFIX * (self.c.eval_only and self.c.weights == 'ema')
        losses = evaluate_weights(self.task.evaluate, self.model, self.average, suffix)
        if losses is None:
            return None
        loss = losses[suffix]['val']['loss']  # of the weights, which decides on best.pt and patience
        return loss, *report.evaluation_line(self.step, losses, time.monotonic() - start)

    def evaluate_only(self):
        """Evaluates once and adds the result to eval.jsonl of a resumed run. A signal ends it at once."""
        if self.state:
            self.say_differences()
        random = 'random weights: --init_from=resume, or another name, takes those of a run'
        for line in (*self.describe(), self.task.origin or random):
            self.say(line)
        _, text, record = self.evaluate()
        self.say(text)
        if self.state:
            on_rank0(self.m, lambda: append_evaluation(self.c, record))
            self.say(f'added to {self.c.out_dir}/eval.jsonl')

    def evaluate_and_save(self):
        """Evaluates, logs the result and saves. Does nothing if a signal came first."""
        if (result := self.evaluate()) is None:
            return
        loss, text, record = result
        check(math.isfinite(loss), 'learning_rate', self.c.learning_rate, f'a lower one: {text}')
        self.evaluated = self.step
        if self.m.rank == 0:
            self.log.write(text, record)
        if self.step == self.first_step and (self.step == 0 or self.new_measure):
            return  # a model that is not trained, or in another way, is no result of this run
        # the model's loss says nothing of a gate that is trained alone: its last checkpoint is the best
        better = loss < self.best or not self.rule.trains_model
        self.best = min(loss, self.best)
        self.evals_since_best = 0 if better else self.evals_since_best + 1
        self.save(best=better)

    def log_step(self, result, lr, n_loop, seconds, flops):
        """Logs the last step. seconds, flops: means per step since the last line."""
        m, step = self.m, self.step - 1
        sums = reduce_sum(m, torch.tensor([result.loss, *result.extra.values()], dtype=torch.float64))
        loss, *values = (sums / m.world).tolist()
        if m.rank > 0:
            return
        extra = dict(zip(result.extra, values, strict=True))
        mfu = flops / seconds / (m.peak * m.world) if m.peak else None
        eta = seconds * (self.last_step - self.step) if step > self.first_step else None
        known = step, loss, result.grad_norm, extra, lr, n_loop, seconds, mfu, self.step_tokens, eta
        self.log.write(*report.step_line(*known, self.flops_done))

    def save(self, best=False):
        """Saves a checkpoint on rank 0, the others wait. Raises UserError if the weights are not finite."""
        self.bad_steps.count(self.saved)
        finite = total_norm(list(self.model.parameters())).isfinite().item()
        last = 'none' if self.saved is None else f'step {self.saved}'
        expected = f'a lower one, the weights are not finite; the last good checkpoint: {last}'
        check(finite, 'learning_rate', self.c.learning_rate, expected)
        checkpoint = dict(
            **whole_states(self.m, self.model, self.optimizers, self.average),
            scaler=self.scaler.state_dict(),
            model_args=asdict(self.model.config),
            iter_num=self.step,
            best_val_loss=self.best,
            evaluated=self.evaluated,
            stale=self.evals_since_best,
            config=dict(self.c),
            rng=dict(seed=self.c.seed),  # all there is: random numbers are functions of it
            machine=self.m.fingerprint(),
            loops_trained=sorted(self.loops_trained) or [self.c.n_loop],
            flops=self.flops_done,
            git=self.git,
            format_version=1,
            **self.task.checkpoint_extra,
        )
        self.say(f'saving checkpoint to {self.c.out_dir}')
        self.say.now('saving')
        # best = inf: a save with another measure was interrupted before it could remove the old best.pt
        old_best = f'best-before-{self.first_step}' if self.new_measure or self.best == math.inf else None
        arguments = Path(self.c.out_dir), checkpoint, self.log, best, old_best, self.say
        on_rank0(self.m, lambda: save_checkpoint(*arguments))
        self.new_measure = []
        self.saved = self.step


# -----------------------------------------------------------------------------
# main


@functools.partial(command, parallel=True)
def main(argv):
    began = time.monotonic()
    c = configure((TrainConfig, RLConfig, GPTConfig), argv, print_line)
    checkpoint, resuming = find_initial_checkpoint(c, print_error if RANK == 0 else None)
    settings = c.build(TrainConfig)
    check_rl_keys(c)
    fresh = checkpoint is None or resuming
    check(fresh or not c.baseline, 'baseline', c.baseline, f'none with the weights of {c.init_from}')
    apply_baseline(c, print_line if RANK == 0 else None)
    settle_epochs(c, print_line if RANK == 0 else None)
    shape = c if checkpoint is None or resuming else configure_checkpoint(checkpoint)[0]
    layers = shape.n_prelude + shape.n_block * shape.n_loop + shape.n_coda
    tokens = c.max_iters * c.gradient_accumulation_steps * c.batch_size * shape.block_size
    with contextlib.ExitStack() as stack:
        say = stack.enter_context(report.Teller(print_line if RANK == 0 else None))
        say.now('setting up the device and the processes')
        m = setup(settings, tokens * layers * shape.n_embd)
        signals = stack.enter_context(Signals(m, print_error if RANK == 0 else None, say.hurry))
        say.now('preparing data and model')
        task = (reinforcement if c.rl_task else pretraining)(c, m, checkpoint, signals.stopped, say)
        trainer = Trainer(task, c, m, signals, checkpoint if resuming else {}, say)
        stack.callback(trainer.close)
        del checkpoint
        say(m.line)
        if c.eval_only:
            trainer.evaluate_only()
            return leave(m)
        finished = trainer.train()
        if finished:
            memory, minutes = peak_memory(m) / 2**20, (time.monotonic() - began) / 60
            spent = f'peak memory {memory:,.0f} MiB, total time {minutes:.1f} min'
            say(f'best val loss {trainer.best:.4f}, {spent}' if trainer.best < math.inf else spent)
            if c.sample_tokens:
                say.now('sampling')
                spec = task.checkpoint_extra['tokenizer']
                text = report.sample_text(trainer.model, spec, c.sample_tokens, c.seed, m, signals)
                say(printable(text))
                say(f'more: python {os.path.relpath(ROOT / "sample.py")} --out_dir={c.out_dir}')
        leave(m)
        if not finished:
            saved = f'at step {trainer.step}, saved; the same command with --init_from=resume goes on'
            say(f'stopped by {signal_name(signals.agreed)} {saved}')
            sys.exit(exit_status(signals.agreed))


if __name__ == '__main__':
    main()
