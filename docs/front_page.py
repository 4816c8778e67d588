"""The generated parts of the README: what the demo shows, what installing takes, why, the rules, the papers."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmark_pages import setting
from index_page import Standing, share
from paper_pages import folders
from rule_pages import belongs, rule_classes, short_names
from tables import Row, load, number, present, spread, table, toml

from apical.bench.papers import papers

LINKS = {"": "https://arxiv.org/abs/", "doi ": "https://doi.org/"}


def front_page(root: Path, measured: Mapping[str, Row], records: Sequence[Row], known: Iterable[Standing]) -> dict[str, str]:
    """The generated blocks of the README.

    Args:
        root: of the repository.
        measured: the files in benchmarks/, by name.
        records: what `apical reproduce` kept.
        known: what each page of results is.
    """
    return {
        "demo": demo_block(root),
        "install": install(measured.get("install") or {}),
        "why": "\n".join(f"- {each}" for each in why(measured)),
        "rules": by_family(toml("families"), records),
        "papers": reproduced(root, known),
    }


def demo_block(root: Path, page: str = "docs/results/demo.md") -> str:
    """The caption, of the comparison in results/demo, with a link to its page."""
    summary, plan = (load(root / "results" / "demo" / f"{name}.json") for name in ("summary", "compare"))
    return demo(summary, plan, page) if summary and plan else "The demo is not kept here."


def demo(summary: Sequence[Row], plan: Row, page: str = "docs/results/demo.md") -> str:
    """The caption of the demo's figure."""
    recipe = plan["recipe"]
    seeds, epochs = len({row["seed"] for row in summary}), recipe["epochs"]
    final = [f"`{rule}` {_accuracy(summary, rule)}" for rule in dict.fromkeys(row["rule"] for row in summary)]
    return (
        f"`make demo`: {len(final)} rules on handwritten digits, {recipe['model']}, {epochs} epochs, n = {seeds} seeds; "
        f"bands: one standard deviation. Test accuracy at the end, %: {', '.join(final)} ([data]({page}))."
    )


def _accuracy(summary: Sequence[Row], rule: str) -> str:
    return spread([100 * value for value in present((row for row in summary if row["rule"] == rule), "test_accuracy")], 1)


def install(measured: Row) -> str:
    """What installing took, by build of PyTorch."""
    lines = [
        f"{row['megabytes'] / 1000:.1f} GB in {row['seconds'] / 60:.1f} minutes with PyTorch's {row['build']} build"
        for row in measured.get("rows") or []
    ]
    where = f"in a fresh environment, on {measured['rows'][0]['cores']} cores that other work shared" if lines else ""
    return f"Measured {where}: {'; '.join(lines)} (`python benchmarks/install.py`)." if lines else "Not measured."


def why(measured: Mapping[str, Row]) -> list[str]:
    """What is worth knowing first, each with its measurement."""
    zoo, steps = measured["zoo"]["rows"], measured["results"]["rows"]
    trained, faults = sum(row["trained"] for row in zoo), sum(bool(row["fault"]) for row in zoo)
    edge = [row for row in steps if row["rule"] in ("fa", "kp", "pfa", "pfa-o")]
    ns = [row["rounds"] for row in edge]
    rounds = " to ".join(map(str, sorted({min(ns), max(ns)})))
    by_model = "; ".join(
        f"{min(ratios):.2f} to {max(ratios):.2f} on {where}"
        for where in dict.fromkeys(setting(row) for row in edge)
        if (ratios := present((row for row in edge if setting(row) == where), "ratio_to_bp"))
    )
    control = next(row for row in measured["control"]["rows"] if row["rule"] == "dfc")
    fastest = max(measured["evolution"]["rows"], key=lambda row: row["speed_up"])
    return [
        f"**Right or refused.** Of {len(zoo)} pairs of {len({row['model'] for row in zoo})} common models and "
        f"{len({row['rule'] for row in zoo})} rules, {trained} train with every check by intervention passed, "
        f"{len(zoo) - trained - faults} are refused with the remedy, {faults} get something else ([which](docs/zoo.md)).",
        f"**Cheap.** A step under `fa`, `kp`, `pfa` or `pfa-o` takes, relative to backpropagation, {by_model} (median of "
        f"{rounds} rounds, one CPU thread; [all rules](docs/benchmarks.md)).",
        f"**Solved, not simulated.** A step of `dfc` takes {number(control['ratio_to_bp'], 1)} times backpropagation's; the "
        f"authors' simulation {number(control['ratio_of_authors'], 0)} times its own, timed by us on another machine "
        f"({setting(control)}, n = {control['rounds']} rounds; [table](docs/benchmarks.md)).",
        f"**Populations.** {fastest['chunk']} learners at once train {number(fastest['speed_up'], 1)} times as fast as one "
        "after another, on one thread, for [`apical evolve`](docs/evolution.md) ([setting](docs/benchmarks.md)).",
    ]


Families = Mapping[str, Mapping[str, Sequence[str]]]
"""Rules by family, each with its references and what it needs."""


def by_family(families: Families, records: Sequence[Row]) -> str:
    """One line per family: its rules, and how many verdicts on them are reproduced."""
    pages = {kind.__name__: (page, short_names(kind)) for page, kind in rule_classes().items()}
    rows = []
    for family, members in families.items():
        links = [
            f"[`{name}`](docs/rules/{pages[name][0]}.md) {' '.join(map('`{}`'.format, pages[name][1]))}" for name in members
        ]
        short = [each for name in members for each in pages[name][1]]
        verdicts = [row["verdict"] for record in records for row in record["rows"] if belongs(row["rule"] or "", short)]
        rows.append([family, "; ".join(links), share(verdicts)])
    return table(("family", "rules, and their names on the command line", "reproduced"), rows, numeric_from=2)


def rules(families: Families, records: Sequence[Row]) -> str:
    """The rules by family, what each needs, and how many verdicts on it are reproduced; for a page in docs/."""
    pages = {kind.__name__: page for page, kind in rule_classes().items()}
    kinds = {kind.__name__: kind for kind in rule_classes().values()}
    rows = []
    for family, members in families.items():
        for name, (references, needs) in members.items():
            short = short_names(kinds[name])
            verdicts = [row["verdict"] for record in records for row in record["rows"] if belongs(row["rule"] or "", short)]
            names = " ".join(f"`{each}`" for each in short)
            link = f"[`{name}`](rules/{pages[name]}.md)"
            rows.append([family, link, names, linked(references), needs, share(verdicts)])
            family = ""
    header = ("family", "rule", "on the command line", "papers", "what it needs", "reproduced")
    return table(header, rows, numeric_from=5)


def linked(references: str) -> str:
    """References with arXiv numbers and DOIs as links."""
    return ", ".join(
        f"[{each}]({LINKS['doi ' if each.startswith('doi') else '']}{each.removeprefix('doi ')})" if "." in each else each
        for each in references.split(", ")
    )


def reproduced(root: Path, known: Iterable[Standing]) -> str:
    """One line per paper: its tables, and the verdicts of those that were run; of a table run twice, of both."""
    rows, waiting, standings = [], [], [*known]
    for name, folder in folders(root).items():
        paper, kept = papers()[name], [each for each in standings if each.target.startswith(f"{name}/")]
        verdicts = [verdict for each in kept for verdict in each.verdicts]
        undecided = len([each for each in verdicts if each not in ("reproduced", "not reproduced")])
        run = f"{len({each.target for each in kept})} of {len(paper.tables)}"
        link = f"[{paper.title}]({(folder / 'README.md').relative_to(root).as_posix()})"
        if kept:
            rows.append([link, f"`{name}`", run, share(verdicts), str(undecided)])
        else:
            waiting.append(f"{link} `{name}`")
    text = table(("paper", "name", "tables run", "reproduced", "undecided"), rows, numeric_from=2)
    return f"{text}\n\nNot run yet: {'; '.join(waiting)}." if waiting else text
