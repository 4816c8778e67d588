"""The study of basins: lattices of functions whose minima are known, outcomes by hand, marks, and a tiny run."""

import json
from pathlib import Path

import pytest
import torch

from apical.evolution.functions import Function, function
from apical_papers.tdca.functions import basins
from apical_papers.tdca.functions.basins import OUTCOMES, outcomes, shares, verdicts

WELLS = Function(
    "wells", lambda z: (z[..., 0].square() - 4).square() + 2 * z[..., 0] + 16 + z[..., 1].square(), ((-2.06, 0.0),)
)
"""Two wells along the first coordinate, near -2.06 and 1.93, of which the first is lower; between them a ridge near 0.13."""


def test_a_lattice_leads_to_the_minimum_on_its_side_of_the_ridge() -> None:
    target, values = basins.basins(WELLS, 4.0, 161)
    assert len(target.unique()) == 2
    x = torch.linspace(-4, 4, 161, dtype=torch.double)
    lowest = x[target // 161]
    assert bool((lowest[x < 0.05] < -1.9).all())
    assert bool((lowest[x > 0.2] > 1.8).all())
    assert bool((values.flatten()[target] <= values).all())


def test_every_known_basin_of_ackleys_function_is_a_cell() -> None:
    """Its minima are near the integers."""
    target, _ = basins.basins(function("ackley"), 2.4, 241)
    places = torch.stack([target.unique() // 241, target.unique() % 241], 1) * 4.8 / 240 - 2.4
    inner = places[(places.abs() < 1.9).all(1)]
    assert len(inner) == 9
    assert (inner - inner.round()).abs().max() < 0.1


def test_outcomes_by_hand() -> None:
    shift = torch.tensor([[0.5, -1.0]], dtype=torch.double)
    starts = torch.tensor([[2.0, 0], [2, 0], [-2, 0], [2, 0]], dtype=torch.double) + shift
    ended = torch.tensor([[-2.0, 0.1], [1.5, 1], [2, 0], [torch.nan, 0]], dtype=torch.double) + shift
    assert outcomes(WELLS, starts, ended, shift).tolist()[:3] == [0, 2, -1]
    assert outcomes(
        function("ackley"), torch.tensor([[2.0, 2], [1, 1]]), torch.tensor([[1.0, 2], [2, 2]]), torch.zeros(1, 2)
    ).tolist() == [1, 3]


def cells(tdca: list[int], adam: list[int]) -> dict[str, dict[str, object]]:
    ends = {"tdca": tdca, "gd": [2, 2, 2, -1], "momentum": [2, 2, 2, -1], "adam": adam, "random": [0, 0, 0, -1]}
    return {f"f{k}": {"ends": [ends, ends]} for k in range(4)}


def test_shares_and_marks() -> None:
    found = cells([0, 1, 2, -1], [0, 3, 2, -1])
    assert shares(found["f0"], "tdca", "global", "lower") == pytest.approx([2 / 3, 2 / 3])
    assert shares(found["f0"], "adam", "higher") == pytest.approx([1 / 3, 1 / 3])
    assert sum(shares(found["f0"], "tdca", name)[0] for name in OUTCOMES) == pytest.approx(1)
    rows = verdicts(found)
    assert rows[0]["verdict"] == "reproduced"
    assert [row["mean"] for row in rows[1:]] == pytest.approx([1 / 3] * 4)
    assert "Adam" in rows[1]["what"]
    assert verdicts(cells([0, 2, 2, -1], [0, 3, 2, -1]))[0]["verdict"] == "not reproduced"  # level with Adam


@pytest.mark.usefixtures("undrawn_here")
def test_a_tiny_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(basins, "CASES", basins.CASES[1:2])
    monkeypatch.setattr(basins, "GRID", 3)
    monkeypatch.setattr(basins, "POINTS", 61)
    given = ["--out", str(tmp_path), "--seeds", "2", "--generations", "1", "--jobs", "1"]
    assert basins.main(given) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["tables"][0]["rows"]) == 6
    assert (tmp_path / "basins.png").exists()
    assert basins.main([*given[:3], "1"]) == 2
    assert "--seeds must be at least 2" in capsys.readouterr().err
