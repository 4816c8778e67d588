"""The README of each paper's folder: every table and recipe, cost and verdicts of kept runs, and references that exist."""

import re
from pathlib import Path
from typing import Any

import pytest
from tests.generator import ROOT, script

from apical.bench.papers import Paper, Table, papers

pages = script("paper_pages")
BIBLIOGRAPHY = (ROOT / "docs" / "references.bib").read_text(encoding="utf-8")


def record(**changes: Any) -> dict[str, Any]:
    rows = [{"verdict": verdict} for verdict in ("reproduced", "reproduced", "not reproduced")]
    return {"target": "new/table", "budget": "cpu", "seconds": 90.0, "resumed": False, "rows": rows, **changes}


def page(hours: dict[str, float], kept: dict[str, Any] | None) -> str:
    """The page of a paper with one table."""
    asked: Any = Table
    table = asked("A table", {"smoke": {}, "cpu": {}, "paper": {}}, module="m", hours=hours)
    paper = Paper("A paper", "First, 2001, arXiv 0101.00001; second: Other, 2002, doi 10.1/x.y", tables={"table": table})
    text = pages.paper_page("new", paper, "From the paper.", {} if kept is None else {"new/table cpu": kept})
    assert isinstance(text, str)
    return text


def test_title_and_references() -> None:
    text = page({}, None)
    assert "\n# A paper\n" in text
    assert "- First, 2001, [arXiv 0101.00001](https://arxiv.org/abs/0101.00001)\n" in text
    assert "- second: Other, 2002, [doi 10.1/x.y](https://doi.org/10.1/x.y)\n" in text
    assert "From the paper." in text


@pytest.mark.parametrize(
    ("hours", "kept", "cells"),
    [
        ({}, None, "- | - | - | -"),
        ({"paper": 2.5}, None, "- | - | 2.5 h | -"),
        ({"cpu": 2.5}, record(), "- | 1.5 min | - | cpu: 2 reproduced, 1 not reproduced"),
        ({"cpu": 0.5}, record(resumed=True), "- | 30 min | - | cpu: 2 reproduced, 1 not reproduced"),
        ({}, record(resumed=True), "- | - | - | cpu: 2 reproduced, 1 not reproduced"),
    ],
    ids=["nothing", "stated", "kept run", "kept run was resumed", "resumed and never timed"],
)
def test_cost_and_verdicts(hours: dict[str, float], kept: dict[str, Any] | None, cells: str) -> None:
    assert f"| `apical reproduce new/table` | A table | {cells} |" in page(hours, kept)


def test_each_folder_has_its_page() -> None:
    written = pages.paper_pages(ROOT, papers(), [])
    assert set(written) == {path.parent / "README.md" for path in (ROOT / "src" / "apical_papers").glob("*/paper.py")}


@pytest.mark.parametrize("name", papers())
def test_the_page_has_every_table_and_recipe(name: str) -> None:
    text = (pages.folders(ROOT)[name] / "README.md").read_text(encoding="utf-8")
    paper = papers()[name]
    for command in (*(f"apical reproduce {name}/{table}" for table in paper.tables), *paper.studies, *paper.evolutions):
        assert f"| `{command}` |" in text


def plain(text: str) -> str:
    return " ".join(re.sub(r"[{}]", "", text).lower().split())


@pytest.mark.parametrize("name", papers())
def test_title_and_numbers_are_those_of_the_bibliography(name: str) -> None:
    paper = papers()[name]
    assert f"title = {plain(paper.title)}," in plain(BIBLIOGRAPHY)
    numbers = re.findall(r"(?:arXiv|doi) (\S*\w)", paper.reference)
    assert len(numbers) == len(paper.reference.split("; "))
    for number in numbers:
        assert f"{{{number}}}" in BIBLIOGRAPHY


def test_a_folder_that_is_not_here_has_no_page(tmp_path: Path) -> None:
    assert pages.paper_pages(tmp_path, papers(), []) == {}
