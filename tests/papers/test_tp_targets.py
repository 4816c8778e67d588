"""The study of where targets point."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from apical.core.chain import Chain
from apical.core.losses import output_error
from apical.diagnostics.gauss_newton import gauss_newton_targets
from apical.rules.target_propagation.difference_target_propagation import DifferenceTargetPropagation
from apical_papers.tp.targets import SETTINGS, main, null_share, output_moves, target_updates


def test_null_share_is_the_share_of_the_weight_update() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    rule = DifferenceTargetPropagation(model, F.mse_loss, variant="dtp")
    x, y = torch.randn(1, 4).double(), torch.randn(1, 2).double()
    rule(x, y).backward()
    update = model[2].weight.grad.flatten()
    rows = [torch.autograd.grad(model(x)[0, k], model[2].weight)[0].flatten() for k in range(2)]
    jacobian = torch.stack(rows)
    inside = torch.linalg.pinv(jacobian) @ (jacobian @ update)
    assert torch.allclose(null_share(rule, x, y), (update - inside).norm() / update.norm(), atol=1e-10)


def test_gauss_newton_wastes_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Identity(), nn.Linear(6, 2)).double()
    rule = DifferenceTargetPropagation(model, F.mse_loss, variant="linear")
    rule.maps[0].q.data = torch.linalg.pinv(model[2].weight.detach())
    x, y = torch.randn(3, 4).double(), torch.randn(3, 2).double()
    assert output_error(rule.loss, model(x), y)[1].abs().min() > 0
    assert null_share(rule, x, y).max() < 1e-12


def test_the_study_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETTINGS, "feedback epochs before", 1)
    monkeypatch.setattr("apical_papers.tp.targets.output_moves", partial(output_moves, networks=5))
    monkeypatch.setattr("apical_papers.tp.targets.wasted", lambda name, seed: float(len(name) + seed) * (1 + 0.1 * seed))
    angles = {"gradient": [50.0, 40.0, 30.0, 20.0], "targets": [30.0, 20.0, 10.0, 5.0]}
    monkeypatch.setattr(
        "apical_papers.tp.targets.angles",
        lambda make, digits, seed, epochs: {k: [x + seed for x in v] for k, v in angles.items()},
    )
    arguments = ["--out", str(tmp_path), "--seeds", "2", "--epochs", "1", "--jobs", "1"]
    assert main(arguments) == 0
    first = json.loads((tmp_path / "results.json").read_text())
    assert {row["verdict"] for row in first["verdicts"]} <= {"reproduced", "not reproduced"}
    monkeypatch.setattr("apical_papers.tp.targets.frozen", None)  # nothing is run again
    assert main(arguments) == 0
    assert json.loads((tmp_path / "results.json").read_text())["verdicts"] == first["verdicts"]
    assert main(["--out", str(tmp_path), "--seeds", "1"]) == 2


def test_targets_of_a_linear_network_move_its_output_straight() -> None:
    found = output_moves(0, nn.Identity, networks=5)
    assert found["targets"] == pytest.approx([1.0, 1.0], abs=1e-9)
    assert max(found["gradient"]) < 0.99


def test_updates_towards_gauss_newton_targets_are_local_products() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(3, 4).double(), torch.arange(3)
    chain = Chain(model)
    states = chain.run(x)
    delta = torch.nn.functional.one_hot(y, 3) - model(x).detach().softmax(1)
    moved = gauss_newton_targets(chain, states, delta, 0.1)
    expected = sum(torch.outer(moved[1][b] * (1 - states.r[2][b] ** 2), states.r[1][b]) for b in range(3)) / 3
    assert torch.allclose(target_updates(chain, x, y, 0.1)[1], expected, atol=1e-12)
