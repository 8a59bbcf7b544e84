"""
Standard errors of what is measured on a sample of items: questions, windows, seeds.
"""

import math

import numpy as np


def mean_and_error(values):
    """Returns the mean of values (n,) and its standard error, sqrt(var / n) with n - 1 in var; nan for n = 1.

    The values of different items must be independent: of an item that is measured several times, take the
    mean.
    """
    values = np.asarray(values, dtype=np.float64)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def ratio_and_error(sums, counts):
    """Returns sum(sums) / sum(counts) and its standard error, for items of unlike counts, (n,) each.

    Tokens of one window are not independent, windows are. With the ratio r the error is that of a mean of
    sums - r counts, over the mean count (the linearised ratio estimator of survey statistics).
    """
    sums, counts = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    ratio = sums.sum() / counts.sum()
    _, error = mean_and_error(sums - ratio * counts)
    return float(ratio), error / float(counts.mean())
