"""The output of a study: results.json, figures and one page."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from apical.bench.document import document, figure_block, pairs, reproduce, table
from apical.bench.figures.curves import Drawing


def write(
    out: Path,
    results: Mapping[str, Any],
    drawings: Sequence[Drawing],
    page: Callable[[Mapping[str, Any], Sequence[Drawing]], str] | None = None,
) -> None:
    """Write results.json, each figure as PNG and SVG, and report.html.

    Args:
        results: title, about, sources, verdicts, tables, command, settings, environment.
        page: makes the page; :func:`study_page` by default.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(compact(rounded(results)) + "\n", encoding="utf-8")
    for drawing in drawings:
        drawing.write(out)
    (out / "report.html").write_text((page or study_page)(results, drawings), encoding="utf-8")


def rounded(value: Any) -> Any:
    """Return the value with every float rounded to five significant digits.

    >>> rounded({"a": [1 / 3, 2]})
    {'a': [0.33333, 2]}
    """
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def compact(value: Any) -> str:
    """Return indented JSON with every list of numbers on one line.

    >>> print(compact({"a": [1, 2.5]}))
    {
     "a": [1, 2.5]
    }
    """
    text = json.dumps(value, indent=1, allow_nan=False)
    return re.sub(r"\[\s*([-\d.eE+,\s]*?)\s*\]", lambda match: "[" + ", ".join(re.split(r",\s+", match[1])) + "]", text)


def study_page(results: Mapping[str, Any], drawings: Sequence[Drawing]) -> str:
    """Return the study as one HTML page, without script or network; every name and value is escaped."""
    tables = "".join(
        f"<h2>{escape(part['title'])}</h2><p>{escape(part['note'])}</p>{table(part['header'], part['rows'])}"
        for part in results["tables"]
    )
    body = f"""<h2>Verdicts</h2>
<p class="note">{escape(results["sources"]["our mark"])}</p>
{_verdicts(results["verdicts"])}
<h2>Figures</h2>
{"".join(map(figure_block, drawings))}
{tables}
{reproduce(results["command"], pairs(results["settings"]), pairs(results["environment"]))}
<p class="note">The figures are also next to this page, as PNG (200 dpi) and SVG.</p>"""
    return document(results["title"], results["about"], body, full=True)


def _verdicts(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = ("Verdict", "Quantity", "Here, mean [95 % interval]", "Mark", "Rule", "n", "p, Student", "p, sign-flip")
    lines = []
    for row in rows:
        measured = f"{row['mean']:.4g}"
        if row.get("low") is not None:
            measured += f" [{row['low']:.3g}, {row['high']:.3g}]"
        p = [f"{row[key]:.2g}" if row.get(key) is not None else "-" for key in ("p_student", "p_sign_flip")]
        lines.append([row["verdict"], row["what"], measured, row["mark"], row["rule"], str(row["n"]), *p])
    return table(heads, lines)
