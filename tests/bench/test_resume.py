"""A run that is killed and resumed ends bit for bit where an uninterrupted one ends."""

import gc
import json
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from tests.command import Command

from apical.bench.distributed import World
from apical.bench.loop import Training
from apical.bench.names import make_rule, resolve
from apical.bench.recipe import Optimizer, Recipe
from apical.bench.restore import check_line, restore_optimizer
from apical.bench.run_folder import RunFolder
from apical.bench.signals import Interrupted, StopSignals
from apical.cli.main import main
from apical.data import Dataset, Split
from apical.errors import CheckpointError

Begin = Callable[..., Training]
Same = Callable[[Path, Path], None]
Start = Callable[..., Command]
ALL = ("bp", "fa", "dfa", "usf", "brsf", "frsf", "kp", "wm", "pfa", "pfa-o")


@pytest.mark.parametrize("rule", ALL)
def test_resuming_within_an_epoch_is_exact(
    begin: Begin, small: Recipe, tmp_path: Path, assert_same_state: Same, rule: str
) -> None:
    recipe = replace(small, rule=rule, crop=1, flip=True, lr=(0.05, 0.01), lr_epochs=(1,))
    whole = begin(recipe, tmp_path / "whole")
    for _ in range(2):
        whole.train_epoch()
    stop = StopSignals()
    for stopped_at in (3, 7, 2):  # twice in the first epoch, once in the second
        part = begin(recipe, tmp_path / "part", stop=stop, resume=(tmp_path / "part").exists())

        def on_step(step: int, at: int = stopped_at, part: Training = part) -> None:
            if step == at and (at != 2 or part.epoch == 1):
                stop.signum = signal.SIGTERM

        def train(part: Training = part, on_step: Callable[[int], None] = on_step) -> None:
            while True:
                part.train_epoch(on_step)

        with pytest.raises(Interrupted):
            train()
        stop.signum = None
        part.folder.unlock()
    part = begin(recipe, tmp_path / "part", resume=True)
    part.train_epoch()
    assert_same_state(tmp_path / "whole" / "checkpoint.pt", tmp_path / "part" / "checkpoint.pt")
    timeless = [
        [{k: v for k, v in line.items() if k not in ("ms_per_step", "seconds")} for line in run.folder.read_metrics()]
        for run in (whole, part)
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize(
    "optimizer", [name for name in get_args(Optimizer) if name != "muon" or hasattr(torch.optim, "Muon")]
)
def test_every_optimizer_resumes_exactly(
    begin: Begin, small: Recipe, tmp_path: Path, assert_same_state: Same, optimizer: Optimizer
) -> None:
    recipe = replace(small, rule="pfa", optimizer=optimizer, epochs=2, lr=(0.01,), lr_epochs=())
    whole = begin(recipe, tmp_path / "whole")
    for _ in range(2):
        whole.train_epoch()
    first = begin(recipe, tmp_path / "part")
    first.train_epoch()
    first.folder.unlock()
    begin(recipe, tmp_path / "part", resume=True).train_epoch()
    assert_same_state(tmp_path / "whole" / "checkpoint.pt", tmp_path / "part" / "checkpoint.pt")


@pytest.mark.parametrize("moment", [-0.5, torch.tensor(0.5), torch.ones(1, 1), None])
def test_a_moment_of_another_shape_is_refused(
    begin: Begin, small: Recipe, tmp_path: Path, moment: float | torch.Tensor | None
) -> None:
    training = begin(small, tmp_path)
    training.train_epoch()
    state = training.optimizer.state_dict()
    state["state"][0]["momentum_buffer"] = moment
    if moment is None:  # SGD without momentum has none
        restore_optimizer(training.optimizer, state)
    else:
        with pytest.raises(ValueError, match="momentum_buffer"):
            restore_optimizer(training.optimizer, state)


@pytest.mark.parametrize(
    ("name", "value"), [("test_accuracy", {}), ("train_loss", {"a": 1.0}), ("layers", 3.0), ("lr", [1.0])]
)
def test_metrics_of_another_kind_are_refused(name: str, value: object) -> None:
    line = {"epoch": 1, "train_loss": 1.0, "test_loss": 1.0, "test_accuracy": 0.5, "ms_per_step": None, "layers": {"a": {}}}
    check_line(line, 1)
    with pytest.raises(ValueError, match=name):
        check_line({**line, name: value}, 1)


def test_longer_training_continues_a_finished_run(
    begin: Begin, small: Recipe, tmp_path: Path, assert_same_state: Same
) -> None:
    whole = begin(replace(small, epochs=3), tmp_path / "whole")
    for _ in range(3):
        whole.train_epoch()
    first = begin(small, tmp_path / "part")
    for _ in range(2):
        first.train_epoch()
    first.folder.unlock()
    begin(replace(small, epochs=3), tmp_path / "part", resume=True).train_epoch()
    assert_same_state(tmp_path / "whole" / "checkpoint.pt", tmp_path / "part" / "checkpoint.pt")


@pytest.mark.parametrize("field", ["rule", "optimizer", "partial", "rng"])
def test_a_checkpoint_that_does_not_fit_names_the_field(begin: Begin, small: Recipe, tmp_path: Path, field: str) -> None:
    begin(small, tmp_path).folder.unlock()
    path = tmp_path / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    saved[field] = {"other": torch.zeros(3)}
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match=f"'{field}'") as caught:
        begin(small, tmp_path, resume=True)
    assert "\n" not in str(caught.value)


def test_the_checkpoints_own_config_counts_too(begin: Begin, small: Recipe, tmp_path: Path) -> None:
    begin(small, tmp_path).folder.unlock()
    with pytest.raises(CheckpointError, match="seed: 0 vs 4"):
        begin(replace(small, seed=4), tmp_path, resume=True)


TRAIN = ("train", "--rule", "wm", "--model", "mlp-64", "--epochs", "25", "--batch-size", "32", "--crop", "1", "--seed", "1")
TRAIN = (*TRAIN, "--threads", "1", "--device", "cpu", "--checkpoint-steps", "5", "--lr", "0.02", "0.01", "--lr-epochs", "12")
TRAIN = (*TRAIN, "--train-limit", "640")


def lines(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def wait_for(condition: Callable[[], bool], process: Command, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_kill_and_resume_a_real_process(apical: Start, tmp_path: Path, assert_same_state: Same) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    dice = random.Random()
    for resume, epochs in (((), 2), (("--resume",), 8)):
        process = apical(*TRAIN, "--out", part, *resume)
        wait_for(lambda least=epochs: lines(part) > least, process)  # type: ignore[misc]
        time.sleep(dice.uniform(0, 0.2))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (part / "result.json").exists()
    assert main([*TRAIN, "--out", str(part), "--resume"]) == 0
    assert main([*TRAIN, "--out", str(whole)]) == 0
    assert_same_state(whole / "checkpoint.pt", part / "checkpoint.pt")
    assert [line["epoch"] for line in map(json.loads, (part / "metrics.jsonl").open())] == list(range(26))
    assert json.loads((part / "result.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_continue(apical: Start, tmp_path: Path, signum: signal.Signals, status: int) -> None:
    process = apical(*TRAIN, "--out", tmp_path / "run")
    wait_for(lambda: lines(tmp_path / "run") > 1, process)
    process.send_signal(signum)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == status
    assert "saved. Continue with: apical train" in output
    assert output.strip().endswith("--resume")
    assert errors == ""
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_examples_lost_after_the_last_checkpoint_are_written_again(
    digits: Dataset, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the last checkpoint and examples.npz; an autoencoder's are those of an uninterrupted run."""
    pictures = [Split(split.inputs, split.inputs.flatten(1)) for split in (digits.train, digits.test)]
    dataset = replace(digits, train=pictures[0], test=pictures[1], classes=64)
    recipe, _ = resolve(replace(small, loss="mse", probe=0), len(dataset.train))

    def run(path: Path, *, resume: bool = False) -> Training:
        training = Training(recipe, dataset, make_rule, RunFolder(path), World(0, 1, torch.device("cpu")))
        training.start(resume=resume, command="test", notes=[], environment={"commit": None})
        while training.epoch < recipe.epochs:
            training.train_epoch()
        training.folder.unlock()
        return training

    run(tmp_path / "whole")

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_examples", kill)
        with pytest.raises(Killed):
            run(tmp_path / "part")
    assert not (tmp_path / "part" / "examples.npz").exists()
    gc.collect()  # the killed training's lock
    run(tmp_path / "part", resume=True)
    whole, part = (np.load(tmp_path / name / "examples.npz") for name in ("whole", "part"))
    assert np.array_equal(whole["made"], part["made"])
    assert np.array_equal(whole["images"], part["images"])


@pytest.mark.parametrize("name", ["linear1.weight", "linear2.weight"])
def test_one_flipped_bit_in_a_stored_weight_is_seen(begin: Begin, small: Recipe, tmp_path: Path, name: str) -> None:
    training = begin(small, tmp_path)
    training.folder.unlock()
    path = tmp_path / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    at = content.find(training.rule.state_dict()[f"model.{name}"].numpy().tobytes())
    assert at > 0
    content[at + 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="fails its checksum"):
        begin(small, tmp_path, resume=True)


def test_a_weight_changed_by_another_program_is_seen_by_its_field(begin: Begin, small: Recipe, tmp_path: Path) -> None:
    begin(small, tmp_path).folder.unlock()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    saved["rule"]["model.linear1.weight"][0, 0] += 1e-7
    torch.save(saved, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="field 'rule' is damaged"):
        begin(small, tmp_path, resume=True)


def test_a_checkpoint_of_an_earlier_version_goes_on_and_says_so(
    begin: Begin, small: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], assert_same_state: Same
) -> None:
    begin(small, tmp_path / "part").folder.unlock()
    path = tmp_path / "part" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    del saved["sha256"], saved["partial"]["untrained"]
    torch.save(saved, path)
    begin(small, tmp_path / "part", resume=True).train_epoch()
    said = capsys.readouterr().err
    assert said == f"apical: checkpoint {path} is from an earlier version and has no checksums of its content\n"
    begin(small, tmp_path / "whole").train_epoch()
    assert_same_state(tmp_path / "whole" / "checkpoint.pt", path)
