"""
Sources of batches. A source is a function batches(step): it returns an iterator of this rank's micro-batches
from a step on, gradient_accumulation_steps / world of them per step. The training loop knows nothing else of
the data.
"""

import functools
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch

from nanoloop.randomness import random_generator, random_sequence


class Batch(NamedTuple):
    """A micro-batch, on the CPU until to_device."""

    idx: torch.Tensor  # (B, T) token ids
    targets: torch.Tensor  # (B, T) each position's next token, -1 = ignored
    seed: int  # for the default generator, from which dropout and noise are drawn
    weights: torch.Tensor | None = None  # (B, T) weight of each token's loss; None = 1
    values: dict = {}  # further values to log, means of the micro-batch: {name: float}
    n_targets: int | None = None  # number of targets other than -1; None = the batch is on the CPU

    def to_device(self, m):
        """Returns the batch with its tensors on the device of m, and its number of targets counted before.

        On a GPU the host does not wait for the copies. A batch that is on the device is returned as it is.
        """
        if self.n_targets is not None:
            return self
        tensors = (None if x is None else m.to_device(x) for x in (self.idx, self.targets, self.weights))
        idx, targets, weights = tensors  # (B, T) each
        n_targets = int((self.targets.numpy() != -1).sum())  # by numpy: this thread shall start no others
        return self._replace(idx=idx, targets=targets, weights=weights, n_targets=n_targets)


def micro_batch_number(m, micro):
    """Returns the index in a step's global batch of micro-batch `micro` of this rank."""
    return micro * m.world + m.rank


def batch_seed(c, step, number):
    """Returns the seed of micro-batch `number` of a step, see Batch."""
    word = random_sequence(c.seed, step, number, stream='noise').generate_state(1, np.uint64)[0]
    return int(word >> 1)  # torch's seeds are int64


def draw_windows(split, c, m, step, micro):
    """Draws a Batch of windows from a Split. It depends on seed, step and micro-batch number only."""
    number = micro_batch_number(m, micro)
    idx, targets = split.draw(random_generator(c.seed, step, number, stream='data'), c.batch_size)
    return Batch(torch.from_numpy(idx), torch.from_numpy(targets), batch_seed(c, step, number))


def window_batches(split, c, m):
    """Returns the source of windows of a split, see read_ahead."""
    return functools.partial(read_ahead, functools.partial(draw_windows, split, c, m), c, m)


# -----------------------------------------------------------------------------
# epochs: each row of the data once, in a new order


def steps_per_epoch(n_rows, c):
    """Returns the steps of an epoch over n_rows rows. The last one has the rows that remain."""
    return math.ceil(n_rows / (c.gradient_accumulation_steps * c.batch_size))


def steps_of_epochs(n_rows, c):
    """Returns the steps of c.epochs epochs over n_rows rows, rounded up: of 0.5, half of an epoch's."""
    whole, part = divmod(Fraction(repr(c.epochs)), 1)  # exact: 0.1 of 30 rows are 3
    left = part * n_rows / (c.gradient_accumulation_steps * c.batch_size)
    return int(whole) * steps_per_epoch(n_rows, c) + math.ceil(left)


@functools.lru_cache(maxsize=1)
def row_order(seed, epoch, n_rows):
    """Returns the order of the rows in an epoch, numbered from 0, a permutation (n_rows,)."""
    return random_generator(seed, epoch, stream='rows').permutation(n_rows)


def take_rows(split, c, m, step, micro):
    """Returns a Batch of the next rows of an epoch. It depends on seed, step and micro-batch number only.

    Past the last row of the epoch it has no targets.
    """
    number, n_rows = micro_batch_number(m, micro), int(split.train_windows.sum())
    epoch, step_in_epoch = divmod(step, steps_per_epoch(n_rows, c))
    start = (step_in_epoch * c.gradient_accumulation_steps + number) * c.batch_size
    rows = row_order(c.seed, epoch, n_rows)[start : start + c.batch_size]
    idx, targets = split.read_train_windows(rows, c.batch_size)
    return Batch(torch.from_numpy(idx), torch.from_numpy(targets), batch_seed(c, step, number))


def row_batches(split, c, m):
    """Returns the source of a split's rows, epoch after epoch."""
    return functools.partial(read_ahead, functools.partial(take_rows, split, c, m), c, m)


def read_ahead(make, c, m, step):
    """Yields make(step, micro) from a step on, on the device.

    While a batch is used, a thread makes the next one and copies it. On a GPU its copies run in between, on
    the stream of everything else, so that they are done before they are used.
    """

    def make_on_device(step, micro):
        batch = make(step, micro)
        return batch.to_device(m) if m.copies_in_threads else batch  # else train_step copies it

    micros = range(c.gradient_accumulation_steps // m.world)
    places = ((later, micro) for later in itertools.count(step) for micro in micros)
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(make_on_device, *next(places))
        while True:
            batch, ahead = ahead.result(), reader.submit(make_on_device, *next(places))
            yield batch
