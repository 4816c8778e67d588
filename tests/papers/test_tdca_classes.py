"""The study of any number of classes: its marks, the hand-sent error is direct feedback alignment, and a tiny run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apical.errors import CheckpointError
from apical.evolution.population import Lifetime
from apical.evolution.strategy import Strategy
from apical.rules.top_down.equivariant import EquivariantNetwork
from apical.rules.top_down.hand_built import wired
from apical_papers.tdca import classes
from apical_papers.tdca.classes import BELOW, LEARNERS, PARTS, RULES, Options


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lifetimes of two steps of small learners, one kind of task."""
    setting_of = classes.setting_of
    life = Lifetime(2, 0.05, "sgd", 1.0, 8)
    tiny = {
        "lifetime": life,
        "model": "mlp-6",
        "others": ("mlp-tanh-5-5",),
        "examples": 16,
        "ways": 3,
        "settled": 1,
        "hidden": 8,
    }
    for name, value in (
        ("setting_of", lambda seed: replace(setting_of(seed), **tiny)),
        ("strategy", lambda: Strategy(population=4)),
        ("PARTS", {"digits-3": PARTS["digits-3"]}),
        ("LEARNERS", {"mlp-7": "ReLU"}),
        ("LAYERS", 2),
        ("RATES", (0.02, 0.1)),
    ):
        monkeypatch.setattr(classes, name, value)


@pytest.mark.usefixtures("undrawn_here")
def test_a_tiny_study_is_kept_and_reported(small: None, tmp_path: Path) -> None:
    pytest.importorskip("evotorch")
    asked = [
        "--out",
        str(tmp_path),
        "--seeds",
        "2",
        "--generations",
        "1",
        "--tasks",
        "2",
        "--validation",
        "1",
        "--jobs",
        "1",
    ]
    assert classes.main(asked) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    first = classes.FIRST
    cells = [json.loads((tmp_path / "cells" / f"{seed}.json").read_text()) for seed in (first, first + 1)]
    pairs = [cell["digits-3"]["mlp-7"] for cell in cells]
    row = next(row for row in results["verdicts"] if row["what"] == "3 digits: loss minus tuned BP's")
    assert row["mean"] == pytest.approx(sum(pair["tdca"]["loss"] - pair["bp"]["loss"] for pair in pairs) / 2, rel=1e-3)
    assert all(len(pair[rule]["losses"]) == 2 and pair[rule]["lr"] in (0.02, 0.1) for pair in pairs for rule in RULES)
    assert cells[0]["teacher"] != cells[1]["teacher"]
    before = {path: path.read_bytes() for path in (tmp_path / "cells").iterdir()}
    assert classes.main(asked) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "cells").iterdir()} == before
    with pytest.raises(CheckpointError, match="other settings"):
        classes.cell(Options(tmp_path, generations=2, tasks=2, validation=1), first)


def invented(loss: Callable[[str, int], float], accuracy: Callable[[str, int], float]) -> list[dict[str, Any]]:
    """Cells of five meta-seeds."""
    return [
        {
            part: {
                learner: {rule: {"loss": loss(rule, seed), "accuracy": accuracy(rule, seed)} for rule in RULES}
                for learner in LEARNERS
            }
            for part in PARTS
        }
        for seed in range(5)
    ]


def test_marks_are_those_that_the_study_names() -> None:
    losses = {"tdca": 0.1, "bp": 0.05, "dfa": 0.2, "silent": 0.3, "shuffled": 2.0, "by-hand": 0.2}
    shares = {"tdca": 0.95, "bp": 0.975, "dfa": 0.96, "silent": 0.9, "shuffled": 0.1, "by-hand": 0.96}
    rows = classes.verdicts(
        invented(lambda rule, seed: losses[rule] * (1 + 1e-3 * seed), lambda rule, seed: shares[rule] * (1 + 1e-3 * seed))
    )
    holds = {row["what"]: row["verdict"] == "reproduced" for row in rows}
    assert len(rows) == len(PARTS) * (len(BELOW) + 2)
    for part, (title, name, _) in PARTS.items():
        assert {rule: holds[f"{title}: loss minus {called}"] for rule, called in BELOW.items()} == {
            **dict.fromkeys(("dfa", "silent", "shuffled"), True),
            "bp": False,
        }, part
        least = "(tuned BP's minus 1 point)" if name == "digits" else "97 % of tuned BP's"
        assert holds[f"{title}: accuracy minus {least}"] == (name != "digits")  # 2.5 points below, which is 2.6 %
        assert holds[f"{title}: accuracy minus (tuned DFA's minus 1 point)"]
    assert classes.verdicts(invented(lambda *_: 0.0, lambda *_: 0.0)[:1]) == []


def test_what_is_drawn_and_told_is_what_is_sent() -> None:
    """Of the right class and of a wrong one of two, at the same probability of their own."""
    p = torch.linspace(0, 1, 11)
    network = wired(EquivariantNetwork(classes.LAYERS, 8))
    vector = torch.nn.utils.parameters_to_vector(network.parameters()).detach()
    lines = classes.sent(vector[None], p)
    assert (lines[0] - torch.stack([p, p - 1])).abs().max() < 0.05
    row = classes.slopes([{"seed": 7, "teacher": vector.tolist()}])["rows"][0]
    assert row[0] == "7"
    assert len(row) == 2 + classes.LAYERS
    assert all(float(size.split()[0]) == pytest.approx(1, abs=0.05) for size in row[1:])
