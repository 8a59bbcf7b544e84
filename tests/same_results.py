"""
Checks that a refactoring changed nothing. Runs the same commands in a base commit and in a working tree, and
compares weights, optimizer states, logs, samples and counts bit for bit.

    python tests/same_results.py --base a1c8a68            218 cases, 4 minutes on 2 CPU cores
    python tests/same_results.py --base a1c8a68 --quick    a fourth of the trainings, 1 to 2 minutes

Only train.py, sample.py and bench.py are called, with their flags, since Python names change between commits.
One process per tree runs all commands, because importing torch takes seconds. The tree is copied first, so
that it can be edited meanwhile. A key that only the tree has, in config, model_args or a log, is allowed.
"""

import contextlib
import importlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import NamedTuple

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
NOT_COPIED = ('.git', '.venv', 'out*', 'wandb', '__pycache__', '*.bin', '*.egg-info')
NOT_COMPARED = {'git', 'log_bytes', 'wandb_id', 'out_dir', 'init_from'}  # of a checkpoint and its config
NOT_COMPARED |= {'train/ms', 'train/tok_per_sec', 'mfu', 'eta'}  # of a log: the time and the machine

# -----------------------------------------------------------------------------
# cases

RUN = (  # prev.pt is the checkpoint of step 10, ckpt.pt that of step 20
    '--dataset={data} --max_iters=20 --eval_interval=10 --eval_iters=3 --log_interval=1 --sample_tokens=0 '
    '--batch_size=4 --vocab_size=256 --device=cpu --dtype=float32 --compile=False --wandb_log=False'
)
RECIPE = f'{RUN} --block_size=32 --gradient_accumulation_steps=2 --warmup_iters=5 --n_block=2'
WIDTH = '--n_embd=32 --n_head=2 --n_hidden=88'
TINY = (
    f'{RUN} --n_embd=32 --n_head=4 --block_size=16 --n_prelude=1 --n_block=2 --n_coda=1 --n_loop=3 '
    '--learning_rate=1e-2 --min_lr=1e-3 --warmup_iters=5'
)
OURO = ('stage1a', 'stage1b', 'stage2', 'gate')
OVERLAYS = ['quickstart', 'train_flt check', *(f'train_ouro_1_4b ouro_{stage}' for stage in OURO)]
MUON = '--optimizer=muon --matrix_lr=0.02'
HARD = f'{MUON} --dropout=0.1 --loop_sampling=poisson --loop_max=6 --gradient_accumulation_steps=3'
VARIANTS = f"""
--dropout=0.2 | --input_injection=inject_random | --gradient_accumulation_steps=3 | --decay_lr=False --seed=7
--input_injection=inject_random --state_std=0.3 --bias=True --bptt_k=1 | --input_injection=passthrough
--input_injection=add | --input_injection=add --state_init=random | --input_injection=add --state_init=none
--input_injection=add --state_init=zero --norm_eps=1e-3 | --input_injection=query_first
--input_injection=query_first --state_init=none --bias=True
--input_injection=query_first --state_init=random
--input_injection=query_all --n_kv_head=2 | --input_injection=query_all --state_init=random --recompute=True
--input_injection=query_all --state_init=none --pos=rope --qk_norm=True | --input_injection=residual_all
--input_injection=residual_all --state_init=none --bptt_k=2 | --input_injection=residual_all --state_init=zero
--input_injection=residual_all --state_init=random | --loop_sampling=poisson --loop_max=6
--loop_sampling=uniform --loop_warmup=10 | --loop_sampling=uniform --loop_max=4 --bptt_k=2 | --loop_warmup=15
{MUON} | {MUON} --tie_weights=False --embedding_lr=0.1 --head_lr=0.01 --lr_width=64
--optimizer=adamw --beta1=0.8 --beta2=0.99 --adam_eps=1e-6 --weight_decay=0.3 --grad_clip=0.2
--optimizer=adamw --matrix_lr=0.02 --embedding_lr=0.1 --lr_width=16 --weight_decay=0 --grad_clip=0
--lr_schedule=linear --warmdown_frac=0.5 --lr_decay_iters=15
--max_flops=2.5e9 | --patience=1 --eval_interval=2 --eval_iters=0 --learning_rate=0.3
--objective=step | --objective=few --n_loop=4 --bptt_k=2 | --objective=exit --exit_gate=True
--objective=exit --exit_gate=True --beta=0.5 --recompute=True --loop_sampling=uniform | --exit_gate=True
--objective=gate --exit_gate=True --dropout=0.1 | --objective=gate --exit_gate=True --gate_ahead=True
--bptt_k=1 | --bptt_k=2 --n_loop=5 | --recompute=True --dropout=0.1 | --recompute=True --objective=step
--norm=layernorm | --norm=layernorm --bias=True --norm_eps=1e-3 --norm_place=post | --norm_place=branch
--norm=rmsnorm_fixed --norm_place=branch | --norm_place=around | --norm_place=post --norm_emb=True
--norm_loop=False | --norm_final=False | --mlp=gelu_tanh | --mlp=relu2 | --mlp=swiglu
--mlp=swiglu --n_hidden=40 --bias=True | --pos=rope | --pos=rope --rope_base=500 --qk_norm=True | --pos=none
--n_kv_head=1 | --n_kv_head=2 --pos=rope --qk_norm=True | --window_pattern=LS --window_size=4
--window_pattern=SSL --pos=rope --n_kv_head=2 | --tie_weights=False --softcap=5 --emb_scale=4
--init=huginn --mlp=swiglu | --init=nanochat --tie_weights=False --norm_place=around --mlp=relu2
--init=nanochat --tie_weights=False --qk_norm=True --pos=rope --n_embd=128 --n_head=1 --size=1
--dtype=float16 | --dtype=bfloat16 | --dtype=bfloat16 --input_injection=query_all --bptt_k=2 --recompute=True
--dtype=bfloat16 --objective=step --pos=rope --qk_norm=True --tie_weights=False
--diagnose=5 | --diagnose=5 --objective=step --n_kv_head=2 | --diagnose=5 --bptt_k=2 --dtype=bfloat16
--baseline=same_params --bptt_k=2 --objective=few | --baseline=same_flops --window_pattern=LS
{HARD} | {HARD} --input_injection=inject_random --loop_warmup=10 --exit_gate=True --objective=exit
"""
MODEL = f'{TINY} --max_iters=120 --eval_interval=60 --n_loop=4 --optimizer=muon --matrix_lr=0.05'
MODELS = {  # to sample from, trained until tokens need different numbers of loops
    'exit gate, learned positions': '--exit_gate=True --objective=exit',
    'rope, windows': '--pos=rope --window_pattern=LS --window_size=6 --n_kv_head=2 --bptt_k=2',
    'query_all, no positions': '--pos=none --input_injection=query_all --state_init=none',
    'random state, rope': '--input_injection=inject_random --pos=rope --qk_norm=True --norm_place=around',
}
SAMPLE = '--max_new_tokens=50 --device=cpu --dtype=float32'  # past block_size
SAMPLES = """
--temperature=0 --num_samples=3 | --num_samples=3 | --temperature=1.2 --top_k=5 --seed=3 --start=FILE:{prompt}
--top_p=0.7 --num_samples=3 | --n_loop=5 --num_samples=2 | --n_loop=1 | --stop=odh --num_samples=3
--stream=True --num_samples=2 | --kv_budget=1 --num_samples=3 | --warm_start=True --num_samples=3
--exit=diff --exit_threshold=0.2 --num_samples=3 | --exit=kl --exit_threshold=0.005 --num_samples=3
--exit=diff --exit_threshold=0.2 --min_loops=2 --kv_budget=2 --start=FILE:{prompt}
--exit=kl --exit_threshold=0.005 --temperature=0 --kv_budget=1 --num_samples=2
--warm_start=True --exit=diff --exit_threshold=0.2 --num_samples=3 | --dtype=bfloat16 --num_samples=3
--speculate=3 --num_samples=2 | --speculate=3 --draft_loops=2 --temperature=0
--exit=gate --exit_threshold=0.6 --num_samples=3 | --exit=gate --exit_threshold=0.7 --temperature=0 --n_loop=5
"""


class Case(NamedTuple):
    name: str
    script: str
    argvs: list  # the flags of one command, or of several that run in turn
    checkpoint: str = ''  # copied to end/ckpt.pt first, to be resumed
    same_as: str = ''  # name of the base's case that must have the same results; '' = this case

    def folder(self, results, name=''):
        """Returns where a tree keeps its results of this case."""
        return Path(results) / re.sub(r'[^\w.]+', '_', name or self.name)


def training(name, flags, files=()):
    """Returns a case that saves the initial weights in start/ and trains in end/."""
    argv = [*files, *flags.split()]
    start = [*argv, '--out_dir={out}/start', '--max_iters=0']
    return Case(name, 'train', [start, [*argv, '--out_dir={out}/end']])


def lines_of(table):
    return re.split(r'\s*[|\n]\s*', table.strip())


def first_round(tree):
    """Returns the cases that need nothing but data: training and counting."""
    cases = [training(f'model: {name}', f'{MODEL} {flags}') for name, flags in MODELS.items()]
    for name in sorted(path.stem for path in (tree / 'config').glob('train_*.py')) + OVERLAYS:
        files = [f'config/{part}.py' for part in name.split()]
        sized = '\nsize = ' in (tree / files[0]).read_text()
        width = '--size=1 --gradient_accumulation_steps=1' if sized else WIDTH
        count = [*files, '--dataset={data}', '--count_only=True']
        cases.append(training(f'recipe: {name}', f'{RECIPE} {width}', files))
        cases.append(Case(f'count: {name}', 'bench', [count, [*count, '--baseline=same_flops']]))
    return cases + [training(f'train: {flags}', f'{TINY} {flags}') for flags in lines_of(VARIANTS)]


def second_round(trained):
    """Returns the cases that begin with a checkpoint of the base: sampling, fine-tuning and resuming."""
    cases, resume = [], ['--init_from=resume', '--out_dir={out}/end']
    for case in trained:
        kind, name = case.name.split(': ')
        end = f'{case.folder("{base}")}/end'
        if kind == 'model':
            init = f'--init_from={end}/ckpt.pt'
            cases.append(training(f'weights: {name}', f'{RUN} {init} --exit_gate=True --objective=gate'))
            for flags in lines_of(SAMPLES)[: None if name.startswith('exit gate') else -2]:
                argv = f'{init} {SAMPLE} {flags}'.split()
                cases.append(Case(f'sample: {name} {flags}', 'sample', [argv]))
        if HARD in name or 'float16' in name:
            cases.append(Case(f'resume step 10: {name}', 'train', [resume], f'{end}/prev.pt', case.name))
            argvs = [[*resume, '--max_iters=25']]
            cases.append(Case(f'resume the end: {name}', 'train', argvs, f'{end}/ckpt.pt'))
    return cases


def sample_of(cases, step):
    """Returns every step-th case and those that change most settings at once."""
    return [case for i, case in enumerate(cases) if i % step == 0 or HARD in case.name]


# -----------------------------------------------------------------------------
# running


def drive(path):
    """Runs cases one after the other in this process, with the scripts of the working directory.

    Writes said.json into the folder of each case: [exit status, stdout, stderr] per command.
    """
    job = json.loads(Path(path).read_text())
    sys.path[0] = os.getcwd()
    torch.set_num_threads(1)
    for case in (Case(*fields) for fields in job['cases']):
        folder, said = case.folder(job['results']), []
        (folder / 'end').mkdir(parents=True)
        places = dict(job['places'], out=folder)
        if case.checkpoint:
            shutil.copy(case.checkpoint.format(**places), folder / 'end/ckpt.pt')
        for argv in case.argvs:
            out, err, status = io.StringIO(), io.StringIO(), 0
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    importlib.import_module(case.script).main([arg.format(**places) for arg in argv])
                except SystemExit as stop:
                    status = stop.code
                except Exception:
                    status = 'traceback'
                    traceback.print_exc()
            said.append([status, out.getvalue(), err.getvalue()])
        (folder / 'said.tmp').write_text(json.dumps(said))
        os.replace(folder / 'said.tmp', folder / 'said.json')


def run_and_compare(cases, trees, results, places):
    """Runs cases in both trees at once and prints a line for each. Returns how many of them differ."""
    drivers, differ = [], 0
    for tree, out in zip(trees, results, strict=True):
        out.mkdir(parents=True, exist_ok=True)
        job = out / 'job.json'
        job.write_text(json.dumps(dict(cases=cases, results=str(out), places=places)))
        env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONDONTWRITEBYTECODE='1')
        argv = [sys.executable, Path(__file__).resolve(), '--drive', job]
        drivers.append(subprocess.Popen(argv, cwd=tree, env=env))
    try:
        for case in cases:
            for driver, out in zip(drivers, results, strict=True):
                while not (case.folder(out) / 'said.json').exists():
                    if driver.poll():
                        sys.exit(f'{case.name}: the process that writes {out} has died')
                    time.sleep(0.05)
            found = difference_of_case(case, *results)
            differ += bool(found)
            print(f'differs  {case.name}  |  {found}' if found else f'same  {case.name}', flush=True)
    finally:
        for driver in drivers:
            driver.kill()
            driver.wait()
    return differ


# -----------------------------------------------------------------------------
# comparing


def difference(a, b, where):
    """Returns the first place where b lacks or changes something of a, as text; '' if there is none."""
    tensors = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    if tensors and (a.dtype, a.shape) == (b.dtype, b.shape):
        if torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (a, b))):
            return ''
        return f'{where}: {(a != b).sum()} of {a.numel()} elements, by up to {(a - b).abs().max():.3g}'
    if isinstance(a, dict) and isinstance(b, dict):
        if lost := sorted(a.keys() - b.keys() - NOT_COMPARED):
            return f'{where}: no {lost[0]}'
        pairs = [(key, a[key], b[key]) for key in a if key not in NOT_COMPARED]
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = [(i, *pair) for i, pair in enumerate(zip(a, b, strict=True))]
    else:
        a, b = repr(a), repr(b)
        start = max(0, len(os.path.commonprefix([a, b])) - 20)  # of a long text, the place
        return '' if a == b else f'{where}: {a[start:]:.60} became {b[start:]:.60}'
    return next(filter(None, (difference(x, y, f'{where}, {key}') for key, x, y in pairs)), '')


def read(path):
    """Returns the records of a log, or a checkpoint with the names of its weights."""
    if path.suffix == '.jsonl':
        records = [json.loads(line) for line in path.read_text().splitlines()]
        # an evaluation of the untrained model, which early commits do not make
        return [record for record in records if record['iter'] or 'val/loss' not in record]
    checkpoint = torch.load(path, weights_only=True)
    return dict(checkpoint, names=sorted(checkpoint['model']))


def told(script, out, err):
    """Returns what must be the same of a script's output. Time and places are left out."""
    if script == 'sample':  # and the shares of exits, the drafts kept, the size of the cache
        return [out, *re.findall(r'\d+: [\d.]+%|\S+ of \S+ kept|[\d.]+ MiB', err)]
    lines = [line for line in out.splitlines() if script == 'bench' and not line.startswith(('Over', ' '))]
    return re.findall(r'\d[\d,.]*(?:e[+-]\d+)?', ' '.join(lines))


def difference_of_case(case, base, tree):
    """Returns the first difference between the results of a case in two folders, as text; '' if none."""
    a, b = case.folder(base), case.folder(tree)
    for one, other in zip(*(json.loads((x / 'said.json').read_text()) for x in (a, b)), strict=True):
        if one[0] or other[0]:  # a command that fails in both proves nothing
            reason = (other if other[0] else one)[2].splitlines()[-1:]
            return f'exit status {one[0]} in the base, {other[0]} in the tree: {reason}'
        if found := difference(told(case.script, *one[1:]), told(case.script, *other[1:]), 'output'):
            return found
    a, resumed = case.folder(base, case.same_as), bool(case.same_as)
    patterns = ['end/log.jsonl', 'end/ckpt.pt'] if resumed else ['start/*.pt', 'end/log.jsonl', 'end/*.pt']
    names = [path.relative_to(a) for pattern in patterns for path in sorted(a.glob(pattern))]
    for name in names:
        if not (b / name).exists():
            return f'no {name}'
        x, y = read(a / name), read(b / name)
        if resumed and name.suffix == '.jsonl':
            x = x[-len(y) :]
        if found := difference(x, y, str(name)):
            return found
    return '' if names or case.script != 'train' else 'nothing was saved'


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('--base', help='commit to compare with', required='--drive' not in sys.argv)
    parser.add_argument('--tree', type=Path, default=REPOSITORY, help='working tree; default: this one')
    parser.add_argument('--quick', action='store_true', help='run a fourth of the trainings')
    parser.add_argument('--drive', help=SUPPRESS)
    args = parser.parse_args()
    if args.drive:
        return drive(args.drive)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that both processes end, too
    start, step = time.time(), 4 if args.quick else 1
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        trees, results = ([folder / part / x for x in ('base', 'tree')] for part in ('code', 'results'))
        subprocess.check_call(['git', 'clone', '-q', '--shared', '--no-checkout', REPOSITORY, trees[0]])
        subprocess.check_call(['git', '-C', trees[0], 'checkout', '-q', args.base])
        shutil.copytree(args.tree, trees[1], ignore=shutil.ignore_patterns(*NOT_COPIED))
        dice, text, prompt = random.Random(0), folder / 'text.txt', folder / 'prompt.txt'
        words = [''.join(dice.choices('etaoinshrdlu', k=dice.randint(2, 7))) for _ in range(12)]
        text.write_text(''.join(dice.choice(words) + dice.choice('    ,.\n') for _ in range(5000)))
        prompt.write_text(text.read_text()[:600])
        prepare = [sys.executable, 'data/text/prepare.py', '--input', text, '--name', 'words']
        subprocess.check_call(prepare, cwd=trees[0], stdout=subprocess.DEVNULL)
        places = dict(data=f'{trees[0]}/data/words', prompt=str(prompt), base=str(results[0]))
        first = sample_of(first_round(trees[0]), step)
        differ = run_and_compare(first, trees, results, places)
        second = second_round(first)
        differ += run_and_compare(second, trees, results, places)
    print(f'{len(first + second)} cases, {differ} differ, {time.time() - start:.0f} s')
    sys.exit(differ > 0)


if __name__ == '__main__':
    main()
