"""The classification study: its harness passes a teacher that needs no evolution, and a tiny run is kept and reported."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from apical.evolution.classification import Classification, Images
from apical.evolution.population import Lifetime
from apical.evolution.strategy import Strategy
from apical_papers.tdca import trials
from apical_papers.tdca.classification import relu, study
from apical_papers.tdca.classification.verdicts import released, verdicts
from apical_papers.tdca.trials import Bench, tuned

RULES = ("tdca", *study.CONTROLS)


def test_the_harness_passes_a_hand_built_teacher() -> None:
    """The error on the logits, and random feedback of it, reach the study's mark without any evolution."""
    task = Classification([study.digits()[1]], study.BASE)
    validation, bench = Bench(task, 4, "harness validation"), Bench(task, 8, "harness")
    found = {}
    for rule in ("hand-random", "hand-silent", "bp"):
        found[rule] = bench.run(rule, [tuned(validation, rule, study.LIFETIME)], study.LIFETIME)[0]
    assert found["hand-random"].accuracy >= found["bp"].accuracy - 0.01
    assert found["hand-random"].loss < 0.02
    assert found["hand-silent"].loss > 3 * found["bp"].loss  # random features alone do not pass


def test_credits_of_other_examples_teach_nothing() -> None:
    task = Classification([study.digits()[1]], study.BASE)
    bench = Bench(task, 4, "harness")
    start = task.start
    shuffled = bench.run("shuffled", [0.02], study.LIFETIME, start)[0]
    assert shuffled.accuracy < 0.6
    silent, whole = (bench.run(rule, [0.02], study.LIFETIME, start)[0] for rule in ("silent", "unevolved"))
    assert silent.losses == whole.losses  # it starts without hidden credit


def invented(loss: Callable[[str, int], float], accuracy: Callable[[str, int], float]) -> list[dict[str, Any]]:
    """Cells of five meta-seeds."""

    def rules(seed: int) -> dict[str, Any]:
        return {rule: {"loss": loss(rule, seed), "accuracy": accuracy(rule, seed)} for rule in RULES}

    parts = ("same_rate", "tuned")
    others = ("elsewhere", "usps"), ("widths", "8")
    return [{part: rules(s) for part in parts} | {part: {name: rules(s)} for part, name in others} for s in range(5)]


@pytest.mark.parametrize(("points", "strong", "stretch"), [(0.3, True, True), (0.8, True, False), (1.4, False, False)])
def test_marks_are_those_that_the_study_names(points: float, strong: bool, stretch: bool) -> None:
    def accuracy(rule: str, seed: int) -> float:
        return 0.95 + 0.001 * seed - (points / 100 + 1e-4 * seed if rule == "tdca" else 0)

    cells = invented(lambda rule, seed: (0.1 if rule == "tdca" else 0.2) + 0.01 * seed * (rule == "bp"), accuracy)
    assert "width 8: accuracy minus 97 % of tuned BP's" in {row["what"] for row in verdicts({"sites-4": cells})}
    rows = {row["what"]: row for row in verdicts({"unit": cells})}
    holds = {what.partition(":")[0]: row["verdict"] == "reproduced" for what, row in rows.items() if "accuracy" in what}
    assert holds["strong form"] == strong
    assert holds["stretch"] == stretch
    assert rows["strong form: loss minus tuned BP's"]["mean"] == pytest.approx(-0.12)
    table = released({"unit": cells, "released": cells})
    assert [row[-1] for row in table["rows"]] == [row["verdict"] for row in list(rows.values())[:4]]
    assert not any("probabilities" in row["rule"] for row in verdicts({"unit": cells, "released": cells}))


@pytest.mark.usefixtures("undrawn_here")
def test_a_tiny_study_is_kept_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("evotorch")
    life = Lifetime(steps=2)
    arms = {name: replace(setting, lifetime=life, examples=20) for name, setting in study.ARMS.items()}
    for name, small in (
        ("LIFETIME", life),
        ("ARMS", arms),
        ("ELSEWHERE", ("usps",)),
        ("STRATEGY", Strategy(population=4)),
        ("unseen", lambda name: Images(*_few(study.digits()[1]), 10, name)),
    ):
        monkeypatch.setattr(study, name, small)
    monkeypatch.setattr(trials, "GRID", (0.01, 0.02))
    asked = ["--out", str(tmp_path), "--seeds", "2", "--generations", "1", "--arms", "unit", "--jobs", "1"]
    asked += ["--tasks", "2", "--validation", "1", "--settled", "2", "--first", "7"]
    assert study.main(asked) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    cells = [json.loads((tmp_path / "cells" / f"unit-{seed}.json").read_text()) for seed in (7, 8)]
    assert [cell["tuned"]["bp"]["lr"] in (0.01, 0.02) and len(cell["tuned"]["bp"]["losses"]) for cell in cells] == [2, 2]
    assert results["title"].endswith("fitness over the last 2 steps")
    assert results["settings"]["settled"] == 2
    row = next(row for row in results["verdicts"] if row["what"] == "strong form: loss minus tuned BP's")
    pairs = [cell["tuned"]["tdca"]["loss"] - cell["tuned"]["bp"]["loss"] for cell in cells]
    assert row["mean"] == pytest.approx(sum(pairs) / 2, rel=1e-3)
    assert any(row["what"].startswith("usps: accuracy") for row in results["verdicts"])
    before = {path: path.read_bytes() for path in (tmp_path / "cells").iterdir()}
    assert study.main(asked) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "cells").iterdir()} == before
    capsys.readouterr()
    assert study.main([*asked[:4], "--generations", "2", *asked[6:]]) == 2
    assert "was made with other settings" in capsys.readouterr().err
    assert study.main([*asked[:6], "--arms", "units"]) == 2
    assert "did you mean 'unit'" in capsys.readouterr().err


def _few(images: Images) -> tuple[Any, Any]:
    return images.inputs[:200], images.targets[:200]


def test_trials_say_how_learners_end() -> None:
    """Logits, swings and silent units, from learners that are trained to each of the last steps alone."""
    task = Classification([study.digits()[1]], replace(study.ARMS["relu"], examples=30))
    bench, life = Bench(task, 2, "ends"), Lifetime(steps=12)
    rates = [0.02, 0.5]
    inputs, targets = (torch.stack([getattr(s, name) for s in bench.samples]) for name in ("inputs", "targets"))
    for rate, trial in zip(rates, bench.run("bp", rates, life), strict=True):
        population, _ = bench.population("bp", None)
        start = torch.stack([population.start(task.learner(seed)) for seed in bench.seeds])
        ends = []
        for steps in range(3, 13):
            shorter = replace(life, steps=steps)
            trained = population.train(start, None, inputs, targets, shorter, lr=torch.tensor([rate, rate]), own=True)
            outputs = population.outputs(trained, inputs, own=True)
            ends.append([float(F.cross_entropy(out, y)) for out, y in zip(outputs, targets, strict=True)])
        assert trial.losses == pytest.approx(ends[-1], rel=1e-4)
        assert trial.logit == pytest.approx(float(outputs.abs().mean()), rel=1e-4)
        assert trial.swings == sum(max(losses) > trials.SWING for losses in zip(*ends, strict=True)) / 2
        silent = []
        for own, x in zip(trained, inputs, strict=True):
            named = population.learner.named(own)
            hidden = F.relu(F.linear(x.flatten(1), named["model.linear1.weight"], named["model.linear1.bias"]))
            silent.append(float((hidden.amax(0) == 0).float().mean()))
        assert trial.dead == pytest.approx(sum(silent) / 2)
    assert trial.dead > 0


def test_the_study_of_relu_learners_reports_both_arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evolution and training are invented; each rule is best at 0.05, and what is reported is each at its best."""
    accuracies = {"tdca": 0.958, "bp": 0.965}
    asked_for: list[str] = []

    def run(self: Bench, rule: str, rates: Sequence[float], lifetime: Lifetime, teacher: torch.Tensor) -> list[trials.Trial]:
        asked_for.append(rule)
        found = [(rate, 0.1 + abs(rate - 0.05) - 0.01 * (rule == "tdca")) for rate in rates]
        right = accuracies.get(rule, 0.9)
        return [trials.Trial(rule, rate, loss, right, (loss,), (right,), 5.0, 0.25, 0.5) for rate, loss in found]

    start = torch.zeros(2)
    monkeypatch.setattr(study, "evolved", lambda *_: ({"parameters": 2, "curve": []}, {"tdca": start, "start": start}))
    monkeypatch.setattr(Bench, "run", run)
    options = ["--out", str(tmp_path), "--seeds", "2", "--jobs", "1"]
    assert relu.main(options) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {row["what"]: row for row in results["verdicts"]}
    assert rows["accuracy minus (tuned BP's minus 1 point)"]["mean"] == pytest.approx(0.003)
    assert rows["loss minus tuned BP's"]["mean"] == pytest.approx(-0.01)
    names = [line[0] for line in results["tables"][0]["rows"]]
    assert len(names) == len(set(names)) == len({*asked_for}) + 1  # TDCA in both arms
    assert all(line[2] == "0.05" and line[-3:-1] == ["25 [25, 25]", "50 [50, 50]"] for line in results["tables"][0]["rows"])
    done = len(asked_for)
    assert relu.main(options) == 0
    assert len(asked_for) == done
    assert relu.main([*options, "--arms", "errors"]) == 2
