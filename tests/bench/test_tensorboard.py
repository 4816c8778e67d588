"""TensorBoard events say what metrics.jsonl says, once, also after an interruption."""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from apical.bench.tensorboard import scalars
from apical.cli.main import main

pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
pytestmark = pytest.mark.usefixtures("undrawn")


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), purge_orphaned_data=True).Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_events_are_the_metrics_also_after_resuming(tmp_path: Path) -> None:
    arguments = [
        "train",
        "--rule",
        "fa",
        "--model",
        "mlp-8",
        "--train-limit",
        "320",
        "--out",
        str(tmp_path),
        "--tensorboard",
    ]
    assert main([*arguments, "--epochs", "1"]) == 0
    assert main([*arguments, "--epochs", "3", "--resume"]) == 0
    found = events(tmp_path / "events")
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for tag in ("test_accuracy", "train_loss", "layers/linear2/weight_alignment"):
        expected = [(line["epoch"], dict(scalars(line))[tag]) for line in lines if tag in dict(scalars(line))]
        assert [step for step, _ in found[tag]] == [epoch for epoch, _ in expected]
        assert [value for _, value in found[tag]] == pytest.approx([value for _, value in expected])
    assert len(found["test_accuracy"]) == 4


def test_comparisons_write_them_too(tmp_path: Path) -> None:
    arguments = [
        "--rules",
        "bp",
        "fa",
        "--model",
        "mlp-8",
        "--train-limit",
        "64",
        "--epochs",
        "1",
        "--seeds",
        "1",
        "--probe",
        "0",
    ]
    assert main(["compare", *arguments, "--out", str(tmp_path / "a"), "--tensorboard"]) == 0
    assert main(["compare", *arguments, "--out", str(tmp_path / "b")]) == 0
    assert len(list((tmp_path / "a").glob("runs/*/seed-0/events/events.*"))) == 2
    assert not list((tmp_path / "b").glob("runs/*/seed-0/events"))


def test_without_the_package_it_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "tensorboard":
            raise ImportError("No module named 'tensorboard'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["train", "--rule", "fa", "--tensorboard", "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'apical[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
