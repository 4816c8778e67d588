"""The study of rules around rules, and of semi-implicit steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from apical_papers.around import damping, study, window


def small(name: str = "mnist") -> study.Digits:
    """128 of the embedded digits in place of MNIST."""
    digits = original("digits")
    digits.x, digits.y = digits.x[:128], digits.y[:128]
    return digits


original = study.Digits


def test_pixels_lie_between_zero_and_one() -> None:
    digits = original("digits")
    assert (float(digits.x.min()), float(digits.x.max())) == (0.0, 1.0)
    assert len(digits.test[0]) == len(digits.test[1]) > 300


def test_arms_begin_alike_and_differ_by_their_gain() -> None:
    digits = original("digits")
    runs = {
        arm: study.accuracies(rule, options, digits, (20,), 0, 1e-9, 256, 1) for arm, (rule, options) in study.ARMS.items()
    }
    assert len({tuple(run) for run in runs.values()}) == 1  # a step of nearly nothing: the same initial weights
    network = study.network((8, 6, 4), 0)
    assert torch.equal(network[0].weight, study.network((8, 6, 4), 0)[0].weight)
    assert float(network[0].weight.detach().abs().max()) <= (6 / 8) ** 0.5


def cell(noise: float, gain: float) -> dict[str, Any]:
    """Results in which node importance, the solver and semi-implicit steps are better than their controls by `gain`."""

    def run(level: float) -> list[float]:
        return [level + noise, level + noise]

    def solver(rule: str, spread: float) -> dict[str, list[float]]:
        return {str(lr): run(0.9 - i * spread) for i, lr in enumerate(study.SOLVED[rule])}

    arms = {"bp": 0.6, "grapes": 0.6 + gain, "local": 0.6, "matched": 0.6}
    shallow = {f"2 hidden layers, lr {lr:g}": {arm: run(value) for arm, value in arms.items()} for lr in study.RATES}
    deep = {"5 hidden layers, lr 0.1": {arm: run(1.2 - value) for arm, value in arms.items()}}
    solved = {
        name: solver(rule, 0.02 + (gain if name == rule else -gain))
        for rule in study.SOLVED
        for name in (rule, f"cwu:{rule}")
    }
    steps = [str(eta) for eta in study.ETAS]
    return {
        "grapes": shallow | deep,
        "solver": solved,
        "cosines": {"first": (0.6 - gain, 0.985 + gain)},
        "semi-implicit": {"sibp": {step: run(0.84 + gain) for step in steps}, "sgd": {step: run(0.84) for step in steps}},
    }


def test_verdicts_follow_the_numbers() -> None:
    for gain, verdict in ((0.013, "reproduced"), (-0.013, "not reproduced")):
        rows = study.verdicts([cell(noise, gain + noise) for noise in (-1e-4, 0.0, 1e-4)])
        said = {(row["rule"], row["what"]): row["verdict"] for row in rows}
        bare = {key for key in said if key[0] in ("bp", "dfa", "ccl")}
        assert {verdict} == {said[key] for key in said.keys() - bare}, said


def test_it_runs_and_keeps_its_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "Digits", small)
    assert study.main(["--out", str(tmp_path), "--seeds", "2", "--epochs", "1", "--jobs", "1"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert {row["figure"] for row in results["verdicts"]} == {"GRAPES", "CWU", "SIBP"}
    cosines = {row["what"]: row["mean"] for row in results["verdicts"] if "what was asked" in row["what"]}
    assert len(cosines) == 3
    assert results["tables"][0]["title"] == "Node importance"


def damped(spread: float, cosine: float) -> dict[str, Any]:
    """A seed whose accuracies have that spread over the rates, at every damping."""

    def runs(rates: tuple[float, ...]) -> dict[str, dict[str, float]]:
        return {str(lr): {"test": 0.9 - spread * (i == 1), "train": 1.0, "growth": 2.0} for i, lr in enumerate(rates)}

    each = {"runs": {rule: runs(rates) for rule, rates in study.SOLVED.items()}, "cosine": cosine}
    return {str(value): each for value in damping.DAMPING}


@pytest.mark.parametrize(("spread", "cosine", "said"), [(0.02, 0.995, "reproduced"), (0.04, 0.985, "not reproduced")])
def test_verdicts_on_damping_follow_the_numbers(spread: float, cosine: float, said: str) -> None:
    rows = damping.verdicts([damped(spread + noise, cosine) for noise in (-1e-4, 0.0, 1e-4)])
    assert {row["verdict"] for row in rows} == {said}
    assert len(rows) == len(damping.DAMPING) * (len(study.SOLVED) + 1)


def test_the_damping_study_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(damping, "Digits", small)
    assert damping.main(["--out", str(tmp_path), "--seeds", "2", "--epochs", "1", "--jobs", "1"]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["tables"][0]["rows"]
    assert len(rows) == 2 * sum(len(rates) for rates in study.SOLVED.values())


@pytest.mark.parametrize(
    ("below", "solved", "bare"), [(0.02, "reproduced", "not reproduced"), (0.04, "not reproduced", "reproduced")]
)
def test_verdicts_on_chosen_ranges_follow_the_numbers(below: float, solved: str, bare: str) -> None:
    rows = window.verdicts([{arm: {"below": below + noise} for arm in window.arms()} for noise in (-1e-4, 0.0, 1e-4)])
    assert {row["verdict"] for row in rows if row["rule"].startswith("cwu")} == {solved}
    assert {row["verdict"] for row in rows if not row["rule"].startswith("cwu")} == {bare}
    assert len(rows) == len(window.RULES) * (1 + len(window.DAMPING))


def test_ranges_span_a_factor_of_twenty() -> None:
    spans = zip(window.RATES, window.RATES[window.SPAN - 1 :], strict=False)
    assert all(high / low == pytest.approx(20, rel=5e-3) for low, high in spans)


def test_ranges_are_chosen_by_one_seed_and_tested_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best rate of all is tested too, where it lies outside the range."""
    seen = []

    def told(rule: str, options: Any, digits: Any, sizes: Any, seed: int, lr: float, *_: Any) -> list[float]:
        seen.append((seed, lr))
        return [
            {0.1: 0.2, 0.3: 0.8, 0.7: 0.8, 2.0: 0.8, 5.4: 0.8, 15.0: 0.95, 40.0: 0.1}[lr] - (seed >= window.TEST) * lr / 1000
        ]

    monkeypatch.setattr(window, "Digits", lambda: None)
    monkeypatch.setattr(window, "accuracies", told)
    monkeypatch.setattr(window, "RATES", (0.1, 0.3, 0.7, 2.0, 5.4, 15.0, 40.0))
    assert window.main(["--out", str(tmp_path), "--seeds", "2", "--epochs", "1", "--jobs", "1"]) == 0
    assert {lr for seed, lr in seen if seed >= window.TEST} == {0.3, 0.7, 2.0, 5.4, 15.0}
    assert {seed for seed, _ in seen} == {500, 501, 600, 601}
    row = json.loads((tmp_path / "results.json").read_text())["tables"][0]["rows"][0]
    assert row[1] == "0.3 to 5.4 (2)"
    assert float(row[3].split()[0]) == pytest.approx(0.95 - 0.015 - (0.8 - 0.0054), abs=1e-3)
