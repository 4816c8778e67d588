"""What the study of reinforcement learning found: verdicts, tables and figures, from its cells."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from apical.bench.figures.curves import Drawing, render
from apical.bench.figures.style import RC
from apical.bench.finding import Row, count, difference, shown
from apical.bench.page import write
from apical.bench.statistics import student

Cells = Sequence[Mapping[str, Any]]

TITLE = "TDCA in reinforcement learning: CartPole, against REINFORCE"
ABOUT = (
    "A policy is trained for 20 updates of 4 episodes (of at most 200 steps) by credits of an evolved top-down network, "
    "which sees probabilities, action and advantage; no loss and no backpropagation. Evolution saw half-lengths of the pole "
    "from 0.4 to 0.6 m and forces from 8 to 12 N. Tests take new initial policies, in that range and on six settings far "
    "outside it. REINFORCE has the same advantages, optimiser and clipping, and its gradient by backpropagation. The "
    "paper's numbers could not be read: there are none to compare with. Evolution here is small "
    "(settings below): what is not reproduced is not reproduced at this budget."
)
SOURCES = {
    "our mark": "Mean return of a lifetime's last 5 updates, paired over meta-seeds: TDCA minus REINFORCE, each at the best "
    "of six learning rates by validation lifetimes in the training range. Reproduced means, in the training range, that the "
    "95 % interval of the mean difference (Student's t) lies above 0; on unseen settings, that the mean difference is not "
    "below 0 on 4 of 6 (single rows there show where the interval excludes equality). The paper claims to beat "
    "backpropagation and to generalise to unseen settings; the environment, and what counts, is our choice."
}
METHODS = {
    "tdca": "TDCA",
    "tdca-as-evolved": "TDCA, rate of evolution",
    "tdca-no-hidden": "TDCA, no hidden credit",
    "unevolved": "unevolved",
    "reinforce": "REINFORCE",
    "reinforce-same-rate": "REINFORCE, rate of evolution",
}
LOOKS: dict[str, tuple[str, str, Any]] = {
    "tdca": ("#0B5345", "*", "-"),
    "tdca-no-hidden": ("#56B4E9", "s", (0, (4, 1.5))),
    "unevolved": ("#CC79A7", "v", (0, (1.2, 1.2))),
    "reinforce": ("#000000", "o", "-"),
    "reinforce-same-rate": ("#E69F00", "^", (0, (5, 1.2, 1, 1.2))),
}
"""Colour (Okabe and Ito's, but for one), marker and line of each method that is drawn."""


def report(
    out: Path,
    evolved: Mapping[str, Any],
    best: Mapping[str, Any],
    cells: Cells,
    places: Sequence[str],
    command: str,
    settings: Mapping[str, Any],
    around: Mapping[str, Any],
) -> dict[str, Any]:
    """Write results.json, the figures and report.html; returns what results.json holds."""
    seconds = round(evolved["evolution_seconds"] + best["seconds"] + sum(cell["seconds"] for cell in cells), 1)
    results = {
        "title": TITLE,
        "about": ABOUT,
        "command": command,
        "environment": around,
        "settings": {**settings, "seconds_of_all_runs": seconds, "seconds_of_evolution": evolved["evolution_seconds"]},
        "sources": SOURCES,
        "seconds": seconds,
        "verdicts": verdicts(cells, places),
        "tables": [_ends(cells, places), _rates(cells, best)],
    }
    write(out, results, draw(evolved, cells, places))
    return results


def ends(cells: Cells, method: str, place: str) -> list[float]:
    """Mean return at the end of lifetimes, one value per meta-seed."""
    return [cell["methods"][method]["end"][place] for cell in cells]


def verdicts(cells: Cells, places: Sequence[str]) -> list[Row]:
    """The training range, the count over unseen settings, then each of these, then comparisons with controls."""
    train, *unseen = places

    def against(rule: str, other: str, place: str) -> Row:
        what = f"{place}: return minus that of {METHODS[other]}"
        return difference("E6", rule, what, ends(cells, rule, place), ends(cells, other, place), less=False)

    singles = [against("tdca", "reinforce", place) for place in unseen]
    holds = [row["mean"] >= 0 for row in singles]
    begun = [cell["methods"]["tdca"]["curve"][0] for cell in cells]
    what = f"{train}: return at the end minus that before learning"
    return [
        against("tdca", "reinforce", train),
        count("E6", "tdca", "unseen settings with a return not below REINFORCE's", holds, 4),
        *singles,
        against("tdca-as-evolved", "reinforce-same-rate", train),
        difference("E6", "tdca", what, ends(cells, "tdca", train), begun, less=False),
        against("tdca", "unevolved", train),
        against("tdca", "tdca-no-hidden", train),
    ]


def _ends(cells: Cells, places: Sequence[str]) -> dict[str, Any]:
    return {
        "title": "Return at the end of lifetimes",
        "note": "Steps that the pole is balanced for, at most 200; mean of the last 5 updates over new policies; mean over "
        "meta-seeds with 95 % interval.",
        "header": ["setting", *METHODS.values()],
        "rows": [[place, *(shown(ends(cells, method, place)) for method in METHODS)] for place in places],
    }


def _rates(cells: Cells, best: Mapping[str, Any]) -> dict[str, Any]:
    rows = [["REINFORCE", *(f"{value:.1f}" for value in best["returns"].values())]]
    for seed, cell in enumerate(cells):
        rows.append([f"TDCA, meta-seed {seed}", *(f"{value:.1f}" for value in cell["tuned"]["returns"].values())])
    return {
        "title": "Return by learning rate",
        "note": "On validation lifetimes in the training range, by which each rate was chosen.",
        "header": ["", *best["returns"]],
        "rows": rows,
    }


def draw(evolved: Mapping[str, Any], cells: Cells, places: Sequence[str]) -> list[Drawing]:
    """Learning curves, returns by setting, and the course of evolution."""
    with matplotlib.rc_context(RC):
        drawings = [
            render(
                "learning_curves",
                "Learning in the training range",
                "Mean return of new policies in each update; line and band: mean over meta-seeds with 95 % interval.",
                _curves(cells),
            ),
            render(
                "settings",
                "Return at the end, by setting",
                "Mean of the last 5 updates; mean over meta-seeds with 95 % interval. Evolution saw the training range "
                "alone.",
                _settings(cells, places),
            ),
            render(
                "evolution",
                "Course of evolution",
                "Mean fitness of the population, a line per meta-seed. Each generation has settings and initial weights of "
                "its own, so neighbouring generations differ in difficulty.",
                _evolution(evolved),
            ),
        ]
    return [drawing for drawing in drawings if drawing is not None]


def _curves(cells: Cells) -> Figure:
    figure = Figure(figsize=(3.5, 3.0))
    axes = figure.add_subplot()
    for method, (colour, marker, line) in LOOKS.items():
        found = [student(values) for values in zip(*(cell["methods"][method]["curve"] for cell in cells), strict=True)]
        x = np.arange(1, len(found) + 1)
        mean, low, high = np.array([each[:3] for each in found], dtype=float).T
        axes.plot(x, mean, color=colour, marker=marker, linestyle=line, markevery=4, label=METHODS[method])
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="update", ylabel="return (steps)", xticks=(1, 5, 10, 15, 20), ylim=(0, 205))
    figure.legend(loc="outside lower center", ncols=2, columnspacing=1.2, handletextpad=0.5)
    return figure


def _settings(cells: Cells, places: Sequence[str]) -> Figure:
    figure = Figure(figsize=(3.5, 3.6))
    axes = figure.add_subplot()
    for number, (method, (colour, marker, _)) in enumerate(LOOKS.items()):
        found = [student(ends(cells, method, place)) for place in places]
        mean, low, high = np.array([each[:3] for each in found], dtype=float).T
        y = np.arange(len(places)) + 0.15 * (number - (len(LOOKS) - 1) / 2)
        spread = np.stack([mean - np.maximum(low, 0), np.minimum(high, 200) - mean])
        axes.errorbar(mean, y, xerr=spread, fmt=marker, color=colour, ms=4, lw=0.9, label=METHODS[method])
    axes.set_yticks(range(len(places)), places)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    for line in np.arange(len(places) - 1) + 0.5:
        axes.axhline(line, color="#e6e6e6", lw=0.5, zorder=0)
    axes.set(xlabel="return (steps)", xlim=(0, 205))
    figure.legend(loc="outside lower center", ncols=2, columnspacing=1.2, handletextpad=0.5)
    return figure


def _evolution(evolved: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(3.5, 2.3))
    axes = figure.add_subplot()
    curve = np.array(evolved["curve"])
    x = np.arange(1, len(curve) + 1)
    for values, colour in zip(curve.T, ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000") * len(curve.T), strict=False):
        axes.plot(x, values, color=colour, lw=0.8)
    axes.set(xlabel="generation", ylabel="mean fitness (steps)", ylim=(0, None))
    return figure
