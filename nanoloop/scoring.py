"""
Scores texts: the cross-entropy of some of their tokens, after each of several numbers of loops.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Text(NamedTuple):
    """Token ids of which some are scored: each of these is predicted from all ids before it."""

    ids: list  # token ids, the beginning-of-text token included
    scored: slice | np.ndarray  # slice(start, end) with start >= 1, or a bool array of the length of ids


class Item(NamedTuple):
    """A question: its texts are the choices, or one."""

    texts: list  # of Text
    info: dict  # what `judge` needs and the file of items shows, plain values: at least index


class Evaluation(NamedTuple):
    """What gives one row of eval.csv for every number of loops or exit policy."""

    name: str  # such as core/arc_easy
    settings: str  # what decides the items beside the name, see results.py
    items: list  # of Item
    # (item, ces, predicted) -> a record of plain values. Of every text ces has its scored tokens'
    # cross-entropies, a float64 array (k,), and predicted the most likely tokens there, an int array (k,)
    judge: Callable
    summarise: Callable  # the records of all items, in their order -> {column of eval.csv: number}
