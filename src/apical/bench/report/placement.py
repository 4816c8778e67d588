"""What each layer's error passes through: saved in placement.json of a run folder, and shown in reports and audits."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from apical.bench.document import table
from apical.bench.state import read_json, write_state
from apical.core.credit import CreditRule
from apical.core.placement import path_summary
from apical.errors import CheckpointError

FILE = "placement.json"
SAMPLES = 4
_HEADS = ("Layer", "Type", "Weight", "Error passes through")


def keep(folder: Path, rule: CreditRule, inputs: Tensor) -> None:
    """Write the placement of a rule to a run folder; a few samples of the inputs (batch, ...) are used."""
    write_state(folder / FILE, {"rows": [asdict(row) for row in rule.placement(inputs[:SAMPLES])]})


def section(out: Path, rules: Sequence[str]) -> str:
    """Return the tables of a run folder or of a compare folder's rules, as HTML; empty if no run has saved one.

    Raises:
        CheckpointError: a file is damaged.
    """
    tables = []
    for rule in rules:
        if path := first_file(out, rule, FILE):
            rows = _rows(path)
            summary = f"<b>{escape(rule)}</b>: {escape(path_summary(row['path'] for row in rows))}"
            tables.append(
                f"<details><summary>{summary}</summary>\n{table(_HEADS, map(_cells, rows), 'placement')}\n</details>"
            )
    return "\n".join(["<h2>What each layer's error passes through</h2>", *tables]) if tables else ""


def first_file(out: Path, rule: str, name: str) -> Path | None:
    """Return the placement of a run folder, or of the first seed of a compare folder's rule that has one."""
    paths = [out / name, *sorted((out / "runs" / rule).glob(f"seed-*/{name}"))]
    return next((path for path in paths if path.is_file()), None)


def _rows(path: Path) -> list[Mapping[str, Any]]:
    rows = read_json(path).get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and isinstance(row.get("path"), str) for row in rows):
        raise CheckpointError(f"{path} is damaged: it has no list of rows")
    return rows


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    shape = row.get("shape")
    size = "x".join(map(str, shape)) if isinstance(shape, list) else ""
    return (str(row.get("layer") or "(model)"), str(row.get("kind", "")), size, str(row.get("path", "")))
