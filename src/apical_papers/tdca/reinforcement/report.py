"""Output of the study of reinforcement learning: verdicts, tables and figures, from its cells."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from apical.bench.figures.curves import Drawing, render
from apical.bench.finding import Row, count, difference, interval, series, shown, table
from apical.bench.program import about_study, keep_results
from apical.bench.statistics import student

Cells = Sequence[Mapping[str, Any]]

TITLE = "TDCA in reinforcement learning: {}, against REINFORCE"
ABOUT = (
    "A policy is trained for 20 updates of 4 episodes (of at most {steps} steps) by credits of an evolved top-down network; "
    "no loss and no backpropagation. What the network sends to the policy's logits is multiplied by the action's advantage, "
    "which the network does not see: a three-factor rule. The first stage sees probabilities and action alone; the second "
    "begins where the first ended and also sees the observation, progress and return. Evolution saw a narrow range of "
    "settings; tests take new initial policies, in that range and on six settings far outside it. REINFORCE has the same "
    "advantages, optimiser and clipping, and its gradient by backpropagation. Every network is also tested with advantages "
    "shuffled among time steps: one that still scores has learned the task by heart and is rejected. The paper's numbers "
    "could not be read, so there are none to compare with. The gate, credit on logits and the state depart from the "
    "released code{ungated}."
)
MARKS = (
    "Mean return of a lifetime's last 5 updates, paired over meta-seeds, with 95 % intervals of mean differences (Student's "
    "t); every rule at its best of seven learning rates, by validation lifetimes in the training range. All marks were set "
    "before the run, and its meta-seeds were not used before. Learning: the interval of end minus start above {gains}. Not "
    "below REINFORCE: the interval of the difference above minus 10 % of what REINFORCE gains. Unseen settings: a mean not "
    "below REINFORCE's on 4 of 6. Shuffled advantages: a mean that differs from that before learning by at most {harmless}. "
    "Second stage: the interval of its difference from REINFORCE above 0."
)
MISSED = {
    "cart-pole": [
        [
            "CartPole, first stage, against REINFORCE",
            "level on average, but learning differs between meta-seeds after 60 generations of one lifetime each",
            "two lifetimes per generation: 120 after 50 generations (one meta-seed), slower by the same clock",
        ],
        [
            "CartPole, first stage, shuffled advantages",
            "credit made by hand, which knows nothing of the task, moves as far: policies that drift at random balance "
            "longer now and then, and no credit undoes it",
            "nothing: the mark stays as it was set",
        ],
        [
            "half-length 0.25 m",
            "the pole falls sooner than any that evolution saw, and REINFORCE is at its best there",
            "nothing",
        ],
    ],
    "pendulum": [
        [
            "Pendulum",
            "lifetimes differ so much that 80 generations of one each are few; credit by hand is below REINFORCE too, so "
            "the hidden units, which get no credit, may matter here",
            "a learning rate of 0.05 in evolution instead of 0.02: no gain in 40 generations (one meta-seed)",
        ],
    ],
    "acrobot": [
        [
            "Acrobot",
            "credit by hand does as well as REINFORCE, so the harness allows it; all lifetimes of a generation share one "
            "initial policy, and from many no episode ends within the limit; what was evolved helps with shuffled "
            "advantages too: it does not come from reward",
            "24 generations and 10 with the state, where 16 and 6 had not begun to learn; then 60 and 20: a higher return, "
            "and no other verdict",
        ],
    ],
}
"""Missed marks by case, with reasons and what was tried."""
METHODS = {
    "gated": "TDCA",
    "state": "TDCA, state",
    "by-hand": "by hand",
    "reinforce": "REINFORCE",
    "unevolved": "unevolved",
}
LOOKS: dict[str, tuple[str, str, Any]] = {
    "gated": ("#0B5345", "*", "-"),
    "state": ("#0072B2", "D", "-"),
    "by-hand": ("#56B4E9", "s", (0, (4, 1.5))),
    "reinforce": ("#000000", "o", "-"),
    "gated-shuffled": ("#D55E00", "v", (0, (1.2, 1.2))),
    "state-shuffled": ("#E69F00", "^", (0, (5, 1.2, 1, 1.2))),
    "reinforce-shuffled": ("#999999", "x", (0, (1.2, 1.2))),
}
"""Colour (all but two from Okabe and Ito), marker and line of each plotted method."""
SHUFFLED = " (shuffled)"


def report(
    out: Path,
    cases: Sequence[Any],
    cells: Mapping[str, tuple[Mapping[str, Any], Cells]],
    train: str,
    command: str,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Write results.json, the figures and report.html; return the content of results.json.

    Args:
        cases: the environments.
        cells: for each environment, its evolutions by stage, and the test of each meta-seed.
        train: name of the training range.
    """
    parts = [part for stages, tests in cells.values() for part in (*stages.values(), *tests)]
    spent = [{"seconds": part.get("evolution", part["seconds"])} for part in parts]
    settings = {**settings, "seconds of all runs": round(sum(part["seconds"] for part in spent), 1)}
    rows = [row for case in cases for row in verdicts(case, cells[case.stem][1], train)]
    rows.sort(key=lambda row: bool(row["verdict"] != "reproduced"))  # reproduced rows first
    tables = [
        *(
            each
            for case in cases
            for each in (ends_table(case, cells[case.stem][1], train, METHODS), _controls(case, cells[case.stem][1], train))
        ),
        *missed([row for case in cases for row in MISSED.get(case.stem, ())], "tables and figures suggest"),
        *([_ungated(cells["cart-pole"][1], train)] if "cart-pole" in cells else []),
        *(rates_table(case, cells[case.stem][1]) for case in cases),
    ]
    return keep_results(out, command, describe(cases), settings, spent, rows, tables, draw(cases, cells, train))


def describe(cases: Sequence[Any]) -> dict[str, Any]:
    """Return the title, what was done, and the meaning of the marks."""

    def by_case(values: Sequence[float]) -> str:
        return ", ".join(f"{value:g} ({case.title})" for value, case in zip(values, cases, strict=True))

    ungated = "; networks without them have a table of their own" if "cart-pole" in {case.stem for case in cases} else ""
    gains, harmless = by_case([case.gain for case in cases]), by_case([case.harmless for case in cases])
    title, steps = TITLE.format(" and ".join(case.title for case in cases)), max(case.setting.steps for case in cases)
    return about_study(title, ABOUT.format(steps=steps, ungated=ungated), MARKS.format(gains=gains, harmless=harmless))


def missed(rows: Sequence[Sequence[str]], suggested: str) -> list[Row]:
    """Return the table of missed marks, if there are any."""
    note = f"Reasons are what the {suggested}; none was tested by an experiment of its own."
    return [table("What does not hold, why, and what was tried", note, ["where", "why", "tried"], rows)] if rows else []


def ends(cells: Cells, method: str, place: str) -> list[float]:
    """Return the mean return at the end of lifetimes, one value per meta-seed."""
    return series(cells, "methods", method, "end", place)


def untrained(cells: Cells, method: str) -> list[float]:
    """Return the mean return in the first update of the training range, before learning, one value per meta-seed."""
    return series(cells, "methods", method, "curve", 0)


def above(rule: str, what: str, values: Sequence[float], others: Sequence[float], mark: float = 0.0) -> Row:
    """Judge values minus others: reproduced if the interval of their mean lies above the mark."""
    moved = difference("E6", rule, what, values, [other + mark for other in others], less=False)
    for key in ("mean", "low", "high"):
        moved[key] += mark
    return {**moved, "mark": f"interval > {mark:g}"}


def within(rule: str, what: str, values: Sequence[float], others: Sequence[float], most: float) -> Row:
    """Judge how close the mean of values minus others is to 0."""
    row = above(rule, what, values, others)
    holds = abs(row["mean"]) <= most
    return {**row, "mark": f"mean within ±{most:g}", "verdict": "reproduced" if holds else "not reproduced"}


def not_below(rule: str, what: str, values: Sequence[float], others: Sequence[float], start: Sequence[float]) -> Row:
    """Judge values minus others: reproduced if the interval lies above minus 10 % of what the others gain."""
    margin = 0.1 * (sum(others) - sum(start)) / len(others)
    return above(rule, what, values, others, -round(margin, 1))


def verdicts(case: Any, cells: Cells, train: str) -> list[Row]:
    """Return the verdicts on one environment, for both stages."""
    rows = []
    theirs = ends(cells, "reinforce", train)
    for method, rule in (("gated", "tdca-gated"), ("state", "tdca-gated-state")):
        ours, begun, where = ends(cells, method, train), untrained(cells, method), f"{case.title}, {train}"
        holds = [
            float(np.mean(ends(cells, method, place))) >= float(np.mean(ends(cells, "reinforce", place)))
            for place in case.unseen
        ]
        rows += [
            above(rule, f"{where}: return at the end minus that before learning", ours, begun, case.gain),
            not_below(rule, f"{where}: return minus that of REINFORCE", ours, theirs, untrained(cells, "reinforce")),
            count("E6", rule, f"{case.title}: unseen settings with a mean return not below REINFORCE's", holds, 4),
            within(
                rule,
                f"{where}, shuffled advantages: return at the end minus that before learning",
                ends(cells, f"{method}-shuffled", train),
                untrained(cells, f"{method}-shuffled"),
                case.harmless,
            ),
        ]
    what = f"{case.title}, {train}: return of the second stage minus that of REINFORCE"
    return [*rows, above("tdca-gated-state", what, ends(cells, "state", train), theirs)]


def ends_table(case: Any, cells: Cells, train: str, methods: Mapping[str, str]) -> dict[str, Any]:
    """Return a table of final returns of a case under each of the titled methods."""
    rows = [[place, *(ends(cells, method, place) for method in methods)] for place in (train, *case.unseen)]
    rows.append([train + SHUFFLED, *(ends(cells, f"{method}-shuffled", train) for method in methods)])
    rows.append([f"{train}, before learning", *(untrained(cells, method) for method in methods)])
    note = (
        "Mean of the last 5 updates over new policies; mean over meta-seeds with 95 % interval. By hand: a (pi - y) for the "
        "logits and nothing for hidden units, what a gated network could send. Shuffled: the same rules with advantages "
        "dealt out anew among time steps."
    )
    return table(f"{case.title}: return at the end of lifetimes", note, ["setting", *methods.values()], rows)


def _controls(case: Any, cells: Cells, train: str) -> dict[str, Any]:
    rows = []
    for place in (train, *case.unseen):
        theirs = ends(cells, "reinforce", place)
        comparisons = (above("", "", ends(cells, method, place), theirs) for method in ("gated", "state", "by-hand"))
        rows.append([place, *(interval(row) for row in comparisons)])
    note, header = "Paired over meta-seeds; mean with 95 % interval (Student's t).", ("gated", "state", "by-hand")
    return table(f"{case.title}: difference from REINFORCE", note, ["setting", *map(METHODS.__getitem__, header)], rows)


def _ungated(cells: Cells, train: str) -> dict[str, Any]:
    ours = ends(cells, "ungated", train)
    rows = [
        above("tdca-ungated", "return minus that of REINFORCE", ours, ends(cells, "reinforce", train)),
        above("tdca-ungated", "return at the end minus that before learning", ours, untrained(cells, "ungated")),
    ]
    return table(
        "CartPole, not gated, as before",
        "Networks as in the released code: the advantage is an input, credit goes to probabilities and hidden units. They "
        f"end at {shown(ours)} steps. Evolution's first step is to do no harm, and it goes no further.",
        ["quantity, training range", "mark", "mean [95 % interval]", "verdict"],
        ([row["what"], row["mark"], interval(row), row["verdict"]] for row in rows),
    )


def rates_table(case: Any, cells: Cells) -> dict[str, Any]:
    """Return a table of returns by learning rate on validation lifetimes."""
    names = [name for name in cells[0]["methods"] if "returns" in cells[0]["methods"][name]]
    rates = list(cells[0]["methods"][names[0]]["returns"])
    rows = [
        [
            name,
            *(f"{np.mean(series(cells, 'methods', name, 'returns', rate)):.1f}" for rate in rates),
            ", ".join(f"{rate:g}" for rate in series(cells, "methods", name, "rate")),
        ]
        for name in names
    ]
    note = "On validation lifetimes in the training range, mean over meta-seeds; last, the rates chosen."
    return table(f"{case.title}: return by learning rate", note, ["", *rates, "chosen"], rows)


def draw(cases: Sequence[Any], cells: Mapping[str, tuple[Mapping[str, Any], Cells]], train: str) -> list[Drawing]:
    """Draw learning curves with the shuffled controls, returns by setting, and the course of evolution."""
    return [
        render(
            "learning_curves",
            "Learning in the training range",
            "Mean return of new policies in each update; line and band: mean over meta-seeds with 95 % interval. "
            "Shuffled: the same rules, with advantages permuted among time steps.",
            curves(cases, {stem: tests for stem, (_, tests) in cells.items()}, LOOKS, METHODS),
        ),
        render(
            "settings",
            "Return at the end, by setting",
            "Mean of the last 5 updates; mean over meta-seeds with 95 % interval. Evolution saw only the range.",
            _settings(cases, cells, train),
        ),
        render(
            "evolution",
            "Course of evolution",
            "Mean fitness of the population (return over whole lifetimes), a line per meta-seed; the second stage "
            "starts at the dashed line. Each generation has its own settings and initial weights, so neighbouring "
            "generations differ in difficulty.",
            _evolution(cases, cells),
        ),
    ]


def curves(cases: Sequence[Any], cells: Mapping[str, Cells], looks: Mapping[str, Any], names: Mapping[str, str]) -> Figure:
    """Draw the mean return by update, a panel for each case.

    Args:
        cells: for each case, the test of each meta-seed.
        looks: colour, marker and line of each plotted method; for a control, under the method's name and "-shuffled".
        names: titles of methods.
    """
    figure = Figure(figsize=(7.0, 3.4))
    panels = figure.subplots(1, len(cases), squeeze=False)[0]
    for axes, case in zip(panels, cases, strict=True):
        for method, (colour, marker, line) in looks.items():
            values_of = zip(*(cell["methods"][method]["curve"] for cell in cells[case.stem]), strict=True)
            mean, low, high = np.array([student(values)[:3] for values in values_of], dtype=float).T
            x = np.arange(1, len(mean) + 1)
            name = names[method.removesuffix("-shuffled")] + (SHUFFLED if method.endswith("-shuffled") else "")
            axes.plot(x, mean, color=colour, marker=marker, linestyle=line, markevery=4, ms=4, label=name)
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.set(xlabel="update", ylabel="return", title=case.title, xticks=(1, 5, 10, 15, 20))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, columnspacing=1.2)
    return figure


def _settings(cases: Sequence[Any], cells: Mapping[str, tuple[Mapping[str, Any], Cells]], train: str) -> Figure:
    figure = Figure(figsize=(7.0, 3.4))
    panels = figure.subplots(1, len(cases), squeeze=False)[0]
    methods = ("gated", "state", "by-hand", "reinforce")
    for axes, case in zip(panels, cases, strict=True):
        places = (train, *case.unseen)
        for number, method in enumerate(methods):
            colour, marker, _ = LOOKS[method]
            intervals = [student(ends(cells[case.stem][1], method, place)) for place in places]
            mean, low, high = np.array([interval[:3] for interval in intervals], dtype=float).T
            y = np.arange(len(places)) + 0.18 * (number - (len(methods) - 1) / 2)
            look: Any = {"fmt": marker, "color": colour, "ms": 4, "lw": 0.9, "label": METHODS[method]}
            axes.errorbar(mean, y, xerr=np.stack([mean - low, high - mean]), **look)
        axes.set_yticks(range(len(places)), places)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        for line in np.arange(len(places) - 1) + 0.5:
            axes.axhline(line, color="#e6e6e6", lw=0.5, zorder=0)
        axes.set(xlabel="return", title=case.title)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, columnspacing=1.2)
    return figure


def _evolution(cases: Sequence[Any], cells: Mapping[str, tuple[Mapping[str, Any], Cells]]) -> Figure:
    figure = Figure(figsize=(7.0, 2.3))
    panels = figure.subplots(1, len(cases), squeeze=False)[0]
    for axes, case in zip(panels, cases, strict=True):
        stages = cells[case.stem][0]
        curve = np.array(stages["gated"]["curve"] + stages["state"]["curve"])
        x = np.arange(1, len(curve) + 1)
        colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
        for values, colour in zip(curve.T, colours * len(curve.T), strict=False):
            axes.plot(x, values, color=colour, lw=0.8)
        axes.axvline(len(stages["gated"]["curve"]) + 0.5, color="#888888", lw=0.8, linestyle="--")
        axes.set(xlabel="generation", ylabel="mean fitness", title=case.title)
    return figure
