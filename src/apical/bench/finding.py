"""Findings: verdicts on our own marks, from means and paired differences over seeds, as rows of a study's table."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from apical.bench.statistics import Interval, sign_flip, student, student_p

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
    interval = student(differences)
    assert interval.low is not None
    assert interval.high is not None
    p = {"p_student": student_p(differences), "p_sign_flip": sign_flip(differences)}
    holds = interval.high < 0 if less else interval.low > 0
    return _row(figure, rule, what, "interval < 0" if less else "interval > 0", _measured(interval, p), holds)


def count(figure: str, rule: str, what: str, holds: Sequence[bool], least: int) -> Row:
    """A verdict on how many of several comparisons hold."""
    measured = {"mean": float(sum(holds)), "std": None, "n": len(holds)}
    return _row(figure, rule, what, f"≥ {least} of {len(holds)}", measured, sum(holds) >= least)


def at_least(figure: str, rule: str, what: str, values: Sequence[float], mark: float, each: float | None = None) -> Row:
    """A verdict on the mean, and on the worst of the seeds, for marks that were set on these; with the mean's interval."""
    interval, holds = student(values), each is None or min(values) >= each
    what = what if each is None else f"{what}; the worst seed: {min(values):.3g}"
    text = f"mean ≥ {mark:g}" if each is None else f"mean ≥ {mark:g}, each ≥ {each:g}"
    return _row(figure, rule, what, text, _measured(interval), interval.mean >= mark and holds)


def at_most(figure: str, rule: str, what: str, values: Sequence[float], mark: float) -> Row:
    """A verdict on the mean, with its interval."""
    interval = student(values)
    return _row(figure, rule, what, f"mean ≤ {mark:g}", _measured(interval), interval.mean <= mark)


def _measured(interval: Interval, p: Mapping[str, float | None] = MappingProxyType({})) -> Row:
    return {"mean": interval.mean, "std": None, "low": interval.low, "high": interval.high, **p, "n": interval.n}


def _row(figure: str, rule: str, what: str, mark: str, measured: Row, holds: bool) -> Row:
    verdict = "reproduced" if holds else "not reproduced"
    around = {"figure": figure, "rule": rule, "what": what, "mark": mark}
    return {**around, **measured, "source": "our mark", "verdict": verdict}


def shown(values: Sequence[float]) -> str:
    """Mean and 95 % interval over meta-seeds.

    >>> shown([1.0, 2.0, 3.0])
    '2 [-0.484, 4.48]'
    """
    mean, low, high, _ = student(values)
    return f"{mean:.3g}" if low is None else f"{mean:.3g} [{low:.3g}, {high:.3g}]"
