"""A loss that grows far above that of an untrained network is a divergence, though it is still finite."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from apical.bench.loop import Training
from apical.bench.recipe import Recipe
from apical.cli.main import main
from apical.core.credit import Credit
from apical.errors import DivergenceError

Begin = Callable[..., Training]


@pytest.mark.parametrize(("times", "diverges"), [(50.0, False), (150.0, True)])
def test_a_loss_that_grows_while_it_stays_finite(
    begin: Begin, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: float, diverges: bool
) -> None:
    training = begin(replace(small, rule="bp", probe=0), tmp_path)
    loss = training.rule.loss
    monkeypatch.setattr(training.rule, "loss", lambda output, targets: loss(output, targets) + times * 2.4)
    if not diverges:
        assert training.train_epoch()["train_loss"] > 50 * 2.3
        return
    with pytest.raises(DivergenceError, match=r"the training loss rose to 3\d\d\.\d, over 100 times that of an untrained"):
        training.train_epoch()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "diverged"
    assert result["epochs"] == 0


def test_a_step_that_throws_the_weights_far_away(begin: Begin, small: Recipe, tmp_path: Path) -> None:
    """Backpropagation with a rate that is too large by far: the weights stay finite, the loss is thousands."""
    training = begin(replace(small, rule="bp", lr=(40.0,), momentum=0.0, probe=0, model="mlp-tanh-64"), tmp_path)
    with pytest.raises(DivergenceError, match="over 100 times that of an untrained network; the last good checkpoint"):
        training.train_epoch()


def test_a_bad_start_that_gets_better_is_not_a_divergence(begin: Begin, small: Recipe, tmp_path: Path) -> None:
    training = begin(replace(small, rule="bp", probe=0, lr=(1e-3,)), tmp_path / "start")
    with torch.no_grad():
        training.rule.model.get_parameter("linear2.weight").mul_(5000)
    training._finish_epoch(trained=False)  # measured as if it began here
    assert training.line["test_loss"] > 300
    training.train_epoch()


def test_what_an_untrained_network_loses_is_kept_with_the_checkpoint(begin: Begin, small: Recipe, tmp_path: Path) -> None:
    first = begin(replace(small, probe=0), tmp_path)
    first.folder.unlock()
    again = begin(replace(small, probe=0), tmp_path, resume=True)
    assert again._untrained == first._untrained >= torch.tensor(10.0).log().item() - 1e-6
    assert isinstance(again.rule(again.dataset.train.inputs[:4], again.dataset.train.targets[:4]), Credit)


def test_a_network_that_is_not_finite_before_its_first_step(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rules go on, and the report says which run has no result and why."""
    (tmp_path / "late.py").write_text(
        "import torch\nfrom torch import nn\n\n\n"
        "class Late(nn.Sequential):\n"
        "    def __init__(self, in_features, num_classes):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(in_features, num_classes))\n\n"
        "    def forward(self, x):\n"
        "        return super().forward(x) * float('nan')\n"
    )
    monkeypatch.chdir(tmp_path)
    small = ["--data", "digits", "--train-limit", "128", "--test-limit", "64", "--epochs", "1"]
    with pytest.warns(RuntimeWarning, match="not finite"):
        assert main(["compare", "--rules", "bp", "--model", "late.py:Late", "--seeds", "2", "--out", "all", *small]) == 3
    said = capsys.readouterr()
    assert said.err == "apical: 2 of 2 runs diverged: bp seed 0, bp seed 1\n"
    result = json.loads(Path("all/runs/bp/seed-1/result.json").read_text())
    assert (result["status"], result["epochs"], result["test_loss"]) == ("diverged", 0, None)
    assert result["message"].endswith(
        "nothing was saved. No step was taken: check the data, the model and its initial weights"
    )
    assert "bp, seed 1: diverged" in Path("all/report.html").read_text()
    assert main(["train", "--rule", "bp", "--model", "late.py:Late", "--out", "one", *small]) == 2
    assert "the test loss is not finite; nothing was saved. No step was taken" in capsys.readouterr().err
