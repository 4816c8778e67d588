"""Means with intervals, and paired tests, over the meta-seeds of an experiment: independent evolutions."""

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import TypedDict

from scipy import stats


class Interval(TypedDict):
    """A mean with its 95 % interval (Student's t) over n values; None for the interval of one value."""

    mean: float
    low: float | None
    high: float | None
    n: int


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval.

    >>> found = interval([1.0, 2.0, 3.0])
    >>> found["mean"], round(found["high"] - 2, 3)
    (2.0, 2.484)
    """
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return {"mean": mean, "low": None, "high": None, "n": n}
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p-value of the exact sign-flip test that paired differences are symmetric about zero.

    With n pairs the smallest possible value is 2 / 2^n: 0.0625 for five, so five pairs never reach 0.05 by this test
    alone; :func:`paired` gives Student's test beside it.

    >>> sign_flip([1.0, 2.0, 3.0])
    0.25
    """
    observed = abs(sum(differences))
    flips = [
        abs(sum(sign * d for sign, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(value >= observed - 1e-12 for value in flips) / len(flips)


class Paired(TypedDict):
    """The mean difference of pairs with its 95 % interval, Student's and the sign-flip test's p-values."""

    difference: Interval
    p_student: float | None
    p_sign_flip: float


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Paired:
    """Paired comparison: ours minus theirs."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    varied = len(differences) > 1 and statistics.stdev(differences) > 0
    p = float(stats.ttest_1samp(differences, 0.0).pvalue) if varied else None
    return {"difference": interval(differences), "p_student": p, "p_sign_flip": sign_flip(differences)}


def excludes_zero(found: Interval) -> bool:
    """Whether the interval lies on one side of zero."""
    return found["low"] is not None and found["high"] is not None and (found["low"] > 0 or found["high"] < 0)
