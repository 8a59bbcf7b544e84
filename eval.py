"""
Measures a model's quality for several numbers of loops: a row per task and number of loops.

    python eval.py --out_dir=out-quickstart --loops=1,2,4,8,16
    python eval.py --out_dir=out-quickstart --tasks=core --core_dir=eval_bundle --max_per_task=500
    python eval.py --init_from=gpt2 --tasks=wikitext,lambada --items=items.jsonl
    torchrun --standalone --nproc_per_node=8 eval.py --out_dir=out --tasks=core

The rows are also lines of eval.csv in the folder of the model. A row that is there already is not measured
again, so the same command continues an evaluation that was stopped. An exit rule with thresholds, and smaller
KV caches, are policies with rows of their own.
"""

import contextlib
import functools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent))  # ours come first, also with python -P
from configurator import command, configure, print_error, print_line

# a Ctrl-C while the rest is imported is handled from here on
# isort: split
import torch

from model import GPT
from nanoloop import RANK
from nanoloop.checkpoint import (
    WEIGHTS,
    check_tokenizer,
    configure_checkpoint,
    find_model,
    find_tokenizer,
    load_checkpoint,
)
from nanoloop.checks import Choice, Count, Name, Size, check, settle_fields
from nanoloop.early_exit import EXIT, EarlyExit
from nanoloop.eval_plot import check_plotting, draw_results
from nanoloop.eval_tasks import TASKS
from nanoloop.evaluator import Evaluator
from nanoloop.files import check_writable
from nanoloop.machine import setup
from nanoloop.number_lists import Numbers, choose_names, read_numbers
from nanoloop.parallel import gather, leave
from nanoloop.results import Results, against_one_loop, csv_beside, format_table, run_id
from nanoloop.scoring import Policy


@dataclass
class EvalConfig:
    # model
    out_dir: Name = 'out'  # folder of a run (its best.pt, else its ckpt.pt), or another name as in init_from
    init_from: Name = 'resume'  # resume (the model in out_dir), a folder, a file, gpt2..gpt2-xl, ouro:FOLDER
    weights: Choice(WEIGHTS) = 'raw'  # ema: load the average of the weights, which train.py saves with --ema
    # what is measured
    tasks: Name = 'loss'  # names with commas between them: loss, core, mano, gsm8k, chatcore, ...
    loops: Numbers(int, 1) = ''  # numbers of loops, such as 1,2,4,8: all in one pass; '' = the model's
    exit: Choice(('', *EXIT)) = ''  # early exit, of at most the largest number of loops; '' = none
    exit_threshold: Numbers(float, 0) = ''  # thresholds of exit, such as 0.1,0.05: a row for each
    min_loops: Count = 1  # smallest number of loops of a token; needs exit
    kv_budget: Numbers(int, 1) = ''  # loops with a KV cache of their own, such as 1,2: a row for each
    # tasks
    dataset: str = ''  # tasks=loss: a data set as in train.py; '' = that of the model's run
    split: str = 'val'  # tasks=loss: the split of the data set
    windows: Size = 0  # loss: windows, 0 = all; mano, p_hop: questions per difficulty, 0 = 2000
    core_dir: str = ''  # tasks=core: the folder with core.yaml; '' = downloaded once
    max_per_task: Count | None = None  # most questions of a task, but for loss, mano, p_hop; None = all
    fewshot_seeds: Numbers(int, 0) = '1234'  # core: seeds that draw the questions in front, such as 1234,2345
    wikitext: str = ''  # file of WikiText: raw text, .jsonl or .parquet; '' = from the hub
    lambada: str = ''  # file of LAMBADA: .jsonl or .parquet with text; '' = from the hub
    # tasks of a chat model
    arc: str = ''  # file or folder of ARC: .jsonl, .parquet or .csv; '' = from the hub
    mmlu: str = ''  # file or folder of MMLU: .csv, .jsonl or .parquet; '' = from the hub
    gsm8k: str = ''  # file or folder of GSM8K: .jsonl or .parquet; '' = from the hub
    humaneval: str = ''  # file or folder of HumanEval: .jsonl or .parquet; '' = from the hub
    words: str = ''  # spellingbee, simplespelling: file with a word on each line; '' = downloaded once
    run_code: bool = False  # humaneval: run programs that the model wrote; limits, but no security boundary
    max_new_tokens: Count = 512  # most tokens of an answer
    # output
    csv: str = ''  # file of the rows; '' = eval.csv in the model's folder
    items: str = ''  # file of JSON lines with the decision on every item; '' = none
    plot: bool = False  # draw all rows of the csv: quality against loops and FLOPs, a .png beside it
    # machine
    batch_tokens: Count = 8192  # tokens of a batch
    device: str = 'auto'  # auto (cuda, else mps, else cpu), cpu, cuda, cuda:N or mps
    dtype: str = 'auto'  # type of matrix products: auto, float32, bfloat16 or float16
    backend: str = 'auto'  # of torch.distributed: auto, nccl or gloo

    def __post_init__(self):
        """Raises UserError for a value out of its bounds, and for values that do not go together."""
        settle_fields(self)
        if not self.exit:
            check(not self.exit_threshold, 'exit_threshold', self.exit_threshold, "'' without an exit")
            check(self.min_loops == 1, 'min_loops', self.min_loops, '1 without an exit')
        elif not (EXIT[self.exit].needs_gate or self.exit_threshold):  # else the model is asked first
            EarlyExit(self.exit, None).check_threshold()
        check(self.fewshot_seeds, 'fewshot_seeds', '', 'at least one number')


def make_policies(c, config):
    """Returns the policies of the keys: numbers of loops, then exits, then budgets of the largest number."""
    loops = read_numbers(c.loops) or [config.n_loop]
    most = max(loops)
    policies = [Policy(n) for n in loops]
    thresholds = (read_numbers(c.exit_threshold, float) or [None]) if c.exit else []
    policies += [Policy(most, EarlyExit(c.exit, threshold, c.min_loops)) for threshold in thresholds]
    for budget in read_numbers(c.kv_budget):
        check(budget <= most, 'kv_budget', c.kv_budget, f'at most the {most} loops')
        policies.append(Policy(most, kv_budget=budget))
    with torch.device('meta'):  # takes no memory
        model = GPT(config)
    for policy in policies:
        if policy.early_exit is not None:
            policy.early_exit.check_model(model, policy.n_loop)
    return policies


class Progress:
    """Tells on stderr how many items of a task this rank has done, on rank 0 only.

    In a terminal it is a bar of tqdm, if that is installed, elsewhere a line every LINE_S seconds.
    """

    LINE_S = 15.0

    def __init__(self, name):
        self.name, self.bar, self.began = name, None, time.monotonic()
        self.told = self.began

    def __call__(self, done, n):
        if RANK:
            return
        if self.bar is None and sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self.bar = tqdm(total=n, desc=self.name, leave=False)
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
        elif (now := time.monotonic()) - self.told >= self.LINE_S:
            print_error(f'... {self.name}: {done:,} of {n:,} items ({now - self.began:.0f} s so far)')
            self.told = now

    def close(self):
        if self.bar is not None:
            self.bar.close()


@functools.partial(command, parallel=True)
def main(argv):
    say = print_error if RANK == 0 else lambda text: None
    c = configure((EvalConfig,), argv, say=print_error)
    c.build(EvalConfig)
    tasks = choose_names('tasks', c.tasks, TASKS)
    if c.plot:
        check_plotting()
    items_file = c['items']  # c.items is the method of a dict
    check(Path(items_file).parent.is_dir(), 'items', items_file, 'a file in a folder that exists')
    if items_file:
        check_writable(Path(items_file), 'items')
    # first all that can be wrong, then the weights
    check_tokenizer(c.out_dir if c.init_from == 'resume' else c.init_from)
    checkpoint = find_model(c, say)
    config, *_ = configure_checkpoint(checkpoint)
    tokenizer = find_tokenizer(checkpoint)
    policies = make_policies(c, config)
    results = Results(c.csv or csv_beside(checkpoint), run_id(checkpoint))
    c['dataset'] = c.dataset or checkpoint.get('config', {}).get('dataset', '')
    loaded = {name: task.load(c, tokenizer, config, say) for name, task in tasks.items()}

    m = setup(SimpleNamespace(**c, compile=False, shard=False, deterministic=False, peak_flops=None, seed=0))
    results.rows = gather(m, results.rows)[0]  # before rank 0 adds any
    model, _ = load_checkpoint(checkpoint, m.device)
    say(m.line)
    step = int(checkpoint['iter_num'])
    average = ', the average of the weights' * (c.weights == 'ema')
    say(f'{checkpoint["path"]}: step {step}{average}, rows in {results.path}')
    base = dict(dtype=str(m.dtype)[6:], step=step, run=results.run, checkpoint=checkpoint['path'])
    evaluator = Evaluator(model, m, policies, results, base, c.batch_tokens, items_file, Progress)
    try:
        rows = [row for name in tasks for row in evaluator.run(name, tasks[name], loaded[name])]
    except KeyboardInterrupt:
        say(f'stopped: {len(results.rows)} rows are in {results.path}; the same command measures the others')
        raise
    if items_file and evaluator.n_found:
        say(f'{items_file}: without the items of {evaluator.n_found} rows that had been measured before')
    rows = list({id(row): row for row in rows}.values())  # chatcore's tasks may be named beside it
    leave(m)
    if RANK == 0:
        for line in (*format_table(rows), *against_one_loop(rows, config.n_loop)):
            print_line(line)
        if c.plot:
            print_line(f'drawn: {draw_results(results)}')


if __name__ == '__main__':
    main()
