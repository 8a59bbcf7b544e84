"""
Standard errors of what is measured on a sample of items: questions, windows, seeds. Tests of differences.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np

from nanoloop.checks import missing_package

RESAMPLES = 1999  # of a bootstrap: moves the end of an interval by 0.06 standard errors at random
RESAMPLED_AT_ONCE = 2**22  # items, for its memory


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


# -----------------------------------------------------------------------------
# differences


class Difference(NamedTuple):
    """A difference with its 95 % interval; nan for what cannot be had."""

    value: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan  # of a test whose hypothesis is that there is none
    method: str = ''  # how interval and p were computed, or why they were not


def load_scipy():
    """Returns scipy.stats. Raises UserError if scipy is missing."""
    try:
        from scipy import stats
    except ImportError:
        raise missing_package('comparing', 'eval', 'scipy') from None
    return stats


def same(values):
    """Returns whether values are equal, to the digits that eval.csv has."""
    return bool(np.ptp(values) <= 1e-7 * np.abs(values).max())


def welch(first, second):
    """Returns the Difference of two means, second - first, by Welch's t-test: variances may differ.

    first, second: values of independent runs. There is no test of a single value, nor without any spread.
    """
    first, second = (np.asarray(values, dtype=np.float64) for values in (first, second))
    value = float(second.mean() - first.mean())
    if min(len(first), len(second)) < 2:
        return Difference(value, method='no test with n=1')
    if not math.isfinite(value):
        return Difference(value, method='no test: a value is not finite')
    if same(first) and same(second):
        return Difference(value, method='no test: the seeds do not differ')
    stats = load_scipy()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)  # of one sample without spread: the other one has it
        result = stats.ttest_ind(second, first, equal_var=False)
    low, high = map(float, result.confidence_interval(0.95))
    return Difference(value, low, high, float(result.pvalue), f"Welch's t-test, df={result.df:.1f}")


def mean_difference(values):
    """Returns the mean of paired differences, (n,), as a Difference with the interval of their t-test."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2 or same(values):
        return Difference(float(values.mean()), method='no interval: the seeds do not differ')
    low, high = map(float, load_scipy().ttest_1samp(values, 0).confidence_interval(0.95))
    return Difference(float(values.mean()), low, high, method=f't interval over {len(values)} seeds')


class Pairs(NamedTuple):
    """What two measurements of the same items gave, (n,) each. A result is sum(values) / sum(counts)."""

    first: np.ndarray
    second: np.ndarray
    counts: np.ndarray  # tokens of a window, 1 for a question
    weight: float = 1.0  # of the result, in a mean over several tasks


def paired_bootstrap(parts, seed=0):
    """Returns the Difference of two measurements of the same items, second - first: a percentile bootstrap.

    parts: a list of Pairs, whose results are weighted and added. The items of each are resampled, and an item
    takes both of its values with it: what is hard for both measurements cancels.
    """
    changes = [part.second - part.first for part in parts]

    def difference(*chosen, axis=-1):  # indices of items, (resamples, n) each
        ratios = (
            change[i].sum(axis) / part.counts[i].sum(axis)
            for part, change, i in zip(parts, changes, chosen, strict=True)
        )
        return sum(part.weight * ratio for part, ratio in zip(parts, ratios, strict=True))

    sizes = [len(change) for change in changes]
    items = tuple(map(np.arange, sizes))
    value = float(difference(*items))
    if min(sizes) < 2 or not any(change.any() for change in changes):
        return Difference(
            value, method='no interval: ' + ('one item' if min(sizes) < 2 else 'no item differs')
        )
    result = load_scipy().bootstrap(
        items,
        difference,
        n_resamples=RESAMPLES,
        batch=max(1, RESAMPLED_AT_ONCE // sum(sizes)),
        vectorized=True,
        method='percentile',
        rng=np.random.default_rng(seed),
    )
    low, high = map(float, result.confidence_interval)
    return Difference(value, low, high, method=f'paired bootstrap over {sum(sizes):,} items')


def unpaired(value, errors):
    """Returns the Difference of two results with these standard errors, as if their items were not the same.

    That interval is too wide: it is what is left where the results of single items are missing.
    """
    half = load_scipy().norm.ppf(0.975) * math.hypot(*errors)
    if not math.isfinite(half):
        return Difference(value, method='no items, no standard errors')
    return Difference(value, value - half, value + half, method='no items: unpaired standard errors')


def holm(p_values):
    """Returns p values of several tests that are adjusted for their number m, by Holm's method.

    The k-th smallest, from 0, is multiplied by m - k; then it is at least the one before it, and at most 1.
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p_values)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1)).clip(max=1)
    return adjusted.tolist()
