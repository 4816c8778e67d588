"""Markdown tables and the numbers in them: what the pages of docs/generate.py are made of."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


MOVED = {
    "apical.recipes.at_epoch": "apical.bench.at_epoch",
    "apical.recipes.ccl_features": "apical_papers.ccl.features",
    "apical.recipes.corinfomax_study": "apical_papers.corinfomax.study",
    "apical.recipes.dfc_toy": "apical_papers.dfc.toy.study",
    "apical.recipes.equilibrium_logic": "apical_papers.equilibrium.logic",
    "apical.recipes.equilibrium_noise": "apical_papers.equilibrium.noise",
    "apical.recipes.equilibrium_study": "apical_papers.equilibrium.study",
    "apical.recipes.pfa_theory": "apical_papers.pfa.theory",
    "apical.recipes.tdca_classification": "apical_papers.tdca.classification.study",
    "apical.recipes.tdca_diffusion": "apical_papers.tdca.diffusion.study",
    "apical.recipes.tdca_functions": "apical_papers.tdca.functions.study",
    "apical.recipes.tdca_landscape": "apical_papers.tdca.landscape",
    "apical.recipes.tdca_reinforcement": "apical_papers.tdca.reinforcement.study",
    "apical.recipes.tp_targets": "apical_papers.tp.targets",
}
"""Modules whose name was another when results that are kept were made."""


def console(command: str) -> str:
    """A command that made kept results, as it is typed today."""
    for before, now in MOVED.items():
        command = command.replace(f"-m {before} ", f"-m {now} ")
    return f"```console\n$ {command}\n```"


def load(path: Path) -> Any:
    """The JSON in `path`; None if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numeric_from: int = 1) -> str:
    """A Markdown table; columns from `numeric_from` on are set to the right."""
    rule = ["---" if i < numeric_from else "---:" for i in range(len(header))]
    lines = [_escaped(header), rule, *map(_escaped, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(cells: Sequence[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in cells]


def number(value: Any, digits: int) -> str:
    """A number with so many decimals; a dash where there is none."""
    known = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:.{digits}f}" if known else "-"


def significant(value: Any, digits: int = 4) -> str:
    """A number with so many significant digits; a dash where there is none."""
    known = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:.{digits}g}" if known else "-"


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and, from two values on, standard deviation."""
    if not values:
        return "-"
    mean = number(statistics.mean(values), digits)
    return mean if len(values) < 2 else f"{mean} ± {number(statistics.stdev(values), digits)}"


def loss_spread(values: Sequence[float]) -> str:
    """The same for losses: four decimals, or three significant digits where those would show little else than zeros."""
    if not values or abs(statistics.mean(values)) >= 0.01:
        return spread(values, 4)
    mean = significant(statistics.mean(values), 3)
    return mean if len(values) < 2 else f"{mean} ± {significant(statistics.stdev(values), 2)}"


def present(rows: Iterable[Row], key: str) -> list[float]:
    """The finite values of `key`."""
    values = [row.get(key) for row in rows]
    return [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]


def grouped(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of `keys`, in the order of first appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return groups


def words(value: Any) -> str:
    """A table cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return significant(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(words, value)) or "-"
    return "-" if value is None else str(value)


def flat(value: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    """Keys and values of a nested object."""
    lines: list[list[str]] = []
    for key, item in value.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        lines += flat(item, f"{name} ") if isinstance(item, dict) else [[name, words(item)]]
    return lines


def facts(value: Mapping[str, Any]) -> str:
    """The same as a table of two columns."""
    return table(("what", "value"), flat(value), numeric_from=2)
