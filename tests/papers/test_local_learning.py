"""The studies of local classifiers and of forward-forward."""

import json
from pathlib import Path
from typing import Any

import pytest

from apical_papers.forward import study as forward
from apical_papers.local import study as local


def test_pixels_are_between_0_and_1() -> None:
    data = local.pixels("digits", 300, 100)
    for split in (data.train, data.test):
        assert float(split.inputs.min()) == pytest.approx(0, abs=1e-6)
        assert float(split.inputs.max()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("arm", "norm"), [("bp", True), ("both", True), ("last layer", True)])
def test_a_local_training_learns(arm: str, norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(local.SETTINGS, "widths", "32-32")
    monkeypatch.setitem(local.SETTINGS, "batch size", 20)
    monkeypatch.setitem(local.SETTINGS, "adam", 1e-2)
    found = local.trained(local.pixels("digits", 300, 100), 0, 3, arm, norm)
    assert found["finite"] == 1
    assert found["accuracy"] > 0.3


@pytest.mark.parametrize("arm", ["symba, all negatives", "hidden layers untrained", "scff", "bp"])
def test_a_forward_training_learns(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(forward.SETTINGS, "widths", "32-32-32")
    monkeypatch.setitem(forward.SETTINGS, "batch size", 20)
    first, last = forward.trained(local.pixels("digits", 300, 100), 0, (1, 3), arm)
    assert last["answer"] > 0.3
    assert ("goodness" in first) == (arm not in ("scff", "bp"))
    if arm == "hidden layers untrained":
        assert last["goodness"] < 0.3


@pytest.mark.parametrize("module", [local, forward], ids=["local", "forward"])
def test_a_study_keeps_what_is_finished(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cell(data: object, seed: int, epochs: Any, arm: str, *norm: bool) -> Any:
        good = {"bp": 0.95, "last layer": 0.7, "hidden layers untrained": 0.8}.get(arm, 0.93) + 0.001 * seed
        if module is local:
            return {"accuracy": good, "finite": 1.0}
        return [{"answer": good, "goodness": good - 0.01}] * len(epochs)

    monkeypatch.setattr(module, "trained", lambda data, seed, epochs, arm, norm=False: cell(data, seed, epochs, arm, norm))
    monkeypatch.setattr(module, "pixels", lambda *sizes: None)
    arguments = ["--out", str(tmp_path), "--seeds", "2", "--epochs", "4", "--jobs", "1"]
    assert module.main(arguments) == 0
    first = json.loads((tmp_path / "results.json").read_text())
    told = {row["what"]: row["verdict"] for row in first["verdicts"]}
    known = "with BatchNorm, minus the last layer alone" if module is local else "accuracy by goodness, in the end"
    assert told[known] == "reproduced"
    monkeypatch.setattr(module, "trained", None)  # nothing is run again
    assert module.main(arguments) == 0
    assert json.loads((tmp_path / "results.json").read_text())["verdicts"] == first["verdicts"]
