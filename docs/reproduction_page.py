"""The page of what `apical reproduce` found: tables of papers, paper beside ours, with verdicts."""

from collections.abc import Sequence
from pathlib import Path

from result_pages import NOTE, joined
from tables import Row, console, load, table

from apical.cli.reproduce import measured

VERDICTS = ("reproduced", "not reproduced", "budget too small to tell", "not run")
SOURCES = {
    "paper": "printed in the paper",
    "fig": "read off the published curves",
    "code": "named in the authors' repository, single runs",
    "ours": "measured with a prototype of ours, not published",
    "order": "an order of two rules",
    "theory": "follows from the paper's theory",
    "statement": "a statement of the paper",
    "our mark": "a threshold of our choice",
}


def reproduction_page(paths: Sequence[Path]) -> str:
    """The page, from the records that the command wrote."""
    records = [load(path) for path in paths]
    parts = [
        NOTE,
        "# Reproduced on demand",
        "What `apical reproduce PAPER/TABLE` found; {doc}`../how-results-are-made` says how verdicts are computed. Ours is "
        "the mean over n seeds (or draws, or evolutions) with its 95 % interval; with few seeds a bootstrap interval is too "
        "narrow. Times are of two virtual CPU cores that other work shared, so they are upper bounds.",
        table(("table", "budget", "minutes", *VERDICTS), [_line(record) for record in records], numeric_from=2),
    ]
    for record in records:
        parts += _section(record)
    return joined(parts)


def _line(record: Row) -> list[str]:
    told = [row["verdict"] for row in record["rows"]]
    counts = [str(told.count(each)) if each in told else "-" for each in VERDICTS]
    minutes = f"{record['seconds'] / 60:.1f}" + (" (resumed)" if record["resumed"] else "")
    return [f"[{record['target']}](#{_anchor(record)})", record["budget"], minutes, *counts]


def _anchor(record: Row) -> str:
    return f"{record['target'].replace('/', '-')}-{record['budget']}"


def _section(record: Row) -> list[str]:
    sizes = ", ".join(
        f"{key.replace('_', ' ')} {value:,}" if isinstance(value, int) else f"{key} {value}"
        for key, value in record["sizes"].items()
    )
    used = [f"`{tag}` {SOURCES.get(tag, tag)}" for tag in dict.fromkeys(row["source"] for row in record["rows"])]
    rows = [
        [
            f"`{row['rule']}`",
            row["what"],
            row["reference"],
            row["source"],
            measured(row),
            str(row["n"] or "-"),
            row["verdict"],
        ]
        for row in record["rows"]
    ]
    return [
        f"({_anchor(record)})=\n## {record['target']}, budget {record['budget']}",
        f"{record['title']}. Sizes: {sizes}. Commit `{str(record['environment'].get('commit'))[:10]}`.",
        console(record["command"]),
        f"Sources: {'; '.join(used)}." if used else "",
        table(("rule", "what", "reference", "source", "ours", "n", "verdict"), rows, numeric_from=99),
    ]
