"""Figures of the benchmarks page, from the JSON files here: distance of each rule from its floor, and growth of cost.

Run `python benchmarks/figures.py`.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from apical.bench.figures.style import RC, RULES

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
Row = dict[str, Any]
LABELS = {"depth": "hidden layers", "width": "units per layer", "batch": "batch"}


def write(figure: Any, name: str) -> None:
    """Write an SVG that is identical for equal data."""
    figure.savefig(DOCS / name, metadata={"Date": None})
    plt.close(figure)
    print(f"written: {DOCS / name}")


def distances(rows: list[Row]) -> None:
    """Draw one panel per model: time of a step over backpropagation's as a bar from 1, with quartiles over rounds; its floor
    as a tick, and its target as a circle."""
    rows = [row for row in rows if row.get("floor") is not None and row["rule"] not in ("bp", "pfa-explicit")]
    titles = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots((len(titles) + 1) // 2, 2, figsize=(7.2, 2.5 * ((len(titles) + 1) // 2)), squeeze=False)
    for ax in axes.flat[len(titles) :]:
        ax.set_axis_off()
    for ax, title in zip(axes.flat, titles, strict=False):
        here = [row for row in rows if row["model"] == title]
        places = range(len(here))
        ax.barh(places, [row["ratio_to_bp"] - 1 for row in here], left=1, color="#c9d8e8", height=0.7)
        ax.hlines(places, *zip(*(row["quartiles"] for row in here), strict=True), color="#5b7fa3", linewidth=1.2)
        ax.plot([row["floor_watched"] for row in here], places, "|", color="#b03030", markersize=11, label="floor")
        asked = [(row["target"], place) for place, row in enumerate(here) if row["target"] is not None]
        ax.plot(*zip(*asked, strict=True), "o", color="black", fillstyle="none", label="asked")
        ax.set_yticks(list(places), [row["rule"] for row in here])
        ax.axvline(1.0, color="#666666", linewidth=0.6)
        ax.set(title=title, xlabel="time of a step / BP")
        ax.invert_yaxis()
    axes[0][0].legend(loc="lower right")
    write(figure, "benchmarks-floor.svg")


def growth(rows: list[Row]) -> None:
    """Draw time above, memory below, a column for each axis."""
    names = list(dict.fromkeys(row["axis"] for row in rows))
    figure, axes = plt.subplots(2, len(names), figsize=(7.2, 4.4), squeeze=False)
    for column, name in enumerate(names):
        for row in (row for row in rows if row["axis"] == name):
            style = RULES[row["rule"]]
            look = {"color": style.colour, "marker": style.marker, "linestyle": style.line, "label": row["rule"]}
            axes[0][column].loglog(row["sizes"], row["ms_per_step"], **look)
            axes[1][column].loglog(row["sizes"], row["mb"], **look)
        sizes = next(row["sizes"] for row in rows if row["axis"] == name)
        for ax in axes[:, column]:
            ax.xaxis.set_major_locator(FixedLocator(sizes[::2]))
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            for axis in (ax.xaxis, ax.yaxis):  # plain numbers: our figures contain no mathematics
                axis.set_minor_locator(NullLocator())
                axis.set_major_formatter("{x:g}")
        axes[1][column].set_xlabel(LABELS[name])
    axes[0][0].set_ylabel("ms per step")
    axes[1][0].set_ylabel("MB held in a step")
    axes[0][0].legend()
    write(figure, "benchmarks-scaling.svg")


def main() -> None:
    plt.rcParams.update(RC)
    for name, draw in (("results", distances), ("scaling", growth)):
        path = HERE / f"{name}.json"
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        if name == "scaling" or any(row.get("floor") is not None for row in rows):
            draw(rows)


if __name__ == "__main__":
    main()
