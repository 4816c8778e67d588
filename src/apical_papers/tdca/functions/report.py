"""Output of the study of non-convex functions: verdicts, tables and figures, from its cells."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from apical.bench.figures.curves import Drawing, render
from apical.bench.finding import Row, count, difference, interval, table
from apical.bench.program import about_study, keep_results
from apical_papers.tdca.functions.figures import final_values, trajectories

Cells = Mapping[Any, Mapping[str, Any]]
Groups = Mapping[str, Sequence[Any]]

TITLE = "TDCA on non-convex functions, against gradient descent, Adam and random points"
ABOUT = (
    "A point is moved 60 times by an evolved top-down network that sees no gradient and not where the point is: only its "
    "own last steps, the values they led to and, where it has memory, how far the best of them is. Minima are shifted for "
    "every start, in evolution and, by other numbers, in the tests. In two dimensions one recurrent network moves both "
    "coordinates; in ten, one small network is applied to each coordinate in turn, six steps each. Controls take as many "
    "steps along the true gradient, or the best of as many random points. The paper's numbers could not be read, so there "
    "are none to compare with. Memory and longer steps depart from the released code; networks without either have a table "
    "of their own. Moving one coordinate at a time suits functions that are sums over coordinates, as Rastrigin's, "
    "Schwefel's and Styblinski and Tang's are."
)
MARKS = (
    "Mean final value from held-out starts, paired over meta-seeds. A function counts if TDCA's value is lower "
    "than that of gradient descent, of momentum, of Adam and of random points, each with its learning rate chosen on "
    "validation starts, and every 95 % interval of the mean difference (Student's t) lies below 0. The marks, 4 of 5 "
    "functions in two dimensions and 2 of 5 in ten, were set before the run; its meta-seeds were not used before, but "
    "settings had been chosen on the same functions. Himmelblau's function (four equal minima, where a gradient ends near "
    "0) is a control, Griewank's information."
)
CONTROLS = {
    "gd": "gradient descent",
    "momentum": "momentum",
    "adam": "Adam",
    "random": "random points",
}
BY_HAND = "capped"
MISSED = {
    "title": "What does not hold, why, and what was tried",
    "note": "Numbers of this table are of single networks, with meta-seeds used before the run to choose settings: leads, "
    "not results.",
    "header": ["where", "why", "tried"],
    "rows": [
        [
            "Rastrigin, 2-D",
            "networks find points as low as the best of 60 random ones (column best point) and leave them again: some never "
            "learn to go back",
            "centre steps of 0.1 and 0.3 in evolution, 600 generations: 7.7 and 10.5",
        ],
        [
            "Rastrigin, 10-D",
            "six steps for each coordinate, 200 generations",
            "600 generations with steps of at most 1: 31, below the controls",
        ],
        [
            "Schwefel, 10-D",
            "six steps for each coordinate, 200 generations",
            "600 generations with steps of at most 1: 1,216, below the controls",
        ],
        [
            "Styblinski-Tang, 10-D",
            "networks of different meta-seeds differ much after 200 generations; Adam at its best rate, 3.2, leaps wells",
            "steps of at most 1 instead of 1.5: 78 to 90; a centre step of 0.3: 54",
        ],
        [
            "Rosenbrock, 10-D",
            "its valley bends through neighbouring coordinates, so moving one at a time leads out of it",
            "nothing else",
        ],
        [
            "without memory",
            "the present step says nothing about better points passed before, and 60 steps of 0.1 do not cross the box",
            "100 generations here; before, 400 with the same outcome",
        ],
    ],
}


def report(out: Path, cells: Cells, groups: Groups, command: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Write results.json, the figures and report.html; return the content of results.json."""
    seconds = round(sum(cell["seconds"] for cell in cells.values()), 1)
    rows = sorted(verdicts(cells, groups), key=lambda row: bool(row["verdict"] != "reproduced"))  # reproduced rows first
    tables = [
        _values(cells, groups),
        _larger(cells, groups["large"]),
        _stateless(cells, groups["stateless"]),
        _successes(cells, groups, settings),
        *([MISSED] if groups["plane"] else []),
        _rates(cells, groups),
    ]
    settings = {**settings, "seconds of all runs": seconds}
    title = TITLE if groups["plane"] else f"{TITLE}: ten dimensions, longer evolutions"
    full = [each for each in tables if each["rows"]]
    about = about_study(title, ABOUT, MARKS)
    return keep_results(out, command, about, settings, cells.values(), rows, full, draw(cells, groups))


def taken(cells: Cells, case: Any, method: str, key: str = "final", dimension: int | None = None) -> list[float]:
    """Return a measure of a method, one value per meta-seed."""
    if method in ("tdca", "unevolved", "tdca-larger"):
        return [record["methods"][method][key] for record in cells[case]["seeds"]]
    return [record[method][key] for record in cells[case]["controls"][str(dimension or case.dimension)]["seeds"]]


def against(cells: Cells, case: Any) -> dict[str, Row]:
    """Judge TDCA against every control."""
    ours = taken(cells, case, "tdca")
    what = f"{case.title}: final value minus that of"
    return {
        name: difference("E1", f"tdca-{case.kind}", f"{what} {title}", ours, taken(cells, case, name), less=True)
        for name, title in CONTROLS.items()
    }


def strongest(rows: Mapping[str, Row]) -> Row:
    """Return the row of the control that TDCA beats by least."""
    return max(rows.values(), key=lambda row: row["mean"])


def verdicts(cells: Cells, groups: Groups) -> list[Row]:
    """Judge counts over functions first, then each function against its strongest control."""
    counts, singles = [], []
    for group, dimensions, least in (("plane", 2, 4), ("large", 10, 2)):
        if not groups[group]:
            continue
        every = [against(cells, case) for case in groups[group]]
        holds = [all(row["verdict"] == "reproduced" for row in rows.values()) for rows in every]
        what = f"functions in {dimensions}-D better than gradient descent, momentum, Adam and random points"
        counts.append(count("E1", f"tdca-{groups[group][0].kind}", what, holds, least))
        singles += [strongest(rows) for rows in every]
    return counts + singles


def _with_memory(groups: Groups) -> list[Any]:
    """The cases whose networks have memory."""
    return [*groups["plane"], *groups["further"], *groups["large"]]


def _values(cells: Cells, groups: Groups) -> Row:
    columns = [("tdca", "final"), ("tdca", "best"), *((name, "final") for name in (*CONTROLS, BY_HAND, "unevolved"))]
    return table(
        "Values after 60 steps, unseen shifts",
        "Mean over held-out starts; mean over meta-seeds with 95 % interval. The global minimum is 0. TDCA's best is the "
        "lowest value that the path touched: where it is far below the final value, the network found a minimum and left "
        "it. Capped gradient is a top-down network made by hand, T proportional to the gradient, in steps of at most 0.5.",
        ["function", "TDCA", "TDCA, best point", *CONTROLS.values(), "capped gradient, by hand", "unevolved"],
        ([case.title, *(taken(cells, case, name, key) for name, key in columns)] for case in _with_memory(groups)),
    )


def _larger(cells: Cells, cases: Sequence[Any]) -> Row:
    rows = []
    for case in cases:
        (large,) = (d for d in cells[case]["controls"] if int(d) != case.dimension)
        values = [taken(cells, case, name, dimension=int(large)) for name in CONTROLS]
        ours = taken(cells, case, "tdca-larger")
        rows.append([f"{case.of.title}, {large}-D", ours, *values])
    return table(
        "Networks of ten dimensions in thirty",
        "Each network evolved in 10-D is applied, unchanged, to thirty coordinates in turn, 180 steps in all; the controls "
        "have 180 steps or points too, and rates chosen there. No mark was set.",
        ["function", "TDCA", *CONTROLS.values()],
        rows,
    )


def _stateless(cells: Cells, cases: Sequence[Any]) -> Row:
    rows = []
    for case in cases:
        row = strongest(against(cells, case))
        control = row["what"].partition("that of ")[2]
        rows.append([case.title, taken(cells, case, "tdca"), control, interval(row), row["verdict"]])
    return table(
        "Without memory, steps of at most 0.1, as before",
        "Networks as in the released code, without memory, which see their last step, the change it made and the value. "
        "Their difference from the strongest control, with the verdict that the mark gives.",
        ["function", "TDCA, stateless", "strongest control", "difference", "verdict"],
        rows,
    )


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval for a rate of `successes` in n trials.

    >>> [round(x, 4) for x in wilson(0, 10)]
    [0.0, 0.2775]
    """
    interval = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def _successes(cells: Cells, groups: Groups, settings: Mapping[str, Any]) -> Row:
    def share(case: Any, method: str) -> str:
        hits = taken(cells, case, method, "successes")
        n = len(hits) * settings["starts"]
        low, high = wilson(int(sum(hits)), n)
        return f"{100 * sum(hits) / n:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    return table(
        "Starts that end at a global minimum, %",
        f"Within {settings['success within']} of it (the box of starts is 6 wide), of all meta-seeds together, with "
        "Wilson's 95 % interval, which takes starts of one meta-seed for independent.",
        ["function", "TDCA", *CONTROLS.values()],
        ([case.title, *(share(case, method) for method in ("tdca", *CONTROLS))] for case in _with_memory(groups)),
    )


def _rates(cells: Cells, groups: Groups) -> Row:
    rows = []
    for case in _with_memory(groups):
        rates = cells[case]["controls"][str(case.dimension)]["tuned"]["rates"]
        seconds = cells[case]["evolution"] / len(cells[case]["seeds"])
        generations = str(cells[case]["config"]["generations"])
        names = ("gd", "momentum", "adam", BY_HAND)
        rows.append([case.title, *(f"{rates[name]:.3g}" for name in names), generations, f"{seconds:.0f}"])
    return table(
        "Learning rates of the controls, and length of evolution",
        "Rates with the lowest mean final value on validation starts. Seconds are wall-clock time on a machine that other "
        "work shared.",
        ["function", "gradient descent", "momentum", "Adam", "capped gradient", "generations", "seconds per evolution"],
        rows,
    )


def draw(cells: Cells, groups: Groups) -> list[Drawing]:
    """Both figures."""
    finals = {
        case.title: {
            method: [
                value / start for value, start in zip(taken(cells, case, method), taken(cells, case, "start"), strict=True)
            ]
            for method in ("tdca", *CONTROLS)
        }
        for case in _with_memory(groups)
    }
    drawn = [case for case in groups["plane"] if case.function in ("rastrigin", "ackley", "schwefel")]
    networks = {case: cells[case]["seeds"][0]["center"] for case in drawn}
    rates = {case: cells[case]["controls"]["2"]["tuned"]["rates"] for case in drawn}
    left = render(
        "final_values",
        "Value left after 60 steps",
        "Mean final value over the mean value at the start, which is 1, on shifts that evolution did not see; mean "
        "over meta-seeds with 95 % interval.",
        final_values(finals, {"tdca": "TDCA", **CONTROLS}),
    )
    if not drawn:
        return [left]
    paths = render(
        "trajectories",
        "Paths over the landscape",
        "From the same four starts (dots) to the ends (crosses); minima are stars, on shifts that evolution did "
        "not see. Networks of the first meta-seed.",
        trajectories(networks, rates),
    )
    return [left, paths]
