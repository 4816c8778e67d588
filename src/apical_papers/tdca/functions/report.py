"""What the study of non-convex functions found: verdicts, tables and figures, from its cells."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from scipy import stats

from apical.bench.figures.curves import Drawing, render
from apical.bench.figures.style import RC
from apical.bench.finding import Row, count, difference, shown
from apical.bench.page import write
from apical_papers.tdca.functions.figures import final_values, trajectories

Cells = Mapping[Any, Mapping[str, Any]]

TITLE = "TDCA on non-convex functions, against gradient descent and Adam"
ABOUT = (
    "A point is moved 60 times by an evolved top-down network that sees no gradient: either where the point is (absolute "
    "input) or what its last step changed (relative input), and the value. Networks with absolute input were evolved with "
    "the minimum always in one place, those with relative input with minima shifted for every start; both are tested with "
    "the minimum in that place and with shifts that evolution did not see. Gradient descent and Adam follow the true "
    "gradient for 60 steps, with learning rates chosen on validation starts. The paper's numbers could not be read: there "
    "are none to compare with. "
    "With absolute input and the minimum in its place, a network can win by learning by heart where it is."
)
SOURCES = {
    "our mark": "Values are paired over meta-seeds, each with held-out starts of its own: TDCA minus the better of gradient "
    "descent and Adam. Reproduced means that the 95 % interval of the mean difference (Student's t) excludes equality; for "
    "counts, that this holds for so many of Rastrigin, Ackley and Himmelblau in 2-D. Basins are counted against Adam alone; "
    "gradient descent, at its rate for Ackley, leaves as many there (table Paths). The paper claims to beat "
    "backpropagation on non-convex functions; which, and what counts, is our choice."
}
PLACES = {"same": "in its place", "shifted": "unseen shifts"}
KINDS = {"absolute": "same", "relative": "shifted"}
"""Input -> where it is to be judged."""


def report(
    out: Path,
    cells: Cells,
    core: Sequence[Any],
    command: str,
    settings: Mapping[str, Any],
    around: Mapping[str, Any],
) -> dict[str, Any]:
    """Write results.json, the figures and report.html; returns what results.json holds."""
    seconds = round(sum(cell["seconds"] for each in cells.values() for cell in _parts(each)), 1)
    results = {
        "title": TITLE,
        "about": ABOUT,
        "command": command,
        "environment": around,
        "settings": {**settings, "seconds_of_all_runs": seconds},
        "sources": SOURCES,
        "seconds": seconds,
        "verdicts": verdicts(cells, core),
        "tables": [_finals(cells), _successes(cells, settings), _paths(cells), _rates(cells)],
    }
    write(out, results, draw(cells, core))
    return results


def _parts(each: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*each["baselines"], *each["absolute"], *each["relative"]]


def taken(each: Mapping[str, Any], method: str, place: str, key: str) -> list[float]:
    """A measure of a method, one value per meta-seed; a network's method is its input, with "-unevolved" or not."""
    kind, _, unevolved = method.partition("-")
    if kind in KINDS:
        return [cell["places"][place]["unevolved" if unevolved else "tdca"][key] for cell in each[kind]]
    name = each["tuned"][place]["best"] if method == "best" else method
    return [cell["places"][place][name][key] for cell in each["baselines"]]


def verdicts(cells: Cells, core: Sequence[Any]) -> list[Row]:
    """Counts over the core functions first, then each function."""
    counts, singles = [], []
    for kind, place in KINDS.items():
        better, further = [], []
        for case, each in cells.items():
            ours, theirs = (taken(each, method, place, "final") for method in (kind, "best"))
            best = each["tuned"][place]["best"]
            what = f"{case.title}, {case.dimension}-D, {PLACES[place]}: final value minus that of {best}"
            row = difference("E1", f"tdca-{kind}", what, ours, theirs, less=True)
            singles.append(row)
            if case in core:
                ours, theirs = (_crossed(each, method, place) for method in (kind, "adam"))
                left = difference("E8", kind, "basins left", ours, theirs, less=False)
                better.append(row["verdict"] == "reproduced")
                further.append(better[-1] and left["verdict"] == "reproduced")
        what = f"functions better than backpropagation, {PLACES[place]}"
        counts.append(count("E1", f"tdca-{kind}", what, better, 2))
        what = f"functions better, and more basins left than by Adam, {PLACES[place]}"
        counts.append(count("E8", f"tdca-{kind}", what, further, 1))
    return [*counts, *singles]


def _crossed(each: Mapping[str, Any], method: str, place: str) -> list[float]:
    size = each["baselines"][0]["config"]["starts"]
    return [100 * value / size for value in taken(each, method, place, "crossed")]


METHODS = {
    "absolute": "TDCA, absolute",
    "relative": "TDCA, relative",
    "gd": "gradient descent",
    "adam": "Adam",
    "random": "best of 60 random points",
    "absolute-unevolved": "unevolved, absolute",
    "relative-unevolved": "unevolved, relative",
}


def _finals(cells: Cells) -> dict[str, Any]:
    rows = [
        [f"{case.title}, {case.dimension}-D", place, *(shown(taken(each, m, key, "final")) for m in METHODS)]
        for case, each in cells.items()
        for key, place in PLACES.items()
    ]
    return {
        "title": "Final values",
        "note": "Mean over held-out starts; mean over meta-seeds with 95 % interval. The global minimum is 0.",
        "header": ["function", "minimum", *METHODS.values()],
        "rows": rows,
    }


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate of `successes` in n trials.

    >>> [round(x, 4) for x in wilson(0, 10)]
    [0.0, 0.2775]
    """
    found = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def _successes(cells: Cells, settings: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for case, each in cells.items():
        for key, place in PLACES.items():
            line = [f"{case.title}, {case.dimension}-D", place]
            for method in METHODS:
                found = taken(each, method, key, "successes")
                n = len(found) * settings["starts"]
                low, high = wilson(int(sum(found)), n)
                line.append(f"{100 * sum(found) / n:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
            rows.append(line)
    return {
        "title": "Success, % of starts",
        "note": f"Starts that end within {settings['success_within']} of a global minimum (the box of starts is 6 wide), of "
        "all meta-seeds together, with Wilson's 95 % interval, which takes starts of one meta-seed for independent.",
        "header": ["function", "minimum", *METHODS.values()],
        "rows": rows,
    }


def _paths(cells: Cells) -> dict[str, Any]:
    methods = ("absolute", "relative", "gd", "adam")
    rows = []
    for case, each in cells.items():
        for key, place in PLACES.items():
            line = [f"{case.title}, {case.dimension}-D", place, *(shown(taken(each, m, key, "detour")) for m in methods)]
            left = case.of.multimodal and case.dimension == 2
            rows.append([*line, *(shown(_crossed(each, m, key)) if left else "-" for m in methods)])
    names = [METHODS[m] for m in methods]
    return {
        "title": "Paths",
        "note": "Distance travelled over distance from start to end (median over starts), and the share of starts, in %, "
        "that end in another minimum's basin than they began in, which is no merit unless they also "
        "end lower; mean over meta-seeds with 95 % interval.",
        "header": ["function", "minimum", *(f"detour: {n}" for n in names), *(f"basin left: {n}" for n in names)],
        "rows": rows,
    }


def _rates(cells: Cells) -> dict[str, Any]:
    rows = []
    for case, each in cells.items():
        for key, place in PLACES.items():
            found = each["tuned"][key]
            rates = [f"{found['rates'][method]:.3g}" for method in ("gd", "adam")]
            seconds = [statistics.fmean(cell["seconds"] for cell in each[kind]) for kind in KINDS]
            generations = str(each["absolute"][0]["config"]["generations"])
            rows.append(
                [f"{case.title}, {case.dimension}-D", place, *rates, found["best"], generations, f"{sum(seconds) / 2:.0f}"]
            )
    return {
        "title": "Learning rates of the baselines, and length of evolution",
        "note": "Rates with the lowest mean final value on validation starts. Seconds are wall-clock time on a busy "
        "machine.",
        "header": ["function", "minimum", "gradient descent", "Adam", "the better", "generations", "seconds per evolution"],
        "rows": rows,
    }


def draw(cells: Cells, core: Sequence[Any]) -> list[Drawing]:
    """Both figures."""
    finals = {
        (case.title, case.dimension, place): {
            method: [
                value / start
                for value, start in zip(
                    taken(each, method, place, "final"), taken(each, "start", place, "final"), strict=True
                )
            ]
            for method in ("absolute", "relative", "gd", "adam", "random")
        }
        for case, each in cells.items()
        for place in PLACES
    }
    with matplotlib.rc_context(RC):
        drawings = [
            render(
                "final_values",
                "Value left after 60 steps",
                "Mean final value over the mean value at the start, which is 1; mean over meta-seeds with 95 % interval. "
                "Left: the minimum is where evolution with absolute input had it. Right: shifted, differently for every "
                "start.",
                final_values(
                    finals, {key: METHODS[key] for key in ("absolute", "relative", "gd", "adam", "random")}, PLACES
                ),
            ),
            render(
                "trajectories",
                "Paths over the landscape",
                "From the same four starts (dots) to the ends (crosses), on minima (stars) shifted by numbers that "
                "evolution did not see. Networks of meta-seed 0; learning rates as chosen for shifted minima.",
                trajectories(cells, core),
            ),
        ]
    return [drawing for drawing in drawings if drawing is not None]
