"""The marks of the classification study, and the verdicts on its evolutions."""

from collections.abc import Mapping, Sequence
from typing import Any

from apical.bench.finding import Row, difference, interval, series, table

Cell = Mapping[str, Any]

STRICT = {
    "dfa": "tuned DFA's",
    "silent": "that without credit to hidden units",
    "unevolved": "that of the network before evolution",
    "shuffled": "that with the credits of other examples",
    "hand-silent": "that of a hand-built teacher: the error, no hidden credit",
    "hand-random": "that of a hand-built teacher: the error, and fixed random feedback of it",
}
"""Rules whose loss TDCA's must be below, and their names."""


def values(cells: Sequence[Cell], rule: str, key: str, part: str = "tuned") -> list[float]:
    """Return a measure of a rule, one value per meta-seed."""
    return series(cells, part, rule, key)


def lower(figure: str, cells: Sequence[Cell], titles: Mapping[str, str], before: str = "") -> list[Row]:
    """Judge whether TDCA's loss lies below that of each of these rules."""
    ours = values(cells, "tdca", "loss")
    return [
        difference(figure, "tdca", f"{before}loss minus {title}", ours, values(cells, rule, "loss"), less=True)
        for rule, title in titles.items()
    ]


def near(figure: str, cells: Sequence[Cell], rule: str = "tdca", title: str = "tdca", before: str = "") -> Row:
    """Judge whether the accuracy of a rule lies within 1 point of tuned backpropagation's."""
    ours, bp = (values(cells, each, "accuracy") for each in (rule, "bp"))
    what = f"{before} minus (tuned BP's minus 1 point)"
    return difference(figure, title, what, ours, bp, less=False, margin=-0.01)


def forms(cells: Sequence[Cell], rule: str = "tdca") -> list[Row]:
    """Judge the weak and the strong form of "better than backpropagation"."""

    def loss(part: str, what: str) -> Row:
        ours, theirs = (values(cells, which, "loss", part) for which in ("tdca", "bp"))
        return difference("C2", rule, what, ours, theirs, less=True)

    rows = [
        loss("same_rate", "weak form: loss minus BP's, both at the learning rate of evolution"),
        loss("tuned", "strong form: loss minus tuned BP's"),
    ]
    ours, bp = (values(cells, each, "accuracy") for each in ("tdca", "bp"))
    for points, name in ((1.0, "strong form"), (0.5, "stretch")):
        what = f"{name}: accuracy minus (tuned BP's minus {points:g} point{'s' * (points != 1)})"
        rows.append(difference("C2", rule, what, ours, bp, less=False, margin=-points / 100))
    return rows


def harness(cells: Sequence[Cell]) -> list[Row]:
    """Judge whether a teacher without evolution passes in this harness; not a claim of the paper."""
    return [near("-", cells, "hand-random", "hand-built", "the harness: accuracy of the hand-built teacher")]


def verdicts(arms: Mapping[str, Sequence[Cell]]) -> list[Row]:
    """Return all verdicts except those of the released credit; an arm run less than twice has none."""
    rows: list[Row] = []
    unit, sites, relu = ([*arms.get(arm, ())] for arm in ("unit", "sites-4", "relu"))
    if len(unit) > 1:
        rows += [*forms(unit), *lower("C2", unit, STRICT), *harness(unit)]
    if len(sites) == len(unit) > 1:
        what = "diffusion, 4 sites: accuracy minus (that of a credit per unit minus 1 point)"
        ours, full = (values(cells, "tdca", "accuracy") for cells in (sites, unit))
        rows.append(difference("C3", "tdca", what, ours, full, less=False, margin=-0.01))
    for figure, part, cells in (("C6", "elsewhere", unit), ("C8", "widths", sites)):
        for name in cells[0][part] if len(cells) > 1 else ():
            ours, bp = (series(cells, part, name, rule, "accuracy") for rule in ("tdca", "bp"))
            what = f"{'width ' if part == 'widths' else ''}{name}: accuracy minus 97 % of tuned BP's"
            rows.append(difference(figure, "tdca", what, ours, [0.97 * accuracy_of_bp for accuracy_of_bp in bp], less=False))
    if len(relu) > 1:
        rows.append(near("C8", relu, before="ReLU: accuracy"))
        rows += lower("C8", relu, {"bp": "tuned BP's", "dfa": STRICT["dfa"]}, "ReLU: ")
    return rows


def released(arms: Mapping[str, Sequence[Cell]]) -> dict[str, Any]:
    """Return the same forms for credit on probabilities as a separate table: they are not counted."""
    cells = arms.get("released", ())
    rows = forms(cells, "tdca-probabilities") if len(cells) > 1 else []
    return table(
        "Credit on probabilities, as in the authors' code",
        "The arm nearest to the released code, at this study's sizes: credit on probabilities, not relative to a right "
        "prediction, from random weights. Its verdicts are not counted among those above. The set-up of the paper itself is "
        "not known.",
        ["quantity", "mark", "mean [95 % interval]", "n", "verdict"],
        ([row["what"], row["mark"], interval(row), str(row["n"]), row["verdict"]] for row in rows),
    )
