"""Position of the usable 20-fold range of learning rates, for rules with and without the local solver.

Run `python -m apical_papers.around.window --out results/around-window`. The other two studies fix the ranges in advance and
miss some of them at one end. Here the range is chosen: one seed selects, among sets of four neighbouring rates that span a
factor of 20, the set with the highest worst accuracy, and another seed compares it with the best of all rates. Rules without
the solver are treated the same way with the same rates. Marks were written before the run.
"""

import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

from apical.bench.finding import Row, at_least, series, table
from apical.bench.program import Cells, SeedStudy, about_study
from apical_papers.around.damping import BATCH, DAMPING, KEPT, WIDTHS
from apical_papers.around.study import SETTINGS, accuracies
from apical_papers.digits import Digits

RULES = ("bp", "dfa", "ccl")
RATES = tuple(round(0.02 * 20 ** (k / 3), 4) for k in range(10))
"""From 0.02 to 160; any four neighbours span a factor of 20."""
SPAN = 4
CHOICE, TEST = 500, 600
"""Added to the number of a seed for the choice and for the test, so that no seed is used in the other studies."""
MARK = 0.03
"""Largest distance of the accuracy below the best anywhere in the range."""

ABOUT = about_study(
    "The local solver's usable range of learning rates, chosen and tested",
    "For each rule four neighbouring learning rates that span a factor of 20 are chosen by one seed and tested by "
    "another. Over the range, test accuracy is to lie within 3 points of the best with the solver, and not without it.",
    "The specification's 3 points over a 20-fold range, whose place it leaves open. Reproduced means that "
    "the mean lies past the mark.",
)


def arms() -> dict[str, tuple[str, dict[str, float]]]:
    """Return rules without the solver and with it, at each damping: name and options."""
    solved = {f"cwu:{rule}, damping {d:g}": (f"cwu:{rule}", {"damping": d}) for rule in RULES for d in DAMPING}
    return {rule: (rule, {}) for rule in RULES} | solved


def chosen(accuracy: Mapping[float, float]) -> tuple[float, ...]:
    """Return the neighbouring rates with the highest lowest accuracy.

    >>> chosen({0.1: 0.5, 0.3: 0.8, 0.7: 0.9, 2.0: 0.9, 5.4: 0.8, 15.0: 0.1})
    (0.3, 0.7, 2.0, 5.4)
    """
    rates = sorted(accuracy)
    ranges = [tuple(rates[k : k + SPAN]) for k in range(len(rates) - SPAN + 1)]
    return max(ranges, key=lambda span: min(accuracy[rate] for rate in span))


def _cell(seed: int, epochs: int) -> dict[str, Any]:
    digits = Digits()
    cell = {}
    for arm, (rule, options) in arms().items():

        def final(lr: float, at: int, rule: str = rule, options: dict[str, Any] = options) -> float:
            return accuracies(rule, options, digits, WIDTHS, at, lr, BATCH, epochs)[-1]

        tried = {lr: final(lr, seed + CHOICE) for lr in RATES}
        best, span = max(tried, key=tried.__getitem__), chosen(tried)
        tested = {lr: final(lr, seed + TEST) for lr in sorted({*span, best})}
        cell[arm] = {
            "tried": {str(lr): value for lr, value in tried.items()},
            "range": [span[0], span[-1]],
            "tested": {str(lr): value for lr, value in tested.items()},
            "below": max(tested.values()) - min(tested[lr] for lr in span),
        }
    return cell


def verdicts(cells: Cells) -> list[Row]:
    """Judge whether accuracy is within 3 points of the best over the chosen range with the solver, and not without it."""
    rows = []
    for arm, (rule, options) in arms().items():
        below = series(cells, arm, "below")
        if not options:
            what = "how far the worst of the chosen range lies below the best"
            rows.append(at_least("CWU", rule, what, below, MARK))
        else:
            what = (
                f"damping {options['damping']:g}: 3 points minus how far the worst of the chosen range lies below the best"
            )
            rows.append(at_least("CWU", rule, what, [MARK - value for value in below], 0.0))
    return rows


def tables(cells: Cells) -> list[Row]:
    """Return the ranges with their accuracies, and accuracies over all rates for the seeds that chose."""
    ranges = [
        [
            arm,
            _ranges(cells, arm),
            [max(tested.values()) for tested in series(cells, arm, "tested")],
            series(cells, arm, "below"),
        ]
        for arm in arms()
    ]
    every = ([arm, *(series(cells, arm, "tried", str(lr)) for lr in RATES)] for arm in arms())
    about = "Means over seeds with 95 % intervals; below: best minus worst test accuracy (0 to 1) in the range."
    note = "Test accuracy (0 to 1), means over seeds with 95 % intervals."
    return [
        table("Chosen ranges, tested", about, ["rule", "range (seeds)", "best accuracy", "below"], ranges),
        table("All rates, by the seeds that chose", note, ["rule", *(f"{lr:g}" for lr in RATES)], every),
    ]


def _ranges(cells: Cells, arm: str) -> str:
    counts = Counter(map(tuple, series(cells, arm, "range")))
    return ", ".join(f"{low:.3g} to {high:.3g} ({n})" for (low, high), n in counts.items())


main = SeedStudy(
    "apical_papers.around.window",
    ABOUT,
    {key: SETTINGS[key] for key in KEPT if "rates" not in key}
    | {"batch": BATCH, "damping": ", ".join(map(str, DAMPING)), "learning rates": ", ".join(f"{lr:g}" for lr in RATES)}
    | {"first seeds of choice and test": f"{CHOICE}, {TEST}"},
    _cell,
    verdicts,
    tables,
    epochs=5,
)


if __name__ == "__main__":
    sys.exit(main())
