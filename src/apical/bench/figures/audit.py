"""The matrices of an audit: a row per rule, a column per criterion, drawn from audit.json."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from apical.bench.figures.curves import Drawing, render
from apical.bench.figures.style import RC

SIGNS = {"yes": "●", "partly": "◐", "no": "○", "not applicable": "-"}
"""Signs of verdicts in tables."""

_COLOURS = {"yes": "#0072B2", "partly": "#A6CBE3", "no": "#FFFFFF", "not applicable": "#EEEEEE"}
_CELL, _NUMBER, _NAMES, _FONT = 0.2, 0.39, 1.05, 7.5  # inches, and points: a phone shows 100 pixels per inch
_TO_BP = "relative to bp"
_UNITS = {"noise": "°", "sparse": "°", "quantised": "°", "multiply_adds": _TO_BP, "held": _TO_BP}


def draw(record: Mapping[str, Any]) -> tuple[Drawing, Drawing]:
    """Render :func:`matrix` and :func:`numbers` as PNG and SVG."""
    with matplotlib.rc_context(RC):
        signs = render("audit", "What rules need", "", matrix(record))
        return signs, render("audit_numbers", "Robustness and cost of the rules", "", numbers(record))


def number_of(key: str, verdict: Mapping[str, Any], reference: Mapping[str, Any] | None) -> str:
    """Format a measured number for a cell: degrees, counts (M: millions), or relative to backpropagation if it was audited.

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
    """Draw verdicts as filled, pale and empty squares, with a thick frame if a paper claims otherwise."""
    rows, criteria = record["rows"], _split(record)[0]
    figure, axes = _grid(rows, [c["title"] for c in criteria], _CELL)
    for y, row in enumerate(rows):
        for x, criterion in enumerate(criteria):
            _cell(axes, x, y, row, criterion["key"])
    _legend(figure, any(not claim["agrees"] for row in rows for claim in row["claims"].values()))
    return figure


def numbers(record: Mapping[str, Any]) -> Figure:
    """Draw the measured numbers, one for each rule and criterion."""
    rows, criteria = record["rows"], _split(record)[1]
    reference = next((row for row in rows if row["rule"] == "bp"), None)
    units = {key: unit for key, unit in _UNITS.items() if reference is not None or unit != _TO_BP}
    titles = [f"{c['title']} ({units[c['key']]})" if c["key"] in units else c["title"] for c in criteria]
    figure, axes = _grid(rows, titles, _NUMBER)
    for y, row in enumerate(rows):
        for x, criterion in enumerate(criteria):
            verdict = row["verdicts"][criterion["key"]]
            text = number_of(criterion["key"], verdict, reference) if verdict["verdict"] == "measured" else "-"
            axes.text(x + 0.95, y + 0.52, text, ha="right", va="center", fontsize=_FONT)
    return figure


def _split(record: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """Return the criteria with a verdict, and those with a number."""
    rows, counted = record["rows"], []
    for criterion in record["criteria"]:
        if any(row["verdicts"][criterion["key"]]["verdict"] == "measured" for row in rows):
            counted.append(criterion)
    return [criterion for criterion in record["criteria"] if criterion not in counted], counted


def _grid(rows: Sequence[Mapping[str, Any]], titles: Sequence[str], cell: float) -> tuple[Figure, Axes]:
    """Draw a row per rule and a column per title, of `cell` inches, no wider than a phone's screen."""
    width = _NAMES + cell * max(len(titles), 1) + 0.85
    height = 1.75 + _CELL * len(rows) + 0.25
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("none")
    size = (_NAMES / width, 0.3 / height, cell * max(len(titles), 1) / width, _CELL * len(rows) / height)
    axes = figure.add_axes(size, xlim=(0, max(len(titles), 1)), ylim=(len(rows), 0))
    axes.set_xticks([x + 0.5 for x in range(len(titles))], titles, rotation=60, ha="left", rotation_mode="anchor")
    axes.set_yticks([y + 0.5 for y in range(len(rows))], [row["rule"] for row in rows])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=_FONT)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes


def _cell(axes: Axes, x: int, y: int, row: Mapping[str, Any], key: str) -> None:
    verdict = row["verdicts"][key]["verdict"]
    colour = _COLOURS[verdict]
    axes.add_patch(Rectangle((x + 0.12, y + 0.12), 0.76, 0.76, facecolor=colour, edgecolor="#777777", linewidth=0.5))
    if verdict == "not applicable":
        axes.plot((x + 0.35, x + 0.65), (y + 0.5, y + 0.5), color="#777777", linewidth=0.8)
    claim = row["claims"].get(key)
    if claim is not None and not claim["agrees"]:
        axes.add_patch(Rectangle((x + 0.06, y + 0.06), 0.88, 0.88, fill=False, edgecolor="#D55E00", linewidth=1.3))


def _legend(figure: Figure, disagrees: bool) -> None:
    marks = [
        Line2D([], [], linestyle="none", marker="s", markersize=6, markerfacecolor=_COLOURS[key], markeredgecolor="#777777")
        for key in _COLOURS
    ]
    names = [*_COLOURS]
    if disagrees:
        frame = Line2D([], [], linestyle="none", marker="s", markersize=7, markerfacecolor="none", markeredgecolor="#D55E00")
        frame.set_markeredgewidth(1.3)
        marks.append(frame)
        names.append("claimed otherwise")
    look: Any = {"fontsize": 6.5, "handletextpad": 0, "columnspacing": 0.5}
    figure.legend(marks, names, loc="lower left", ncols=len(names), bbox_to_anchor=(0.0, 0.0), **look)
