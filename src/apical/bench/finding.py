"""Findings: verdicts on our pass marks, from means and paired differences over seeds, as rows of a study's table."""

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import getitem
from types import MappingProxyType
from typing import Any

from apical.bench.statistics import Interval, sign_flip, student, student_p

Row = dict[str, Any]
"""figure, rule, what, mark, mean, std, low, high, n, source and verdict of one finding."""


def difference(
    figure: str,
    rule: str,
    what: str,
    ours: Sequence[float],
    theirs: Sequence[float] | float,
    *,
    less: bool,
    margin: float = 0.0,
) -> Row:
    """Judge ours minus theirs, pair by pair: reproduced if its 95 % interval lies on the better side of 0.

    Args:
        figure: part of the specification to which it belongs.
        rule, what: the rule, and the quantity compared.
        ours, theirs: one value per meta-seed; theirs may be a single number.
        margin: added to theirs.
    """
    others = [theirs] * len(ours) if isinstance(theirs, int | float) else theirs
    differences = [a - (b + margin) for a, b in zip(ours, others, strict=True)]
    interval = student(differences)
    assert interval.low is not None
    assert interval.high is not None
    p = {"p_student": student_p(differences), "p_sign_flip": sign_flip(differences)}
    holds = interval.high < 0 if less else interval.low > 0
    return _row(figure, rule, what, "interval < 0" if less else "interval > 0", _measured(interval, p), holds)


def count(figure: str, rule: str, what: str, holds: Sequence[bool], least: int) -> Row:
    """Judge how many of several comparisons hold."""
    measured = {"mean": float(sum(holds)), "std": None, "n": len(holds)}
    return _row(figure, rule, what, f"≥ {least} of {len(holds)}", measured, sum(holds) >= least)


def at_least(figure: str, rule: str, what: str, values: Sequence[float], mark: float, each: float | None = None) -> Row:
    """Judge the mean and, if a mark is given for it, the worst seed; with the interval of the mean."""
    interval, holds = student(values), each is None or min(values) >= each
    what = what if each is None else f"{what}; the worst seed: {min(values):.3g}"
    text = f"mean ≥ {mark:g}" if each is None else f"mean ≥ {mark:g}, each ≥ {each:g}"
    return _row(figure, rule, what, text, _measured(interval), interval.mean >= mark and holds)


def at_most(figure: str, rule: str, what: str, values: Sequence[float], mark: float) -> Row:
    """Judge the mean, with its interval."""
    interval = student(values)
    return _row(figure, rule, what, f"mean ≤ {mark:g}", _measured(interval), interval.mean <= mark)


def _measured(interval: Interval, p: Mapping[str, float | None] = MappingProxyType({})) -> Row:
    return {"mean": interval.mean, "std": None, "low": interval.low, "high": interval.high, **p, "n": interval.n}


def _row(figure: str, rule: str, what: str, mark: str, measured: Row, holds: bool) -> Row:
    verdict = "reproduced" if holds else "not reproduced"
    around = {"figure": figure, "rule": rule, "what": what, "mark": mark}
    return {**around, **measured, "source": "our mark", "verdict": verdict}


def series(cells: Sequence[Mapping[str, Any]], *path: Any) -> list[Any]:
    """Return the value at a path of keys and indices, for each meta-seed.

    >>> series([{"bp": [0.5, 0.75]}, {"bp": [0.25, 1.0]}], "bp", -1)
    [0.75, 1.0]
    """
    return [reduce(getitem, path, cell) for cell in cells]


def by_name(cells: Sequence[Mapping[str, Any]], part: str) -> dict[str, list[Any]]:
    """Return one part of the cells: name -> one value per meta-seed.

    >>> by_name([{"arms": {"bp": 1, "fa": 2}}, {"arms": {"bp": 3, "fa": 4}}], "arms")
    {'bp': [1, 3], 'fa': [2, 4]}
    """
    return {name: series(cells, part, name) for name in cells[0][part]}


def table(title: str, note: str, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> Row:
    """Return a table of texts and of values over meta-seeds, shown as their mean with its 95 % interval."""
    lines = [[cell if isinstance(cell, str) else shown(cell) for cell in row] for row in rows]
    return {"title": title, "note": note, "header": [*header], "rows": lines}


def mean_table(
    title: str, note: str, first: str, runs: Mapping[str, Sequence[Mapping[str, float]]], measures: Mapping[str, str]
) -> Row:
    """Return a table of means over meta-seeds with 95 % intervals: a row for each name, a column for each measure.

    Args:
        first: heading of the column of names.
        runs: measurements under each name, one per meta-seed.
        measures: key of a measure -> heading of its column.
    """
    rows = ([name, *(series(of_name, key) for key in measures)] for name, of_name in runs.items())
    return table(title, note, [first, *measures.values()], rows)


def interval(row: Row) -> str:
    """Format the mean of a verdict on differences with its interval."""
    return f"{_digits(row['mean'])} [{_digits(row['low'])}, {_digits(row['high'])}]"


def shown(values: Sequence[float]) -> str:
    """Format mean and 95 % interval over meta-seeds.

    >>> shown([1.0, 2.0, 3.0])
    '2 [-0.484, 4.48]'
    """
    mean, low, high, _ = student(values)
    return _digits(mean) if low is None or high is None else f"{_digits(mean)} [{_digits(low)}, {_digits(high)}]"


def _digits(value: float) -> str:
    """Format with three significant digits, or all digits of a whole number with four or five."""
    return f"{value:.0f}" if 999.5 <= abs(value) < 99_999.5 else f"{value:.3g}"
