"""Trajectories in run folders, and `apical landscape`, which draws them."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from apical.bench.loop import Training
from apical.bench.recipe import Recipe, from_json
from apical.bench.signals import Interrupted, StopSignals
from apical.bench.trajectory import Recorder, load
from apical.cli.main import main
from apical.diagnostics.landscape import flat
from apical.errors import CheckpointError

Begin = Callable[..., Training]


def test_snapshots_are_the_weights_at_their_steps(begin: Begin, small: Recipe, tmp_path: Path) -> None:
    training = begin(replace(small, trajectory=4), tmp_path)  # 10 steps an epoch
    seen = {0: flat(training.rule.model)}

    def on_step(step: int) -> None:
        seen[training.epoch * 10 + step] = flat(training.rule.model)

    for _ in range(2):
        training.train_epoch(on_step)
    saved = load(tmp_path / "trajectory.pt")
    assert saved.steps == (0, 4, 8, 12, 16, 20)
    assert torch.equal(saved.weights, torch.stack([seen[step] for step in saved.steps]))
    assert saved.names == tuple(name for name, _ in training.rule.model.named_parameters())
    assert saved.shapes == tuple(tuple(p.shape) for p in training.rule.model.parameters())
    assert len({tuple(row[:5].tolist()) for row in saved.weights}) == 6


def test_the_end_is_kept_and_off_keeps_nothing(begin: Begin, small: Recipe, tmp_path: Path) -> None:
    short = replace(small, epochs=1)
    begin(replace(short, trajectory=7), tmp_path / "on").train_epoch()
    assert load(tmp_path / "on" / "trajectory.pt").steps == (0, 7, 10)
    begin(short, tmp_path / "off").train_epoch()
    assert not (tmp_path / "off" / "trajectory.pt").exists()


def test_recording_changes_nothing(
    begin: Begin, small: Recipe, tmp_path: Path, assert_same_state: Callable[[Path, Path], None]
) -> None:
    recipe = replace(small, epochs=1, rule="kp")
    for name, every in (("on", 3), ("off", 0)):
        begin(replace(recipe, trajectory=every), tmp_path / name).train_epoch()
    assert_same_state(tmp_path / "on" / "checkpoint.pt", tmp_path / "off" / "checkpoint.pt")
    assert recipe.hash() == replace(recipe, trajectory=3).hash()


@pytest.mark.parametrize("two_phase", [False, True])
def test_an_interrupted_run_has_the_trajectory_of_a_whole_one(
    begin: Begin, small: Recipe, tmp_path: Path, two_phase: bool
) -> None:
    recipe = replace(small, trajectory=3, probe=0)
    if two_phase:  # steps that only feedback learns in come before and after the forward ones, and do not count
        more = {
            "rule": "dfc-ss",
            "model": "mlp-tanh-8",
            "pretrain_epochs": 1,
            "feedback_passes": 2,
            "feedback_fraction": 0.5,
        }
        recipe = replace(recipe, **more)
    whole = begin(recipe, tmp_path / "whole")
    for _ in range(2):
        whole.train_epoch()
    stop = StopSignals()
    for stopped_at in (1, 5, 8) if not two_phase else (4, 13, 22):
        part = begin(recipe, tmp_path / "part", stop=stop, resume=(tmp_path / "part").exists())

        def on_step(step: int, at: int = stopped_at) -> None:
            stop.signum = signal.SIGTERM if step == at else None

        with pytest.raises(Interrupted):
            part.train_epoch(on_step)
        stop.signum = None
        part.folder.unlock()
    part = begin(recipe, tmp_path / "part", resume=True)
    for _ in range(2):
        part.train_epoch()
    contents = [(tmp_path / name / "trajectory.pt").read_bytes() for name in ("whole", "part")]
    assert contents[0] == contents[1]
    assert load(tmp_path / "part" / "trajectory.pt").steps == (0, 3, 6, 9, 12, 15, 18, 20)


def test_snapshots_newer_than_the_checkpoint_are_made_again(begin: Begin, small: Recipe, tmp_path: Path) -> None:
    """A run killed between the two files, and then a longer one."""
    first = begin(replace(small, epochs=1, trajectory=3), tmp_path / "part")
    checkpoint = (tmp_path / "part" / "checkpoint.pt").read_bytes()
    first.train_epoch()
    (tmp_path / "part" / "checkpoint.pt").write_bytes(checkpoint)
    first.folder.unlock()
    for epochs in (1, 2):
        part = begin(replace(small, epochs=epochs, trajectory=3), tmp_path / "part", resume=True)
        part.train_epoch()
        part.folder.unlock()
    whole = begin(replace(small, trajectory=3), tmp_path / "whole")
    for _ in range(2):
        whole.train_epoch()
    assert (tmp_path / "part" / "trajectory.pt").read_bytes() == (tmp_path / "whole" / "trajectory.pt").read_bytes()


@pytest.mark.parametrize("damage", ["missing", "cut", "fewer", "other"])
def test_a_trajectory_that_does_not_fit_is_named(begin: Begin, small: Recipe, tmp_path: Path, damage: str) -> None:
    recipe = replace(small, trajectory=4)
    training = begin(recipe, tmp_path)
    training.train_epoch()
    training.folder.unlock()
    path = tmp_path / "trajectory.pt"
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-99])
    else:
        content = torch.load(path, weights_only=True)
        for field in ("steps", "weights"):
            content[field] = content[field][:2] if damage == "fewer" or field == "steps" else content[field]
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"trajectory\.pt") as caught:
        begin(recipe, tmp_path, resume=True)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(tmp_path / "trajectory.pt", nn.Linear(2, 1), every=1, last=9)
    recorder.see(0)
    recorder.save()

    def full(*_: object) -> None:
        raise OSError("no space left")

    recorder.see(1)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no space"):
            recorder.save()
    assert load(tmp_path / "trajectory.pt").steps == (0,)
    assert os.listdir(tmp_path) == ["trajectory.pt"]
    recorder.save()
    assert load(tmp_path / "trajectory.pt").steps == (0, 1)


def test_a_recipe_comes_back_from_its_json() -> None:
    recipe = Recipe(rule="pfa", lr=(0.1, 0.01), lr_epochs=(3,), rule_options=("expansion=3",), trajectory=5)
    assert from_json({**recipe.to_json(), "command": "apical train", "notes": []}) == recipe


QUICK = ("--model", "mlp-8", "--epochs", "2", "--train-limit", "96", "--probe", "0", "--device", "cpu", "--threads", "1")
LANDSCAPE = ("--grid", "5", "--examples", "64", "--device", "cpu")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rules, two seeds, snapshots."""
    out = tmp_path_factory.mktemp("runs") / "compared"
    arguments = ("compare", "--rules", "bp", "fa", "--seeds", "2", "--jobs", "1", "--trajectory", "1", *QUICK)
    assert main([*arguments, "--out", str(out)]) == 0
    return out


def test_a_comparison_on_one_surface(compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("landscape", str(compared), "--out", str(tmp_path / "out"), *LANDSCAPE)
    assert main(list(arguments)) == 0
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "landscape.json").read_text())
    written = {path.name for path in (tmp_path / "out").iterdir()} - {".lock"}
    assert written == {f"landscape.{kind}" for kind in ("json", "png", "svg")}
    assert (tmp_path / "out" / "landscape.png").read_bytes().startswith(b"\x89PNG")
    assert len(record["x"]) == len(record["y"]) == len(record["losses"]) == len(record["losses"][0]) == 5
    assert [(run["label"], run["seed"]) for run in record["runs"]] == [("bp", 0), ("bp", 1), ("fa", 0), ("fa", 1)]
    assert record["same_start"] == {"0": True, "1": True}
    assert f"{100 * record['explained_variance'][0]:.1f} %" in said
    weights = {
        run["label"]: load(Path(run["folder"]) / "trajectory.pt").weights for run in record["runs"] if not run["seed"]
    }
    for run in record["runs"]:
        assert run["steps"] == list(range(7))
        for place in run["coordinates"]:  # the default shows every snapshot
            assert record["x"][0] < place[0] < record["x"][-1]
            assert record["y"][0] < place[1] < record["y"][-1]
        assert run["tortuosity"] == pytest.approx(run["travelled"] / run["start_to_end"])
        assert run["losses"][-1] < run["losses"][0]
    assert record["runs"][0]["start_to_end"] == pytest.approx(float((weights["bp"][-1] - weights["bp"][0]).norm()), rel=1e-5)
    between = [line for line in record["barriers"] if line["from"] == "bp end"]
    assert [(line["seed"], line["to"]) for line in between] == [(0, "fa end"), (1, "fa end")]
    assert between[0]["losses"][0] == pytest.approx(record["runs"][0]["losses"][-1], rel=1e-5)
    assert between[0]["losses"][-1] == pytest.approx(record["runs"][2]["losses"][-1], rel=1e-5)
    assert f"barrier, seed 0, bp end to fa end: {between[0]['height']:.4g}" in said
    assert main(list(arguments)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_a_random_plane_is_around_the_end_of_the_first_run(compared: Path, tmp_path: Path) -> None:
    run = compared / "runs" / "fa" / "seed-1"
    assert main(["landscape", str(run), "--plane", "random", "--span", "0.5", "--out", str(tmp_path), *LANDSCAPE]) == 0
    record = json.loads((tmp_path / "landscape.json").read_text())
    assert (record["x"][0], record["x"][-1]) == (-0.5, 0.5)
    assert record["explained_variance"] is None
    assert record["losses"][2][2] == pytest.approx(record["runs"][0]["losses"][-1], rel=1e-5)
    assert record["runs"][0]["distances"][-1] == pytest.approx(0, abs=1e-9)
    assert record["runs"][0]["distances"][0] > 0.1


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([*map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("apical: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_what_cannot_be_drawn_is_one_line(compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", tmp_path / "out")
    one = compared / "runs" / "bp" / "seed-0"
    for arguments, said in (
        ((tmp_path, *out), f"{tmp_path} is not the folder of a run or a comparison"),
        ((one, one, *out), "is given twice"),
        ((one, "--grid", "2", *out), "--grid must be at least 3"),
        ((one, "--examples", "1", *out), "--examples must be at least 2"),
        ((one, "--span", "0", *out), "--span must be positive"),
        ((one, "--span", "nan", *out), "--span must be finite"),
    ):
        assert said in refused(capsys, "landscape", *arguments)
    plain, other, straight = (tmp_path / name for name in ("plain", "other", "straight"))
    assert main(["train", *QUICK, "--epochs", "1", "--out", str(plain)]) == 0
    assert main(["train", *QUICK, "--trajectory", "1", "--model", "mlp-9", "--out", str(other)]) == 0
    assert main(["train", *QUICK, "--trajectory", "999", "--out", str(straight)]) == 0
    capsys.readouterr()
    assert f"{plain} has no trajectory: train with --trajectory N" in refused(capsys, "landscape", one, plain, *out)
    said = refused(capsys, "landscape", one, other, *out)
    assert f"{other} has a different loss surface: model mlp-9, but {one} has mlp-8" in said
    assert "on one line" in refused(capsys, "landscape", straight, *out)
    (other / "trajectory.pt").write_bytes((one / "trajectory.pt").read_bytes())
    assert "does not match the weights of mlp-9" in refused(capsys, "landscape", other, *out)
    (other / "result.json").unlink()
    assert f"{other} is not finished" in refused(capsys, "landscape", other, *out)
    assert not (tmp_path / "out").exists()


def test_runs_of_one_rule_are_told_apart_and_diverged_ones_left_out(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / name for name in ("slow", "lost")]
    for folder, lr in zip(folders, ("0.001", "1e20"), strict=True):
        status = main(["train", *QUICK, "--trajectory", "2", "--lr", lr, "--epochs", "9", "--out", str(folder)])
        assert status == (2 if lr == "1e20" else 0)
    one = compared / "runs" / "bp" / "seed-0"
    capsys.readouterr()
    assert main(["landscape", *map(str, (one, *folders)), "--out", str(tmp_path / "out"), *LANDSCAPE]) == 0
    record = json.loads((tmp_path / "out" / "landscape.json").read_text())
    assert [run["label"] for run in record["runs"]] == ["bp (seed-0)", "bp (slow)"]
    assert record["diverged"] == [str(folders[1])]
    assert f"left out because it diverged: {folders[1]}" in capsys.readouterr().out
    assert "every run diverged" in refused(capsys, "landscape", folders[1], "--out", tmp_path / "none")
