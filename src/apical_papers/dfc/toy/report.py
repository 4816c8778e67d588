"""The toy study as one HTML page: verdicts, figures inside the file, the command. No script and no network."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from apical.bench.figures.curves import Drawing
from apical.bench.page import pairs, table
from apical.bench.report.html import STYLE, command_block, facts, figure_block
from apical_papers.dfc.toy.verdicts import SOURCES, tally

_MISSING = "\u2013"


def page(results: Mapping[str, Any], drawings: Sequence[Drawing]) -> str:
    """The page as text, from what results.json says; every name and value is escaped."""
    title = escape(results["title"])
    sources = "".join(f"<li>{escape(name)}: {escape(meaning)}</li>" for name, meaning in SOURCES.items())
    failures = "".join(f"<li>{escape(text)}</li>" for text in results["failures"])
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}
figure img {{ max-width: 100%; }}
.wide {{ overflow-x: auto; }}</style>
</head>
<body>
<h1>{title}</h1>
<p class="lead">{escape(results["about"])}</p>
{f'<div class="problems"><p><strong>Runs that failed</strong></p><ul>{failures}</ul></div>' if failures else ""}
<h2>Verdicts</h2>
<p>{escape(tally(results["verdicts"]))}</p>
<ul class="note">{sources}</ul>
{_verdicts(results["verdicts"])}
<h3>Against the axes of the authors' plots</h3>
{_axes(results["axes"])}
<h2>Figures</h2>
{"".join(map(figure_block, drawings))}
<h2>Reproduce this</h2>
{command_block(results["command"])}
<div class="pair">
<div><h3>Settings</h3>{facts(pairs(results["settings"]))}</div>
<div><h3>Versions and machine</h3>{facts(pairs(results["environment"]))}</div>
</div>
<p class="note">The figures also lie beside this page, as PNG (200 dpi) and SVG; results.json has every curve.</p>
</body>
</html>
"""


def shown(value: float | None, std: float | None = None) -> str:
    """A measured number with four significant digits, and its spread with two.

    >>> shown(0.97331, 0.0123), shown(None)
    ('0.9733 ± 0.012', '–')
    """
    if value is None:
        return _MISSING
    return f"{value:.4g}" + ("" if std is None else f" ± {std:.2g}")


def _verdicts(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = ("Figure", "Rule", "Quantity", "Mark", "Here, mean ± s.d.", "n", "Source", "Verdict")
    lines = []
    for row in rows:
        measured = shown(row["mean"], row["std"])
        found = (row["figure"], row["rule"] or _MISSING, row["what"], row["mark"], measured, str(row["n"]), row["source"])
        lines.append([*found, row["verdict"]])
    return table(heads, lines)


def _axes(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        found = _MISSING if row["range"] is None else " to ".join(shown(value) for value in row["range"])
        inside = {True: "inside", False: "outside", None: "not run"}[row["inside"]]
        limits = " to ".join(f"{limit:g}" for limit in row["limits"])
        lines.append([row["measure"].replace("_", " "), limits, found, inside])
    return table(("Measure", "Axis", "Mean curves here", "Verdict"), lines)
