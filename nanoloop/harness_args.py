"""
The arguments that lm-evaluation-harness passes to a model: its own, and those of a generated text.
"""

import os
from dataclasses import dataclass
from typing import Annotated

import torch

from model import GPT
from nanoloop.checkpoint import WEIGHTS
from nanoloop.checks import (
    Above,
    AtLeast,
    AtMost,
    Choice,
    Count,
    Name,
    NotNegative,
    Size,
    check,
    hints_of,
    settle_fields,
)
from nanoloop.early_exit import EXIT, make_early_exit
from nanoloop.scoring import Policy


def make(cls, key, values):
    """Returns the dataclass cls of {name: value}. Raises UserError, with `key`, for an unknown name."""
    known = hints_of(cls)
    for name in values:
        check(name in known, key, name, f'one of {", ".join(known)}')
    return cls(**values)


class Rows:
    """A bound: auto, auto:N, or at least 1."""

    def holds(self, value, config):
        return value >= 1 if isinstance(value, int) else value.partition(':')[0] == 'auto'

    def expected(self, config):
        return 'auto or a number, at least 1'


@dataclass
class ModelArgs:
    """The arguments of a model: keys of sample.py, and batch_size, which is a flag of the harness."""

    out_dir: Name = 'out'
    init_from: Name = 'resume'
    weights: Choice(WEIGHTS) = 'raw'
    n_loop: Count | None = None
    exit: Choice(('', *EXIT)) = ''
    exit_threshold: NotNegative | None = None
    min_loops: Count = 1
    kv_budget: Count | None = None
    batch_size: Annotated[int | str, Rows()] = 'auto'
    device: str = 'auto'
    dtype: str = 'auto'

    def __post_init__(self):
        """Raises UserError for a value out of its bounds, and for values that do not go together."""
        for key in ('out_dir', 'init_from'):  # the harness makes a number of the folder 123
            value = getattr(self, key)
            value = str(value) if type(value) is int else value
            if isinstance(value, str):  # no shell has replaced the ~ in out_dir=~/out or ouro:~/Ouro
                value = ':'.join(map(os.path.expanduser, value.split(':')))
            setattr(self, key, value)
        if isinstance(self.batch_size, str) and self.batch_size.isdecimal():
            self.batch_size = int(self.batch_size)
        settle_fields(self)
        make_early_exit(self)

    def policy(self, config):
        """Returns the Policy for a model of this GPTConfig. Raises UserError for one that it cannot take."""
        n_loop, early_exit = self.n_loop or config.n_loop, make_early_exit(self)
        check((self.kv_budget or 1) <= n_loop, 'kv_budget', self.kv_budget, f'at most the {n_loop} loops')
        if early_exit is not None:
            with torch.device('meta'):  # takes no memory
                early_exit.check_model(GPT(config), n_loop)
        return Policy(n_loop, early_exit, self.kv_budget)


@dataclass
class GenerationArgs:
    """What a task and --gen_kwargs say about a generated text, beside `until`."""

    max_gen_toks: Count = 256
    do_sample: bool = False  # normalize_gen_kwargs has made a temperature of it
    temperature: NotNegative = 0.0
    top_k: Size | None = None
    top_p: Annotated[float, Above(0), AtMost(1)] | None = None
    num_beams: Annotated[int, AtLeast(1), AtMost(1)] = 1

    def __post_init__(self):
        settle_fields(self)
