"""The score against its cost: seconds of training, and multiply-adds. Epochs favour rules with expensive steps."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from apical.bench.figures.lines import Line, rule_lines
from apical.bench.figures.style import plain_log, plain_log_steps
from apical.bench.report.records import Array, Comparison, Run

_FAR = 5.0
"""Ratio of the largest to the smallest total cost, or loss, above which the axis is logarithmic."""


def seconds(comparison: Comparison) -> Figure | None:
    """Draw the score against seconds of training."""
    return _against(comparison, "seconds", "training time (s)", 1.0)


def compute(comparison: Comparison) -> Figure | None:
    """Draw the score against multiply-adds."""
    return _against(comparison, "multiply_adds", "multiply-adds (10⁹)", 1e-9)


def _against(comparison: Comparison, cost: str, label: str, factor: float) -> Figure | None:
    score = comparison.score
    points_of = {rule: _points(comparison.of(rule), cost, score.key) for rule in comparison.rules}
    places = {rule: (factor * at[0], score.scale * at[1]) for rule, at in points_of.items() if at is not None}
    if not places:
        return None
    lines = {rule: _line(costs, scores) for rule, (costs, scores) in places.items()}
    figure, axes = rule_lines(lines, comparison.rules)
    axes.set(xlabel=label, ylabel=score.label)
    ends = [line.x[-1] for line in lines.values()]
    if max(ends) > _FAR * min(ends):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        plain_log(axes.xaxis)
    lowest = min(float(scores.min()) for _, scores in places.values())
    if score.is_loss and 0 < _FAR * lowest < max(float(scores.max()) for _, scores in places.values()):
        axes.set_yscale("log")
        plain_log_steps(axes)
    return figure


def _line(costs: Array, scores: Array) -> Line:
    """Return the line for costs and scores (runs, epochs)."""
    deviation = scores.std(axis=0, ddof=1) if len(scores) > 1 else np.full(scores.shape[1], np.nan)
    return Line(costs.mean(axis=0), scores.mean(axis=0), deviation, len(scores), list(zip(costs, scores, strict=True)))


def _points(runs: list[Run], cost: str, key: str) -> tuple[Array, Array] | None:
    """Return costs and scores (runs, epochs) after each epoch that all of these runs finished; None if there is none."""
    measured = []
    for run in runs:
        spent, values = run.curve(cost), run.curve(key)
        there = {
            epoch: (spent[i], values[i])
            for i, epoch in enumerate(run.epochs)
            if epoch > 0 and np.isfinite(spent[i]) and np.isfinite(values[i]) and spent[i] > 0
        }
        if there:
            measured.append(there)
    common = sorted(set.intersection(*(set(there) for there in measured))) if measured else []
    if not common:
        return None
    table = np.array([[there[epoch] for epoch in common] for there in measured], dtype=np.float64)
    return table[..., 0], table[..., 1]
