"""
Random numbers without a state: functions of (seed, step, micro-batch), so that a resumed run, every rank and
any number of processes draw the same ones.
"""

import numpy as np

# what the numbers are for: each has a key of its own
STREAMS = dict(data=0, noise=1, loops=2, rollouts=4, rows=5, growth=6)


def random_sequence(seed, step, micro_batch=None, *, stream):
    """Returns numpy's SeedSequence for one of the STREAMS.

    micro_batch: the place in the global batch, micro * world + rank; None: for numbers of a whole step.
    """
    # numpy pads (seed, step) with zeros: without keys, a step's numbers would be those of its first
    # micro-batch
    words = (seed, step) if micro_batch is None else (seed, step, micro_batch)
    return np.random.SeedSequence(words, spawn_key=(STREAMS[stream],))


def random_generator(*args, **stream):
    """Returns a numpy Generator for random_sequence's arguments."""
    return np.random.default_rng(random_sequence(*args, **stream))
