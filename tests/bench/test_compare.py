import json
import os
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.command import Command

from apical.bench import compare
from apical.bench.compare import Job
from apical.bench.names import make_rule, resolve
from apical.bench.recipe import Recipe
from apical.bench.signals import Interrupted, StopSignals
from apical.cli.main import main

pytestmark = pytest.mark.usefixtures("undrawn")
Same = Callable[[Path, Path], None]
Start = Callable[..., Command]


def job(out: Path, rules: tuple[str, ...] = ("bp", "wm"), seeds: tuple[int, ...] = (0, 1), **options: Any) -> Job:
    fields = {"model": "mlp-32", "epochs": 2, "train_limit": 320, "probe": 64, "device": "cpu", "threads": 1}
    recipe = {key: options.pop(key, value) for key, value in {**fields, "lr": (0.05,)}.items()}
    recipes = tuple(resolve(Recipe(rule=rule, **recipe), 320)[0] for rule in rules)  # type: ignore[arg-type]
    return Job(recipes, seeds, out, make_rule, command="apical compare", **{"jobs": 1, **options})


def run(what: Job) -> list[dict[str, Any]]:
    compare.check(what)
    return compare.run(what, StopSignals(), lambda: None)


def test_summary_has_a_row_per_rule_and_seed(tmp_path: Path) -> None:
    rows = run(job(tmp_path))
    assert json.loads((tmp_path / "summary.json").read_text()) == rows
    assert [(row["rule"], row["seed"]) for row in rows] == [("bp", 0), ("bp", 1), ("wm", 0), ("wm", 1)]
    for row in rows:
        assert {"epochs", "test_accuracy", "train_loss", "ms_per_step", "ratio_to_bp", "memory_mb"} <= row.keys()
        assert {"config_hash", "commit", "seconds", "n_train", "n_test", "status"} <= row.keys()
        assert row["epochs"] == 2
        assert row["memory_mb"] > 0
        assert row["status"] == "finished"
        assert 0 < row["test_accuracy"] < 1
    assert all(row["ratio_to_bp"] == 1 for row in rows if row["rule"] == "bp")
    about = json.loads((tmp_path / "compare.json").read_text())
    assert (about["rules"], about["seeds"], about["command"]) == (["bp", "wm"], [0, 1], "apical compare")
    assert about["recipe"]["model"] == "mlp-32"


def test_ratio_is_the_median_over_epochs_of_paired_times(tmp_path: Path) -> None:
    what = job(tmp_path, seeds=(0,), epochs=3)
    (_, row) = run(what)
    times = [[line["ms_per_step"] for line in what.folder(rule, 0).read_metrics()[1:]] for rule in ("wm", "bp")]
    assert row["ratio_to_bp"] == pytest.approx(statistics.median(mine / bp for mine, bp in zip(*times, strict=True)))
    assert row["ratio_to_bp"] == json.loads(what.folder("wm", 0).result.read_text())["ratio_to_bp"]


def test_without_backprop_there_is_no_ratio(tmp_path: Path) -> None:
    assert [row["ratio_to_bp"] for row in run(job(tmp_path, ("fa",), (0,)))] == [None]


def test_a_run_among_others_equals_the_run_alone(tmp_path: Path, assert_same_state: Same) -> None:
    both = job(tmp_path / "both", ("brsf", "wm"), (1,))
    run(both)
    alone = job(tmp_path / "alone", ("wm",), (1,))
    run(alone)
    assert_same_state(both.folder("wm", 1).checkpoint, alone.folder("wm", 1).checkpoint)


def test_one_diverged_run_does_not_stop_the_others(tmp_path: Path) -> None:
    recipes = [*job(tmp_path).recipes]
    import dataclasses

    recipes[1] = dataclasses.replace(recipes[1], lr=(1e20,))
    what = dataclasses.replace(job(tmp_path, seeds=(0,)), recipes=tuple(recipes))
    rows = run(what)
    assert [row["status"] for row in rows] == ["finished", "diverged"]
    assert "diverged" in rows[1]["message"]
    again = compare.run(dataclasses.replace(what, resume=True), StopSignals(), lambda: None)
    assert [row["status"] for row in again] == ["finished", "diverged"]


def test_interrupted_in_process_then_resumed(tmp_path: Path, assert_same_state: Same) -> None:
    whole, part = job(tmp_path / "whole", epochs=3), job(tmp_path / "part", epochs=3)
    run(whole)
    stop, calls = StopSignals(), []

    def refresh() -> None:
        calls.append(1)
        if len(calls) == 5:
            stop.signum = signal.SIGINT

    with pytest.raises(Interrupted):
        compare.run(part, stop, refresh)
    assert not (tmp_path / "part" / "summary.json").exists()
    import gc

    gc.collect()  # lets go of the folders' locks, as the end of a process does
    rows = run(job(tmp_path / "part", epochs=3, resume=True))
    assert len(rows) == 4
    for rule in ("bp", "wm"):
        for seed in (0, 1):
            assert_same_state(whole.folder(rule, seed).checkpoint, part.folder(rule, seed).checkpoint)


def test_overwrite_removes_an_older_comparison_and_nothing_else(tmp_path: Path) -> None:
    run(job(tmp_path, ("bp", "fa"), (0, 1)))
    (tmp_path / "notes.txt").write_text("mine")
    run(job(tmp_path, ("bp",), (0,), overwrite=True))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.glob("runs/*/*/config.json"))] == [
        os.path.join("runs", "bp", "seed-0", "config.json")
    ]
    assert os.listdir(tmp_path / "runs") == ["bp"]


COMPARE = ("compare", "--rules", "bp", "wm", "--seeds", "2", "--model", "mlp-64", "--epochs", "8", "--train-limit", "640")
COMPARE = (*COMPARE, "--probe", "64", "--device", "cpu", "--threads", "1", "--checkpoint-steps", "7")


def finished_epochs(out: Path) -> int:
    return sum(path.read_text().count("\n") for path in out.glob("runs/*/*/metrics.jsonl"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The comparison that nothing stopped."""
    out = tmp_path_factory.mktemp("comparison") / "whole"
    assert main([*COMPARE, "--jobs", "1", "--out", str(out)]) == 0
    return out


@pytest.mark.xdist_group("stopped comparisons")  # both on one worker: the whole one is run once
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_stop_a_real_comparison_and_resume_it(
    apical: Start, whole: Path, tmp_path: Path, assert_same_state: Same, signum: signal.Signals
) -> None:
    part = tmp_path / "part"
    process = apical(*COMPARE, "--jobs", "2", "--out", part)
    deadline = time.monotonic() + 240
    while finished_epochs(part) < 6:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signum)
    output, errors = process.communicate(timeout=120)
    if signum == signal.SIGINT:
        assert process.returncode == 130
        assert "Continue with: apical compare" in output
        assert errors == ""
    assert not (part / "summary.json").exists()
    assert main([*COMPARE, "--jobs", "1", "--out", str(part), "--resume"]) == 0
    for rule in ("bp", "wm"):
        for seed in ("seed-0", "seed-1"):
            run_folder = Path("runs") / rule / seed / "checkpoint.pt"
            assert_same_state(whole / run_folder, part / run_folder)
    assert (part / "report.html").exists()


def children(pid: int) -> list[int]:
    """Its child processes."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_killed_worker_is_reported(apical: Start, tmp_path: Path) -> None:
    if not Path("/proc/self/task").exists():
        pytest.skip("finds the workers through /proc")
    process = apical(*COMPARE, "--jobs", "2", "--out", tmp_path / "run")
    deadline = time.monotonic() + 240
    while finished_epochs(tmp_path / "run") < 4:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    [server] = [pid for pid in children(process.pid) if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(children(server)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 2
    assert "was killed by signal 9" in errors
    assert errors.count("\n") == 1


WARNS = """
import warnings
import apical

class Warns(apical.Backprop):
    def forward(self, inputs, targets):
        warnings.warn("about\\nthis rule")
        return super().forward(inputs, targets)
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_warning_is_one_line(apical: Start, tmp_path: Path, jobs: int) -> None:
    rule = tmp_path / "warns.py"
    rule.write_text(WARNS, encoding="utf-8")
    size = ["--data", "digits", "--model", "mlp-4", "--train-limit", 64, "--epochs", 1, "--seeds", 2, "--jobs", jobs]
    command = apical("compare", "--rules", f"{rule}:Warns", *size, "--out", tmp_path / "out")
    _, errors = command.communicate(60)
    assert set(errors.splitlines()) == {f"apical: warning: {rule}, line 7: about this rule"}


def test_threads_are_shared_among_the_workers(tmp_path: Path) -> None:
    cores = compare.cores()
    assert job(tmp_path, jobs=0).workers == min(2, cores)
    assert job(tmp_path, jobs=0, threads=0).recipe(0, 1).threads == max(1, cores // min(2, cores))
    assert job(tmp_path, jobs=1, threads=0).recipe(0, 1).threads == cores
    assert torch.get_num_threads() >= 1
