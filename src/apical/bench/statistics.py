"""Intervals and paired tests over the seeds of an experiment."""

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
"""Nominal coverage of intervals."""

RESAMPLES = 10_000
"""Number of resamples of a bootstrap that does not enumerate all of them."""

ALL = 6
"""Largest number of values for which a bootstrap enumerates all resamples: 6^6 = 46,656."""


class Interval(NamedTuple):
    """A mean with its interval over n values; low and high are None for one value."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def shown(self, places: int = 2) -> str:
        """Format as text.

        >>> Interval(1.0, 0.5, 1.5, 3).shown(1)
        '1.0 [0.5, 1.5]'
        """
        if self.low is None or self.high is None:
            return f"{self.mean:.{places}f}"
        return f"{self.mean:.{places}f} [{self.low:.{places}f}, {self.high:.{places}f}]"


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """Return the mean of the values and its percentile bootstrap interval at 95 %.

    Up to six values, all resamples are used; beyond that, 10,000 drawn with `seed`. With few seeds the interval is too
    narrow: three values never give one wider than their range. Always report n with it.

    Raises:
        ValueError: no values.

    >>> bootstrap([1.0, 2.0, 3.0]).shown()
    '2.00 [1.22, 2.78]'
    """
    if not values:
        raise ValueError("no values to resample")
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Interval(mean, None, None, 1)
    means = _all_means(values) if n <= ALL else _drawn_means(values, seed)
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(mean, float(low), float(high), n)


def student(values: Sequence[float]) -> Interval:
    """Return the mean of the values and its 95 % interval by Student's t.

    >>> student([1.0, 2.0, 3.0]).shown(3)
    '2.000 [-0.484, 4.484]'
    """
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Interval(mean, None, None, n)
    from scipy import stats  # its import takes a third of a second

    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def student_p(differences: Sequence[float]) -> float | None:
    """Return the two-sided p-value of Student's test that the mean of paired differences is zero; None if all are equal."""
    if len(differences) < 2 or statistics.stdev(differences) == 0:
        return None
    from scipy import stats

    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def _all_means(values: Sequence[float]) -> list[float]:
    return [sum(sample) / len(values) for sample in itertools.product(values, repeat=len(values))]


def _drawn_means(values: Sequence[float], seed: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    draws = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    means: np.ndarray[tuple[int], np.dtype[np.float64]] = np.asarray(values, dtype=np.float64)[draws].mean(axis=1)
    return means


def sign_flip(differences: Sequence[float], seed: int = 0) -> float:
    """Return the two-sided p-value of the sign-flip test that paired differences are symmetric about zero.

    Exact up to sixteen pairs; beyond that, over 10,000 flips drawn with `seed`. With n pairs the smallest value is 2 / 2^n:
    0.25 for three, 0.0625 for five; at least six pairs are needed to reach 0.05.

    >>> sign_flip([1.0, 2.0, 3.0])
    0.25
    """
    observed, slack = abs(sum(differences)), 1e-12 * sum(map(abs, differences))
    flipped = list(_flips(differences, seed))
    extreme = sum(value >= observed - slack for value in flipped)
    sampled = len(differences) > _EXACT
    return (extreme + sampled) / (len(flipped) + sampled)


_EXACT = 16


def _flips(differences: Sequence[float], seed: int) -> Iterator[float]:
    if len(differences) <= _EXACT:
        for signs in itertools.product((1, -1), repeat=len(differences)):
            yield abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)))
        return
    signs_drawn = np.random.default_rng(seed).choice((-1.0, 1.0), (RESAMPLES, len(differences)))
    yield from np.abs(signs_drawn @ np.asarray(differences)).tolist()


class Paired(NamedTuple):
    """Difference, ours minus theirs, over common seeds: mean with interval, and the sign-flip test's p-value."""

    difference: Interval
    p: float


def paired(ours: dict[int, float], theirs: dict[int, float]) -> Paired | None:
    """Compare two rules over the seeds that both have; None if they have none in common.

    >>> found = paired({0: 2.0, 1: 3.0, 2: 9.0}, {0: 1.0, 1: 1.0})
    >>> found.difference.mean, found.difference.n, found.p
    (1.5, 2, 0.5)
    """
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    return Paired(bootstrap(differences), sign_flip(differences)) if differences else None


LIMIT = 0.25
"""Largest interquartile range of the epochs' times, as a share of their median."""
FEWEST = 4
"""Smallest number of epochs for which the spread is judged."""


def spread(times: Sequence[float]) -> float:
    """Return the interquartile range over the median; 0 for fewer than :data:`FEWEST` times.

    >>> spread([1.0, 1.0, 1.0, 1.0, 9.0]), spread([1.0, 1.0, 2.0, 3.0, 3.0])
    (0.0, 1.0)
    """
    if len(times) < FEWEST:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / middle if middle > 0 else 0.0


def busy_note(times: Mapping[str, Sequence[float]]) -> str:
    """Return a sentence if the times of some rule vary too much to compare; otherwise nothing.

    Args:
        times: by rule, a step's time in every epoch of every seed.
    """
    widths = {rule: spread(values) for rule, values in times.items()}
    rule = max(widths, key=lambda name: widths[name], default="")
    if not rule or widths[rule] <= LIMIT:
        return ""
    return (
        f"Times are approximate because the machine was busy: the interquartile range of the step times of {rule} is "
        f"{100 * widths[rule]:.0f} % of their median (more than {100 * LIMIT:.0f} %)."
    )
