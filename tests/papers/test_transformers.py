"""Studies of small language models: arms, the choice of rates, what is kept, marks; and exponents from known power laws."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apical import data
from apical.bench.names import find_rule, make_rule
from apical.data import Dataset
from apical.models import Transformer
from apical_papers.transformers import language, larger, scaling
from apical_papers.transformers.recipes import LANGUAGE, STUDIES
from apical_papers.transformers.training import Arm, Setting, recipe_of, trained


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    made = data.load("text-python", validation=8, train_limit=128, test_limit=8)
    for study in (language, scaling):
        monkeypatch.setattr(study, "data", lambda: made)
    return made


def test_the_protocol_is_that_of_the_specification() -> None:
    recipe = recipe_of(Arm("bp"), Setting("bp", 1e-2, 0, 64, 400))
    assert (recipe.epochs * recipe.epoch_steps, recipe.batch_size, recipe.context) == (400, 32, 64)
    assert (recipe.optimizer, recipe.momentum, recipe.beta2, recipe.weight_decay, recipe.decay_on) == (
        *("adamw", 0.9, 0.98, (0.01,)),
        "matrices",
    )
    assert (recipe.lr_warmup, recipe.lr_cosine, recipe.lr_final) == (20, 4, 0.1)
    assert (recipe.clip, recipe.clip_over) == (1.0, "network")
    assert recipe_of(Arm("kp", decay=2.5), Setting("kp", 1e-2, 0, 64, 400)).weight_decay == (2.5, 0.01)


@pytest.mark.parametrize("name", language.ARMS)
def test_every_arm_is_a_rule_that_the_model_takes_or_refuses_by_name(name: str) -> None:
    arm = language.ARMS[name]
    find_rule(arm.rule)
    recipe = recipe_of(arm, Setting(name, 1e-2, 0, 8, 4))
    make_rule(recipe, Transformer(11, width=8, context=64), (64,))


def test_head_only_leaves_the_rest(little: Dataset) -> None:
    setting = Setting("head only", 1e-2, 0, 8, 4)
    found = trained(Arm("bp", head_only=True), little, setting)
    assert set(found) >= {"test", "held out", "angles"}
    model = Transformer(little.classes, width=8)
    assert [name for name, _ in model.named_parameters() if name.startswith("head.")] == ["head.weight", "head.bias"]


def test_a_study_keeps_what_is_finished(
    little: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(language.ARMS, "tdca", Arm("tdca", ("teacher=digits",)))  # which has ten outputs
    arguments = ["--steps", "4", "--width", "8", "--seeds", "2", "--rates", "0.01", "0.02", "--arms", "bp", "tdca"]
    assert language.main([*arguments, "--out", str(tmp_path)]) == 0
    first = json.loads((tmp_path / "results.json").read_text())
    assert len(list((tmp_path / "cells").glob("bp-*.json"))) == 3
    spent = sum(json.loads(path.read_text())["seconds"] for path in (tmp_path / "cells").glob("*.json"))
    assert first["seconds"] == pytest.approx(spent, abs=0.1)
    rows = {row[0]: row for row in first["tables"][0]["rows"]}
    assert {"bp", "tdca", "bigram counts", "trigram counts"} <= rows.keys()
    assert rows["tdca"][1] == "refused"
    assert "learner" in rows["tdca"][-1]
    capsys.readouterr()
    assert language.main([*arguments, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert " s  bp" not in printed
    assert " s  tdca" in printed  # a later version may train it
    assert json.loads((tmp_path / "results.json").read_text())["tables"] == first["tables"]
    assert language.main([*arguments, "--out", str(tmp_path), "--kept"]) == 0
    assert " s  " not in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["tables"] == first["tables"]


def test_the_rate_is_chosen_on_held_out_windows() -> None:
    cells = {1.0: {"held out": 2.0, "test": 1.0}, 2.0: {"held out": 1.5, "test": 3.0}, 3.0: {"held out": None, "test": None}}
    assert language._best(cells) == 2.0
    assert language._best({3.0: cells[3.0]}) is None


@pytest.mark.parametrize(
    ("losses", "tried", "bracketed"),
    [
        ((3.0, 2.0, 1.0, 2.0), (2.0, 3.0, 4.0), True),
        ((3.0, 1.0, 2.0, 9.0), (1.0, 2.0, 3.0), True),
        ((4.0, 3.0, 2.0, 1.0), (2.0, 3.0, 4.0), False),
        ((1.0, 2.0, 3.0, 0.0), (1.0, 2.0, 3.0), False),
        ((9.0, 2.0, None, 9.0), (1.0, 2.0, 3.0), True),
    ],
)
def test_rates_are_tried_until_the_best_is_bracketed(
    losses: tuple[float | None, ...], tried: tuple[float, ...], bracketed: bool
) -> None:
    rates = (1.0, 2.0, 3.0, 4.0)
    cells = language.tuned(rates, lambda lr: {"held out": losses[rates.index(lr)]})
    assert tuple(cells) == tried
    assert language.is_bracketed(rates, cells) is bracketed


def test_of_a_stopped_study_the_rates_that_are_there() -> None:
    cells = language.tuned((1.0, 2.0, 3.0, 4.0), lambda lr: {"held out": -lr} if lr < 4 else None)
    assert tuple(cells) == (2.0, 3.0)
    assert not language.is_bracketed((1.0, 2.0, 3.0, 4.0), cells)


def cells_of(losses: dict[str, float]) -> Callable[[float], dict[str, list[dict[str, Any]]]]:
    def with_angle(degrees: float) -> dict[str, list[dict[str, Any]]]:
        angles = {"first": {"q": degrees + 1}, "last": {"q": degrees}}
        return {
            name: [{"test": loss + noise, "angles": angles} for noise in (-0.01, 0.0, 0.011)]
            for name, loss in losses.items()
        }

    return with_angle


@pytest.mark.parametrize(("kp", "degrees", "holds"), [(1.82, 5.0, True), (1.90, 13.0, False)])
def test_marks(kp: float, degrees: float, holds: bool) -> None:
    cells = cells_of({"bp": 1.8, "kp-mirror": kp, "fa": 2.45, "head only": 2.76, "dfa": 2.54})(degrees)
    rows = language.verdicts(cells, {"bigram": 2.44})
    found = {(row["figure"], row["rule"], row["what"]): row["verdict"] == "reproduced" for row in rows}
    assert found["M1", "bp", "test loss minus that of the bigram table"]
    assert found["M2", "kp-mirror", "test loss over that of bp"] is holds
    assert found["M2", "kp-mirror", "largest angle at step 1, degrees"] is holds
    assert found["goal", "kp-mirror", "test loss minus 1.02 times that of bp"] is holds
    assert found["M7", "fa", "test loss minus that of head only, plus 0.2"]
    assert found["M8", "bp", "test loss minus that of dfa, plus 0.2"]
    assert not any(row["rule"] == "pfa-mirror" for row in rows)


def test_a_larger_model_has_the_marks_of_the_smaller_one(little: Dataset, tmp_path: Path) -> None:
    cells = cells_of({"bp": 1.8, "kp-mirror": 1.83, "pfa-wide-mirror-160": 1.90, "fa": 2.45})(14.0)
    rows = larger.verdicts(cells, {"bigram": 2.44})
    found = {(row["rule"], row["mark"]): row["verdict"] == "reproduced" for row in rows}
    assert found == {
        ("bp", "mean ≤ -0.2"): True,
        ("kp-mirror", "mean ≤ 1.02"): True,
        ("pfa-wide-mirror-160", "mean ≤ 1.05"): False,
        ("kp-mirror", "mean ≤ 15"): True,
        ("pfa-wide-mirror-160", "mean ≤ 15"): True,
        ("kp-mirror", "mean ≤ -0.2"): True,
    }
    assert larger.main(["--steps", "4", "--width", "8", "--arms", "bp", "kp-mirror", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["model"] == "gpt-4x8"
    assert {row["rule"] for row in results["verdicts"]} == {"bp", "kp-mirror"}


def test_exponents_of_power_laws() -> None:
    widths = (32, 64, 128)
    assert scaling.exponent(widths, [3.0 * width**-0.1 for width in widths]) == pytest.approx(0.1, abs=1e-12)
    rows = scaling.verdicts({"bp": [0.10, 0.11], "fa": [0.04, 0.05], "kp-mirror": [0.1, 0.1]})
    assert [(row["rule"], row["verdict"]) for row in rows] == [("fa", "reproduced")]


def test_scaling_runs(little: Dataset, tmp_path: Path) -> None:
    arguments = ["--steps", "4", "--seeds", "2", "--widths", "4", "8", "--out", str(tmp_path)]
    assert scaling.main(arguments) == 0
    table = json.loads((tmp_path / "results.json").read_text())["tables"][0]
    assert [row[0] for row in table["rows"]] == list(scaling.NAMES)


def test_recipes_name_their_data() -> None:
    assert LANGUAGE.steps_per_epoch(50_000) * LANGUAGE.epochs == 400
    assert STUDIES["lstm-copy"].default.model == "lstm-128"
