"""The report as one HTML page: no script, no network, figures inside the file, readable on a phone and on paper."""

import base64
import math
import statistics
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from apical.bench.figures.curves import Drawing
from apical.bench.report.records import ACCURACY, Comparison, Run, Score
from apical.bench.report.verdicts import Verdict, tally

if TYPE_CHECKING:
    from apical.bench.report.folder import RuleSummary

_MISSING = "\u2013"
STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 66rem; background: #fff; color: #1b1b1b;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; }
p, li { max-width: 44rem; }
.lead { font-size: 1.06rem; }
.note { color: #555; font-size: .875rem; }
.problems { border-left: 3px solid #d55e00; padding: .1rem 0 .1rem 1rem; margin: 1.25rem 0; }
.problems p { margin: .4rem 0; }
.problems ul { margin: .4rem 0; padding-left: 1.1rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; vertical-align: bottom; }
th, td { padding: .45rem .8rem .45rem 0; border-bottom: 1px solid #e4e4e4; }
thead th.n { white-space: normal; }
thead th { border-bottom: 1.5px solid #1b1b1b; line-height: 1.25; }
th.n, td.n { text-align: right; white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
.rules td:first-child { min-width: 11.5rem; }
.placement td { overflow-wrap: anywhere; }
th small, td small { color: #555; font-weight: 400; font-size: .82em; }
th small, td small { display: block; line-height: 1.3; }
.swatch { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; margin-right: .5rem; }
.figures { columns: 2 27rem; column-gap: 2.5rem; }
figure { margin: 0 0 2.25rem; break-inside: avoid; }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
figure h3 { margin-top: 0; }
figure img { display: block; width: 100%; max-width: 31rem; height: auto; }
figcaption { color: #555; font-size: .85rem; line-height: 1.45; margin-top: .4rem; max-width: 31rem; }
pre { background: #f5f5f5; padding: .8rem 1rem; border-radius: 4px; font-size: .85rem; line-height: 1.5;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.facts th { width: 13rem; font-weight: 400; color: #555; vertical-align: top; }
.facts td { overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 0 2.5rem; }
summary { cursor: pointer; margin: 1rem 0 .5rem; }
@media (max-width: 46rem) {
  body { padding-top: 1.25rem; }
  .rules thead { position: absolute; left: -9999px; }
  .rules tr { display: block; padding: .6rem 0; border-bottom: 1px solid #cfcfcf; }
  .rules td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem 0;
    text-align: right; }
  .rules td:first-child { display: block; text-align: left; font-weight: 600; margin-bottom: .2rem; }
  .rules td::before { content: attr(data-label); color: #555; text-align: left; }
  .rules td:first-child::before { content: none; }
  .rules td small { display: inline; font-weight: 400; }
  .facts th { width: 9rem; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  figure, tr, pre { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .figures { columns: 2; column-gap: 1.5rem; }
}
"""


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
) -> str:
    """The page as text; every name and value taken from the runs is escaped."""
    figures = "\n".join(map(figure_block, drawings)) or "<p>No epoch has been recorded yet, so there is nothing to draw.</p>"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="lead">{escape(summary)}</p>
{_problems(comparison.runs)}
<h2>Rules</h2>
{_rules_table(rows, comparison.score)}
{sure}
{_verdicts(verdicts)}
<h2>Figures</h2>
<div class="figures">
{figures}
</div>
<h2>Reproduce this</h2>
{command_block(comparison.command)}
<div class="pair">
<div><h3>Settings</h3>{facts(config)}</div>
<div><h3>Versions and machine</h3>{facts(environment)}</div>
</div>
{placement}
<h2>Every run</h2>
{_runs_table(comparison.runs, comparison.score)}
<p class="note">The figures also lie beside this page, as PNG (200 dpi) and SVG, in the folder figures.</p>
</body>
</html>
"""


def mean_and_spread(values: Sequence[float], score: Score = ACCURACY) -> str:
    """Mean ± standard deviation over seeds, of an accuracy with two decimals; the value alone if there is one.

    >>> mean_and_spread([97.0, 98.0])
    '97.50 ± 0.71'
    """
    if not values:
        return _MISSING
    form = significant if score.is_loss else "{:.2f}".format
    mean = form(statistics.mean(values))
    return f"{mean} ± {form(statistics.stdev(values))}" if len(values) > 1 else mean


def significant(value: float) -> str:
    """Three significant digits without an exponent where that stays short; a dash for NaN.

    >>> significant(52.471), significant(1234.5), significant(0.01234)
    ('52.5', '1,234', '0.0123')
    """
    if not math.isfinite(value):
        return _MISSING
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if value != 0 and abs(value) < 1e-4:
        return f"{value:.1e}"
    decimals = 2 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def _heading(score: Score) -> str:
    return "Test loss" if score.is_loss else "Test accuracy,&nbsp;%"


def _rules_table(rows: Sequence["RuleSummary"], score: Score) -> str:
    seeds = max((row.finished for row in rows), default=0)
    first = _heading(score) + (" <small>mean ± s.d.</small>" if seeds > 1 else "")
    step = "ms per step <small>median (range)</small>" if seeds > 1 else "ms per step"
    relative = "Time relative to bp <small>median (range)</small>" if seeds > 1 else "Time relative to bp"
    with_memory = any(row.memory for row in rows)
    memory = ("Peak memory,&nbsp;MB",) if with_memory else ()
    heads = (first, "Seeds", "Training loss", step, relative, *memory, "Parameters")
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
    memory = significant(statistics.median(row.memory)) if row.memory else _MISSING
    cells = (
        (_heading(score), mean_and_spread(row.scores(score), score)),
        ("Seeds", seeds),
        ("Training loss", significant(statistics.mean(row.train_loss)) if row.train_loss else _MISSING),
        ("ms per step", _median_and_range(row.milliseconds)),
        ("Time relative to bp", _ratio(row)),
        *([("Peak memory,&nbsp;MB", memory)] if with_memory else []),
        ("Parameters", f"{row.parameters:,}" if row.parameters is not None else _MISSING),
    )
    return f"<tr><td>{swatch}{escape(row.name)}{short}</td>{''.join(_cell(*cell) for cell in cells)}</tr>"


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
        lines.append(f"<tr>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>")
    heads = ("Rule", "Quantity", "Epoch", "Reference ± tolerance", "Source", "Here, mean ± s.d.", "n", "Verdict")
    return (
        f"<h2>Against reference numbers</h2><p>{escape(tally(verdicts))} Reproduced means that the mean over seeds lies "
        "within the tolerance.</p>"
        f'<details><summary>Every number</summary><table class="runs"><thead><tr>'
        f"{''.join(f'<th>{head}</th>' for head in heads)}</tr></thead><tbody>{''.join(lines)}</tbody></table></details>"
    )


def _spread(row: Verdict) -> str:
    return "" if row.spread is None else f" ± {row.shown(row.spread)}"


def _cell(label: str, value: str) -> str:
    return f'<td class="n" data-label="{label}"><span>{value}</span></td>'


def _median_and_range(values: Sequence[float]) -> str:
    if len(values) < 2:
        return significant(values[0]) if values else _MISSING
    low, high = significant(min(values)), significant(max(values))
    middle = significant(statistics.median(values))
    return middle if low == high else f"{middle} <small>({low} to {high})</small>"


def _ratio(row: "RuleSummary") -> str:
    if not row.ratio:
        return _MISSING
    middle = f"{statistics.median(row.ratio):.2f}\u00d7"
    spread = f"{min(row.ratio):.2f} to {max(row.ratio):.2f}"
    return middle if len(row.ratio) < 2 or row.rule == "bp" else f"{middle} <small>({spread})</small>"


def _problems(runs: Sequence[Run]) -> str:
    failed = [run for run in runs if not run.finished]
    if not failed:
        return ""
    items = "".join(f"<li>{escape(run.rule)}, seed {run.seed}: {escape(run.status)}</li>" for run in failed)
    return f'<div class="problems"><p><strong>Runs without a final result</strong></p><ul>{items}</ul></div>'


def figure_block(drawing: Drawing) -> str:
    """A figure with its title and caption, embedded."""
    data = base64.b64encode(drawing.svg).decode("ascii")
    source = f'<img alt="{escape(drawing.title)}" src="data:image/svg+xml;base64,{data}">'
    return (
        f'<figure id="{drawing.stem}"><h3>{escape(drawing.title)}</h3>{source}'
        f"<figcaption>{escape(drawing.caption)}</figcaption></figure>"
    )


def command_block(command: str) -> str:
    """The command that made a page."""
    return f"<pre><code>{escape(command)}</code></pre>" if command else "<p>The command was not recorded.</p>"


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """A table of names and values, escaped."""
    if not rows:
        return "<p>Not recorded.</p>"
    body = "".join(f"<tr><th>{escape(key.replace('_', ' '))}</th><td>{escape(value)}</td></tr>" for key, value in rows)
    return f'<table class="facts"><tbody>{body}</tbody></table>'


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
        ("Epoch", str(run.epochs[-1]) if run.epochs else _MISSING),
        (_heading(score), mean_and_spread([value] if math.isfinite(value) else [], score)),
        ("Training loss", significant(run.final("train_loss"))),
        ("ms per step", significant(run.final("ms_per_step"))),
    )
    state = f'<td data-label="State"><span>{escape(run.status)}</span></td>'
    return f"<tr><td>{escape(run.rule)}</td>{state}{''.join(_cell(*cell) for cell in cells)}</tr>"
