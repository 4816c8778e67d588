"""Targets that are numbers: losses instead of accuracies, from the loop to the report."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from apical.bench.distributed import World
from apical.bench.document import significant
from apical.bench.figures import curves as figures
from apical.bench.loop import Training
from apical.bench.names import RULES, make_rule, resolve
from apical.bench.progress import describe, results_table, score_name
from apical.bench.recipe import Recipe
from apical.bench.report import folder as report
from apical.bench.report.records import Comparison, Run, read
from apical.bench.run_folder import RunFolder, write_json
from apical.bench.schedule import data_order
from apical.cli.main import main
from apical.data import Dataset, Split
from apical.errors import ConfigError

pytestmark = pytest.mark.usefixtures("undrawn")
RECIPE = Recipe(
    model="mlp-tanh-8", loss="mse", epochs=2, batch_size=16, probe=16, lr=(0.05,), weight_decay=(0.0,), device="cpu"
)


@pytest.fixture(scope="module")
def line() -> Dataset:
    """Six numbers to three, by a fixed matrix."""
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 3, generator=draw)

    def split(size: int) -> Split:
        inputs = torch.randn(size, 6, generator=draw)
        return Split(inputs, inputs @ matrix)

    return Dataset("line", split(96), split(32), split(40), 3, (0.0,) * 6, (1.0,) * 6, "the test")


@pytest.fixture
def begin(line: Dataset) -> Callable[..., Training]:
    def make(recipe: Recipe, path: Path) -> Training:
        resolved, notes = resolve(recipe, len(line.train))
        training = Training(resolved, line, make_rule, RunFolder(path), World(0, 1, torch.device("cpu")))
        training.start(resume=False, command="test", notes=notes, environment={"commit": None})
        return training

    return make


def mean_squared_error(model: torch.nn.Module, split: Split) -> float:
    with torch.no_grad():
        return float((model(split.inputs) - split.targets).double().square().sum() / split.targets.numel())


def test_losses_are_mean_squared_errors_and_there_is_no_accuracy(begin: Callable[..., Training], tmp_path: Path) -> None:
    training = begin(RECIPE, tmp_path)
    model, train = copy.deepcopy(training.rule.model), training.dataset.train
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), []
    for batch in data_order(96, 0, 1).split(16):
        optimizer.zero_grad()
        loss = ((model(train.inputs[batch]) - train.targets[batch]) ** 2).sum() / (3 * 16)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    found = training.train_epoch()
    assert found["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found["test_loss"] == pytest.approx(mean_squared_error(model, training.dataset.test), rel=1e-5)
    assert training.dataset.validation is not None
    assert found["validation_loss"] == pytest.approx(mean_squared_error(model, training.dataset.validation), rel=1e-5)
    assert [found[f"{split}_accuracy"] for split in ("train", "test", "validation")] == [None] * 3
    assert training.result()["test_accuracy"] is None
    assert training.result()["test_loss"] == found["test_loss"]


OF_CLASSES = ("local-sim", "local-both", "ff", "scff", "csdp")


@pytest.mark.parametrize(
    "rule",
    [rule for rule in RULES if rule not in ("bp", "corinfomax") and not rule.startswith(("ccl", "tdca", *OF_CLASSES))],
)  # corinfomax answers from 0 to 1 only
def test_every_rule_learns_regression(begin: Callable[..., Training], tmp_path: Path, rule: str) -> None:
    options = ("beta=0.1",) if rule == "hep" else ()  # errors are large: nudges of 0.4 leave the branch (off_branch 0.3)
    model = "mlp-mu-16x2" if rule == "mupc" else RECIPE.model
    training = begin(replace(RECIPE, rule=rule, model=model, rule_options=options, epochs=30, probe=0), tmp_path)
    before = training.line["test_loss"]
    assert any(training.train_epoch()["test_loss"] < before / 2 for _ in range(30))


def test_classification_losses_are_refused(line: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="add --loss mse"):
        Training(
            replace(RECIPE, loss="cross_entropy"), line, make_rule, RunFolder(tmp_path), World(0, 1, torch.device("cpu"))
        )


def test_what_people_see_is_the_test_loss(begin: Callable[..., Training], tmp_path: Path) -> None:
    rows = []
    for rule, seed in (("bp", 0), ("bp", 1), ("fa", 0), ("fa", 1)):
        training = begin(replace(RECIPE, rule=rule, seed=seed), tmp_path / "runs" / rule / f"seed-{seed}")
        for _ in range(2):
            training.train_epoch()
        write_json(training.folder.result, training.result())
        rows.append(training.result())
    last = training.line
    assert f"test loss {last['test_loss']:.4g}" in " ".join(describe(last, 2).split())
    console = Console(width=120, force_terminal=False)
    with console.capture() as capture:
        console.print(results_table(rows))
    table = capture.get()
    assert "test loss" in table
    mean = (rows[0]["test_loss"] + rows[1]["test_loss"]) / 2
    assert f"{mean:.4g} ±" in table
    assert "accuracy" not in table

    comparison = read(tmp_path)
    assert comparison.score.is_loss
    bp, fa = report.summarise(comparison)
    assert bp.scores(comparison.score) == (rows[0]["test_loss"], rows[1]["test_loss"])
    assert [drawing.stem for drawing in figures.draw(comparison)][:3] == ["test_loss", "loss", "final_test_loss"]
    page = report.write(tmp_path).read_text()
    assert "Test loss" in page
    assert "Test accuracy" not in page
    words = report.describe(comparison)
    assert f"Backpropagation reached a test loss of {significant(mean)} ± " in words
    assert "accuracy" not in words
    ordered = sum(fa.scores(comparison.score)) > sum(bp.scores(comparison.score))
    assert ("above it" if ordered else "below it") in words


def test_one_run_with_an_accuracy_makes_it_classification() -> None:
    empty = Run("bp", 0, {}, {}, (), (), None)
    loss = Run("bp", 1, {}, {}, (0,), ({"test_loss": 1.0},), None)
    both = Run("bp", 2, {}, {}, (0,), ({"test_loss": 1.0, "test_accuracy": 0.5},), None)
    for runs, is_loss in (((empty,), False), ((empty, loss), True), ((loss, both), False)):
        assert Comparison("", ("bp",), runs, single=False).score.is_loss is is_loss
    assert score_name([]) == "test accuracy"
    assert score_name([{"test_loss": 1.0, "test_accuracy": None}]) == "test loss"
    assert score_name([{"test_loss": 1.0, "test_accuracy": 0.1}, {"test_accuracy": None}]) == "test accuracy"


SMALL = ("--model", "mlp-tanh-8", "--epochs", "1", "--train-limit", "320", "--test-limit", "100", "--device", "cpu")


def test_student_teacher_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["compare", "--rules", "bp", "dfa", "--seeds", "1", "--data", "student-teacher", *SMALL, "--out", str(out)]
    assert main([*arguments, "--loss", "cross_entropy"]) == 2
    assert "add --loss mse" in capsys.readouterr().err
    assert not out.exists()
    assert main([*arguments, "--lr", "1e-5", "--validation", "1000"]) == 0
    printed = capsys.readouterr().out
    assert "the targets of student-teacher are numbers: the loss is mse" in printed
    assert "test loss" in printed
    assert "accuracy" not in printed
    rows: list[dict[str, Any]] = json.loads((out / "summary.json").read_text())
    assert [row["test_accuracy"] for row in rows] == [None, None]
    assert all(row["test_loss"] > 0 and row["validation_loss"] > 0 for row in rows)
    one = ["train", "--data", "student-teacher-1", *SMALL, "--loss", "mse", "--lr", "1e-5"]
    assert main([*one, "--out", str(tmp_path / "one")]) == 0


def test_mse_on_classes_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "--loss", "mse", "--out", str(tmp_path / "out")]) == 2
    assert "--loss mse needs numbers as targets; those of digits are classes" in capsys.readouterr().err
