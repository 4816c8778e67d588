"""The matrix of an audit: a row per rule, a column per criterion, from what audit.json keeps."""

from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from apical.bench.figures.curves import Drawing, render
from apical.bench.figures.style import RC

SIGNS = {"yes": "●", "partly": "◐", "no": "○", "not applicable": "-"}
"""Verdicts in tables."""

_COLOURS = {"yes": "#0072B2", "partly": "#A6CBE3", "no": "#FFFFFF", "not applicable": "#EEEEEE"}
_CELL = 0.27
_UNITS = {"noise": "°", "sparse": "°", "quantised": "°", "multiply_adds": "relative to bp", "held": "relative to bp"}


def draw(record: Mapping[str, Any]) -> Drawing:
    """:func:`matrix` as PNG and SVG."""
    with matplotlib.rc_context(RC):
        return render("audit", "What rules need", "", matrix(record))


def number_of(key: str, verdict: Mapping[str, Any], reference: Mapping[str, Any] | None) -> str:
    """A measured number as a cell shows it: degrees, counts (M: millions), or times that of backpropagation, if it is there.

    >>> number_of("depth", {"numbers": {"depth": 6}}, None)
    '6'
    """
    value = float(next(iter(verdict["numbers"].values())))
    if key in ("multiply_adds", "held") and reference is not None:
        times = value / float(next(iter(reference["verdicts"][key]["numbers"].values())))
        return f"{times:.2f}" if times < 10 else f"{times:.0f}"
    if key in ("noise", "sparse", "quantised"):
        return f"{value:.0f}"
    return f"{value / 1e6:.1f}M" if value >= 1e6 else f"{value:,.0f}"


def matrix(record: Mapping[str, Any]) -> Figure:
    """Verdicts as filled, pale and empty squares; a thick frame where a paper claims otherwise; numbers at the right."""
    rows, criteria = record["rows"], record["criteria"]
    binary = [c for c in criteria if not any(row["verdicts"][c["key"]]["verdict"] == "measured" for row in rows)]
    counted = [c for c in criteria if c not in binary]
    reference = next((row for row in rows if row["rule"] == "bp"), None)
    width = 1.25 + _CELL * len(binary) + 0.46 * len(counted) + 0.7
    height = 1.6 + _CELL * len(rows) + 0.25
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("none")
    axes = figure.add_axes((1.25 / width, 0.3 / height, (width - 1.95) / width, _CELL * len(rows) / height))
    total = len(binary) + len(counted) * 0.46 / _CELL
    axes.set(xlim=(0, total), ylim=(len(rows), 0))
    for y, row in enumerate(rows):
        for x, criterion in enumerate(binary):
            _cell(axes, x, y, row, criterion["key"])
        for number, criterion in enumerate(counted):
            verdict = row["verdicts"][criterion["key"]]
            text = number_of(criterion["key"], verdict, reference) if verdict["verdict"] == "measured" else "-"
            right = len(binary) + (number + 0.95) * 0.46 / _CELL
            axes.text(right, y + 0.52, text, ha="right", va="center", fontsize=6.5)
    places = [x + 0.5 for x in range(len(binary))]
    places += [len(binary) + (number + 0.6) * 0.46 / _CELL for number in range(len(counted))]
    titles = [f"{c['title']} ({_UNITS[c['key']]})" if c["key"] in _UNITS else c["title"] for c in (*binary, *counted)]
    axes.set_xticks(places, titles, rotation=50, ha="left", rotation_mode="anchor")
    axes.set_yticks([y + 0.5 for y in range(len(rows))], [row["rule"] for row in rows])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    _legend(figure, any(not claim["agrees"] for row in rows for claim in row["claims"].values()))
    return figure


def _cell(axes: Axes, x: int, y: int, row: Mapping[str, Any], key: str) -> None:
    verdict = row["verdicts"][key]["verdict"]
    colour = _COLOURS[verdict]
    axes.add_patch(Rectangle((x + 0.12, y + 0.12), 0.76, 0.76, facecolor=colour, edgecolor="#777777", linewidth=0.5))
    if verdict == "not applicable":
        axes.plot((x + 0.35, x + 0.65), (y + 0.5, y + 0.5), color="#777777", linewidth=0.8)
    claim = row["claims"].get(key)
    if claim is not None and not claim["agrees"]:
        frame = Rectangle((x + 0.06, y + 0.06), 0.88, 0.88, fill=False, edgecolor="#D55E00", linewidth=1.3)
        axes.add_patch(frame)


def _legend(figure: Figure, disagrees: bool) -> None:
    marks = [
        Line2D([], [], linestyle="none", marker="s", markersize=6, markerfacecolor=_COLOURS[key], markeredgecolor="#777777")
        for key in ("yes", "partly", "no", "not applicable")
    ]
    names = ["yes", "partly", "no", "not applicable"]
    if disagrees:
        frame = Line2D([], [], linestyle="none", marker="s", markersize=7, markerfacecolor="none", markeredgecolor="#D55E00")
        frame.set_markeredgewidth(1.3)
        marks.append(frame)
        names.append("claimed otherwise")
    figure.legend(marks, names, loc="lower left", ncols=len(names), bbox_to_anchor=(0.01, 0.0), handletextpad=0.2)
