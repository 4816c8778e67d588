"""The page of what `apical reproduce` found: tables of papers, paper beside ours, with verdicts."""

from collections.abc import Sequence

from result_pages import NOTE, joined, judged
from tables import Row, console, table, tabulate, text, toml

from apical.cli.reproduce import measured

VERDICTS = ("reproduced", "not reproduced", "budget too small to tell", "not run")
*_, SOURCES = toml("sources").values()
COLUMNS = {"verdict": text("verdict"), "what": text("what"), "rule": lambda row: f"`{row['rule']}`" if row["rule"] else "-"}
COLUMNS |= {
    "reference": text("reference"),
    "ours": lambda row: measured(dict(row)),
    "n": text("n"),
    "source": text("source"),
}


def reproduction_page(records: Sequence[Row]) -> str:
    """The page, from the records that the command wrote."""
    parts = [
        NOTE,
        "# Reproduced on demand",
        "Results of `apical reproduce PAPER/TABLE`; {doc}`../how-results-are-made` explains how verdicts are computed. Ours "
        "is the mean over n seeds (or draws, or evolutions) with its 95 % interval; with few seeds a bootstrap interval is "
        "too narrow. Times are for two virtual CPU cores shared with other work, so they are upper bounds.",
        table(("table", "budget", "minutes", *VERDICTS), [_line(record) for record in records], numeric_from=2),
    ]
    return joined([*parts, *(part for record in records for part in _section(record))])


def _line(record: Row) -> list[str]:
    verdicts = [row["verdict"] for row in record["rows"]]
    minutes = f"{record['seconds'] / 60:.1f}" + (" (resumed)" if record["resumed"] else "")
    counts = [str(verdicts.count(each) or "-") for each in VERDICTS]
    return [f"[{record['target']}](#{_anchor(record)})", record["budget"], minutes, *counts]


def _anchor(record: Row) -> str:
    return f"{record['target'].replace('/', '-')}-{record['budget']}"


def _section(record: Row) -> list[str]:
    sizes = ", ".join(
        f"{key.replace('_', ' ')} {value:,}" if isinstance(value, int) else f"{key} {value}"
        for key, value in record["sizes"].items()
    )
    used = [f"`{tag}` {SOURCES.get(tag, tag)}" for tag in dict.fromkeys(row["source"] for row in record["rows"])]
    return [
        f"({_anchor(record)})=\n## {record['target']}, budget {record['budget']}",
        f"{record['title']}. Sizes: {sizes}. Commit `{str(record['environment'].get('commit'))[:10]}`.",
        f"Sources: {'; '.join(used)}." if used else "",
        judged(tabulate(record["rows"], COLUMNS, numeric_from=99), "ours") if record["rows"] else "It has no marks.",
        console(record["command"]),
    ]
