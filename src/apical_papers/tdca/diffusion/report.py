"""Output of the study of credit diffusion: verdicts, table and figure, from the finished meta-seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from apical.bench.figures.curves import render
from apical.bench.finding import Row, difference, series
from apical.bench.finding import table as table_of
from apical.bench.program import about_study, keep_results
from apical_papers.tdca.classification.report import error_bar, generations_to, percent, reached

Cell = Mapping[str, Any]

TITLE = "TDCA: credit diffusion, before and after"
ABOUT = (
    "Learners with one hidden layer of eight tanh units, so small that a top-down network can hand out a credit for every "
    "weight: the case before diffusion. Then a credit per unit, and credit from K sites that spreads over the units. Credit "
    "per weight stands alone as the gradient, or is multiplied by what is local to the synapse (activity and slope) as "
    "credit per unit always is. Which of these the paper calls undiffused could not be read; both are here. All evolutions "
    "have the same number of generations and the same settings, which were chosen for credit per unit. {place}"
)
PLACES = {
    "probabilities": "Credit is that of the authors' code, on probabilities.",
    "logits": "The output's credit stands on the logits, and credit is relative to that of a right prediction, as with the "
    "shipped teacher: departures from the authors' code.",
}
MARKS = (
    "Values are means over unseen tasks, paired over meta-seeds (independent evolutions on the same tasks): the "
    "first kind of credit minus the second. Reproduced means that the 95 % interval of the mean difference (Student's t) "
    "lies on the better side of the mark. The paper claims that diffusion greatly cuts the weights of the top-down network "
    "and speeds its training, without loss of performance; our marks are 1 point of accuracy, and any gain of time."
)
TITLES = {
    "weight-alone": "per weight, alone",
    "weight": "per weight, local factors",
    "unit": "per unit",
    "sites-8": "8 sites",
    "sites-4": "4 sites",
    "sites-2": "2 sites",
    "sites-1": "1 site",
}
BY_HAND = {"hand-silent": "by hand: the error, hidden silent", "hand-random": "by hand: and random feedback of it"}
"""Hand-built teachers."""
TARGET = 0.3
"""Loss (nats) up to which generations are counted."""


def report(out: Path, cells: Sequence[Cell], command: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Write results.json, the figure and report.html; return the content of results.json."""
    title = TITLE + (", credit on logits" if settings["credit"] == "logits" else "")
    about = about_study(title, ABOUT.format(place=PLACES[settings["credit"]]), MARKS)
    drawing = render("diffusion", "Before and after", _CAPTION, figure(cells))
    settings = {"meta-seeds": len(cells), **settings}
    return keep_results(out, command, about, settings, cells, verdicts(cells), [table(cells)], [drawing])


_CAPTION = (
    "Held-out accuracy on unseen tasks and seconds per generation for each kind of credit, with the number of weights of "
    "its top-down network; mean over meta-seeds and 95 % interval."
)


def values(cells: Sequence[Cell], arm: str, key: str) -> list[float]:
    """Return accuracy or loss under the evolved network, or seconds per generation, one value per meta-seed."""
    return series(cells, "arms", arm, *(() if key == "seconds_per_generation" else ("tdca",)), key)


def verdicts(cells: Sequence[Cell]) -> list[Row]:
    """Judge accuracy and time: each coarser credit against credit per weight, and each K against credit per unit."""
    rows = []
    pairs = [("weight", after) for after in list(TITLES)[2:]] + [("unit", after) for after in list(TITLES)[3:]]
    for before, after in pairs:
        what = f"credit {TITLES[after]}: accuracy minus (that of credit {TITLES[before]} minus 1 point)"
        ours, theirs = (values(cells, arm, "accuracy") for arm in (after, before))
        rows.append(difference("C3", "tdca", what, ours, theirs, less=False, margin=-0.01))
    for before, after in pairs:
        what = f"credit {TITLES[after]}: seconds per generation minus those of credit {TITLES[before]}"
        ours, theirs = (values(cells, arm, "seconds_per_generation") for arm in (after, before))
        rows.append(difference("C3", "tdca", what, ours, theirs, less=True))
    what = "credit per weight: accuracy with local factors minus that of credit alone"
    ours, theirs = (values(cells, arm, "accuracy") for arm in ("weight", "weight-alone"))
    return [*rows, difference("C3", "tdca", what, ours, theirs, less=False)]


def table(cells: Sequence[Cell]) -> dict[str, Any]:
    """Return a table with one row per kind of credit, and rows for rules without evolution."""
    rows: list[list[Any]] = []
    per_weight = cells[0]["arms"]["weight"]["parameters"]
    for arm, title in TITLES.items():
        count = cells[0]["arms"][arm]["parameters"]
        until = reached([generations_to(cell["arms"][arm], TARGET) for cell in cells])
        measures = (
            values(cells, arm, "loss"),
            percent(values(cells, arm, "accuracy")),
            percent(series(cells, "arms", arm, "unevolved", "accuracy")),
            values(cells, arm, "seconds_per_generation"),
        )
        rows.append([title, str(count), f"{100 * count / per_weight:.1f}", *measures, until])
    for rule, title in {**BY_HAND, "bp": "backpropagation"}.items():
        accuracy = percent(series(cells, rule, "accuracy"))
        rows.append([title, "-", "-", series(cells, rule, "loss"), accuracy, "-", "-", "-"])
    return table_of(
        "Before and after",
        "Weights of the top-down network, and in per cent of those for a credit per weight; training loss (nats) and "
        "accuracy on held-out images of unseen tasks, learning rates tuned; accuracy under the network before its "
        "evolution; median seconds of a generation, all evolutions of a meta-seed taking turns; generations until the loss "
        f"in evolution stays below {TARGET} (median of five), and how many evolutions got there. Mean over meta-seeds with "
        "95 % interval.",
        ["credit", "weights", "%", "loss", "accuracy, %", "unevolved, %", "s per generation", f"to {TARGET} nats"],
        rows,
    )


def figure(cells: Sequence[Cell]) -> Figure:
    """Draw accuracy and time of each kind of credit against the number of weights of its top-down network."""
    drawn = Figure(figsize=(5.2, 2.4))
    for axes, key, scale in zip(
        drawn.subplots(1, 2, sharey=True), ("accuracy", "seconds_per_generation"), (100.0, 1.0), strict=True
    ):
        for row, arm in enumerate(TITLES):
            mean, bar = error_bar([scale * value for value in values(cells, arm, key)])
            axes.errorbar(mean, row, xerr=bar, fmt="o", color="#0B5345", elinewidth=0.8)
        axes.set_xlim(0, 100 if key == "accuracy" else None)
        axes.set_xlabel("accuracy (%)" if key == "accuracy" else "seconds per generation")
    counts = [cells[0]["arms"][arm]["parameters"] for arm in TITLES]
    axes.set_yticks(range(len(TITLES)), [f"{title}: {n}" for title, n in zip(TITLES.values(), counts, strict=True)])
    axes.set_ylim(len(TITLES) - 0.5, -0.5)
    return drawn
