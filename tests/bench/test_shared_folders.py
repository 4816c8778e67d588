"""Two processes on one folder: who comes second neither wipes nor renames what the first one made. Links lead nowhere."""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.command import Command

from apical.bench import folders, run_folder
from apical.bench.evolve import loop
from apical.bench.run_folder import FolderLock
from apical.bench.state import append_line
from apical.cli.main import main

pytestmark = [pytest.mark.skipif(os.name != "posix", reason="locks are POSIX"), pytest.mark.usefixtures("undrawn")]
SMALL = ("--data", "digits", "--model", "mlp-4", "--train-limit", "64", "--test-limit", "32", "--device", "cpu")
SMALL = (*SMALL, "--probe", "0", "--threads", "1", "--epochs", "1")
COMPARE = ("compare", "--rules", "bp", "--seeds", "1", "--jobs", "1", *SMALL)
SWEEP = ("sweep", "--rules", "bp", "--space", "lr=0.01,0.1", "--seeds", "1", "--jobs", "1", "--final-seeds", "0", *SMALL)
EVOLVE = ("evolve", "--population", "4", "--hidden", "4", "--sites", "2", "--examples", "20", "--steps", "2")
COMMANDS = {
    "train": ("train", *SMALL),
    "compare": COMPARE,
    "sweep": SWEEP,
    "evolve": (*EVOLVE, "--model", "mlp-tanh-4", "--generations", "1"),
    "audit": ("audit", "bp", "--model", "mlp-4", "--epochs", "1"),
    "landscape": ("landscape", "RUN", "--grid", "3"),
    "reproduce": ("reproduce", "tp/targets", "--budget", "smoke"),
    "reproduce a file": ("reproduce", "pfa/theory", "--budget", "smoke"),
}
Start = Callable[..., Command]


def files(folder: Path) -> dict[str, bytes]:
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_another_process_finished_meanwhile_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder is fresh when it is looked at, and used when it is held."""
    if name == "evolve":
        pytest.importorskip("evotorch")
    arguments = [word.replace("RUN", str(tmp_path / "run")) for word in COMMANDS[name]]
    if name == "landscape":
        assert main(["train", *SMALL, "--trajectory", "1", "--out", str(tmp_path / "run")]) == 0
        capsys.readouterr()
    hold, theirs = FolderLock.hold, dict[str, bytes]()

    def late(lock: FolderLock, doing: str, wait: float | None = None) -> None:
        if not theirs:
            folder = (
                lock.folder if lock.path.name == folders.LOCK else lock.folder / lock.path.name[1:].removesuffix(".lock")
            )
            if folder.suffix == ".json":
                folder.parent.mkdir(parents=True)
                folder.write_text("their result")
            else:
                folder.mkdir(parents=True)
                for file in ("config.json", "result.json", "compare.json", "plan.json", "audit.json"):
                    (folder / file).write_text("their result")
            theirs.update(files(tmp_path))
        hold(lock, doing, wait)

    monkeypatch.setattr(FolderLock, "hold", late)
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert theirs
    assert files(tmp_path) == theirs
    assert said.count("\n") == 1
    assert "--overwrite" in said or "must not be mixed" in said


@pytest.mark.parametrize("name", ["train", "compare", "sweep", "evolve"])
def test_a_folder_moved_away_while_it_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody else's may be at its path by then: nothing is written there, and what was saved goes on where it is now."""
    if name == "evolve":
        pytest.importorskip("evotorch")
    out, moved = tmp_path / "out", tmp_path / "moved"
    longer = ("--generations", "3") if name == "evolve" else ("--epochs", "3")
    theirs = dict[str, bytes]()

    def append(path: Path, line: Mapping[str, Any]) -> None:
        append_line(path, line)
        if not moved.exists():
            out.rename(moved)
            path.parent.mkdir(parents=True)
            for file in ("config.json", "checkpoint.pt", "metrics.jsonl"):
                (path.parent / file).write_text("theirs")
            FolderLock(path.parent).hold("training")
            theirs.update(files(tmp_path / "out"))

    for module in (run_folder, loop):
        monkeypatch.setattr(module, "append_line", append)
    assert main([*COMMANDS[name][:-2], *longer, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "was moved, removed or replaced while results were written" in said
    assert said.count("\n") == 1
    assert theirs
    assert files(out) == theirs
    assert main([*COMMANDS[name][:-2], *longer, "--resume", "--out", str(moved)]) == 0


def test_two_real_processes_on_a_fresh_folder(apical: Start, tmp_path: Path) -> None:
    out = tmp_path / "out"
    started = [apical("train", *SMALL, "--epochs", "20", "--seed", seed, "--out", out) for seed in (1, 2)]
    answers = [process.communicate(timeout=120) for process in started]
    codes = [process.returncode for process in started]
    assert sorted(codes) == [0, 2], answers
    seed = 1 + codes.index(0)
    assert json.loads((out / "config.json").read_text())["seed"] == seed
    assert json.loads((out / "result.json").read_text())["seed"] == seed
    said = answers[codes.index(2)][1]
    assert "is not empty; add --resume" in said or "another process is training in" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_a_refused_comparison_changes_nothing(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_folder, "PATIENCE", 0.1)
    out = tmp_path / "out"
    assert main([*COMPARE, "--out", str(out)]) == 0
    before = files(out)
    other = ("compare", "--rules", "bp", "fa", "--seeds", "2", "--jobs", "1", *SMALL)
    with FolderLock(out).held("comparing"):
        assert main([*other, flag, "--out", str(out)]) == 2
    assert "another process is comparing in" in capsys.readouterr().err
    assert files(out) == before


@pytest.mark.parametrize(
    "other",
    [
        ("train", *SMALL, "--overwrite"),
        ("train", *SMALL, "--resume"),
        ("sweep", "--rules", "bp", "--space", "lr=0.1", *SMALL, "--resume"),
        ("evolve", "--generations", "1", "--overwrite"),
        ("audit", "bp", "--overwrite"),
        ("measure", "mlp-8", "--overwrite"),
    ],
    ids=lambda words: f"{words[0]} {words[-1]}",
)
def test_what_another_command_made_is_neither_continued_nor_replaced(
    other: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "compare.json").write_text("{}")
    assert main([*other, "--out", str(tmp_path)]) == 2
    assert "contains a comparison, which must not be mixed with" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} <= {"compare.json", ".lock"}


@pytest.mark.parametrize("link", ["runs", "runs/bp", "runs/bp/seed-0", "figures"])
def test_overwriting_a_comparison_removes_nothing_through_a_link(
    link: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    assert main([*COMPARE, "--out", str(out)]) == 0
    (out / link).rename(elsewhere)
    (out / link).symlink_to(elsewhere)
    before = files(elsewhere), files(out)
    assert before[0]
    capsys.readouterr()
    assert main([*COMPARE, "--overwrite", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert f"is a link to {elsewhere}" in said or "is a link to" in said
    assert said.count("\n") == 1
    assert (files(elsewhere), files(out)) == before


def test_an_out_that_is_itself_a_link_is_fine(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    assert main([*COMPARE, "--out", str(tmp_path / "out")]) == 0
    assert main([*COMPARE, "--overwrite", "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("folder", ["trials", "final"])
def test_overwriting_a_sweep_removes_nothing_through_a_link(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis.tex").write_text("precious")
    out.mkdir()
    (out / folder).symlink_to(elsewhere)
    assert main([*SWEEP, "--overwrite", "--out", str(out)]) == 2
    assert "is a link to" in capsys.readouterr().err
    assert (elsewhere / "thesis.tex").read_text() == "precious"


def test_links_within_a_folder_of_trials_go_and_what_they_lead_to_stays(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis.tex").write_text("precious")
    (out / "cells").mkdir(parents=True)
    (out / "cells" / "away").symlink_to(elsewhere)
    folders.remove_tree(out / "cells", out)
    assert not (out / "cells").exists()
    assert (elsewhere / "thesis.tex").read_text() == "precious"


def test_overwriting_a_run_replaces_links_to_files(tmp_path: Path) -> None:
    out, precious = tmp_path / "out", tmp_path / "precious"
    assert main(["train", *SMALL, "--out", str(out)]) == 0
    for name in ("checkpoint.pt", "checkpoint.pt.tmp", "metrics.jsonl", "config.json", "result.json"):
        (out / name).unlink(missing_ok=True)
        precious.write_text("precious")
        (out / name).symlink_to(precious)
    assert main(["train", *SMALL, "--overwrite", "--out", str(out)]) == 0
    assert precious.read_text() == "precious"
    assert not any(path.is_symlink() for path in out.iterdir())


def test_a_lock_whose_file_was_removed_is_taken_again(tmp_path: Path) -> None:
    first, second, third = (FolderLock(tmp_path / "out") for _ in range(3))
    first.hold("training")
    second_waits = open(second.path, "a")  # noqa: SIM115
    first.release(remove=True)
    second_waits.close()
    second.hold("training", wait=0)
    with pytest.raises(folders.ConfigError, match="another process"):
        third.hold("training", wait=0)
    began = time.monotonic()
    second.release()
    third.hold("training", wait=0)
    assert time.monotonic() - began < 1


def test_an_error_before_anything_is_written_leaves_no_folder(tmp_path: Path) -> None:
    def fail() -> None:
        with FolderLock(tmp_path / "out").held("auditing"):
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert not (tmp_path / "out").exists()
