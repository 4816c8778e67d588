"""The study of how the shipped teacher's learners end: averages, decay and marks."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from apical import data
from apical.models.catalogue import build
from apical_papers.tdca import settling


@pytest.mark.parametrize("cosine", [False, True])
def test_learners_are_trained_as_by_pytorchs_own_optimiser(cosine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backpropagation, one batch an epoch: the mean of the weights after each of the last quarter of the steps."""
    monkeypatch.setattr(settling, "BATCH", 16)
    digits = data.load("digits")
    x, y = digits.train.inputs[:16], digits.train.targets[:16]
    population, weights = settling.train("mlp-5", "bp", digits, (x, y), [3], [0.1, 0.5], cosine)
    for number, rate in enumerate((0.1, 0.5)):
        torch.manual_seed(3)
        model = build("mlp-5", tuple(x.shape[1:]), 10)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        late = []
        for step in range(20):
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / 20)) / 2 if cosine else rate
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            late.append(population.start(model).clone())
        assert (weights["last"][number] - late[-1]).abs().max() < 1e-4
        assert (weights["averaged"][number] - torch.stack(late[15:]).mean(0)).abs().max() < 1e-4


def findings(tdca: list[float], last: list[float]) -> settling.Findings:
    ends: dict[str, dict[str, Any]] = {
        end: {"rate": 0.1, "losses": [0.1, 0.2], "accuracies": [97.0, 96.0]} for end in settling.ENDS
    }
    ours = {
        **ends,
        "averaged": {**ends["averaged"], "accuracies": tdca},
        "constant": {**ends["constant"], "accuracies": last},
    }
    return {"mlp-5": {"bp": ends, "tdca": ours}}


@pytest.mark.parametrize(("worst", "holds"), [(95.01, True), (94.99, False)])
def test_marks_are_those_that_the_study_names(worst: float, holds: bool) -> None:
    """Backpropagation's mean is 96.5, so every start must reach 95."""
    starts, averaging = settling.verdicts(findings([97.0, worst], [96.0, worst - 1.01]))
    assert starts["verdict"] == ("reproduced" if holds else "not reproduced")
    assert averaging["mean"] == pytest.approx(1.005)
    assert averaging["verdict"] == "reproduced"


def test_a_tiny_study_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling, "MODELS", ("mlp-5",))
    monkeypatch.setattr(settling, "EPOCHS", 1)
    monkeypatch.setattr(settling, "BATCH", 400)
    monkeypatch.setattr(settling, "TUNING", 1)
    assert settling.main(["--out", str(tmp_path), "--starts", "2"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["tables"][0]["rows"]) == 6
    assert settling.main(["--out", str(tmp_path), "--starts", "1"]) == 2
