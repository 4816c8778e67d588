"""Markdown tables and the numbers in them: what the pages of docs/generate.py are made of."""

import json
import math
import re
import statistics
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

Cell = Callable[[Row], str]


def toml(name: str) -> dict[str, Any]:
    """The content of a file beside this one."""
    return tomllib.loads(Path(__file__).with_name(f"{name}.toml").read_text(encoding="utf-8"))


def console(command: str) -> str:
    """A command that made kept results, as it is typed today."""
    for before, now in toml("moved").items():
        command = command.replace(f"-m {before} ", f"-m {now} ")
    return f"```console\n$ {command}\n```"


def load(path: Path) -> Any:
    """The JSON in `path`; None if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def comparisons(root: Path) -> list[Path]:
    """The folders that `apical compare` wrote."""
    return sorted(path.parent for path in (root / "results").glob("*/summary.json"))


def own_studies(root: Path) -> list[Path]:
    """The folders that studies with measures of their own wrote."""
    return sorted(path.parent for path in (root / "results").glob("*/results.json"))


def reproductions(root: Path) -> list[Row]:
    """What `apical reproduce` wrote."""
    return [load(path) for path in sorted((root / "results" / "reproductions").glob("*.json"))]


def benchmarks(root: Path) -> dict[str, Row]:
    """What is in the files of benchmarks/, by their names."""
    return {path.stem: load(path) for path in (root / "benchmarks").glob("*.json")}


DATA = {"mnist": "MNIST", "cifar": "CIFAR", "fashion": "Fashion", "std3": "3 std"}
"""How parts of the names of data are written in a sentence."""


def data_name(name: str) -> str:
    """A data set as a sentence names it.

    >>> data_name("fashion-mnist-raw"), data_name("cifar-10"), data_name("digits")
    ('Fashion-MNIST (raw)', 'CIFAR-10', 'digits')
    """
    stem, *kind = re.split(r"-(?=raw$|std3$|autoencoder$)", name)
    written = "-".join(DATA.get(part, part) for part in stem.split("-"))
    return f"{written} ({DATA.get(kind[0], kind[0])})" if kind else written


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numeric_from: int = 1) -> str:
    """A Markdown table; columns from `numeric_from` on are set to the right."""
    rule = ["---" if i < numeric_from else "---:" for i in range(len(header))]
    lines = [_escaped(header), rule, *map(_escaped, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fitting(header: Sequence[str], rows: Iterable[Sequence[str]], numeric_from: int = 1) -> str:
    """The same for a page of the documentation: set small where there are many columns."""
    text = table(header, rows, numeric_from)
    return f":::{{container}} small\n{text}\n:::" if len(header) > 5 else text


def signs(header: Sequence[str], rows: Iterable[Sequence[str]], numeric_from: int = 99) -> str:
    """A table of signs or short numbers, which keeps its columns narrow on a phone too."""
    return f":::{{container}} signs\n{table(header, rows, numeric_from)}\n:::"


def _escaped(cells: Iterable[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in cells]


def tabulate(rows: Iterable[Row], columns: Mapping[str, Cell], numeric_from: int = 1) -> str:
    """The same from rows and, for each header, the function that writes its cell."""
    return table(list(columns), ([cell(row) for cell in columns.values()] for row in rows), numeric_from)


def code(key: str) -> Cell:
    """The cell of a name; a dash for nothing."""
    return lambda row: f"`{row[key]}`" if row[key] else "-"


def text(key: str) -> Cell:
    """The cell of anything else; a dash for nothing."""
    return lambda row: str(row[key] or "-")


def texts(*keys: str) -> dict[str, Cell]:
    """The cells of columns that are called after what they show."""
    return {key: text(key) for key in keys}


def number(value: Any, digits: int, form: str = "f") -> str:
    """A number with so many decimals; a dash where there is none."""
    return f"{value:.{digits}{form}}" if isinstance(value, int | float) and math.isfinite(value) else "-"


def significant(value: Any, digits: int = 4) -> str:
    """A number with so many significant digits; a dash where there is none."""
    return number(value, digits, "g")


def plus_minus(mean: str, deviation: str | None) -> str:
    """A mean with its standard deviation, if it has one."""
    return mean if deviation is None else f"{mean} ± {deviation}"


def spread(values: Sequence[float], digits: int, form: str = "f", last: int | None = None) -> str:
    """Mean and, from two values on, standard deviation, with other digits if `last` says so."""
    if not values:
        return "-"
    deviation = None if len(values) < 2 else number(statistics.stdev(values), last or digits, form)
    return plus_minus(number(statistics.mean(values), digits, form), deviation)


def loss_spread(values: Sequence[float]) -> str:
    """The same for losses: four decimals, or three significant digits where those would show little else than zeros."""
    large = not values or abs(statistics.mean(values)) >= 0.01
    return spread(values, 4) if large else spread(values, 3, "g", last=2)


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
