"""The toy study as one HTML page: verdicts, figures inside the file, the command. No script and no network."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from apical.bench.document import MISSING, document, figure_block, pairs, reproduce, table
from apical.bench.figures.curves import Drawing
from apical_papers.dfc.toy.verdicts import SOURCES, tally


def page(results: Mapping[str, Any], drawings: Sequence[Drawing]) -> str:
    """Return the page as text, from the content of results.json; every name and value is escaped."""
    sources = "".join(f"<li>{escape(name)}: {escape(meaning)}</li>" for name, meaning in SOURCES.items())
    failures = "".join(f"<li>{escape(text)}</li>" for text in results["failures"])
    failed = f'<div class="problems"><p><strong>Runs that failed</strong></p><ul>{failures}</ul></div>' if failures else ""
    body = f"""{failed}
<h2>Verdicts</h2>
<p>{escape(tally(results["verdicts"]))}</p>
<ul class="note">{sources}</ul>
{_verdicts(results["verdicts"])}
<h3>Against the axes of the authors' plots</h3>
{_axes(results["axes"])}
<h2>Figures</h2>
{"".join(map(figure_block, drawings))}
{reproduce(results["command"], pairs(results["settings"]), pairs(results["environment"]))}
<p class="note">The figures are also next to this page, as PNG (200 dpi) and SVG; results.json has every curve.</p>"""
    return document(results["title"], results["about"], body, full=True)


def shown(value: float | None, std: float | None = None) -> str:
    """Format a measured number with four significant digits, and its spread with two.

    >>> shown(0.97331, 0.0123), shown(None)
    ('0.9733 ± 0.012', '–')
    """
    if value is None:
        return MISSING
    return f"{value:.4g}" + ("" if std is None else f" ± {std:.2g}")


def _verdicts(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = ("Figure", "Rule", "Quantity", "Mark", "Here, mean ± s.d.", "n", "Source", "Verdict")
    lines = []
    for row in rows:
        measured = shown(row["mean"], row["std"])
        cells = (row["figure"], row["rule"] or MISSING, row["what"], row["mark"], measured, str(row["n"]), row["source"])
        lines.append([*cells, row["verdict"]])
    return table(heads, lines)


def _axes(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        extent = MISSING if row["range"] is None else " to ".join(shown(value) for value in row["range"])
        inside = {True: "inside", False: "outside", None: "not run"}[row["inside"]]
        limits = " to ".join(f"{limit:g}" for limit in row["limits"])
        lines.append([row["measure"].replace("_", " "), limits, extent, inside])
    return table(("Measure", "Axis", "Mean curves here", "Verdict"), lines)
