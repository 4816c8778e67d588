"""The classification study: its harness passes a teacher that needs no evolution, and a tiny run is kept and reported."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apical.evolution.classification import Classification, Images
from apical.evolution.population import Lifetime
from apical.evolution.strategy import Strategy
from apical_papers.tdca import trials
from apical_papers.tdca.classification import study
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


def test_a_tiny_study_is_kept_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("evotorch")
    life = Lifetime(steps=2)
    arms = {name: replace(setting, lifetime=life, examples=20) for name, setting in study.ARMS.items()}
    for name, small in (
        ("TASKS", 2),
        ("VALIDATION", 1),
        ("LIFETIME", life),
        ("ARMS", arms),
        ("ELSEWHERE", ("usps",)),
        ("STRATEGY", Strategy(population=4)),
        ("unseen", lambda name: Images(*_few(study.digits()[1]), 10, name)),
    ):
        monkeypatch.setattr(study, name, small)
    monkeypatch.setattr(trials, "GRID", (0.01, 0.02))
    asked = ["--out", str(tmp_path), "--seeds", "2", "--generations", "1", "--arms", "unit"]
    assert study.main(asked) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    cells = [json.loads((tmp_path / "cells" / f"unit-{seed}.json").read_text()) for seed in (study.FIRST, study.FIRST + 1)]
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
