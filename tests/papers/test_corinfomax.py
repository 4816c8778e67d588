"""The studies of CorInfoMax."""

import json
from pathlib import Path

import pytest

from apical.data import load
from apical_papers.corinfomax import recipes as corinfomax
from apical_papers.corinfomax import study as corinfomax_study


def test_rates_fall_and_jump_as_in_the_released_code() -> None:
    rates, epochs = corinfomax.falling(1.0, 20, jump=True)
    assert rates[14] == pytest.approx(0.95**14, rel=1e-5)
    assert rates[15] == pytest.approx(0.9**15, rel=1e-5)
    assert epochs == tuple(range(1, 20))
    assert corinfomax.falling(2.0, 20, jump=False)[0][15] == pytest.approx(2 * 0.95**15, rel=1e-5)


def test_a_training_learns_and_aligns() -> None:
    found = corinfomax_study.trained(load("digits-raw", train_limit=400, test_limit=100), 1, 3)
    assert found["accuracy"] > 0.4
    assert found["after"] < found["before"] - 3
    assert 80 < found["before"] < 100


def test_the_study_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(digits: object, seed: int, epochs: int, forward: float = 1.0, **options: object) -> dict[str, float]:
        accuracy = 0.1 if options.get("step") == 0.15 else 0.8 + 0.15 * (forward == 1.0)
        activity = 3.0 if options.get("sparse") == corinfomax_study.SPARSE else 5.0
        return {
            "accuracy": accuracy + 0.002 * seed,
            "dead": 0.0,
            "activity": activity + 0.1 * seed,
            "before": 90.0,
            "after": 65.0 + seed,
        }

    monkeypatch.setattr(corinfomax_study, "trained", trained)
    arguments = ["--out", str(tmp_path), "--seeds", "2", "--epochs", "1", "--jobs", "1"]
    assert corinfomax_study.main(arguments) == 0
    first = json.loads((tmp_path / "results.json").read_text())
    told = {row["what"]: row["verdict"] for row in first["verdicts"]}
    assert told["accuracy at step 0.15, minus 0.3"] == "reproduced"
    assert told["degrees between both ways after training, minus 30"] == "reproduced"
    monkeypatch.setattr(corinfomax_study, "trained", None)  # nothing is run again
    assert corinfomax_study.main(arguments) == 0
    assert json.loads((tmp_path / "results.json").read_text())["verdicts"] == first["verdicts"]
    assert corinfomax_study.main(["--out", str(tmp_path), "--seeds", "1"]) == 2
