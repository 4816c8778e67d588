"""Means over the seeds of a rule, as lines with their spread."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from apical.bench.figures.style import label, styles
from apical.bench.report.records import Array, Run

WIDTH = 3.5
"""Width of a journal column in inches."""


class Line(NamedTuple):
    """One rule's line: mean and standard deviation over n seeds at each x (points,), and each seed's own points."""

    x: Array
    mean: Array
    deviation: Array
    n: int
    seeds: Sequence[tuple[Array, Array]]


def rule_lines(lines: Mapping[str, Line], rules: Sequence[str]) -> tuple[Figure, Axes]:
    """Draw a line per rule, with a band for three or more seeds and thin lines for two; legend below.

    Args:
        rules: all rules of the comparison, which determine the styles.
    """
    longest = max(len(label(rule)) for rule in lines)
    columns = min(len(lines), 5, int(WIDTH / (0.44 + 0.044 * longest)))  # inches: handle, and letters
    figure = Figure(figsize=(WIDTH, 2.45 + 0.16 * math.ceil(len(lines) / columns)))
    axes, style = figure.add_subplot(), styles(rules)
    for position, (rule, line) in enumerate(lines.items()):
        colour, every = style[rule].colour, max(1, math.ceil(len(line.x) / 7))
        look: dict[str, Any] = {"color": colour, "marker": style[rule].marker, "linestyle": style[rule].line}
        look |= {"markeredgecolor": "white", "markeredgewidth": 0.4, "markevery": (position % every, every), "zorder": 3}
        axes.plot(line.x, line.mean, label=label(rule), **look)
        band(axes, line.x, line.mean, line.deviation, line.n, colour)
        for x, values in line.seeds if line.n == 2 else ():
            axes.plot(x, values, color=colour, linewidth=0.5, alpha=0.7)
    legend(figure, axes, columns)
    return figure, axes


def band(axes: Axes, x: Array, mean: Array, deviation: Array, count: int, colour: str) -> None:
    """Draw plus and minus one standard deviation, for three or more seeds."""
    if count >= 3:
        axes.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)


def legend(figure: Figure, axes: Axes, columns: int) -> None:
    """Draw the legend of the axes' lines below a figure."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.2, handletextpad=0.5)


def spread(runs: Sequence[Run], key: str, layer: str | None = None, first: int = 0) -> tuple[Array, Array, Array, int]:
    """Return epochs from `first` on, mean and standard deviation (NaN for one run) over the runs, and their number."""
    curves = [(run.epochs, run.curve(key, layer)) for run in runs]
    curves = [(epochs, values) for epochs, values in curves if has_values(values)]
    axis = sorted({epoch for epochs, _ in curves for epoch in epochs})
    late = np.array(axis, dtype=np.float64) >= first
    table = np.full((len(curves), len(axis)), np.nan)
    for row, (epochs, values) in zip(table, curves, strict=True):
        row[[axis.index(epoch) for epoch in epochs]] = values
    count = np.isfinite(table).sum(axis=0)
    mean = column_mean(table)
    squares = np.nansum((table - mean) ** 2, axis=0)
    deviation = np.sqrt(squares / np.where(count > 1, count - 1, np.nan))
    return np.array(axis, dtype=np.float64)[late], mean[late], deviation[late], len(curves)


def column_mean(table: Array) -> Array:
    """Return the mean of each column over its finite entries; NaN where there is none."""
    count = np.isfinite(table).sum(axis=0)
    mean: Array = np.nansum(table, axis=0) / np.where(count > 0, count, np.nan)
    return mean


def has_values(values: Array) -> bool:
    """Return whether any is finite."""
    return bool(np.isfinite(values).any())
