"""
Measures CORE with and without reusing the computation of what the texts of a question have in common.

    python tests/speed_of_core.py CORE_DIR [questions]

Random weights, 2 + 2x4 + 2 layers, 128 wide, bytes. Both sides in turns on the same questions of each task,
in CPU time of one thread. The answers are the same.
"""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from eval import EvalConfig
from model import GPT, GPTConfig
from nanoloop.core import core
from nanoloop.machine import setup
from nanoloop.scoring import Policy, score
from nanoloop.tokenizer import Bytes


def tell(name, seconds):
    """Prints the seconds with and without reuse, {reuse: seconds}, and their ratio."""
    ratio = seconds[False] / seconds[True]
    print(f'{name}, {seconds[True]:.2f} s, without {seconds[False]:.2f} s: {ratio:.2f} times', flush=True)


def main(folder, questions=11):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = GPTConfig(n_prelude=2, n_block=2, n_coda=2, n_loop=4, n_embd=128, n_head=4, block_size=2048,
                       vocab_size=256, pos='rope')  # fmt: skip
    model = GPT(config).eval()
    c = EvalConfig(core_dir=folder, max_per_task=int(questions))
    keys = dict(
        device='cpu', dtype='float32', backend='auto', compile=False, shard=False, deterministic=False
    )
    m = setup(SimpleNamespace(**keys, peak_flops=None, seed=0))
    totals = {True: 0.0, False: 0.0}
    for evaluation in core(c, Bytes(), config, print):
        if not len(evaluation.items):
            continue
        times, answers = {}, {}
        for reuse in (True, False):
            start = time.process_time()
            (result,) = score(model, evaluation, [Policy(4)], m, reuse=reuse)
            times[reuse] = time.process_time() - start
            answers[reuse] = [record.get('correct') for record in result.records]
        assert answers[True] == answers[False]
        totals = {reuse: totals[reuse] + times[reuse] for reuse in times}
        tell(f'{evaluation.name}: {len(evaluation.items)} questions', times)
    tell('all', totals)


if __name__ == '__main__':
    main(*sys.argv[1:])
