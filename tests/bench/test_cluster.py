"""Comparisons on a Ray cluster: the same bits as without, also when a worker is killed."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apical.bench import cluster as cluster_module
from apical.bench.cluster import cluster
from apical.bench.signals import StopSignals
from apical.cli.main import main
from apical.errors import ApicalError
from apical.evolution import workers

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.xdist_group("ray"),  # two clusters at once hinder each other
    pytest.mark.usefixtures("undrawn"),
]
psutil = pytest.importorskip("psutil")

SMALL = ["--rules", "bp", "fa", "--model", "mlp-16", "--train-limit", "640", "--test-limit", "100", "--seeds", "2"]


def scores(out: Path) -> list[tuple[str, int, float, float]]:
    rows = json.loads((out / "summary.json").read_text())
    return [(row["rule"], row["seed"], row["test_accuracy"], row["train_loss"]) for row in rows]


def kill_a_worker(out: Path, killed: list[int]) -> None:
    """Wait until a run has a checkpoint, and kill a worker that trains."""
    deadline = time.monotonic() + 240
    while not killed and time.monotonic() < deadline:
        time.sleep(0.05)
        if not any(path.stat().st_size for path in out.glob("runs/bp/seed-*/checkpoint.pt")):
            continue
        for child in psutil.Process().children(recursive=True):
            if "_train_task" in child.name() or "_train_task" in " ".join(child.cmdline()):
                os.kill(child.pid, signal.SIGKILL)
                killed.append(child.pid)
                break


@pytest.mark.usefixtures("local_cluster")
def test_a_cluster_trains_the_same_and_a_killed_worker_loses_nothing(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    arguments = ["compare", *SMALL, "--epochs", "10", "--threads", "1", "--probe", "0"]
    assert main([*arguments, "--jobs", "1", "--out", str(here)]) == 0
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(there, killed), daemon=True)
    killer.start()
    assert main([*arguments, "--ray", "local", "--jobs", "2", "--out", str(there)]) == 0
    assert killed, "no worker was seen at work"
    killer.join()
    assert scores(there) == scores(here)


@pytest.mark.parametrize("started", [True, False])
def test_only_a_cluster_that_was_started_here_ends_here(started: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def connected(*arguments: object) -> tuple[Any, bool]:
        asked.append(arguments)
        return SimpleNamespace(shutdown=lambda: asked.append("shut down")), started

    monkeypatch.setattr(cluster_module, "connected", connected)
    with cluster("local", 2):
        assert asked == [("local", 2)]
    assert asked[1:] == ["shut down"] * started


def test_tables_with_programs_of_their_own_stay_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "dfc/toy", "--ray", "local", "--out", str(tmp_path)]) == 2
    assert "--ray is for tables of trainings" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def end(folder: str) -> None:
    """What kills its worker every time."""
    with open(Path(folder) / "tries", "a") as file:
        file.write("x")
    os._exit(1)


@pytest.mark.usefixtures("local_cluster")
def test_a_task_that_kills_its_worker_for_ever_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cluster_module, workers):
        monkeypatch.setattr(module, "RETRIES", 1)  # a new worker takes seconds to start
    with (
        cluster("local", 1) as tasks,
        pytest.raises(ApicalError, match=r"Ray lost the workers of one task 2 times.*--resume"),
    ):
        tasks(end, [(str(tmp_path),)], StopSignals(), lambda: None)
    assert (tmp_path / "tries").read_text() == "xx"
