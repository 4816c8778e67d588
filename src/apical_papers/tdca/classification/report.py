"""Output of the classification study: tables and figures, from the finished evolutions."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from apical.bench.figures.curves import render
from apical.bench.figures.style import plain_log, styles
from apical.bench.finding import series, shown, table
from apical.bench.program import about_study, keep_results
from apical.bench.statistics import student
from apical_papers.tdca.classification.verdicts import Cell, released, values, verdicts
from apical_papers.tdca.emission import OF_LOGITS, credit_figure, sent_to_outputs

TITLE = "TDCA on classification, against backpropagation and controls"
ABOUT = (
    "Top-down networks are evolved on tasks of four classes of handwritten digits and then train learners on tasks with "
    "other images and other initial weights. Backpropagation, direct feedback alignment and the controls train the same "
    "learners on the same images, with learning rates from one grid chosen on validation tasks. The paper's numbers could "
    "not be read: there are none to compare with. Credit on logits, relative to a right prediction, departs from the "
    "authors' code. Convolutions and deeper learners were not run."
)
MARKS = (
    "Values are means over unseen tasks, paired over meta-seeds (independent evolutions, each with test tasks "
    "of its own): TDCA, the average of the search distribution's centres, minus the other. Marks were set before the run, "
    "settings chosen on other meta-seeds and tasks. Reproduced means that the 95 % interval of the mean difference "
    "(Student's t) lies on the better side of the mark. The paper claims that TDCA beats BP; the weak form is at the same "
    "learning rate, the strong form against the tuned one, at an accuracy not below its minus 1 point."
)
NAMES = {
    "tdca": "TDCA",
    "bp": "BP",
    "dfa": "DFA",
    "silent": "no credit to hidden units",
    "shuffled": "credits of other examples",
    "unevolved": "unevolved",
    "hand-silent": "hand-built, hidden silent",
    "hand-random": "hand-built, hidden random",
}
TITLES = {
    "unit": "a credit per unit",
    "sites-4": "diffusion, 4 sites",
    "relu": "ReLU learners",
    "released": "credit on probabilities",
}


def finish(out: Path, cells: Sequence[Cell], command: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Write results.json, the figures and report.html; return the content of results.json."""
    cells_of = {arm: [cell for cell in cells if cell["arm"] == arm] for arm in TITLES}
    arms = {arm: evolutions for arm, evolutions in cells_of.items() if evolutions}
    steps = settings["settled"]
    title = TITLE if steps == 1 else f"{TITLE}, fitness over the last {steps} steps"
    about = about_study(title, " ".join([ABOUT, *_left_out(arms)]), MARKS)
    unit, sites = arms.get("unit", []), arms.get("sites-4", [])
    tables = [
        *([released(arms)] if "released" in arms else []),
        _lineup(arms, "tuned", "With tuned learning rates"),
        _lineup(arms, "same_rate", "All at the learning rate of evolution"),
        _by_task(arms),
        _evolutions(arms),
        _elsewhere(unit, "elsewhere", "Other data sets", "Networks evolved on digits, on tasks from"),
        _elsewhere(sites, "widths", "Other widths", "Networks with 4 sites evolved at width 32, at width"),
    ]
    drawings = [
        render("losses", "Loss on unseen tasks", _LOSSES, losses_figure(arms)),
        render("evolution", "Evolution", _EVOLUTION, evolution_figure(arms)),
    ]
    if unit or sites:
        p, signals = sent_to_outputs(unit or sites)
        drawing = credit_figure(p, signals, *OF_LOGITS)
        drawings.append(render("credit", "The output's credit", _CREDIT, drawing))
    return keep_results(out, command, about, settings, cells, verdicts(arms), tables, drawings)


_LOSSES = (
    "Training loss after a lifetime on unseen tasks, learning rates tuned; mean over meta-seeds and 95 % interval (cut "
    "where it reaches below zero). One row per kind of learner or evolution."
)
_EVOLUTION = (
    "Loss of learners under the centre of the search distribution, on each generation's own tasks; one line per meta-seed."
)
_CREDIT = (
    "Credit of the evolved networks for a logit, by the probability of its class: mean over random predictions, a line for "
    "each meta-seed, scaled to the size of the error, p - y (dashed)."
)


def percent(found: Sequence[float]) -> list[float]:
    """Return shares in per cent."""
    return [100 * value for value in found]


MEASURES: dict[str, tuple[str, Callable[[Sequence[float]], Sequence[float]]]] = {
    "loss": ("loss", list),
    "accuracy": ("accuracy, %", percent),
}
"""Key of a measure -> its name in tables, and the function that prepares its values."""


def _lineup(arms: Mapping[str, Sequence[Cell]], part: str, title: str) -> dict[str, Any]:
    rows = [
        [TITLES[arm], str(len(cells)), unit, *(form(values(cells, rule, key, part)) for rule in NAMES)]
        for arm, cells in arms.items()
        for key, (unit, form) in MEASURES.items()
    ]
    note = "Training loss in nats and accuracy on held-out images of the same tasks: mean over meta-seeds with 95 % interval"
    return table(title, f"{note}.", ["learner or evolution", "meta-seeds", "measure", *NAMES.values()], rows)


def _by_task(arms: Mapping[str, Sequence[Cell]]) -> dict[str, Any]:
    rules = ("tdca", "bp", "dfa")
    rows = []
    for arm, cells in arms.items():
        for cell in cells:
            losses = [cell["tuned"][rule]["losses"] for rule in rules]
            parts = [f"{statistics.median(of_rule):.2g}, {max(of_rule):.2g}" for of_rule in losses]
            rows.append([TITLES[arm], str(cell["seed"]), *parts])
    note = (
        "Training loss in nats with tuned learning rates: median over tasks, then the worst task. Added after the run; no "
        "mark was set on it. Where one task of all is far above the others, it decides the mean, and so the verdict."
    )
    return table(
        "Median and worst task", note, ["learner or evolution", "meta-seed", *(NAMES[rule] for rule in rules)], rows
    )


def generations_to(cell: Cell, loss: float = 0.1) -> int | None:
    """Return the generations until five consecutive ones have a median loss below the mark; None if this never happens."""
    curve = [float("inf") if value is None else -value for value in cell["curve"]]
    for end in range(5, len(curve) + 1):
        if statistics.median(curve[end - 5 : end]) < loss:
            return end
    return None


def reached(generations: Sequence[int | None]) -> str:
    """Format the generations until the mark, and the number of evolutions that reached it."""
    numbers = [float(number) for number in generations if number is not None]
    return f"{shown(numbers) if numbers else '-'} ({len(numbers)} of {len(generations)})"


def _evolutions(arms: Mapping[str, Sequence[Cell]]) -> dict[str, Any]:
    rows = []
    for arm, cells in arms.items():
        until, seconds = reached([generations_to(cell) for cell in cells]), series(cells, "seconds_per_generation")
        rows.append([TITLES[arm], str(cells[0]["parameters"]), seconds, until])
    note = (
        "Weights of the top-down network; seconds per generation of 64 lifetimes on one core, whatever else the machine was "
        "doing; generations until the loss in evolution stays below 0.1 (median of five), and how many evolutions got there."
    )
    return table("Evolutions", note, ["evolution", "weights", "s per generation", "generations to 0.1"], rows)


def _left_out(arms: Mapping[str, Sequence[Cell]]) -> list[str]:
    """Return a sentence on the arms of the study that were not run."""
    missing = [title for arm, title in TITLES.items() if arm not in arms]
    return [f"Of this study's arms these were not run: {'; '.join(missing)}."] if missing else []


def _elsewhere(cells: Sequence[Cell], part: str, title: str, about: str) -> dict[str, Any]:
    rules = ("tdca", "bp")
    rows = [
        [name, unit, *(form(series(cells, part, name, rule, key)) for rule in rules)]
        for name in (cells[0].get(part, {}) if cells else ())
        for key, (unit, form) in MEASURES.items()
    ]
    note = f"{about} the first column; all learning rates tuned there. Mean over meta-seeds with 95 % interval."
    return table(title, note, [part, "measure", *(NAMES[rule] for rule in rules)], rows)


def error_bar(found: Sequence[float], floor: float = 0.0) -> tuple[float, list[list[float]]]:
    """Return the mean, and the extent of its 95 % interval below (down to the floor) and above, as Matplotlib takes it.

    >>> error_bar([1e-6, 2e-6], floor=1e-5)[1][0]
    [0.0]
    """
    mean, low, high, _ = student(found)
    if low is None or high is None:
        return mean, [[0.0], [0.0]]
    return mean, [[max(0.0, mean - max(low, floor))], [high - mean]]


def losses_figure(arms: Mapping[str, Sequence[Cell]]) -> Figure:
    """Draw one row per arm, one symbol per rule."""
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


def evolution_figure(arms: Mapping[str, Sequence[Cell]]) -> Figure:
    """Draw the loss under the centre over generations."""
    figure = Figure(figsize=(3.5, 2.6))
    axes = figure.add_subplot()
    colours = {"unit": "#000000", "sites-4": "#009E73", "relu": "#0072B2", "released": "#D55E00"}
    for arm, colour in colours.items():
        for number, cell in enumerate(arms.get(arm, [])):
            losses = [float("nan") if value is None else -value for value in cell["curve"]]
            label = TITLES[arm] if number == 0 else None
            axes.plot(range(1, len(losses) + 1), losses, color=colour, linewidth=0.7, alpha=0.8, label=label)
    axes.set(xlabel="generation", ylabel="loss after a lifetime (nats)", yscale="log")
    plain_log(axes.yaxis)
    figure.legend(loc="outside lower center", ncols=2)
    return figure
