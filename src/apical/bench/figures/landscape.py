"""The figure of a loss surface with the trajectories of several rules on it, drawn from landscape.json."""

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from apical.bench.figures.curves import Drawing, render
from apical.bench.figures.style import RC, Style, styles
from apical.bench.report.records import Array

_WIDTH = 3.5
_LEVELS = 14
_WIDE = 5.0
"""Ratio of largest to smallest loss above which levels are spaced logarithmically."""

_SHADES = LinearSegmentedColormap.from_list("depth", ("#fbfcfd", "#dde5ec", "#b9c6d2", "#8d9cab"))
"""Colours that are light where the loss is low, because lines end there, and never too dark for a black line."""

_NAMES = {"cross_entropy": "cross-entropy", "mse": "mean squared error"}


def draw(record: Mapping[str, Any]) -> Drawing:
    """Render :func:`landscape` as PNG and SVG."""
    with matplotlib.rc_context(RC):
        return render("landscape", "Loss landscape", "", landscape(record))


def landscape(record: Mapping[str, Any]) -> Figure:
    """Draw contours of the loss and all projected trajectories: a circle at the start, the rule's marker at the end."""
    runs = record["runs"]
    labels = list(dict.fromkeys(run["label"] for run in runs))
    look = styles(labels)
    longest = max(map(len, labels))
    columns = min(len(labels) + 1, 5 if longest <= 5 else 4 if longest <= 10 else 2)
    rows = -(-(len(labels) + 1) // columns)
    figure = Figure(figsize=(_WIDTH, 2.95 + 0.15 * rows), layout="compressed")  # for axes that stay square
    axes = figure.add_subplot()
    _contours(figure, axes, record)
    for run in runs:
        _path(axes, np.array(run["coordinates"], dtype=np.float64), look[run["label"]])
    x, y = record["x"], record["y"]
    axes.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), aspect="equal")
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    shares = record["explained_variance"]
    names = ["random direction 1", "random direction 2"]
    if shares is not None:
        names = [f"principal component {i} ({100 * share:.1f} % of variance)" for i, share in enumerate(shares, start=1)]
    axes.set(xlabel=names[0], ylabel=names[1])
    entries = [(_START, "start"), *((_end(look[label], 4.5), label) for label in labels)]
    entries = [entry for column in range(columns) for entry in entries[column::columns]]  # so that rows are read in order
    lines, texts = [line for line, _ in entries], [text for _, text in entries]
    spacing = {"columnspacing": 1.2, "handlelength": 2.2, "handletextpad": 0.5}
    figure.legend(lines, texts, loc="outside lower center", ncols=columns, **spacing)
    return figure


def _contours(figure: Figure, axes: Axes, record: Mapping[str, Any]) -> None:
    values = np.ma.masked_invalid(np.array(record["losses"], dtype=np.float64))
    low, high = float(values.min()), float(values.max())
    wide = low > 0 and high > _WIDE * low
    if not high > low:
        low, high = low - 0.5, low + 0.5  # a flat surface needs levels too
    levels = np.geomspace(low, high, _LEVELS) if wide else np.linspace(low, high, _LEVELS)
    levels[[0, -1]] = low, high
    scale: Normalize = LogNorm(low, high) if wide else Normalize(low, high)
    axes.set_facecolor("#d9d9d9")  # where the loss is not finite
    filled = axes.contourf(record["x"], record["y"], values, levels=levels, norm=scale, cmap=_SHADES)
    axes.contour(record["x"], record["y"], values, levels=levels[1:-1], colors="white", linewidths=0.4)
    bar = figure.colorbar(filled, ax=axes, fraction=0.05, pad=0.03, aspect=22)
    bar.set_label(f"{_NAMES.get(record['loss'], record['loss'])} of {record['examples']} training examples")
    bar.locator = LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 2.0, 5.0)) if wide else MaxNLocator(6)
    bar.formatter = FuncFormatter(lambda value, _: f"{value:.10g}")
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.update_ticks()
    bar.ax.minorticks_off()


def _path(axes: Axes, place: Array, look: Style) -> None:
    casing = [Stroke(linewidth=2.4, foreground="white", alpha=0.9), Normal()]
    axes.plot(*place.T, color=look.colour, linestyle=look.line, linewidth=1.2, zorder=3, path_effects=casing)
    if len(place) <= 60:  # more markers would cover the line
        axes.plot(*place[1:-1].T, ".", color=look.colour, markersize=2.2, zorder=3.5)
    axes.add_line(_copy(_START, place[0], 4))
    axes.add_line(_copy(_end(look), place[-1], 5))


_HOLLOW: Any = {"marker": "o", "markersize": 4.2, "markerfacecolor": "white", "markeredgewidth": 0.8}
_START = Line2D([], [], color="black", linestyle="", **_HOLLOW)


def _end(look: Style, size: float = 6.0) -> Line2D:
    line: Any = {"color": look.colour, "linestyle": look.line, "linewidth": 1.2}
    marker: Any = {"marker": look.marker, "markeredgecolor": "white", "markeredgewidth": 0.5}
    return Line2D([], [], **line, **marker, markersize=size + 1.5 * (look.marker == "*"))


def _copy(like: Line2D, place: Array, zorder: float) -> Line2D:
    copy = Line2D([place[0]], [place[1]], zorder=zorder)
    copy.update_from(like)
    copy.set_zorder(zorder)
    return copy
