"""The README in the folder of each paper of apical: its tables with cost and verdicts, and its recipes."""

import inspect
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

from reproduction_page import VERDICTS
from result_pages import NOTE, joined
from tables import Row, table

from apical.bench.papers import BUDGETS, GROUP, Budget, Paper, Table
from apical.cli.reproduce import cost

LINKS = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}


def folders(root: Path) -> dict[str, Path]:
    """The folder of each paper of this repository, by the paper's name."""
    modules = {entry.name: entry.module for entry in entry_points(group=GROUP)}
    paths = {name: root / "src" / Path(*module.split(".")[:-1]) for name, module in modules.items()}
    return {name: path for name, path in sorted(paths.items()) if path.exists()}


def paper_page(name: str, paper: Paper, recipes: str, records: Mapping[str, Row]) -> str:
    """The page.

    Args:
        name: of the paper on the command line.
        paper: what it brings.
        recipes: where its settings are from.
        records: what `apical reproduce` kept, by table and budget.
    """
    tables = [_line(f"{name}/{key}", each, records) for key, each in paper.tables.items()]
    studies = [
        [f"`{key}`", each.title, " ".join(f"`{rule}`" for rule in each.rows), each.cost]
        for key, each in paper.studies.items()
    ]
    evolutions = [[f"`{key}`", ", ".join(each.data), ", ".join(each.model)] for key, each in paper.evolutions.items()]
    parts = [
        NOTE,
        f"# {paper.title}",
        "\n".join(f"- {linked(each)}" for each in paper.reference.split("; ")),
        "## Tables",
        "Run a table with `apical reproduce PAPER/TABLE --budget smoke|cpu|paper`; without `--budget` it is `cpu`. Times "
        "are wall-clock times on two shared virtual CPU cores; a dash is a time not measured. The last column counts the "
        "verdicts of the runs that are [kept](../../../docs/results/reproductions.md).",
        table(("command", "what it is", *BUDGETS, "kept verdicts"), tables, numeric_from=99),
        "## Recipes",
        recipes,
    ]
    if studies:
        parts.append("Train one with `apical compare --recipe NAME`.")
        parts.append(table(("recipe", "what it is", "rules", "one run takes"), studies, numeric_from=99))
    if evolutions:
        parts.append("Evolve one with `apical evolve --recipe NAME`.")
        parts.append(table(("recipe", "data", "learners"), evolutions, numeric_from=99))
    return joined(parts)


def _line(target: str, each: Table, records: Mapping[str, Row]) -> list[str]:
    kept = {budget: records[f"{target} {budget}"] for budget in BUDGETS if f"{target} {budget}" in records}
    verdicts = [f"{budget}: {verdict_counts(record)}" for budget, record in kept.items()]
    costs = [measured_cost(each, budget, kept.get(budget)) for budget in BUDGETS]
    return [f"`apical reproduce {target}`", each.title, *costs, "; ".join(verdicts) or "-"]


def measured_cost(each: Table, budget: Budget, record: Row | None) -> str:
    """The time of a budget: that of the kept run, if it was not resumed, or else the one the table states."""
    if record is not None and not record["resumed"]:
        return f"{record['seconds'] / 60:.1f} min"
    return cost(each, budget) if budget in each.hours else "-"


def verdict_counts(record: Row) -> str:
    """How many verdicts of each kind a record has."""
    verdicts = [row["verdict"] for row in record["rows"]]
    return ", ".join(f"{verdicts.count(each)} {each}" for each in VERDICTS if each in verdicts) or "no marks"


def linked(reference: str) -> str:
    """A reference with its arXiv number or DOI as a link."""
    return re.sub(r"(arXiv|doi) (\S*\w)", lambda found: f"[{found[0]}]({LINKS[found[1]]}{found[2]})", reference)


def paper_pages(root: Path, papers: Mapping[str, Paper], records: Sequence[Row]) -> dict[Path, str]:
    """Path -> page, of every paper of this repository."""
    kept = {f"{record['target']} {record['budget']}": record for record in records}
    return {
        path / "README.md": paper_page(name, papers[name], _settings(path), kept) for name, path in folders(root).items()
    }


def _settings(folder: Path) -> str:
    """What the recipes' module says of its settings."""
    return inspect.getdoc(import_module(f"apical_papers.{folder.name}.recipes")) or ""
