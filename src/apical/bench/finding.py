"""Findings: verdicts on our own marks, from means and paired differences over seeds, as rows of a study's table."""

from collections.abc import Sequence
from typing import Any

from apical.bench.statistics import sign_flip, student, student_p

Row = dict[str, Any]
"""figure, rule, what, mark, mean, std, low, high, n, source and verdict of one finding."""


def difference(figure: str, rule: str, what: str, ours: Sequence[float], theirs: Sequence[float], *, less: bool) -> Row:
    """A verdict on ours minus theirs, pair by pair: reproduced if its 95 % interval lies on the better side of 0.

    Args:
        figure: part of the specification that it belongs to.
        rule, what: which rule, and what is compared.
        ours, theirs: one value per meta-seed.
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, low, high, n = student(differences)
    assert low is not None
    assert high is not None
    holds = high < 0 if less else low > 0
    return {
        "figure": figure,
        "rule": rule,
        "what": what,
        "mark": "interval < 0" if less else "interval > 0",
        "mean": mean,
        "std": None,
        "low": low,
        "high": high,
        "p_student": student_p(differences),
        "p_sign_flip": sign_flip(differences),
        "n": n,
        "source": "our mark",
        "verdict": "reproduced" if holds else "not reproduced",
    }


def count(figure: str, rule: str, what: str, holds: Sequence[bool], least: int) -> Row:
    """A verdict on how many of several comparisons hold."""
    return {
        "figure": figure,
        "rule": rule,
        "what": what,
        "mark": f"≥ {least} of {len(holds)}",
        "mean": float(sum(holds)),
        "std": None,
        "n": len(holds),
        "source": "our mark",
        "verdict": "reproduced" if sum(holds) >= least else "not reproduced",
    }


def at_least(figure: str, rule: str, what: str, values: Sequence[float], mark: float, each: float | None = None) -> Row:
    """A verdict on the mean, and on the worst of the seeds, for marks that were set on these; with the mean's interval."""
    mean, low, high, n = student(values)
    return {
        "figure": figure,
        "rule": rule,
        "what": what if each is None else f"{what}; the worst seed: {min(values):.3g}",
        "mark": f"mean ≥ {mark:g}" if each is None else f"mean ≥ {mark:g}, each ≥ {each:g}",
        "mean": mean,
        "std": None,
        "low": low,
        "high": high,
        "n": n,
        "source": "our mark",
        "verdict": "reproduced" if mean >= mark and (each is None or min(values) >= each) else "not reproduced",
    }


def shown(values: Sequence[float]) -> str:
    """Mean and 95 % interval over meta-seeds.

    >>> shown([1.0, 2.0, 3.0])
    '2 [-0.484, 4.48]'
    """
    mean, low, high, _ = student(values)
    return f"{mean:.3g}" if low is None else f"{mean:.3g} [{low:.3g}, {high:.3g}]"
