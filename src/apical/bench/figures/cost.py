"""The score against what it took: seconds of training, and multiply-adds. Epochs flatter rules whose steps are dear."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from apical.bench.figures.style import plain_log_steps, styles
from apical.bench.report.records import Array, Comparison, Run

_WIDTH = 3.5
_FAR = 5.0
"""Ratio of the largest to the smallest total cost, or loss, from which the axis is logarithmic."""


def seconds(comparison: Comparison) -> Figure | None:
    """Score against seconds of training."""
    return _against(comparison, "seconds", "training time (s)", 1.0)


def compute(comparison: Comparison) -> Figure | None:
    """Score against multiply-adds."""
    return _against(comparison, "multiply_adds", "multiply-adds (10⁹)", 1e-9)


def _against(comparison: Comparison, cost: str, label: str, factor: float) -> Figure | None:
    score = comparison.score
    points_of = {rule: _points(comparison.of(rule), cost, score.key) for rule in comparison.rules}
    drawn = {rule: points for rule, points in points_of.items() if points is not None}
    if not drawn:
        return None
    columns = min(len(drawn), 5, int(_WIDTH / (0.44 + 0.044 * max(map(len, drawn)))))
    figure = Figure(figsize=(_WIDTH, 2.45 + 0.16 * -(-len(drawn) // columns)))
    axes, style = figure.add_subplot(), styles(comparison.rules)
    for position, (rule, (costs, scores)) in enumerate(drawn.items()):
        look = style[rule]
        x, mean = factor * costs.mean(axis=0), score.scale * scores.mean(axis=0)
        every = max(1, -(-len(x) // 7))
        line: dict[str, Any] = {"color": look.colour, "linestyle": look.line, "marker": look.marker, "zorder": 3}
        line |= {"markeredgecolor": "white", "markeredgewidth": 0.4, "markevery": (position % every, every)}
        axes.plot(x, mean, label=rule, **line)
        if len(scores) >= 3:
            deviation = score.scale * scores.std(axis=0, ddof=1)
            axes.fill_between(x, mean - deviation, mean + deviation, color=look.colour, alpha=0.15, linewidth=0)
        elif len(scores) == 2:
            for costs_of_one, values in zip(costs, scores, strict=True):
                axes.plot(factor * costs_of_one, score.scale * values, color=look.colour, linewidth=0.5, alpha=0.7)
    axes.set(xlabel=label, ylabel=score.label)
    ends = [factor * costs.mean(axis=0)[-1] for costs, _ in drawn.values()]
    if max(ends) > _FAR * min(ends):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    lowest = min(float(scores.min()) for _, scores in drawn.values())
    if score.is_loss and 0 < _FAR * lowest < max(float(scores.max()) for _, scores in drawn.values()):
        axes.set_yscale("log")
        plain_log_steps(axes)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.2, handletextpad=0.5)
    return figure


def _points(runs: list[Run], cost: str, key: str) -> tuple[Array, Array] | None:
    """Costs and scores (runs, epochs) after each epoch that all of these runs have finished; None if there are none."""
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
