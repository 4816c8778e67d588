"""The study of one top-down network for several tasks: what it is evolved on, what is tested where, marks and a report."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apical.evolution.population import Lifetime
from apical.evolution.reinforcement import together
from apical_papers.tdca.reinforcement import several
from apical_papers.tdca.reinforcement.study import CASES, TRAIN


def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lifetimes of two updates, episodes of eight steps."""
    short = {"lifetime": Lifetime(steps=2, lr=0.05), "steps": 8, "last": 1}
    for stem, case in CASES.items():
        monkeypatch.setitem(several.CASES, stem, replace(case, setting=replace(case.setting, **short)))  # type: ignore[arg-type]


def test_every_network_is_evolved_on_what_its_name_says() -> None:
    assert several.NETWORKS["all"] == ("cart-pole", "pendulum", "acrobot")
    for stem in CASES:
        assert several.NETWORKS[stem] == (stem,)
        assert {*several.NETWORKS[f"without-{stem}"], stem} == {*CASES}
        assert stem not in several.NETWORKS[f"without-{stem}"]


def test_fitness_is_the_mean_share_of_the_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    shorter(monkeypatch)
    tasks = [tuple(several.task(stem, seed) for stem in ("cart-pole", "pendulum")) for seed in (3, 4)]
    populations = torch.randn(2, 3, tasks[0][0].network.parameters)
    shares = several.mean_share(tasks, populations, 5)
    for seed in range(2):  # each alone
        pole, pendulum = (together([task], populations[seed, None], 5)[0] for task in tasks[seed])
        torch.testing.assert_close(shares[seed], (pole / 200 + pendulum / 1000) / 2)


def test_what_is_sent_by_a_network_that_was_made_by_hand() -> None:
    """The networks are nearly linear here: pi - y, which the figure shows beside them."""
    network = several.task("acrobot", 0).network
    (w1, b1), (w2, b2), (w3, b3) = network.layers(torch.zeros(1, network.parameters))
    w1[0, 0], w2[0, 0, 0], w3[0, 0, 0] = torch.tensor([1.0, -1.0]) * 0.01, 1.0, 100.0
    weights = torch.cat([each.flatten() for each in (w1, b1, w2, b2, w3, b3)])
    pi = torch.linspace(0, 1, 5)
    signals = several.sent(torch.stack([weights, 2 * weights]), pi)
    torch.testing.assert_close(signals[0], torch.stack([pi, pi - 1]), rtol=0, atol=1e-3)


def cells(ours: float, others: float, shuffled: float) -> list[dict[str, Any]]:
    """Two meta-seeds on CartPole, with REINFORCE and the network of this task at 100, from 30."""
    case = CASES["cart-pole"]
    ends = {"all": ours, "others": others, "own": 100.0, "reinforce": 100.0}
    made: dict[str, Any] = {}
    for name, end in ends.items():
        made[name] = {"end": dict.fromkeys((TRAIN, *case.unseen), end), "curve": [30.0, end]}
        made[f"{name}-shuffled"] = {"end": {TRAIN: shuffled}, "curve": [30.0, shuffled]}
    return [{"methods": made}, {"methods": made}]


@pytest.mark.parametrize(
    ("ours", "others", "shuffled", "holds"),
    [
        (110.0, 110.0, 35.0, "11111 11111 1"),
        (95.0, 79.0, 35.0, "11110 01100 1"),  # below REINFORCE by less and by more than a tenth of its gain; 49 gained
        (110.0, 110.0, 45.0, "11011 11011 1"),  # gains with shuffled advantages
        (45.0, 110.0, 45.0, "00000 11011 0"),
    ],
)
def test_marks(ours: float, others: float, shuffled: float, holds: str) -> None:
    rows = several.verdicts(CASES["cart-pole"], cells(ours, others, shuffled))
    verdicts = "".join("1" if row["verdict"] == "reproduced" else "0" for row in rows)
    assert verdicts == holds.replace(" ", "")


@pytest.mark.usefixtures("undrawn_here")
def test_a_tiny_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shorter(monkeypatch)
    given = ["--out", str(tmp_path), "--seeds", "2", "--generations", "1", "--lifetimes", "2", "--jobs", "1"]
    assert several.main(given) == 0
    assert "generation 1" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["verdicts"]) == 33
    assert all(len(row) == len(each["header"]) for each in results["tables"] for row in each["rows"])
    tested = json.loads((tmp_path / "cells" / "acrobot-test-60.json").read_text())["methods"]
    names = ("all", "others", "own", "unevolved", "by-hand", "reinforce")
    assert tested.keys() == {*names, *(f"{name}-shuffled" for name in names)}
    assert several.main(given) == 0
    assert "generation 1" not in capsys.readouterr().out  # nothing is done twice
    assert several.main([*given, "--generations", "2"]) == 2
