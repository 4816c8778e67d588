"""The report of a comparison as one HTML page."""

import math
import statistics
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from apical.bench.document import MISSING, document, figure_block, reproduce, significant, table
from apical.bench.figures.curves import Drawing
from apical.bench.report.records import ACCURACY, NATS, Comparison, Run, Score
from apical.bench.report.verdicts import Verdict, tally

if TYPE_CHECKING:
    from apical.bench.report.folder import RuleSummary


def render(
    comparison: Comparison,
    rows: Sequence["RuleSummary"],
    drawings: Sequence[Drawing],
    *,
    title: str,
    summary: str,
    config: Sequence[tuple[str, str]],
    environment: Sequence[tuple[str, str]],
    verdicts: Sequence[Verdict] = (),
    sure: str = "",
    placement: str = "",
    measures: str = "",
) -> str:
    """The page as text; every name and value taken from the runs is escaped."""
    figures = "\n".join(map(figure_block, drawings)) or "<p>No epoch has been recorded yet, so there is nothing to draw.</p>"
    body = f"""{_problems(comparison.runs)}
<h2>Rules</h2>
{_rules_table(rows, comparison.score)}
{sure}
{_verdicts(verdicts)}
<h2>Figures</h2>
<div class="figures">
{figures}
</div>
{measures}
{reproduce(comparison.command, config, environment)}
{placement}
<h2>Every run</h2>
{_runs_table(comparison.runs, comparison.score)}
<p class="note">The figures also lie beside this page, as PNG (200 dpi) and SVG, in the folder figures.</p>"""
    return document(title, summary, body)


def mean_and_spread(values: Sequence[float], score: Score = ACCURACY) -> str:
    """Mean ± standard deviation over seeds, of an accuracy with two decimals; the value alone if there is one.

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


def _rules_table(rows: Sequence["RuleSummary"], score: Score) -> str:
    seeds = max((row.finished for row in rows), default=0)
    first = _heading(score) + (" <small>mean ± s.d.</small>" if seeds > 1 else "")
    step = "ms per step <small>median (range)</small>" if seeds > 1 else "ms per step"
    relative = "Time relative to bp <small>median (range)</small>" if seeds > 1 else "Time relative to bp"
    with_memory = any(row.memory for row in rows)
    memory = ("Peak memory,&nbsp;MB",) if with_memory else ()
    heads = (
        first,
        *(_OTHER_UNITS if score == NATS else ()),
        "Seeds",
        "Training loss",
        step,
        relative,
        *memory,
        "Parameters",
    )
    head = "<th>Rule</th>" + "".join(f'<th class="n">{text}</th>' for text in heads)
    body = "\n".join(_rule_row(row, with_memory, score) for row in rows)
    note = (
        f"Only runs that finished are counted. {'The test loss' if score.is_loss else 'Accuracy'} is that after the last "
        "epoch, not the best one; ± is the standard deviation over seeds. Time is wall-clock time per training step, with "
        "whatever else the machine was doing."
    )
    return (
        f'<table class="rules">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>'
        f'\n<p class="note">{note}</p>'
    )


def _rule_row(row: "RuleSummary", with_memory: bool, score: Score) -> str:
    seeds = str(row.finished) if row.finished == row.planned else f"{row.finished} of {row.planned}"
    swatch = f'<span class="swatch" style="background:{escape(row.colour)}"></span>'
    short = f" <small>{escape(row.rule)}</small>" if row.rule != row.name else ""
    memory = significant(statistics.median(row.memory)) if row.memory else MISSING
    cells = (
        (_heading(score), mean_and_spread(row.scores(score), score)),
        *(zip(_OTHER_UNITS, map(_mean, (row.bits, row.perplexity)), strict=True) if score == NATS else ()),
        ("Seeds", seeds),
        ("Training loss", significant(statistics.mean(row.train_loss)) if row.train_loss else MISSING),
        ("ms per step", _median_and_range(row.milliseconds)),
        ("Time relative to bp", _ratio(row)),
        *([("Peak memory,&nbsp;MB", memory)] if with_memory else []),
        ("Parameters", f"{row.parameters:,}" if row.parameters is not None else MISSING),
    )
    return f"<tr><td>{swatch}{escape(row.name)}{short}</td>{''.join(_cell(*cell) for cell in cells)}</tr>"


_OTHER_UNITS = ("Bits per token", "Perplexity")


def _mean(values: Sequence[float]) -> str:
    return significant(statistics.mean(values)) if values else MISSING


def _verdicts(verdicts: Sequence[Verdict]) -> str:
    """Reference against measured numbers; nothing if there are none."""
    if not verdicts:
        return ""
    lines = []
    for row in verdicts:
        values = (
            row.rule,
            row.what,
            f"{row.epoch}",
            f"{row.published:g} ± {row.tolerance:g}" if row.tolerance is not None else f"at least {row.published:g}",
            row.tag,
            "—" if row.measured is None else row.shown(row.measured) + _spread(row),
            f"{row.n}",
            row.verdict,
        )
        lines.append(values)
    heads = ("Rule", "Quantity", "Epoch", "Reference ± tolerance", "Source", "Here, mean ± s.d.", "n", "Verdict")
    return (
        f"<h2>Against reference numbers</h2><p>{escape(tally(verdicts))} Reproduced means that the mean over seeds lies "
        "within the tolerance.</p>"
        f"<details><summary>Every number</summary>{table(heads, lines, 'runs')}</details>"
    )


def _spread(row: Verdict) -> str:
    return "" if row.spread is None else f" ± {row.shown(row.spread)}"


def _cell(label: str, value: str) -> str:
    return f'<td class="n" data-label="{label}"><span>{value}</span></td>'


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


def _problems(runs: Sequence[Run]) -> str:
    failed = [run for run in runs if not run.finished]
    if not failed:
        return ""
    items = "".join(f"<li>{escape(run.rule)}, seed {run.seed}: {escape(run.status)}</li>" for run in failed)
    return f'<div class="problems"><p><strong>Runs without a final result</strong></p><ul>{items}</ul></div>'


def _runs_table(runs: Sequence[Run], score: Score) -> str:
    head = "<th>Rule</th><th>State</th>" + "".join(
        f'<th class="n">{text}</th>' for text in ("Seed", "Epoch", _heading(score), "Training loss", "ms per step")
    )
    body = "\n".join(_run_row(run, score) for run in runs)
    return (
        f"<details><summary>{len(runs)} {'run' if len(runs) == 1 else 'runs'}</summary>"
        f'<table class="rules"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></details>'
    )


def _run_row(run: Run, score: Score) -> str:
    value = score.scale * run.final(score.key)
    cells = (
        ("Seed", str(run.seed)),
        ("Epoch", str(run.epochs[-1]) if run.epochs else MISSING),
        (_heading(score), mean_and_spread([value] if math.isfinite(value) else [], score)),
        ("Training loss", significant(run.final("train_loss"))),
        ("ms per step", significant(run.final("ms_per_step"))),
    )
    state = f'<td data-label="State"><span>{escape(run.status)}</span></td>'
    return f"<tr><td>{escape(run.rule)}</td>{state}{''.join(_cell(*cell) for cell in cells)}</tr>"
