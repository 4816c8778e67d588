"""Tables of the optional measures of the networks before, during and after training."""

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from apical.bench.document import MISSING, significant, table
from apical.bench.network import WHOLE, quantities
from apical.bench.report.records import Comparison, Run

Cell = Mapping[str, Mapping[str, Any]]
"""Layer to quantity to number."""
Lines = tuple[list[str], list[list[str]]]
"""Column heads and rows of a table."""


def section(comparison: Comparison) -> str:
    """Return the tables as HTML; empty if nothing was measured."""
    parts = []
    for measure in _names(comparison):
        whole, details = _tables(comparison, measure)
        parts.append(f"<h3>{escape(measure)}</h3>{table(*whole) if whole[1] else ''}")
        if details[1]:
            parts.append(f"<details><summary>{escape(measure)}, by layer</summary>{table(*details)}</details>")
    if not parts:
        return ""
    note = (
        "Means over the seeds that reached the epoch, ± standard deviation. Numbers of different networks, or with other "
        "noise, are not comparable; persistence is meaningful where it differs from that of the same weights shuffled."
    )
    return "\n".join(["<h2>Measures of the network</h2>", f'<p class="note">{note}</p>', *parts])


def _names(comparison: Comparison) -> list[str]:
    measures = (record.get("measured") for run in comparison.runs for record in run.records)
    return list(dict.fromkeys(name for value in measures if isinstance(value, Mapping) for name in value))


def _tables(comparison: Comparison, measure: str) -> tuple[Lines, Lines]:
    rows = [
        ([rule, f"{epoch}"], [_cell(run, epoch, measure) for run in comparison.of(rule)])
        for rule in comparison.rules
        for epoch in sorted({e for run in comparison.of(rule) for e in run.epochs if _cell(run, e, measure)})
    ]
    return of_networks_and_layers(rows, ["Rule", "Epoch"], "Layer")


def of_networks_and_layers(
    rows: Sequence[tuple[list[str], Sequence[Cell]]], heads: list[str], layer: str
) -> tuple[Lines, Lines]:
    """Return a table of whole networks and one of their layers, over seeds, from the measures of each labelled network."""
    every = [cell for _, cells in rows for cell in cells]
    whole = quantities([cell[WHOLE] for cell in every if WHOLE in cell])
    lines = [[*names, *(shown(cells, WHOLE, key) for key in whole)] for names, cells in rows] if whole else []
    layers = [name for name in dict.fromkeys(name for cell in every for name in cell) if name != WHOLE]
    keys = quantities([cell[name] for cell in every for name in layers if name in cell])
    detailed = [[*names, name, *(shown(cells, name, key) for key in keys)] for names, cells in rows for name in layers]
    return ([*heads, *whole], lines), ([*heads, layer, *keys], detailed)


def _cell(run: Run, epoch: int, measure: str) -> Cell:
    record = run.records[run.epochs.index(epoch)] if epoch in run.epochs else {}
    cell: Cell = (record.get("measured") or {}).get(measure) or {}
    return cell


def shown(cells: Sequence[Cell], layer: str, key: str) -> str:
    """Format mean and standard deviation of a quantity over seeds."""
    entries = [cell.get(layer, {}).get(key) for cell in cells]
    values = [float(value) for value in entries if isinstance(value, int | float)]
    if not values:
        return MISSING
    if len(set(values)) == 1 and isinstance(entries[-1], int):
        return f"{entries[-1]:,}"
    mean = significant(statistics.mean(values))
    return f"{mean} ± {significant(statistics.stdev(values))}" if len(values) > 1 else mean
