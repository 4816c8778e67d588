"""Verdicts on figures 1D, 2 and 3 of deep feedback control, computed from the runs.

The paper prints no numbers for these figures: it makes statements ("all variants stay stable") and its plotting script has
axis limits. If a statement only gives a direction, the direction is tested (source "statement"); if it needs a threshold,
the threshold is our choice (source "our mark"). A row is reproduced if all its values (seeds, samples) meet the mark.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from apical_papers.dfc.recipes import FIXED, TRAINED
from apical_papers.dfc.toy.optimal import Optimal
from apical_papers.dfc.toy.runs import FAST, NOISE, SHOWN, History
from apical_papers.dfc.toy.traces import Traces, error_left, still_moving

Histories = Mapping[str, Sequence[History]]

SOURCES = {
    "statement": "a direction that the paper states; every value must have it",
    "our mark": "a threshold of our choice for a statement of the paper, which gives no number; every value must meet it",
    "axis": "the limits of an axis in the authors' plotting script; the curves themselves are not published as numbers",
}

AXES = {
    "condition_two": (0.7, 1.0),
    "minimum_norm": (0.0, 70.0),
    "condition_one_code": (0.0, 0.45),
    "gauss_newton": (0.0, 70.0),
    "eigenvalue": (-0.6, -0.4),
    "ssa": (0.0, 8.0),
}
"""Limits of the panels in the authors' script, which plots Condition 1 in the form of their code."""


def judge(histories: Histories, traces: Traces, optimal: Optimal) -> list[dict[str, Any]]:
    """Return every row: figure, rule, what, mark, values' mean, std and n, source, verdict."""
    rows = _figure_3(histories)
    weak, left = traces.weak, error_left(traces.weak, traces.weak_target).tolist()
    rows += [
        _row("1D", "dfc", "error left after 10 tau_u, share of the first", "<", 0.01, "our mark", left),
        _row("1D", "dfc", "change of u in the last tau_u, relative", "<", 0.01, "our mark", still_moving(weak).tolist()),
        _row("2", "dfc-ssa", "angle between updates of optimal Q, largest, °", "<", 0.1, "our mark", [optimal.angles.max()]),
        _row("2", "", "J^T in the cloud (1: yes)", ">=", 1, "statement", [float(optimal.transpose_inside)]),
        _row("2", "", "J^+ in the cloud (1: yes)", ">=", 1, "statement", [float(optimal.pseudoinverse_inside)]),
        _row(
            *("2", "", "angle between two optimal Q over that of J^T and J^+", ">", 1, "statement"),
            [optimal.typical / optimal.between],
        ),
    ]
    return rows


def _figure_3(histories: Histories) -> list[dict[str, Any]]:
    rows = []

    def add(
        rules: Sequence[str], what: str, sign: str, mark: float, source: str, take: Callable[[History], float | None]
    ) -> None:
        for rule in rules:
            numbers = [take(history) for history in histories.get(rule, ()) if history.failure is None]
            rows.append(_row("3", rule, what, sign, mark, source, [value for value in numbers if value is not None]))

    learned = ("dfc-ssa", NOISE)
    add(learned, "Condition 2 of random Q, before pre-training", "<", 0.6, "our mark", lambda run: run.before)
    add(learned, "Condition 2 after pre-training", ">=", 0.88, "our mark", lambda run: run.values["condition_two"][0])
    lowest, highest = "lowest over training", "largest over training"
    add(TRAINED, f"Condition 2, {lowest}", ">=", 0.88, "our mark", lambda run: min(run.values["condition_two"]))
    add(TRAINED, f"angle to minimum norm, {highest}, °", "<=", 30, "our mark", lambda run: max(run.values["minimum_norm"]))
    add(
        ("dfa", FAST),
        f"angle to minimum norm, {lowest}, °",
        *(">=", 55, "our mark", lambda run: min(run.values["minimum_norm"])),
    )
    what = f"angle to minimum norm minus that of dfc-ssa, {lowest}, °"
    rows.append(_row("3", "dfa", what, ">", 0, "our mark", _lead(histories, "dfa", "dfc-ssa", "minimum_norm")))
    every = (*TRAINED, *FIXED, NOISE)
    what = f"largest Re eig of any sample, {highest}, 1/tau_u"
    add(every, what, "<", 0, "statement", lambda run: max(run.values["eigenvalue_worst"]))
    what = f"angle to DFC-SSA, {highest}, °"
    add(("dfc-ss", "dfc-ss-fixed"), what, "<", 1, "our mark", lambda run: max(run.values["ssa"]))
    add(("dfc", "dfc-fixed"), what, "<", 5, "our mark", lambda run: max(run.values["ssa"]))
    what = "angle to DFC-SSA at the end, simulated step by step, °"
    add(("dfc",), what, "<", 5, "our mark", lambda run: None if run.simulated is None else run.simulated["ssa"])
    for key, name, sign in (
        ("condition_two", "Condition 2", "<"),
        ("minimum_norm", "angle to minimum norm, °", ">"),
        ("gauss_newton", "angle to Gauss-Newton, °", ">"),
    ):
        add(FIXED, f"change over training: {name}", sign, 0, "statement", lambda run, key=key: _change(run.values[key]))  # type: ignore[misc]
    return rows


def _lead(histories: Histories, rule: str, other: str, key: str) -> list[float]:
    """Return per seed the smallest difference of two rules over the epochs."""
    pairs = zip(histories.get(rule, ()), histories.get(other, ()), strict=False)
    whole = [(one, two) for one, two in pairs if one.failure is None and two.failure is None]
    return [min(a - b for a, b in zip(one.values[key], two.values[key], strict=True)) for one, two in whole]


def _change(values: Sequence[float]) -> float:
    return values[-1] - values[0]


def _row(figure: str, rule: str, what: str, sign: str, mark: float, source: str, values: Sequence[float]) -> dict[str, Any]:
    """Return one verdict, comparing every value with the mark."""
    mean = statistics.mean(values) if values else None
    return {
        "figure": figure,
        "rule": rule,
        "what": what,
        "mark": f"{sign} {mark:g}",
        "mean": None if mean is None else float(mean),
        "std": float(statistics.stdev(values)) if len(values) > 1 else None,
        "n": len(values),
        "source": source,
        "verdict": "not run"
        if mean is None
        else "reproduced"
        if all(holds(value, sign, mark) for value in values)
        else "not reproduced",
    }


def holds(value: float, sign: str, mark: float) -> bool:
    """Return whether `value sign mark`.

    >>> holds(0.9, ">=", 0.88), holds(0.0, "<", 0)
    (True, False)
    """
    return {"<": value < mark, "<=": value <= mark, ">": value > mark, ">=": value >= mark}[sign]


def within_axes(curves: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return per panel of figure 3 the axis limits of the authors' script, and the range of our mean curves."""
    rows = []
    for key, (low, high) in AXES.items():
        lines = [curves[rule]["metrics"].get(key) for rule in SHOWN if rule != "bp"]  # the paper draws no BP
        values = torch.tensor([value for line in lines if line is not None for value in line["mean"]])
        extent = [float(values.min()), float(values.max())] if len(values) else None
        inside = None if extent is None else bool(low <= extent[0] and extent[1] <= high)
        rows.append({"measure": key, "limits": [low, high], "range": extent, "inside": inside, "source": "axis"})
    return rows


def tally(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return how many rows are reproduced, by source.

    >>> tally([{"source": "statement", "verdict": "reproduced"}, {"source": "our mark", "verdict": "not run"}])
    'Reproduced: 1 of 1 by statement, 0 of 0 by our mark.'
    """
    parts = []
    for source in dict.fromkeys(row["source"] for row in rows):
        outcomes = [row["verdict"] for row in rows if row["source"] == source and row["verdict"] != "not run"]
        parts.append(f"{outcomes.count('reproduced')} of {len(outcomes)} by {source}")
    return f"Reproduced: {', '.join(parts)}."
