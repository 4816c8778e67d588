"""The placement of a run: kept in its folder, shown in the report, damaged files refused."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import apical
from apical.bench.report import placement as placement_section
from apical.errors import CheckpointError


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


def test_every_rule_of_a_comparison_has_its_table(tmp_path: Path) -> None:
    for rule in ("bp", "dfa"):
        folder = tmp_path / "runs" / rule / "seed-0"
        folder.mkdir(parents=True)
        placement_section.keep(folder, apical.Backprop(network()), torch.randn(10, 6))
    page = placement_section.section(tmp_path, ("bp", "fa", "dfa"))
    assert page.count("<table") == 2
    assert "<summary><b>bp</b>: 2 exact</summary>" in page
    assert "<b>fa</b>" not in page
    assert "<td>0</td><td>Linear</td><td>5x6</td><td>exact</td>" in page


def test_one_run_has_its_table_and_no_run_none(tmp_path: Path) -> None:
    assert placement_section.section(tmp_path, ("bp",)) == ""
    placement_section.keep(tmp_path, apical.Backprop(network()), torch.randn(10, 6))
    assert "<td>exact</td>" in placement_section.section(tmp_path, ("bp",))


def test_names_are_escaped(tmp_path: Path) -> None:
    row = {"layer": "<b>", "kind": "&", "shape": [2], "path": "cut at '<i>'"}
    (tmp_path / placement_section.FILE).write_text(json.dumps({"rows": [row]}))
    page = placement_section.section(tmp_path, ("bp",))
    assert "<td>&lt;b&gt;</td><td>&amp;</td><td>2</td><td>cut at &#x27;&lt;i&gt;&#x27;</td>" in page


@pytest.mark.parametrize("text", ["{", '{"rows": 3}', '{"rows": [1]}', '{"rows": [{"path": 1}]}', "{}", "[]"])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / placement_section.FILE).write_text(text)
    with pytest.raises(CheckpointError, match=placement_section.FILE):
        placement_section.section(tmp_path, ("bp",))
