"""The study of loss landscapes: same starts for both rules, verdicts by hand, and a tiny run."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from apical.data import load
from apical.evolution.population import Lifetime
from apical_papers.tdca import landscape as tdca_landscape
from apical_papers.tdca.landscape import train, verdicts


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    short = Lifetime(steps=5, lr=0.02, optimizer="sgd", clip=1.0, batch_size=8)
    small = {"MODEL": "mlp-8-8", "LIFETIME": short, "EVERY": 2, "POINTS": 4, "TUNING": 1, "GRID": (0.01, 0.02)}
    for name, value in small.items():
        monkeypatch.setattr(tdca_landscape, name, value)


def test_ways_begin_alike_and_are_seen_at_start_and_end() -> None:
    digits = load("digits")
    ways = {rule: train(rule, digits, [3, 4], [0.01, 0.02])[1] for rule in ("tdca", "bp")}
    for way in ways.values():
        assert way.shape[:2] == (4, 2)  # after 0, 2, 4 and 5 steps
        assert bool((way[1:] != way[:-1]).flatten(2).any(2).all())
    assert torch.equal(ways["tdca"][0], ways["bp"][0])
    assert not torch.equal(ways["bp"][0, 0], ways["bp"][0, 1])


def test_teachers_made_by_hand_begin_where_bp_does_and_the_silent_one_teaches_the_last_layer_alone() -> None:
    digits = load("digits")
    bp, silent, random = (train(rule, digits, [3, 4], [0.02, 0.02])[1] for rule in ("bp", "hand-silent", "hand-random"))
    assert torch.equal(silent[0], bp[0])
    assert torch.equal(random[0], bp[0])
    last = 8 * 10 + 10
    still = silent[1:, :, :-last] == silent[:1, :, :-last]
    assert bool(still.all())
    assert not torch.equal(silent[-1, :, -last:], silent[0, :, -last:])
    assert not torch.equal(random[-1, :, :-last], silent[-1, :, :-last])
    assert torch.allclose(silent[1, :, -10:], bp[1, :, -10:], atol=1e-2)  # p - y is BP's at the output, in the first steps


def test_verdicts_by_hand() -> None:
    def rows(losses: list[float]) -> list[dict[str, float]]:
        return [{"loss": loss} for loss in losses]

    lower, higher = [0.10, 0.11, 0.12], [0.50, 0.52, 0.51]
    findings = verdicts({"tdca": rows(lower), "bp": rows(higher)})
    assert [row["verdict"] for row in findings] == ["reproduced", "reproduced"]
    assert findings[0]["mean"] == pytest.approx(-0.4)
    assert findings[1]["mean"] == 3
    findings = verdicts({"tdca": rows([0.5, 2.4, 2.31]), "bp": rows(lower)})  # ln 10 is 2.303
    assert findings[1]["verdict"] == "not reproduced"
    assert findings[1]["mean"] == 1


def test_a_tiny_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tdca_landscape.main(["--out", str(tmp_path), "--starts", "2"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    digits = load("digits").train
    rate = results["settings"]["chosen"]["bp"]
    seeds = [tdca_landscape.seed_of("landscape", k) for k in range(2)]
    population, way = train("bp", load("digits"), seeds, [rate] * 2)
    ends = [float(F.cross_entropy(output, digits.targets)) for output in population.outputs(way[-1], digits.inputs)]
    shown = results["tables"][0]["rows"][-1][4]
    assert float(shown.split()[0]) == pytest.approx(sum(ends) / 2, rel=5e-3)
    assert (tmp_path / "landscape.png").exists()
    capsys.readouterr()
    assert tdca_landscape.main(["--out", str(tmp_path), "--starts", "1"]) == 2
    assert "--starts must be at least 2" in capsys.readouterr().err
