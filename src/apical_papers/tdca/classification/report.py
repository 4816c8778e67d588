"""What the classification study found: verdicts, tables and figures, from the evolutions that are finished."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from apical.bench.figures.curves import render
from apical.bench.figures.style import RC, plain_log, styles
from apical.bench.finding import Row, difference, shown
from apical.bench.page import write
from apical.bench.statistics import student

Cell = Mapping[str, Any]

TITLE = "TDCA on classification, against backpropagation and controls"
ABOUT = (
    "Top-down networks are evolved on tasks of four classes of handwritten digits and then train learners on tasks with "
    "other images and other initial weights. Backpropagation, direct feedback alignment and the controls (the network "
    "before evolution; the evolved one without credit for hidden units) train the same learners on the same images, with "
    "learning rates from one grid chosen on validation tasks. The paper's numbers could not be read: there are none to "
    "compare with."
)
SOURCES = {
    "our mark": "Values are means over unseen tasks, paired over meta-seeds (independent evolutions, each with test tasks "
    "of its own): TDCA, the centre of the search distribution, minus the other. Reproduced means that the 95 % interval of "
    "the mean difference (Student's t) lies on the better side of the mark. The paper claims that TDCA beats BP; "
    "the weak form is at the same learning rate, the strong form against the tuned one."
}
NAMES = {
    "tdca": "TDCA",
    "tdca-fittest": "TDCA, fittest of the last generation",
    "bp": "BP",
    "dfa": "DFA",
    "silent": "no credit to hidden units",
    "unevolved": "unevolved",
}
TITLES = {
    "fresh": "fresh tasks and weights",
    "fixed": "initial weights of evolution fixed",
    "sites-1": "diffusion, 1 site",
    "sites-2": "diffusion, 2 sites",
    "sites-4": "diffusion, 4 sites",
    "sites-8": "diffusion, 8 sites",
    "zeros": "weights begin at zero",
    "relu": "ReLU",
    "two-layers": "2 hidden layers",
    "three-layers": "3 hidden layers",
    "residual": "residual, 2 blocks",
    "conv": "convolutions",
}
DIFFUSION = ("sites-1", "sites-2", "sites-4", "sites-8", "fresh")


def finish(
    out: Path, cells: Sequence[Cell], command: str, settings: Mapping[str, Any], around: Mapping[str, Any]
) -> dict[str, Any]:
    """Write results.json, the figures and report.html; returns what results.json holds."""
    arms = {arm: [cell for cell in cells if cell["arm"] == arm] for arm in TITLES}
    arms = {arm: found for arm, found in arms.items() if found}
    results = {
        "title": TITLE,
        "about": ABOUT,
        "command": command,
        "environment": around,
        "settings": settings,
        "sources": SOURCES,
        "seconds": round(sum(cell["seconds"] for cell in cells), 1),
        "verdicts": verdicts(arms),
        "tables": [
            _lineup(arms, "tuned", "With tuned learning rates"),
            _lineup(arms, "same_rate", "All at the same learning rate, 0.02"),
            _diffusion(arms),
            _elsewhere(arms.get("fresh", []), "elsewhere", "Other data sets", "Networks evolved on digits, on tasks from"),
            _elsewhere(
                arms.get("sites-4", []), "widths", "Other widths", "Networks with 4 sites evolved at width 32, at width"
            ),
        ],
    }
    with matplotlib.rc_context(RC):
        made = [
            render("losses", "Loss on unseen tasks", _LOSSES, losses_figure(arms)),
            render("diffusion", "Credit diffusion", _DIFFUSION, diffusion_figure(arms)),
            render("evolution", "Evolution", _EVOLUTION, evolution_figure(arms)),
        ]
    write(out, results, [drawing for drawing in made if drawing is not None])
    return results


_LOSSES = (
    "Training loss after a lifetime on unseen tasks, learning rates tuned; mean over meta-seeds and 95 % interval (cut "
    "where it reaches below zero). One row per kind of learner or evolution."
)
_DIFFUSION = (
    "Weights of the top-down network against loss and held-out accuracy on unseen tasks, for 1, 2, 4 and 8 emission sites "
    "and for a credit per unit (rightmost); mean over meta-seeds and 95 % interval."
)
_EVOLUTION = (
    "Loss of learners under the centre of the search distribution, on each generation's own tasks; one line per meta-seed."
)


def values(cells: Sequence[Cell], rule: str, key: str, part: str = "tuned") -> list[float]:
    """A measure of a rule, one value per meta-seed."""
    return [cell[part][rule][key] for cell in cells]


def verdicts(arms: Mapping[str, Sequence[Cell]]) -> list[Row]:
    """Weak and strong form, then the other claims; those with fewer than two meta-seeds are left out."""
    rows: list[Row] = []
    fresh, fixed = arms.get("fresh", []), arms.get("fixed", [])

    def loss(
        figure: str, rule: str, what: str, ours: Sequence[float], theirs: Sequence[float], *, less: bool = True
    ) -> None:
        if len(ours) > 1:
            rows.append(difference(figure, rule, what, ours, theirs, less=less))

    known = [cell["known_start"] for cell in fixed]
    what = "weak form, on the initial weights of evolution: loss minus BP's at the same learning rate"
    loss("C2", "tdca", what, [k["tdca"]["loss"] for k in known], [k["bp"]["loss"] for k in known])
    what = "weak form, unseen tasks and weights: loss minus BP's at the same learning rate"
    loss("C2", "tdca", what, values(fresh, "tdca", "loss", "same_rate"), values(fresh, "bp", "loss", "same_rate"))
    what = "strong form, unseen tasks and weights: loss minus tuned BP's"
    loss("C2", "tdca", what, values(fresh, "tdca", "loss"), values(fresh, "bp", "loss"))
    what = "strong form: held-out accuracy minus (tuned BP's minus 0.5 points)"
    bp = [accuracy - 0.005 for accuracy in values(fresh, "bp", "accuracy")]
    loss("C2", "tdca", what, values(fresh, "tdca", "accuracy"), bp, less=False)
    for rule, title in (("dfa", "tuned DFA's"), ("unevolved", "that of the network before evolution")):
        loss("C2", "tdca", f"loss minus {title}", values(fresh, "tdca", "loss"), values(fresh, rule, "loss"))
    what = "loss minus that without credit to hidden units"
    loss("C2", "tdca", what, values(fresh, "tdca", "loss"), values(fresh, "silent", "loss"))
    n = min(len(fresh), len(fixed))
    what = "evolved with fresh weights: loss on unseen weights minus that of those evolved on fixed weights"
    loss("C5", "tdca", what, values(fresh[:n], "tdca", "loss"), values(fixed[:n], "tdca", "loss"))
    for arm in DIFFUSION[:-1]:
        cells = arms.get(arm, [])
        n = min(len(cells), len(fresh))
        what = f"{TITLES[arm]}: accuracy minus (that of a credit per unit minus 1 point)"
        full = [accuracy - 0.01 for accuracy in values(fresh[:n], "tdca", "accuracy")]
        loss("C3", "tdca", what, values(cells[:n], "tdca", "accuracy"), full, less=False)
    for part, cells, figure in (("elsewhere", fresh, "C6"), ("widths", arms.get("sites-4", []), "C8")):
        for name in cells[0].get(part, {}) if cells else ():
            ours, bp = ([cell[part][name][rule]["accuracy"] for cell in cells] for rule in ("tdca", "bp"))
            what = f"{'width ' if part == 'widths' else ''}{name}: accuracy minus 97 % of tuned BP's"
            loss(figure, "tdca", what, ours, [0.97 * accuracy for accuracy in bp], less=False)
    for arm in ("zeros", "relu", "two-layers", "three-layers", "residual", "conv"):
        cells = arms.get(arm, [])
        what = f"{TITLES[arm]}: accuracy minus 97 % of tuned BP's"
        bp = [0.97 * accuracy for accuracy in values(cells, "bp", "accuracy")]
        loss("C8", "tdca", what, values(cells, "tdca", "accuracy"), bp, less=False)
    return rows


def _percent(found: Sequence[float]) -> str:
    return shown([100 * value for value in found])


def _lineup(arms: Mapping[str, Sequence[Cell]], part: str, title: str) -> dict[str, Any]:
    rows = []
    for arm, cells in arms.items():
        for key, form, unit in (("loss", shown, "loss"), ("accuracy", _percent, "accuracy, %")):
            rows.append([TITLES[arm], str(len(cells)), unit, *(form(values(cells, rule, key, part)) for rule in NAMES)])
    return {
        "title": title,
        "note": "Training loss in nats and accuracy on held-out images of the same tasks: mean over meta-seeds with 95 % "
        "interval.",
        "header": ["learner or evolution", "meta-seeds", "measure", *NAMES.values()],
        "rows": rows,
    }


def generations_to(cell: Cell, loss: float = 0.1) -> int | None:
    """Generations until five in a row have a median loss below the mark; None where that never happens."""
    curve = [float("inf") if value is None else -value for value in cell["curve"]]
    for end in range(5, len(curve) + 1):
        if statistics.median(curve[end - 5 : end]) < loss:
            return end
    return None


def _diffusion(arms: Mapping[str, Sequence[Cell]]) -> dict[str, Any]:
    rows = []
    for arm in DIFFUSION:
        cells = arms.get(arm, [])
        if cells:
            reached = [generations_to(cell) for cell in cells]
            known = [float(g) for g in reached if g is not None]
            rows.append(
                [
                    "a credit per unit" if arm == "fresh" else TITLES[arm],
                    str(cells[0]["parameters"]),
                    shown(values(cells, "tdca", "loss")),
                    _percent(values(cells, "tdca", "accuracy")),
                    shown([cell["seconds_per_generation"] for cell in cells]),
                    f"{shown(known)} ({len(known)} of {len(reached)})" if known else f"- (0 of {len(reached)})",
                ]
            )
    return {
        "title": "Credit diffusion",
        "note": "Weights of the top-down network before (a credit per unit) and after; loss and accuracy on unseen tasks; "
        "seconds per generation, with whatever else the machine was doing; generations until the loss in evolution stays "
        "below 0.1 (median of five), and how many evolutions got there.",
        "header": ["diffusion", "weights", "loss", "accuracy, %", "s per generation", "generations to 0.1"],
        "rows": rows,
    }


def _elsewhere(cells: Sequence[Cell], part: str, title: str, about: str) -> dict[str, Any]:
    names = list(cells[0].get(part, {})) if cells else []
    rules = ("tdca", "bp", "dfa", "unevolved")
    rows = [
        [name, unit, *(form([cell[part][name][rule][key] for cell in cells]) for rule in rules)]
        for name in names
        for key, form, unit in (("loss", shown, "loss"), ("accuracy", _percent, "accuracy, %"))
    ]
    return {
        "title": title,
        "note": f"{about} the first column; all learning rates tuned there. Mean over meta-seeds with 95 % interval.",
        "header": [part, "measure", *(NAMES[rule] for rule in rules)],
        "rows": rows,
    }


def error_bar(found: Sequence[float], floor: float = 0.0) -> tuple[float, list[list[float]]]:
    """Mean, and how far its 95 % interval reaches below (to the floor at most) and above, as Matplotlib takes it.

    >>> error_bar([1e-6, 2e-6], floor=1e-5)[1][0]
    [0.0]
    """
    mean, low, high, _ = student(found)
    if low is None or high is None:
        return mean, [[0.0], [0.0]]
    return mean, [[max(0.0, mean - max(low, floor))], [high - mean]]


def losses_figure(arms: Mapping[str, Sequence[Cell]]) -> Figure:
    """One row per arm, one symbol per rule."""
    figure = Figure(figsize=(3.5, 0.9 + 0.3 * len(arms)))
    axes = figure.add_subplot()
    look = styles(("bp", "dfa", "tdca", "tdca-unevolved"))
    symbols = {"bp": look["bp"], "dfa": look["dfa"], "tdca": look["tdca"], "unevolved": look["tdca-unevolved"]}
    smallest = 1e-5
    for row, cells in enumerate(arms.values()):
        for shift, (rule, style) in enumerate(symbols.items()):
            mean, bar = error_bar(values(cells, rule, "loss"), smallest)
            place = row + 0.16 * (shift - 1.5)
            label = NAMES[rule] if row == 0 else None
            axes.errorbar(mean, place, xerr=bar, fmt=style.marker, color=style.colour, label=label, elinewidth=0.8)
    axes.set_xscale("log")
    plain_log(axes.xaxis)
    axes.set_yticks(range(len(arms)), [TITLES[arm] for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel("training loss (nats)")
    figure.legend(loc="outside lower center", ncols=4, columnspacing=1.0, handletextpad=0.3)
    return figure


def diffusion_figure(arms: Mapping[str, Sequence[Cell]]) -> Figure | None:
    """Weights of the top-down network against loss and accuracy."""
    found = [arm for arm in DIFFUSION if arm in arms]
    if len(found) < 2:
        return None
    figure = Figure(figsize=(3.5, 2.9))
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, key, scale in ((upper, "loss", 1.0), (lower, "accuracy", 100.0)):
        for arm in found:
            mean, bar = error_bar([scale * value for value in values(arms[arm], "tdca", key)])
            axes.errorbar(arms[arm][0]["parameters"], mean, yerr=bar, fmt="o", color="#0B5345", elinewidth=0.8)
            if axes is upper:
                label = arm.removeprefix("sites-") if arm != "fresh" else "all"
                axes.annotate(
                    label, (arms[arm][0]["parameters"], mean), xytext=(4, 3), textcoords="offset points", fontsize=7
                )
    upper.set(ylabel="loss (nats)", ylim=(0, None))
    lower.set(ylabel="accuracy (%)", xlabel="weights of the top-down network")
    return figure


def evolution_figure(arms: Mapping[str, Sequence[Cell]]) -> Figure:
    """Loss under the centre over generations, for the arms with and without diffusion."""
    figure = Figure(figsize=(3.5, 2.6))
    axes = figure.add_subplot()
    colours = {"fresh": "#000000", "sites-8": "#0072B2", "sites-4": "#009E73", "sites-2": "#E69F00", "sites-1": "#D55E00"}
    for arm, colour in colours.items():
        for number, cell in enumerate(arms.get(arm, [])):
            losses = [float("nan") if value is None else -value for value in cell["curve"]]
            label = (
                ("a credit per unit" if arm == "fresh" else TITLES[arm].removeprefix("diffusion, ")) if number == 0 else None
            )
            axes.plot(range(1, len(losses) + 1), losses, color=colour, linewidth=0.7, alpha=0.8, label=label)
    axes.set(xlabel="generation", ylabel="loss after a lifetime (nats)", yscale="log")
    plain_log(axes.yaxis)
    figure.legend(loc="outside lower center", ncols=3)
    return figure
