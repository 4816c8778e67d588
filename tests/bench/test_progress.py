"""What a person sees of runs: every finished epoch once, of the run that is there now, and times that are medians."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from apical.bench.progress import Watch, Watched, describe, results_table
from apical.bench.run_folder import RunFolder
from apical.bench.statistics import busy_note


def line(epoch: int, **more: Any) -> str:
    return json.dumps({"epoch": epoch, "train_loss": 1.0, "test_loss": 2.0, "ms_per_step": 3.0 + epoch, **more}) + "\n"


@pytest.fixture
def run(tmp_path: Path) -> Watched:
    return Watched("bp", 0, RunFolder(tmp_path))


def write(run: Watched, *lines: str) -> None:
    run.folder.metrics.write_text("".join(lines))


def epochs(run: Watched) -> list[int]:
    return [found["epoch"] for found in run.news()]


def test_each_line_is_news_once_and_a_torn_one_waits(run: Watched) -> None:
    assert epochs(run) == []
    write(run, line(0), line(1)[:9])
    assert epochs(run) == [0]
    write(run, line(0), line(1), line(2))
    assert epochs(run) == [1, 2]
    assert epochs(run) == []
    assert run.times == {0: 3.0, 1: 4.0, 2: 5.0}


@pytest.mark.parametrize("longer", [False, True])
def test_a_replaced_file_is_read_from_its_start(run: Watched, longer: bool) -> None:
    """Whatever its length: the place up to which the old one was read may lie within a line of the new one."""
    write(run, line(0), line(1), line(2))
    assert epochs(run) == [0, 1, 2]
    write(run, *(line(epoch, seconds=1e-9 * 7**9 * longer) for epoch in range(4 if longer else 2)))
    assert epochs(run) == list(range(4 if longer else 2))


def test_a_file_that_is_gone_is_forgotten(run: Watched) -> None:
    write(run, line(0), line(1))
    run.news()
    run.folder.metrics.unlink()
    assert epochs(run) == []
    assert (run.line, run.times) == ({}, {})
    write(run, line(0), line(1))
    assert epochs(run) == [0, 1]


def test_what_will_be_replaced_is_not_known_beforehand(run: Watched) -> None:
    write(run, line(0), line(1))
    console = Console(force_terminal=False)
    with Watch(console, [run], 2, anew=True).shown():
        assert run.line == {}
    with Watch(console, [run], 2).shown():
        assert run.line["epoch"] == 1


@pytest.mark.parametrize(("rule", "score"), [("kp-mirror", {"test_accuracy": 1.0}), ("bp    ", {"test_loss": 2.345})])
def test_a_line_of_an_epoch_fits_into_eighty_columns(rule: str, score: dict[str, float]) -> None:
    text = describe({"epoch": 20, "train_loss": 2.3456, "ms_per_step": 9.99, **score}, 20)
    assert len(f"{rule} seed 0  {text}") <= 80
    assert "test 100.00 %" in text or "test loss   2.345" in text


def test_times_are_medians_over_seeds() -> None:
    common = {"rule": "bp", "status": "finished", "test_accuracy": 0.5, "test_loss": 1.0, "train_loss": 1.0}
    rows = [{**common, "ms_per_step": time, "ratio_to_bp": time / 2} for time in (1.0, 2.0, 30.0)]
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        console.print(results_table(rows))
    assert capture.get().splitlines()[1].split()[-3:] == ["2.00", "1.00", "3"]


def test_a_busy_machine_is_said() -> None:
    assert busy_note({"bp": [1.0, 1.1, 1.0, 1.05, 9.0], "fa": [2.0] * 5}) == ""
    note = busy_note({"bp": [1.0] * 5, "fa": [1.0, 1.0, 2.0, 3.0, 3.0]})
    assert "step times of fa is 100 % of their median (more than 25 %)" in note
    assert busy_note({"bp": [1.0, 5.0]}) == ""  # too few to tell


def test_a_table_is_made_of_the_seeds_that_finished() -> None:
    """A run that diverged ends with what its network said before that, which is no result."""
    common = {"rule": "bp", "ms_per_step": 1.0, "ratio_to_bp": 1.0, "test_loss": 1.0, "train_loss": 0.5}
    rows = [{**common, "status": "finished", "test_accuracy": accuracy} for accuracy in (0.9, 0.8)]
    rows += [{**common, "status": "diverged", "test_accuracy": 0.1, "train_loss": None}]
    rows += [{**common, "rule": "fa", "status": "diverged", "test_accuracy": 0.1}]
    console = Console(width=100, force_terminal=False)
    with console.capture() as capture:
        console.print(results_table(rows))
    bp, fa = (line.split() for line in capture.get().splitlines()[1:])
    assert bp[1:5] == ["85.00", "%", "±", "7.07"]  # of 90 and 80
    assert bp[-5:] == ["2", "of", "3,", "1", "diverged"]
    assert fa == ["fa", "-", "-", "-", "-", "0", "of", "1,", "1", "diverged"]
