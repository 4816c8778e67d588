"""The studies of equilibrium propagation."""

import json
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from apical import models
from apical.bench.cells import side_by_side
from apical.bench.finding import at_least
from apical.errors import ApicalError
from apical.rules.equilibrium.equilibrium_propagation import EquilibriumPropagation
from apical_papers.equilibrium import logic as equilibrium_logic
from apical_papers.equilibrium import noise as equilibrium_noise
from apical_papers.equilibrium import study as equilibrium_study


def directed(asymmetry: float) -> EquilibriumPropagation:
    torch.manual_seed(0)
    model = models.build("mlp-sigmoid-6-5", (1, 2, 2), 3)
    return EquilibriumPropagation(
        model, weights="directed", asymmetry=asymmetry, beta=1e-3, free_steps=200, nudged_steps=200
    ).double()


def test_with_alike_weights_states_move_by_the_adjoint() -> None:
    torch.manual_seed(1)
    x, y = torch.rand(4, 1, 2, 2).double(), torch.arange(4) % 3
    assert equilibrium_study.adjoint_cosines(directed(0.0), x, y) == pytest.approx((1.0, 1.0), abs=1e-5)
    whole, first = equilibrium_study.adjoint_cosines(directed(90.0), x, y)
    assert first < 0.999
    assert whole < 1 - 1e-6


def test_symmetry_is_that_of_the_jacobian() -> None:
    rule = directed(90.0)
    x = torch.rand(1, 4).double()
    net, back = rule.network, [each.detach() for each in rule.back]
    given = [g.detach() for g in net.given(x) if g is not None]

    def field(u: torch.Tensor) -> torch.Tensor:  # in activities: the activation is passed over
        low, high = u[:6], u[6:]
        return torch.cat((given[0][0] + high @ back[0], low @ net.stages[1].layer.weight.detach().T + given[1])) - u

    j = torch.func.jacrev(field)(torch.rand(11).double())
    alike, unlike = ((j + j.T) / 2).norm(), ((j - j.T) / 2).norm()
    assert equilibrium_study.symmetry(rule) == pytest.approx(float(alike / (alike + unlike)), rel=1e-12)
    assert equilibrium_study.symmetry(directed(0.0)) == 1.0


def test_the_study_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("directions", "orders"):
        found = {key: 0.5 + 0.1 * len(key) for key in ("5", "10", "20", "40", "one-sided", "symmetric", "N = 4")}
        monkeypatch.setattr(
            equilibrium_study, name, lambda digits, seed, found=found: {k: v + seed for k, v in found.items()}
        )
    values = {"cosine": 0.5, "cosine, layer 1": 0.4, "symmetry": 0.7, "accuracy": 0.9}
    monkeypatch.setattr(
        equilibrium_study,
        "directed",
        lambda *given: {k: v * (1 + 0.1 * given[2] + 0.01 * given[3]) for k, v in values.items()},
    )
    monkeypatch.setattr(
        equilibrium_study, "decaying", lambda digits, seed, epochs: {"before": 90.0, "after": 50.0 + seed, "accuracy": 0.9}
    )
    monkeypatch.setattr(equilibrium_study, "original", lambda seed, epochs: 0.95 + 0.001 * seed)
    arguments = ["--out", str(tmp_path), "--seeds", "2", "--epochs", "1", "--jobs", "1"]
    assert equilibrium_study.main(arguments) == 0
    first = json.loads((tmp_path / "results.json").read_text())
    assert {row["verdict"] for row in first["verdicts"]} == {"reproduced", "not reproduced"}
    monkeypatch.setattr(equilibrium_study, "original", None)  # nothing is run again
    assert equilibrium_study.main(arguments) == 0
    assert json.loads((tmp_path / "results.json").read_text())["verdicts"] == first["verdicts"]
    assert equilibrium_study.main(["--out", str(tmp_path), "--seeds", "1"]) == 2


def test_the_study_of_noise_runs(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), "--seeds", "2", "--epochs", "1", "--train-limit", "20", "--jobs", "1"]
    assert equilibrium_noise.main(arguments) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert len(list((tmp_path / "cells").iterdir())) == 20
    assert [row["figure"] for row in found["verdicts"]] == ["K1"] * 4 + ["K2"] * 3
    assert equilibrium_noise.main(["--out", str(tmp_path), "--epochs", "0"]) == 2


def test_verdicts_of_noise_follow_the_accuracies() -> None:
    def values(method: str, noise: float) -> list[float]:
        good = "N" in method or noise == 0
        return [0.95 + 0.001 * k if good else 0.1 + 0.001 * k for k in range(3)]

    assert {row["verdict"] for row in equilibrium_noise.verdicts("mnist", values)} == {"reproduced"}
    told = {row["what"]: row["verdict"] for row in equilibrium_noise.verdicts("digits", values)}
    assert told["one-sided, 0.02, noise 0.04: accuracy minus 0.5"] == "reproduced"
    one_sided = "N = 2, 0.4, without noise: accuracy minus that of one-sided, 1"
    assert told[one_sided] == "reproduced"  # as good

    def worse(method: str, noise: float) -> list[float]:
        return [value - 0.001 * method.startswith("N = 2") for value in values(method, noise)]

    told = {row["what"]: row["verdict"] for row in equilibrium_noise.verdicts("digits", worse)}
    assert told[one_sided] == "not reproduced"


def test_marks_of_a_mean_and_of_the_worst_seed() -> None:
    values = [0.95, 0.9, 0.88]
    assert at_least("P1", "", "accuracy", values, 0.9, 0.75)["verdict"] == "reproduced"
    assert at_least("P1", "", "accuracy", values, 0.9, 0.89)["verdict"] == "not reproduced"
    assert at_least("P1", "", "accuracy", values, 0.92)["verdict"] == "not reproduced"
    row = at_least("P1", "", "accuracy", values, 0.9, 0.75)
    assert (row["mark"], row["what"]) == ("mean ≥ 0.9, each ≥ 0.75", "accuracy; the worst seed: 0.88")


def test_the_published_network_is_what_is_trained() -> None:
    setting = equilibrium_noise.SETTINGS["mnist"]
    model = models.build(setting.model, (1, 28, 28), 10)
    assert [m.weight.shape[0] for m in model if isinstance(m, torch.nn.Linear)] == [256, 256, 10]
    rule = EquilibriumPropagation(model, F.cross_entropy, **setting.methods["N = 10, 0.4"])
    assert (rule.free_steps, rule.nudged_steps, rule.points, rule.beta) == (200, 50, 10, 0.4)


def test_the_study_of_logic_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(equilibrium_logic.SETTINGS, "steps of a phase", 20)
    arguments = ["--out", str(tmp_path), "--seeds", "2", "--epochs", "2", "--jobs", "1"]
    assert equilibrium_logic.main(arguments) == 0
    first = json.loads((tmp_path / "results.json").read_text())
    assert len(first["tables"][0]["rows"]) == 2 * len(equilibrium_logic.NETWORKS)
    monkeypatch.setattr(equilibrium_logic, "trained", None)  # nothing is run again
    assert equilibrium_logic.main(arguments) == 0
    assert equilibrium_logic.main(["--out", str(tmp_path), "--seeds", "1"]) == 2


def test_seeds_side_by_side_come_to_the_same(tmp_path: Path) -> None:
    tables = []
    for jobs in ("1", "2"):
        arguments = ["--out", str(tmp_path / jobs), "--seeds", "2", "--epochs", "1", "--jobs", jobs]
        assert equilibrium_logic.main(arguments) == 0
        tables.append(json.loads((tmp_path / jobs / "results.json").read_text())["tables"])
    assert tables[0] == tables[1]
    assert equilibrium_logic.main(["--out", str(tmp_path / "none"), "--jobs", "-1"]) == 2


def test_a_killed_process_is_told_in_one_line(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    assert dict(side_by_side(1, [3, 4], str, tmp_path)) == {3: "3", 4: "4"}
    assert torch.get_num_threads() == threads
    with pytest.raises(ApicalError, match="a training was killed; run the same command again"):
        list(side_by_side(2, [0, signal.SIGKILL], signal.raise_signal, tmp_path))  # signal 0 is none
