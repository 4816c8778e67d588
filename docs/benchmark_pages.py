"""The page of the benchmarks; which tables it has, benchmarks.toml says."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from result_pages import NOTE, joined
from tables import Row, facts, fitting, grouped, number, toml, words

TABLES = toml("benchmarks")
CELLS: dict[str, Callable[[Row, str], str]] = {
    "code": lambda row, key: row[key] if " " in row[key] and key == "rule" else f"`{row[key]}`",
    "text": lambda row, key: words(row.get(key)),
    "model": lambda row, key: f"{row[key]}, batch {row['batch']}",
    "percent": lambda row, key: number(100 * row[key], 1),
    "time over": lambda row, key: number(row["ratio_to_bp"] / row[key], 2),
    "range": lambda row, key: " to ".join(number(value, 2) for value in row.get(key) or ()) or "-",
    "target": lambda row, key: "-" if row.get(key) is None else f"at most {row[key]:g}",
    "verdict": lambda row, key: "-" if row.get("target") is None else "met" if row[key] else "missed",
    "limited": lambda row, key: limited(row),
}
"""Ways to write a value, for values that are no plain number."""


FLOOR = """![Time of a step over backpropagation's, and its floor](benchmarks-floor.svg)

Bars: the median over rounds, from backpropagation's time; lines: quartiles. *Floor* estimates what a step cannot avoid, in
the same run: a step of backpropagation, plus what the rule's matrix products take more or less than backpropagation's (both
timed alone, with the tensors of a real step), plus the bytes that must be moved to make feedback weights that depend on the
forward weights, at the speed at which this machine adds two matrices. *Watching* is the reading of weights before
and after each step, without which a closed form would not see that somebody else has moved them. A floor below 1
belongs to a rule with fewer products."""


def benchmark_page(files: Mapping[str, Row]) -> str:
    """The page, of what the files in benchmarks/ hold, by name; they may be absent."""
    parts = [
        NOTE,
        "# Benchmarks",
        "Time and memory of one training step relative to backpropagation, all rules interleaved in one run so that they "
        "see the same machine. `make bench` measures these tables on your machine and writes them here.",
    ]
    steps = files.get("results") or {}
    if not steps.get("rows") and not (files.get("control") or {}).get("rows"):
        return joined([*parts, "No measurement is kept here yet."])
    for (device,), rows in grouped(steps.get("rows") or [], "device").items():
        parts += section({"rows": [{**row, "device": device or "CPU"} for row in rows]}, TABLES["steps"][0])
    if any(row.get("floor") is not None for row in steps.get("rows") or []):
        parts.append(FLOOR)
    parts += ["## Measured with", facts(steps["environment"])] if steps.get("environment") else []
    for about in TABLES["sections"]:
        for each in [one for one in TABLES["sections"] if one["file"] == about["like"]] if "like" in about else [about]:
            parts += section(files.get(about["file"]) or {}, each)
    return joined(parts)


def limited(row: Row) -> str:
    """Whether the target was met, or was missed because the floor measured in the same run is above it."""
    if row.get("target") is None or row.get("rule") == "bp":
        return "-"
    if row["within_target"]:
        return "met"
    floor = row.get("floor")
    if floor is not None and floor > row["target"]:
        return "missed: below the floor"
    watched = row.get("floor_watched")
    return "missed: below the floor with watching" if watched is not None and watched > row["target"] else "missed"


def section(file: Row, about: Row) -> list[str]:
    """One entry of benchmarks.toml: heading, text, tables and machine; nothing where nothing was measured."""
    rows = [row for row in file.get(about["rows"]) or [] if "only" not in about or row["rule"] == about["only"]]
    if not rows:
        return []
    known = {**rows[0], "environment": file.get("environment")}
    parts = [about[key].format(**known) for key in ("heading", "text") if key in about]
    if "columns" in about:
        groups = grouped(rows, "model", "batch", "precision").values() if about.get("settings") else [rows]
        for members in groups:
            parts += [f"### {setting(members[0])}"] if about.get("settings") else []
            parts.append(columns(members, about["columns"], about.get("labels", 1)))
    return [
        *parts,
        *(["### Measured with", facts(file["environment"])] if about.get("measured") and known["environment"] else []),
    ]


def columns(rows: Sequence[Row], asked: Sequence[Sequence[Any]], labels: int) -> str:
    """The table of the columns asked for: header, key, and decimals or the name of a cell."""
    lines = [
        [number(row.get(key), how) if isinstance(how, int) else CELLS[how](row, key) for _, key, how in asked]
        for row in rows
    ]
    return fitting([header for header, *_ in asked], lines, numeric_from=labels)


def setting(row: Row) -> str:
    """Model, batch and precision of a benchmark row."""
    precision = row.get("precision")
    return f"{row.get('model')}, batch {row.get('batch')}" + (f", {precision}" if precision else "")
