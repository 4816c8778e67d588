"""The tables of a comparison's report in HTML; every name and value from the runs is escaped."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from apical.bench.document import MISSING, significant, table
from apical.bench.report.records import ACCURACY, NATS, Run, Score
from apical.bench.report.verdicts import Verdict, tally

if TYPE_CHECKING:
    from apical.bench.report.folder import RuleSummary


def mean_and_spread(values: Sequence[float], score: Score = ACCURACY) -> str:
    """Format mean ± standard deviation over seeds, with two decimals for accuracies; a single value without deviation.

    >>> mean_and_spread([97.0, 98.0])
    '97.50 ± 0.71'
    """
    if not values:
        return MISSING
    form = significant if score.is_loss else "{:.2f}".format
    mean = form(statistics.mean(values))
    return f"{mean} ± {form(statistics.stdev(values))}" if len(values) > 1 else mean


def _heading(score: Score) -> str:
    if score == NATS:
        return "Test loss,&nbsp;nats"
    return "Test loss" if score.is_loss else "Test accuracy,&nbsp;%"


def rules_table(rows: Sequence["RuleSummary"], score: Score) -> str:
    """Return a table with one line per rule: its score, seeds, losses, times and size."""
    several = max((len(row.runs) for row in rows), default=0) > 1
    spread, middle = (" <small>mean ± s.d.</small>", " <small>median (range)</small>") if several else ("", "")
    units = {"Bits per token": "bits_per_token", "Perplexity": "perplexity"} if score == NATS else {}
    has_memory = any(row.values("peak_memory_mb") for row in rows)

    def columns(row: "RuleSummary") -> dict[str, str]:
        name = f'<span class="swatch" style="background:{escape(row.colour)}"></span>{escape(row.name)}'
        memory, parameters = row.values("peak_memory_mb"), row.values("parameters")
        cells = {
            "Rule": name + (f" <small>{escape(row.rule)}</small>" if row.rule != row.name else ""),
            _heading(score) + spread: mean_and_spread(row.scores(score), score),
            **{unit: _mean(row.values(key)) for unit, key in units.items()},
            "Seeds": f"{len(row.runs)}" + (f" of {row.planned}" if len(row.runs) < row.planned else ""),
            "Training loss": _mean(row.values("train_loss")),
            f"ms per step{middle}": _median_and_range(row.values("ms_per_step")),
            f"Time relative to bp{middle}": _ratio(row),
        }
        if has_memory:
            cells["Peak memory,&nbsp;MB"] = significant(statistics.median(memory)) if memory else MISSING
        return cells | {"Parameters": f"{int(parameters[0]):,}" if parameters else MISSING}

    note = (
        f"Only finished runs are counted. {'The test loss' if score.is_loss else 'Accuracy'} is that after the last "
        "epoch, not the best one; ± is the standard deviation over seeds. Time is wall-clock time per training step, which "
        "other load on the machine increases."
    )
    return f'{_labelled(map(columns, rows))}\n<p class="note">{note}</p>'


def _labelled(rows: Iterable[Mapping[str, str]]) -> str:
    """Return a table of cells by heading, both HTML; each cell carries its heading, for screens where rows are blocks.

    All columns except the first and the states are numbers.
    """
    lines = list(rows)
    heads = "".join(f"<th{_kind(place, text)}>{text}</th>" for place, text in enumerate(lines[0] if lines else ()))
    body = "\n".join(f"<tr>{''.join(_cell(place, *cell) for place, cell in enumerate(line.items()))}</tr>" for line in lines)
    return f'<table class="rules">\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>'


def _kind(place: int, heading: str) -> str:
    return ' class="n"' if place and heading != "State" else ""


def _cell(place: int, heading: str, value: str) -> str:
    label = heading.partition(" <small>")[0]
    return f'<td{_kind(place, heading)} data-label="{label}"><span>{value}</span></td>' if place else f"<td>{value}</td>"


def _mean(values: Sequence[float]) -> str:
    return significant(statistics.mean(values)) if values else MISSING


def verdicts_table(verdicts: Sequence[Verdict]) -> str:
    """Return reference and measured numbers; nothing if there are none."""
    if not verdicts:
        return ""
    lines = [
        (
            row.verdict,
            row.rule,
            row.what,
            "—" if row.measured is None else row.shown(row.measured) + _spread(row),
            f"{row.published:g} ± {row.tolerance:g}" if row.tolerance is not None else f"at least {row.published:g}",
            row.tag,
            f"{row.n}",
            f"{row.epoch}",
        )
        for row in verdicts
    ]
    heads = ("Verdict", "Rule", "Quantity", "Here, mean ± s.d.", "Reference ± tolerance", "Source", "n", "Epoch")
    return (
        f"<h2>Against reference numbers</h2><p>{escape(tally(verdicts))} Reproduced means that the mean over seeds lies "
        "within the tolerance.</p>"
        f"<details><summary>Every number</summary>{table(heads, lines, 'runs')}</details>"
    )


def _spread(row: Verdict) -> str:
    return "" if row.spread is None else f" ± {row.shown(row.spread)}"


def _median_and_range(values: Sequence[float]) -> str:
    if len(values) < 2:
        return significant(values[0]) if values else MISSING
    low, high = significant(min(values)), significant(max(values))
    middle = significant(statistics.median(values))
    return middle if low == high else f"{middle} <small>({low} to {high})</small>"


def _ratio(row: "RuleSummary") -> str:
    if not row.ratio:
        return MISSING
    middle = f"{statistics.median(row.ratio):.2f}\u00d7"
    spread = f"{min(row.ratio):.2f} to {max(row.ratio):.2f}"
    return middle if len(row.ratio) < 2 or row.rule == "bp" else f"{middle} <small>({spread})</small>"


def problems(runs: Sequence[Run]) -> str:
    """Return the runs that did not finish; nothing if all did."""
    failed = [run for run in runs if not run.finished]
    if not failed:
        return ""
    items = "".join(f"<li>{escape(run.rule)}, seed {run.seed}: {escape(run.status)}</li>" for run in failed)
    return f'<div class="problems"><p><strong>Runs without a final result</strong></p><ul>{items}</ul></div>'


def runs_table(runs: Sequence[Run], score: Score) -> str:
    """Return a collapsed table with one line per run."""
    summary = f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}"
    return f"<details><summary>{summary}</summary>{_labelled(_run_columns(run, score) for run in runs)}</details>"


def _run_columns(run: Run, score: Score) -> dict[str, str]:
    value = score.scale * run.final(score.key)
    return {
        "Rule": escape(run.rule),
        "State": escape(run.status),
        "Seed": str(run.seed),
        "Epoch": str(run.epochs[-1]) if run.epochs else MISSING,
        _heading(score): mean_and_spread([value] if math.isfinite(value) else [], score),
        "Training loss": significant(run.final("train_loss")),
        "ms per step": significant(run.final("ms_per_step")),
    }
