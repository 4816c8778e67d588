"""Warm-up, centralisation and the cosine schedule, from the options to the weights; runs on images keep examples."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from apical import data
from apical.bench import at_epoch, loop
from apical.bench.distributed import World
from apical.bench.loop import Training
from apical.bench.names import make_rule, resolve
from apical.bench.optimizer import make_optimizer, scheduled, shape_gradients
from apical.bench.recipe import Recipe
from apical.bench.report import folder as report
from apical.bench.report.records import read
from apical.bench.run_folder import RunFolder
from apical.data import Dataset, Split
from apical.errors import CheckpointError, ConfigError


def gradients(recipe: Recipe, step: int | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Before and after shaping, of a small perceptron."""
    torch.manual_seed(0)
    rule = make_rule(recipe, torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)))
    optimizer = make_optimizer(replace(recipe, weight_decay=(0.0,)), rule)
    for parameter in rule.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = [parameter.grad.clone() for parameter in rule.parameters()]
    shape_gradients(optimizer, recipe, step)
    return list(zip(before, (parameter.grad for parameter in rule.parameters()), strict=True))


def test_gradients_grow_over_the_first_steps() -> None:
    recipe = Recipe(warmup_steps=4)
    for step, factor in ((0, 0.25), (2, 0.75), (3, 1.0), (9, 1.0), (None, 1.0)):
        for before, after in gradients(recipe, step):
            torch.testing.assert_close(after, factor * before)


def test_centralised_gradients_of_weights_have_no_mean_over_inputs() -> None:
    for before, after in gradients(Recipe(centralise=True), 0):
        wanted = before if before.dim() == 1 else before - before.mean(1, keepdim=True)
        torch.testing.assert_close(after, wanted)


def test_clipping_comes_last() -> None:
    pairs = gradients(Recipe(centralise=True, warmup_steps=2, clip=0.1, clip_over="network"), 0)
    assert math.sqrt(sum(float(after.square().sum()) for _, after in pairs)) == pytest.approx(0.1, rel=1e-4)


def test_the_rate_falls_along_half_a_cosine() -> None:
    recipe = Recipe(lr=(1.0,), lr_cosine=10, lr_min=0.2, weight_decay=(0.0,))
    assert [round(scheduled(recipe, epoch)[0], 6) for epoch in (0, 5, 10, 12)] == [1.0, 0.6, 0.2, 0.2]
    with pytest.raises(ConfigError, match="lr-cosine starts from one"):
        Recipe(lr=(1.0, 0.1), lr_epochs=(3,), lr_cosine=10)
    with pytest.raises(ConfigError, match="warmup-steps must not be negative"):
        Recipe(warmup_steps=-1)


@pytest.fixture
def pictures() -> Dataset:
    draw = torch.Generator().manual_seed(0)

    def split(size: int) -> Split:
        inputs = torch.rand(size, 1, 8, 8, generator=draw)
        return Split(inputs, inputs.flatten(1))

    return Dataset("pictures", split(64), split(16), split(24), 64, (0.0,), (1.0,), "the test")


def test_an_autoencoder_keeps_examples_and_the_report_shows_them(pictures: Dataset, tmp_path: Path) -> None:
    recipe = Recipe(
        rule="ccl", rule_options=("pair=match",), model="conv-autoencoder-4-6", loss="mse", epochs=2, batch_size=16, probe=16
    )
    resolved, notes = resolve(replace(recipe, weight_decay=(0.0,), device="cpu"), 64)
    training = Training(resolved, pictures, make_rule, RunFolder(tmp_path), World(0, 1, torch.device("cpu")))
    training.start(resume=False, command="test", notes=notes, environment={})
    training.train_epoch()
    assert not (tmp_path / "examples.npz").exists()
    training.train_epoch()
    with np.load(tmp_path / "examples.npz", allow_pickle=False) as kept:
        np.testing.assert_array_equal(kept["images"], pictures.test.inputs[:8].numpy())
        with torch.no_grad():
            wanted = training.rule.model.eval()(pictures.test.inputs[:8]).view(8, 1, 8, 8)
        np.testing.assert_allclose(kept["made"], wanted.numpy(), rtol=1e-5, atol=1e-7)
    report.write(tmp_path)
    assert {"reconstructions.png", "pair_cka.png"} <= {path.name for path in (tmp_path / "figures").iterdir()}
    (tmp_path / "examples.npz").write_bytes(b"PK damaged")
    with pytest.raises(CheckpointError, match=r"examples.npz is damaged"):
        read(tmp_path)


def test_read_outs_are_recorded_and_runs_are_compared_at_an_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = data.load("digits", validation=100, train_limit=320, test_limit=100)
    recipe, notes = resolve(Recipe(rule="ccl", model="mlp-elu-16-16", epochs=2, probe=32, validation=100, lr=(0.5,)), 320)
    folder = tmp_path / "runs" / "ccl" / "seed-0"
    training = Training(recipe, digits, make_rule, RunFolder(folder), World(0, 1, torch.device("cpu")))
    training.start(resume=False, command="test", notes=notes, environment={"commit": "abc", "device": "cpu"})
    for _ in range(2):
        training.train_epoch()
    assert list(training.line["depths"]) == ["linear1", "linear2", "linear3"]
    assert training.line["depths"]["linear3"] == pytest.approx(training.line["test_accuracy"])
    assert 0 <= training.line["layers"]["linear1"]["pair_cka"] <= 1
    out = tmp_path / "rows.json"
    options = ["--epoch", "1", "--recipe", "ccl-mnist", "--out", str(out)]
    assert at_epoch.main([str(tmp_path), *options]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    first = RunFolder(folder).read_metrics()[1]
    assert row["test accuracy"] == f"{100 * first['test_accuracy']:.2f}"
    assert row["published"] == "98.13 ± 0.10 at epoch 100"
    assert row["verdict"] == "outside ± 0.5"
    assert at_epoch.main([str(tmp_path), "--epoch", "7", "--out", str(out)]) == 2
    assert "no run of ccl reached epoch 7" in capsys.readouterr().err


def test_passes_of_the_feedback_weights_have_no_warm_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int | None]] = []
    recipe = Recipe(rule="dfc-ssa", model="mlp-tanh-8", epochs=2, batch_size=32, feedback_passes=2, warmup_steps=3, probe=0)
    resolved, notes = resolve(recipe, 96)
    digits = data.load("digits", train_limit=96, test_limit=50)
    training = Training(resolved, digits, make_rule, RunFolder(tmp_path), World(0, 1, torch.device("cpu")))
    monkeypatch.setattr(loop, "shape_gradients", lambda _, __, step: seen.append((training.rule.phase, step)))
    training.start(resume=False, command="test", notes=notes, environment={})
    for _ in range(2):
        training.train_epoch()
    assert [step for phase, step in seen if phase == "forward"] == list(range(6))
    assert {step for phase, step in seen if phase == "feedback"} == {None}
