"""The study of diffusion: credit per weight by its equations, its limit credit per unit, and a tiny run that is resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apical import TopDownCreditAssignment
from apical.errors import UnsupportedModelError
from apical.evolution.population import Lifetime
from apical.evolution.strategy import Strategy
from apical.rules.top_down.teacher import TopDownNetwork
from apical_papers.tdca import trials as tdca_trials
from apical_papers.tdca.classification.study import digits
from apical_papers.tdca.diffusion import study as tdca_diffusion
from apical_papers.tdca.diffusion.study import ARMS, task
from apical_papers.tdca.synapses import SynapticCredit


def per_unit(network: TopDownNetwork, fan_in: tuple[int, int]) -> TopDownNetwork:
    """A network with a credit per weight that gives each of a unit's weights the credit that `network` gives the unit.

    Units of a layer share relative credit, so that the two divide alike.
    """
    units = (*network.widths, network.outputs)
    emitted = sum(n * (inputs + 1) for n, inputs in zip(units, fan_in, strict=True))
    kind = {"relative": network.relative, "credit": network.credit}
    wide = TopDownNetwork(network.outputs, [emitted - network.outputs], network.hidden, **kind).double()
    state = network.state_dict()
    repeats = torch.cat([torch.full((n,), inputs + 1) for n, inputs in zip(units, fan_in, strict=True)])
    last = {name: state[name].repeat_interleave(repeats, 0) for name in ("body.4.weight", "body.4.bias") if name in state}
    wide.load_state_dict({**state, **last})
    return wide


def learner() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(7, 1, 2, 3, dtype=torch.double), torch.arange(7) % 3


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("kind", [{"credit": "probabilities"}, {"credit": "logits"}, {"credit": "logits", "relative": True}])
def test_equal_credit_for_a_units_weights_is_credit_per_unit(kind: dict[str, Any], silent: bool) -> None:
    torch.manual_seed(0)
    model, network = learner(), TopDownNetwork(3, [4], hidden=8, **kind).double()
    if not network.relative:
        nn.init.normal_(network.body[-1].bias)
    found = []
    for rule in (
        SynapticCredit(model, per_unit(network, (6, 4)), silent=silent),
        TopDownCreditAssignment(model, teacher=network, silent=silent),
    ):
        model.zero_grad()
        torch.manual_seed(1)
        rule(*batch()).backward()
        found.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours - theirs).abs().max() < 1e-12
    assert (found[0][0] is None) == silent


def test_credit_alone_is_the_gradient() -> None:
    torch.manual_seed(0)
    model, teacher = learner(), TopDownNetwork(3, [40], hidden=8).double()
    x, y = batch()
    SynapticCredit(model, teacher, local=False)(x, y).backward()
    p, label = torch.softmax(model(x), 1), torch.eye(3, dtype=torch.double)[y]
    mean = teacher(p, label).mean(0)
    first, second = mean[:28].view(4, 7), mean[28:].view(3, 5)
    for parameter, expected in zip(
        model.parameters(), (first[:, :6], first[:, 6], second[:, :4], second[:, 4]), strict=True
    ):
        assert (parameter.grad - expected).abs().max() < 1e-12


def test_other_networks_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(UnsupportedModelError, match="ReLU"):
        SynapticCredit(model, TopDownNetwork(3, [40], hidden=8))


def test_weights_of_the_top_down_networks() -> None:
    """64-8-4 has 520 + 36 parameters; H = 16 and N = 4 make (2N+1)H + (H+1)H + (H+1)C with C credits or emissions."""
    counts = {arm: task(arm, digits()[0], 0).start.numel() for arm in ARMS}
    emitted = {"weight-alone": 556, "weight": 556, "unit": 12, "sites-8": 12, "sites-4": 8, "sites-2": 6, "sites-1": 5}
    assert counts == {arm: 9 * 16 + 17 * 16 + 17 * c for arm, c in emitted.items()}


def test_weights_where_credit_is_relative() -> None:
    """Its topmost layer has no bias: (2N+1)H + (H+1)H + HC."""
    counts = [task(arm, digits()[0], 0, "logits").start.numel() for arm in ("weight", "unit", "sites-4")]
    assert counts == [9 * 16 + 17 * 16 + 16 * c for c in (556, 12, 8)]


@pytest.mark.usefixtures("undrawn_here")
def test_a_tiny_study_is_kept_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("evotorch")
    for name, small in (
        ("TASKS", 2),
        ("VALIDATION", 1),
        ("LIFETIME", Lifetime(steps=2)),
        ("STRATEGY", Strategy(population=4)),
    ):
        monkeypatch.setattr(tdca_diffusion, name, small)
    monkeypatch.setattr(tdca_trials, "GRID", (0.01, 0.02))
    asked = ["--out", str(tmp_path), "--seeds", "2", "--generations", "1", "--jobs", "1"]
    assert tdca_diffusion.main(asked) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    cells = [json.loads((tmp_path / "cells" / f"seed-{seed}.json").read_text()) for seed in (0, 1)]
    row = next(r for r in results["verdicts"] if "4 sites: accuracy minus (that of credit per weight" in r["what"])
    pairs = [cell["arms"]["sites-4"]["tdca"]["accuracy"] - cell["arms"]["weight"]["tdca"]["accuracy"] for cell in cells]
    assert row["mean"] == pytest.approx(sum(pairs) / 2 + 0.01, rel=1e-3)
    assert len(results["tables"][0]["rows"]) == len(ARMS) + 3  # and two teachers made by hand, and backpropagation
    by_hand = [json.loads((tmp_path / "cells" / f"by-hand-{seed}.json").read_text()) for seed in (0, 1)]
    mean = sum(100 * cell["hand-random"]["accuracy"] for cell in by_hand) / 2
    assert results["tables"][0]["rows"][-2][4].startswith(f"{mean:.3g} ")
    assert "per weight, local factors" in (tmp_path / "report.html").read_text()
    before = {path: path.read_bytes() for path in (tmp_path / "cells").iterdir()}
    assert tdca_diffusion.main(asked) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "cells").iterdir()} == before
    capsys.readouterr()
    assert tdca_diffusion.main([*asked, "--generations", "2"]) == 2
    assert "was made with other settings" in capsys.readouterr().err
