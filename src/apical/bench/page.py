"""What a study writes: results.json, figures and one page. The parts of a page, every name and value escaped."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from apical.bench.figures.curves import Drawing
from apical.bench.report.html import STYLE, command_block, facts, figure_block


def write(
    out: Path,
    results: Mapping[str, Any],
    drawings: Sequence[Drawing],
    page: Callable[[Mapping[str, Any], Sequence[Drawing]], str] | None = None,
) -> None:
    """results.json, each figure as PNG and SVG, and report.html.

    Args:
        out: folder.
        results: title, about, sources, verdicts, tables, command, settings, environment.
        drawings: figures.
        page: makes the page; :func:`study_page` by default.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(compact(rounded(results)) + "\n", encoding="utf-8")
    for drawing in drawings:
        (out / f"{drawing.stem}.png").write_bytes(drawing.png)
        (out / f"{drawing.stem}.svg").write_bytes(drawing.svg)
    (out / "report.html").write_text((page or study_page)(results, drawings), encoding="utf-8")


def rounded(value: Any) -> Any:
    """The same with every float to five significant digits.

    >>> rounded({"a": [1 / 3, 2]})
    {'a': [0.33333, 2]}
    """
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value


def compact(value: Any) -> str:
    """Indented JSON with every list of numbers on one line.

    >>> print(compact({"a": [1, 2.5]}))
    {
     "a": [1, 2.5]
    }
    """
    text = json.dumps(value, indent=1, allow_nan=False)
    return re.sub(r"\[\s*([-\d.eE+,\s]*?)\s*\]", lambda found: "[" + ", ".join(re.split(r",\s+", found[1])) + "]", text)


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """An HTML table, wide ones scroll; every cell is escaped."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def pairs(known: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values as :func:`apical.bench.report.html.facts` takes them."""
    return [(key, _plain(value)) for key, value in known.items() if value is not None]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def study_page(results: Mapping[str, Any], drawings: Sequence[Drawing]) -> str:
    """The study as one HTML page, without script or network; every name and value is escaped."""
    title = escape(results["title"])
    tables = "".join(
        f"<h2>{escape(each['title'])}</h2><p>{escape(each['note'])}</p>{table(each['header'], each['rows'])}"
        for each in results["tables"]
    )
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
<h2>Verdicts</h2>
<p class="note">{escape(results["sources"]["our mark"])}</p>
{_verdicts(results["verdicts"])}
<h2>Figures</h2>
{"".join(map(figure_block, drawings))}
{tables}
<h2>Reproduce this</h2>
{command_block(results["command"])}
<div class="pair">
<div><h3>Settings</h3>{facts(pairs(results["settings"]))}</div>
<div><h3>Versions and machine</h3>{facts(pairs(results["environment"]))}</div>
</div>
<p class="note">The figures also lie beside this page, as PNG (200 dpi) and SVG.</p>
</body>
</html>
"""


def _verdicts(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = ("Rule", "Quantity", "Mark", "Here, mean [95 % interval]", "p, Student", "p, sign flips", "n", "Verdict")
    lines = []
    for row in rows:
        measured = f"{row['mean']:.4g}"
        if row.get("low") is not None:
            measured += f" [{row['low']:.3g}, {row['high']:.3g}]"
        p = [f"{row[key]:.2g}" if row.get(key) is not None else "-" for key in ("p_student", "p_sign_flip")]
        lines.append([row["rule"], row["what"], row["mark"], measured, *p, str(row["n"]), row["verdict"]])
    return table(heads, lines)
