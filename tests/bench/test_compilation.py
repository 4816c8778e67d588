"""Training with compiled steps: the same numbers, resumable to the bit, and one clear line where there is no compiler."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from apical import Backprop, DirectFeedbackAlignment, FeedbackAlignment, models
from apical.bench import compilation
from apical.bench.compilation import CompiledStep
from apical.bench.loop import Training
from apical.bench.recipe import Recipe
from apical.bench.signals import Interrupted, StopSignals
from apical.cli.main import main

pytestmark = pytest.mark.compiles
Begin = Callable[..., Training]
Same = Callable[[Path, Path], None]


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the generation of code, which takes a compiler and minutes."""
    monkeypatch.setattr(compilation, "COMPILE", {"backend": "aot_eager"})
    monkeypatch.setattr(compilation, "check_compiler", lambda device: None)
    monkeypatch.setattr("apical.bench.loop.check_compiler", lambda device: None)


def parameters(training: Training) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in training.rule.parameters()]


@pytest.mark.parametrize("rule", ["kp", "wm", "ep"])  # closed, noisy, settling
def test_compiled_steps_train_as_others_do(begin: Begin, small: Recipe, tmp_path: Path, rule: str) -> None:
    recipe = replace(small, rule=rule, epochs=1, lr=(0.05,), lr_epochs=())
    eager, compiled = begin(recipe, tmp_path / "eager"), begin(replace(recipe, compile=True), tmp_path / "compiled")
    before = parameters(eager)
    assert isinstance(compiled.module, CompiledStep)
    for one, other in zip(before, parameters(compiled), strict=True):  # a batch was shown to the rule, and has left no trace
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    lines = [training.train_epoch() for training in (eager, compiled)]
    assert lines[1]["train_loss"] == pytest.approx(lines[0]["train_loss"], rel=1e-5)
    moved = [not torch.equal(one, other) for one, other in zip(before, parameters(eager), strict=True)]
    assert any(moved)
    for one, other in zip(parameters(eager), parameters(compiled), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_compiled_run_resumes_to_the_bit(begin: Begin, small: Recipe, tmp_path: Path, assert_same_state: Same) -> None:
    recipe = replace(small, rule="wm", compile=True, epochs=2, lr=(0.05,), lr_epochs=())
    whole = begin(recipe, tmp_path / "whole")
    for _ in range(2):
        whole.train_epoch()
    stop = StopSignals()
    part = begin(recipe, tmp_path / "part", stop=stop)

    def on_step(step: int) -> None:
        if step == 3:
            stop.signum = signal.SIGTERM

    with pytest.raises(Interrupted):
        part.train_epoch(on_step)
    part.folder.unlock()
    rest = begin(recipe, tmp_path / "part", resume=True)
    for _ in range(2):
        rest.train_epoch()
    assert_same_state(tmp_path / "whole" / "checkpoint.pt", tmp_path / "part" / "checkpoint.pt")


def test_rules_of_one_process_do_not_use_up_each_others_compilations() -> None:
    torch.compiler.reset()
    inputs, targets = torch.randn(8, 1, 4, 4), torch.randint(0, 3, (8,))

    def step(make: Callable[[nn.Module], Backprop | FeedbackAlignment | DirectFeedbackAlignment]) -> CompiledStep:
        return CompiledStep(make(models.build("mlp-5", (1, 4, 4), 3)), inputs, targets)

    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for make in (Backprop, FeedbackAlignment, DirectFeedbackAlignment):
            step(make)(inputs, targets).backward()


def test_without_a_compiler_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["train", "--compile", "True", "--epochs", "1", "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "--compile needs a C++ compiler, but no-such-compiler was not found" in message
    assert not list(tmp_path.glob("run/*.json*"))


def test_older_results_keep_their_hashes() -> None:
    assert Recipe(compile=False).hash() == Recipe().hash() != Recipe(compile=True).hash()
    assert "compile" in Recipe().to_json()
