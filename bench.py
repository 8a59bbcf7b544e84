"""
Measures training steps: time, tokens per second, model FLOPs utilisation and memory; or decoding.

    python bench.py config/train_gpt2_looped.py --batch_size=8
    python bench.py config/train_ouro_2_6b.py --count_only=True                parameters and FLOPs, no memory
    python bench.py config/train_ouro_2_6b.py --plan=64                        memory and time on 64 GPUs
    python bench.py config/train_shakespeare_char_looped.py --vs="--n_loop=8"   two settings, taking turns
    python bench.py --mode=decode --init_from=out-quickstart                   ways to sample, taking turns

--json=FILE.jsonl appends what is measured to a file, a JSON object per line.

Utilisation counts every executed layer, the loop's backward pass only for the last bptt_k iterations. It is
taken against the device's dense peak, on a CPU against its own matrix products, measured here.
"""

import itertools
import json
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # ours come first, also with python -P
from configurator import command, configure, print_error

# a Ctrl-C while the rest is imported is handled from here on
# isort: split
import torch

from model import GPT, GPTConfig
from nanoloop import WORLD
from nanoloop.baselines import apply_baseline
from nanoloop.batches import Batch
from nanoloop.bench_decode import (
    bytes_per_step,
    decoding_ways,
    print_timings,
    summarize_timings,
    time_decoding,
)
from nanoloop.checkpoint import find_from_flags, load_checkpoint
from nanoloop.checks import Choice, Count, Fraction, NotNegative, Positive, check, settle_fields
from nanoloop.count import flops, parameters
from nanoloop.datasets import find_data, read_meta
from nanoloop.decode import prepare_linears_
from nanoloop.ema import make_average
from nanoloop.machine import device_name, forget_peak, peak_memory, prepare_training, setup
from nanoloop.number_lists import Numbers, read_numbers
from nanoloop.objective import (
    OBJECTIVE,
    TrainingLoss,
    check_loops,
    loops_at,
    set_trained_parts,
    training_flops,
)
from nanoloop.optimizer import make_optimizers
from nanoloop.plan import GPUS, describe_plan, plan_run
from nanoloop.rates import matmul_rate, read_rate
from nanoloop.run_folder import git_commit
from nanoloop.sizes import check_sizes
from nanoloop.training_step import train_step
from train import TrainConfig


@dataclass
class BenchConfig:
    # bench
    mode: Choice(('train', 'decode')) = 'train'  # train measures steps, decode measures text
    count_only: bool = False  # print parameters and FLOPs, and measure nothing
    plan: Count | None = None  # print memory, communication and time on so many GPUs, and measure nothing
    gpu: Choice(GPUS) = 'H100'  # plan: the GPU; peak_flops and the speeds of its links replace the table's
    plan_mfu: Fraction = 0.4  # plan: MFU on one GPU, of which communication takes its part
    nvlink: Positive | None = None  # plan: GB/s between GPUs of a node, one direction; None = the GPU's
    infiniband: Positive | None = None  # plan: Gb/s of each GPU to other nodes, one direction; None = usual
    tokens: Count = 256  # mode=decode: new tokens per row
    prompt: Count = 16  # mode=decode: tokens of the prompt
    sequences: Numbers(int, 1) = '1'  # mode=decode: rows of the batch, or several such as 1,8,64
    bandwidth: Positive | None = None  # mode=decode: GB/s of the device's memory; None = measured by a sum
    exit_threshold: NotNegative | None = None  # mode=decode: of every rule, in its own unit; None = advised
    draft_tokens: Count = 4  # mode=decode: tokens per draft of speculation, one loop each
    combined: bool = False  # mode=decode: also exits with drafts; with compile=True every way compiled, too
    json: str = ''  # append the results to this file.jsonl, a JSON object per line; '' = do not
    vs: str = ''  # flags of a second setting, as in the docstring's example; '' = none
    warmup: Count = 5  # mode=train: steps between the first one, which compiles, and measuring
    rounds: Count = 5  # number of measurements; the median is printed
    steps: Count = 10  # mode=train: steps per measurement

    def __post_init__(self):
        """Raises UserError for a value out of its bounds."""
        settle_fields(self)
        check(self.sequences, 'sequences', '', 'a number of rows, such as 8, or several: 1,8,64')
        path = Path(self.json)
        fits = not self.json or (path.suffix == '.jsonl' and path.parent.is_dir() and not path.is_dir())
        check(fits, 'json', self.json, 'a file with the ending .jsonl in a folder that exists')


class Setting:
    """One of the settings to compare: its model, its optimizer, and a random batch that costs no reading."""

    def __init__(self, c, m, name):
        self.c, self.m, self.name, self.seconds = c, m, name, []
        memory_before = forget_peak(m)  # of another setting
        torch.manual_seed(c.seed)
        config = c.build(GPTConfig)
        check_sizes(c, m, config)
        self.model = GPT(config).to(m.device)
        prepare_training(self.model, m)
        check_loops(c, self.model.config)
        set_trained_parts(self.model, OBJECTIVE[c.objective])
        self.training_loss = TrainingLoss(self.model, c)
        self.optimizers, _ = make_optimizers(self.model, c)
        self.scaler, self.average = m.scaler(), make_average(self.model, c)
        tokens = torch.randint(c.vocab_size, (c.batch_size, c.block_size + 1))
        idx, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()  # (B, T) each
        self.batches = itertools.repeat(Batch(idx, targets, c.seed).to_device(m))
        self.tokens = c.gradient_accumulation_steps * c.batch_size * c.block_size
        self.step, self.flops = 0, 0.0
        self.first = self.run(1)
        self.run(c.warmup)
        self.memory, self.flops = peak_memory(m) - memory_before, 0.0

    def run(self, steps):
        """Returns the seconds per step. The host waits for the device after the last one only."""
        start = time.perf_counter()
        for _ in range(steps):
            n_loop = loops_at(self.step, self.c)
            parts = self.training_loss, self.optimizers, self.scaler, self.batches
            result = train_step(*parts, n_loop, self.c, self.m)
            if self.average:
                self.average.update(result.changed)
            self.step, self.flops = self.step + 1, self.flops + training_flops(self.model, self.c, n_loop)
        _ = result.loss  # the host waits for the device
        return (time.perf_counter() - start) / steps

    def report(self, peak):
        """Prints the setting's figures, and returns them. peak: FLOP/s of the device, or None."""
        step = statistics.median(self.seconds)
        rate = self.flops * self.tokens / (len(self.seconds) * self.c.steps) / step  # FLOP/s
        result = dict(
            name=self.name,
            ms=1000 * step,
            tokens_per_s=self.tokens / step,
            tflops_per_s=rate / 1e12,
            mfu=rate / peak if peak else None,
            first_s=self.first,
            memory_mib=self.memory / 2**20,
        )
        spread = f'{1000 * min(self.seconds):.2f} to {1000 * max(self.seconds):.2f}'
        mfu = f'{result["mfu"]:.2%}' if peak else 'n/a'
        print(
            f'{self.name}: {1000 * step:.2f} ms per step (median of {len(self.seconds)} x {self.c.steps}, '
            f'{spread}), {self.tokens / step:,.0f} tokens/s, {rate / 1e12:.3f} TFLOP/s, mfu {mfu}, '
            f'first step {self.first:.1f} s, memory {result["memory_mib"]:,.0f} MiB'
        )
        return result


def append_json(c, m, results):
    """Appends results, dicts, to the file c.json, each with what it was measured on and with."""
    if c.json:
        place = dict(device=device_name(m), dtype=str(m.dtype)[6:], torch=torch.__version__, git=git_commit())
        with open(c.json, 'a') as file:
            file.writelines(json.dumps(result | place) + '\n' for result in results)


def measure_decoding(c, m):
    """Prints how fast a model decodes, in all ways that are possible with it."""
    given = {key: c[key] for key in c.given}
    checkpoint = find_from_flags(c.init_from, c.out_dir, given, say=print_error, weights=c.weights)
    torch.manual_seed(c.seed)
    if checkpoint is None:
        model, name = GPT(c.build(GPTConfig)).to(m.device).eval(), 'random weights'
    else:
        given = {field.name for field in fields(GPTConfig)} & c.given
        model, checkpoint = load_checkpoint(checkpoint, m.device, **{key: c[key] for key in given})
        name = f'{checkpoint["path"]}, step {int(checkpoint["iter_num"])}'
        name += ', the average of the weights' * (c.weights == 'ema')
    print(f'{name}: {model.get_num_params():,} parameters, n_loop {model.config.n_loop}')
    prepare_linears_(model, m.dtype)
    bandwidth = c.bandwidth * 1e9 if c.bandwidth else read_rate(m)
    how = 'as given' if c.bandwidth else 'measured, a sum over a large tensor'
    print(f'memory bandwidth: {bandwidth / 1e9:.1f} GB/s, {how}')
    for n_rows in read_numbers(c.sequences):
        prompts = torch.randint(model.config.vocab_size, (n_rows, c.prompt), device=m.device)
        ways = decoding_ways(model, n_rows, c.draft_tokens, c.exit_threshold, c.compile, c.combined)
        with m.autocast():
            timings = time_decoding(model, prompts, c.tokens, ways, c.rounds)
        step_bytes = bytes_per_step(model, n_rows, range(c.prompt + 1, c.prompt + max(c.tokens, 2)))
        about = f'{n_rows} rows, a prompt of {c.prompt} tokens, a step reads {step_bytes / 2**20:.1f} MiB'
        print(f'{about} (the weights of every executed layer, keys and values)')
        rows = summarize_timings(timings, c.tokens, n_rows, model.config.n_loop, step_bytes, bandwidth)
        print_timings(rows, print)
        append_json(c, m, rows)


def print_counts(c):
    """Prints parameters by section and FLOPs per token by kind, of a model that takes no memory."""
    config = c.build(GPTConfig)
    check_loops(c, config)
    with torch.device('meta'):
        model = GPT(config)
    for name, n in parameters(model).items():
        note = ' (those of the loop counted n_loop times)' if name == 'effective' else ''
        print(f'{name + " parameters":24} {n:16,}{note}')
    layers = f'{config.n_prelude} + {config.n_block} x {config.n_loop} + {config.n_coda}'
    print(f'{"executed layers":24} {config.depth:16,} ({layers})')
    rule = OBJECTIVE[c.objective]
    counted = flops(model, loops_read=len(rule.loops(config.n_loop)))
    if not rule.trains_model:  # its backward pass is the gate's alone
        counted['training'] = counted['forward']
    for phase, kinds in counted.items():
        split = ', '.join(f'{kind} {n:.6e}' for kind, n in kinds.items())
        print(f'{phase + " FLOPs per token":24} {sum(kinds.values()):16.6e} ({split})')


def print_plan(c):
    """Prints memory, communication and time of a run on c.plan GPUs, see nanoloop/plan.py."""
    config = c.build(GPTConfig)
    check_loops(c, config)
    print(*describe_plan(plan_run(c, config, c.plan), c), sep='\n')


def check_mode(c, decoding):
    """Raises UserError for keys that have no meaning in what is measured. decoding: it is decoding."""
    expected = 'scratch, or --mode=decode without count_only and plan'
    check(decoding or c.init_from == 'scratch', 'init_from', c.init_from, expected)
    check(decoding or c.weights == 'raw', 'weights', c.weights, 'raw, or --mode=decode with --init_from')
    check(not (decoding and c.vs), 'vs', c.vs, 'nothing with --mode=decode')
    for key in ('gpu', 'plan_mfu', 'nvlink', 'infiniband'):
        check(c.plan or key not in c.given, key, c[key], 'no value without --plan=N')
    check(not (c.json and (c.count_only or c.plan)), 'json', c.json, 'nothing where nothing is measured')


@command
def main(argv):
    keys = (BenchConfig, TrainConfig, GPTConfig)
    c = configure(keys, argv)
    settings = [c, configure(keys, [*argv, *shlex.split(c.vs)], say=None)] if c.vs else [c]
    for setting in settings:
        setting.build(BenchConfig)
        setting.build(TrainConfig)
        apply_baseline(setting, print)
        if 'vocab_size' not in setting.given:
            try:
                setting['vocab_size'] = read_meta(find_data(setting.dataset))['vocab_size']
            except ValueError as error:
                print(f'vocab_size={setting.vocab_size} is assumed: {error}')
    counting = c.count_only or c.plan
    decoding = c.mode == 'decode' and not counting
    check_mode(c, decoding)
    if counting:
        for setting, name in zip(settings, ('this', c.vs), strict=False):
            if c.vs:
                print(f'{name}:')
            if setting.count_only:
                print_counts(setting)
            if setting.plan:
                print_plan(setting)
        return
    if decoding:  # the blocks of a whole model are not compiled then, but a step if asked for
        c['compile'] = c.compile is True
    check(WORLD == 1, 'processes', WORLD, '1')
    m = setup(c)
    print(m.line)
    append_json(c, m, [])  # a file that cannot be written ends the program here
    if decoding:
        return measure_decoding(c, m)
    fixed = ('device', 'dtype', 'compile', 'deterministic', 'seed')
    changed = ', '.join(key for key in fixed if settings[-1][key] != c[key])
    check(not changed, 'vs', c.vs, f'the same {changed} for both settings')
    contenders = [Setting(setting, m, name) for setting, name in zip(settings, ('this', c.vs), strict=False)]
    for _ in range(c.rounds):
        for contender in contenders:
            contender.seconds.append(contender.run(c.steps))
    peak = m.peak or (matmul_rate(m) if m.kind == 'cpu' else None)
    if m.kind == 'cpu' and not c.peak_flops:
        print(f'peak: {peak / 1e12:.3f} TFLOP/s, measured matrix products of 2048 in {str(m.dtype)[6:]}')
    append_json(c, m, [contender.report(peak) for contender in contenders])
    if c.vs:
        ratios = [b / a for a, b in zip(contenders[0].seconds, contenders[1].seconds, strict=True)]
        spread = f'median of {len(ratios)}, {min(ratios):.3f} to {max(ratios):.3f}'
        print(f'time per step, {c.vs} / this: {statistics.median(ratios):.3f} ({spread})')


if __name__ == '__main__':
    main()
