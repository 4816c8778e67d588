"""One HTML page: no script, no network, figures inside the file, readable on a phone and on paper."""

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from apical.bench.figures.curves import Drawing

MISSING = "\u2013"
"""The dash shown for a missing value."""

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 66rem; background: #fff; color: #1b1b1b;
  overflow-wrap: break-word;
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
.rules td:first-child { min-width: 11.5rem; overflow-wrap: anywhere; }
.placement td { overflow-wrap: anywhere; }
th small, td small { color: #555; font-weight: 400; font-size: .82em; }
th small, td small { display: block; line-height: 1.3; }
.swatch { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; margin-right: .5rem; }
.figures { columns: 2 27rem; column-gap: 2.5rem; }
figure { margin: 0 0 2.25rem; break-inside: avoid; }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
figure h3 { margin-top: 0; }
figure img { display: block; width: 100%; max-width: 31rem; height: auto; }
.full figure img { max-width: 100%; }
figcaption { color: #555; font-size: .85rem; line-height: 1.45; margin-top: .4rem; max-width: 31rem; }
pre { background: #f5f5f5; padding: .8rem 1rem; border-radius: 4px; font-size: .85rem; line-height: 1.5;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
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
  .wide { overflow-x: auto; }
.facts th { width: 9rem; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  figure, tr, pre { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .figures { columns: 2; column-gap: 1.5rem; }
}
"""


def document(title: str, lead: str, body: str, *, full: bool = False) -> str:
    """Return the page as text.

    Args:
        lead: the first paragraph; it is escaped.
        full: figures are as wide as the page.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body{' class="full"' if full else ""}>
<h1>{escape(title)}</h1>
<p class="lead">{escape(lead)}</p>
{body}
</body>
</html>
"""


def reproduce(command: str, settings: Sequence[tuple[str, str]], environment: Sequence[tuple[str, str]]) -> str:
    """Return the section with the command that made a page, its settings, versions and machine."""
    return f"""<h2>Reproduce this</h2>
{command_block(command)}
<div class="pair">
<div><h3>Settings</h3>{facts(settings)}</div>
<div><h3>Versions and machine</h3>{facts(environment)}</div>
</div>"""


def figure_block(drawing: Drawing) -> str:
    """Return a figure with its title and caption, embedded."""
    data = base64.b64encode(drawing.svg).decode("ascii")
    source = f'<img alt="{escape(drawing.title)}" src="data:image/svg+xml;base64,{data}">'
    return (
        f'<figure id="{drawing.stem}"><h3>{escape(drawing.title)}</h3>{source}'
        f"<figcaption>{escape(drawing.caption)}</figcaption></figure>"
    )


def command_block(command: str) -> str:
    """Return the command that made a page."""
    return f"<pre><code>{escape(command)}</code></pre>" if command else "<p>The command was not recorded.</p>"


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Return a table of names and values, escaped."""
    if not rows:
        return "<p>Not recorded.</p>"
    body = "".join(f"<tr><th>{escape(key.replace('_', ' '))}</th><td>{escape(value)}</td></tr>" for key, value in rows)
    return f'<table class="facts"><tbody>{body}</tbody></table>'


def table(heads: Sequence[str], lines: Iterable[Sequence[str]], kind: str = "") -> str:
    """Return an HTML table; wide ones scroll unless a class is given; every cell is escaped."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    text = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<table class="{kind}">{text}' if kind else f'<div class="wide"><table>{text}</div>'


def pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return names and values in the form that :func:`facts` takes."""
    return [(key, _plain(value)) for key, value in values.items() if value is not None]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def significant(value: float) -> str:
    """Format with three significant digits, without an exponent if that stays short; a dash for NaN.

    >>> significant(52.471), significant(1234.5), significant(0.01234)
    ('52.5', '1,234', '0.0123')
    """
    if not math.isfinite(value):
        return MISSING
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if value != 0 and abs(value) < 1e-4:
        return f"{value:.1e}"
    decimals = 2 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"
