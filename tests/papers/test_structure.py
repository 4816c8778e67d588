"""The study of structure and depth: what arrives at the first layer, what is compared with what, and its verdicts."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from apical.bench import names
from apical.bench.papers import tables, too_small
from apical.models import orthogonal_
from apical_papers import digits
from apical_papers.structure import depth, depth_study, study, theory, trained


def test_all_of_backpropagations_gradient_arrives_through_an_isometry() -> None:
    for layers in (10, 50):
        assert depth.arrival("bp", depth.EXACT, layers, 0) == pytest.approx(1, abs=1e-4)
    assert depth.arrival("ccl", depth.EXACT, 50, 0) < 1e-10  # type: ignore[operator]
    assert "range" in str(depth.arrival("corinfomax", depth.EXACT, 10, 0))


def test_rules_are_not_asked_beyond_their_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth, "NETWORKS", {depth.EXACT: depth.NETWORKS[depth.EXACT]})
    (row,) = depth.measure(0, ("bp",), (1, 2), {"bp": 1}).values()
    assert row == {"bp": {"1": 1.0, "2": "not run"}}


def test_networks_of_every_kind_have_their_depth() -> None:
    for name in depth.NETWORKS:
        layers = [m for m in depth.network(name, 10, 0) if isinstance(m, torch.nn.Linear)]
        assert [len(layer.weight) for layer in layers] == [depth.WIDTH] * 10 + [10]


def test_rules_begin_with_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained, "RULES", {"bp": 0.0, "fa": 0.0})
    monkeypatch.setattr(digits, "TRAIN", 128)
    found = trained.topology(digits.Digits("digits"), 0, 1)
    assert found["untrained"] == found["bp"] == found["fa"]


def test_spearman_by_hand() -> None:
    assert trained.spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    tied = 4.5 / (5 * 4.5) ** 0.5  # of the ranks 1, 2.5, 2.5, 4
    assert trained.spearman([1, 2, 3, 4], [1, 2, 2, 3]) == pytest.approx(tied)
    assert trained.spearman([1, 3, 2, 4], [1, 2, 2, 3]) == pytest.approx(tied)


def cells() -> list[dict[str, Any]]:
    """Results in which bp's DGP is at the level of shuffled weights, and the others' above."""
    made = []
    for seed in range(3):
        noise = 0.001 * seed

        def row(dgp: float, noise: float = noise) -> dict[str, Any]:
            layers = {"np": [0.9, 0.5, 0.4], "np shuffled": [0.8, 0.5, 0.4], "np shuffled std": [0.01] * 3}
            return {**layers, "spread": [0.1, dgp, dgp], "dgp": dgp + noise, "dgp shuffled": 0.5, "accuracy": 0.9}

        wiring = {"accuracy": 0.5 + noise, "pruned": 0.0, "accuracy pruned": 0.5 + noise}
        wirings = {name: dict(wiring) for name in trained.WIRINGS}
        for name in ("learned", "learned, fa"):
            wirings[name]["accuracy"] += 0.2 + noise
        arrives = {rule: {str(d): 1e-14 if rule == "ccl" else 1.0 for d in depth.DEPTHS} for rule in depth.RULES}
        made.append(
            {
                "depth": {name: copy.deepcopy(arrives) for name in depth.NETWORKS},
                "topology": {"untrained": row(0.1), **{r: row(0.5 + 0.1 * (r != "bp") + noise) for r in trained.RULES}},
                "wirings": wirings,
                "codes": -0.2 + noise,
                "seconds": 1.0,
            }
        )
    return made


def test_verdicts_and_tables() -> None:
    rows = {(row["rule"], row["what"]): row["verdict"] for row in study.verdicts(cells())}
    assert rows["all", "rules whose DGP and its excess over shuffled weights both differ from bp's"] == "reproduced"
    assert rows["bp", "learned minus chain"] == "reproduced"
    assert rows["bp", "attention minus learned"] == "not reproduced"
    assert rows["bp", "with L1: share of the edges below 0.01"] == "not reproduced"
    assert rows["none", "rank correlation of entropy with a read-out's accuracy"] == "not reproduced"
    assert rows["ccl", "|x| at depth 50: orders of magnitude lost"] == "reproduced"
    titles = [part["title"] for part in study.tables(cells())]
    assert len(titles) == len(depth.NETWORKS) + 3
    assert all(len(line) == len(part["header"]) for part in study.tables(cells()) for line in part["rows"])
    assert math.isclose(study._excess(cells(), "bp")[0], 0, abs_tol=1e-12)


def test_the_table_of_further_rules() -> None:
    assert set(depth.FURTHER) & set(depth.RULES) == set(depth.SLOW)
    assert {*depth.FURTHER, *depth.RULES} == set(names.RULES)
    arrives = {rule: {str(d): "refused" if rule == "csdp" else 0.5 for d in depth.DEPTHS} for rule in depth.FURTHER}
    made = [{"depth": {name: copy.deepcopy(arrives) for name in depth.NETWORKS}} for _ in range(3)]
    assert {row["verdict"] for row in depth_study.verdicts(made)} == {"reproduced"}
    rows = {line[0]: line[1:] for line in depth_study.tables(made)[0]["rows"]}
    assert rows["csdp"] == ["refused"] * 3
    assert rows["kp"] == ["0.5 (0.5 to 0.5)"] * 3


def test_shallow_chains_alone_have_tables_and_no_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth, "FURTHER", ("kp", "csdp"))
    monkeypatch.setattr(depth_study, "FAR", ("kp",))
    assert depth_study.main(["--out", str(tmp_path), "--seeds", "2", "--deepest", "49", "--jobs", "1"]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["verdicts"] == []
    assert found["settings"] == {"seeds": 2, "deepest": 10, "width": depth.WIDTH}
    assert all(part["header"] == ["rule", "depth 10"] for part in found["tables"])
    assert all(dict(part["rows"])["csdp"] == "refused" for part in found["tables"])


def test_no_chain_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert depth_study.main(["--out", str(tmp_path), "--deepest", "9"]) == 2
    assert "--deepest must be at least 10" in capsys.readouterr().err


def test_the_depth_table_is_a_table_of_the_paper() -> None:
    table = tables()["structure"]["depth"]
    assert table.module == depth_study.__name__
    assert not too_small(table, table.budgets["cpu"])
    assert too_small(table, table.budgets["smoke"])


def test_product_nodes_and_the_lorenz_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theory, "STATES", 100)
    monkeypatch.setattr(theory, "ITERATIONS", 100)
    assert theory.lorenz(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [[10.0, 23.0, -6.0]]
    assert theory.emulation_error(1, 0, 2) > 0.1
    for nodes in (2, 3):  # two are enough for every digit, and there is nothing that a third could gain
        assert theory.emulation_error(nodes, 0, 3) < 1e-11


def test_gradients_along_euler_steps() -> None:
    """By the products of the Jacobians 1 + D W / N."""
    torch.manual_seed(0)
    steps = theory.normal(3.0, tied=True)
    assert all(torch.equal(step.linear.weight, steps[0].linear.weight) for step in steps)
    assert not torch.equal(*(step.linear.weight for step in theory.normal(3.0)[:2]))
    x = torch.randn(1, theory.WIDTH)
    torch.manual_seed(1)
    norms = theory.gradient_norms(steps, x.clone(), torch.tensor([3]))
    torch.manual_seed(1)
    read, states = orthogonal_(torch.nn.Linear(theory.WIDTH, 10)), [x]
    for step in steps:
        states.append(step(states[-1]).detach())
    e = torch.softmax(read(states[-1]), 1) - torch.nn.functional.one_hot(torch.tensor([3]), 10)
    error = e @ read.weight
    last = error.norm()
    for k in reversed(range(theory.STEPS)):
        w = steps[k].linear.weight
        error = error + (error * (states[k] @ w.T).sign()) @ w / theory.STEPS
        assert float((error.norm() / last).detach()) == pytest.approx(float(norms[k]), rel=1e-4)


def test_components_are_white_and_of_the_training_digits() -> None:
    digits = theory.Components("digits")
    assert torch.allclose(torch.cov(digits.x.T, correction=0), torch.eye(theory.WIDTH), atol=1e-3)
    assert digits.test[0].shape[1] == theory.WIDTH


def test_claims_of_theory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theory, "GAINS", (0.5, 1.0))
    made = []
    for seed in range(3):
        wide = {"least": 0.2, "largest": 4.0 + seed}
        ranges = {name: {"least": 0.9, "largest": 1.1} if name in theory.ORTHOGONAL else wide for name in theory.FLOWS}
        channels = theory.channels(seed)
        channels["normal, gain 1"]["every"] -= 0.001 * seed
        made.append(
            {
                "lorenz": {"1": {"error": 0.5}, "2": {"error": 1e-9}, "3": {"error": 1e-3}},
                "gradients": ranges,
                "accuracy": {name: {"accuracy": 0.8 - 0.1 * (name == "tied")} for name in theory.TRAINED},
                "channels": channels,
            }
        )
    rows = {row["what"].split(":")[0]: row["verdict"] for row in theory.verdicts(made)}
    assert {what for what, verdict in rows.items() if verdict != "reproduced"} == {"error with 3 product nodes", "tied"}
    assert len(rows) == 3 + 5 + 2 + 1
    for part in theory.tables(made):
        assert all(len(line) == len(part["header"]) for line in part["rows"])
