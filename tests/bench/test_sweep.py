"""`apical sweep`: equal trials, chosen by validation, tested once, and nothing lost whatever is killed."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.command import Command

from apical.bench import sweep
from apical.bench.materials import OF_DATA, load_data
from apical.bench.names import make_rule, resolve
from apical.bench.recipe import Recipe
from apical.bench.run_folder import FolderLock, RunFolder
from apical.bench.signals import StopSignals
from apical.bench.space import Axis, Optuna, applied, edges, grid, parse, space
from apical.cli.main import main

pytestmark = pytest.mark.usefixtures("undrawn_here")  # the figures of `folder` are drawn
SMALL = ["--model", "mlp-8", "--train-limit", "320", "--test-limit", "100", "--epochs", "1", "--jobs", "1"]


def swept(out: Path, *more: str) -> int:
    return main(["sweep", "--out", str(out), *SMALL, *more])


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "out"
    space = ["--space", "lr=0.001,0.1,1e30", "pfa:expansion=3", "--final-seeds", "2"]
    assert swept(out, "--rules", "bp", "pfa", *space) == 0
    return out


def test_every_rule_has_as_many_trials(folder: Path) -> None:
    record = read(folder / "sweep.json")
    settings = {rule: [t["settings"] for t in record["trials"] if t["rule"] == rule] for rule in ("bp", "pfa")}
    assert settings["bp"] == [{"lr": lr} for lr in (0.001, 0.1, 1e30)]
    assert settings["pfa"] == [{"lr": lr, "expansion": 3} for lr in (0.001, 0.1, 1e30)]
    scores = {(t["rule"], t["number"]): t["score"] for t in record["trials"]}
    assert scores["bp", 2] is None  # it diverged, and the sweep went on
    for rule in ("bp", "pfa"):
        assert record["best"][rule] == max(range(2), key=lambda i, rule=rule: scores[rule, i])  # type: ignore[misc]
    assert '<a href="final/report.html">' in (folder / "sweep.html").read_text()
    for name in ("sweep.html", "sweep.png", "sweep.svg", "final/report.html"):
        assert (folder / name).stat().st_size > 1000


def test_the_best_settings_are_tested_with_new_seeds(folder: Path) -> None:
    rows = read(folder / "final" / "summary.json")
    assert sorted((row["rule"], row["seed"]) for row in rows) == [(r, s) for r in ("bp", "pfa") for s in (1000, 1001)]
    best = read(folder / "best.json")["rows"]
    record = read(folder / "sweep.json")
    for rule, recipe in best.items():
        chosen = record["trials"][[(t["rule"], t["number"]) for t in record["trials"]].index((rule, record["best"][rule]))]
        assert recipe["lr"] == [chosen["settings"]["lr"]]
        assert recipe["validation"] == 32  # a tenth of the images


def test_the_best_settings_are_a_recipe(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    assert main(["compare", "--recipe", str(folder / "best.json"), "--seeds", "1", "--jobs", "1", "--out", str(out)]) == 0
    saved = read(out / "compare.json")["recipes"]
    assert {rule: recipe["lr"] for rule, recipe in saved.items()} == {
        rule: recipe["lr"] for rule, recipe in read(folder / "best.json")["rows"].items()
    }


def test_the_test_images_are_not_looked_at_before_the_choice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(recipe: Recipe) -> Any:
        data = load_data(recipe)
        return replace(data, test=replace(data.test, inputs=torch.full_like(data.test.inputs, float("nan"))))

    monkeypatch.setattr(sweep, "load_data", poisoned)
    space = ["--space", "lr=0.001,0.1,1e30", "pfa:expansion=3", "--final-seeds", "0"]
    assert swept(tmp_path / "out", "--rules", "bp", "pfa", *space) == 0
    ours, theirs = read(tmp_path / "out" / "sweep.json"), read(folder / "sweep.json")
    assert [t["score"] for t in ours["trials"]] == [t["score"] for t in theirs["trials"]]
    held_out = poisoned(Recipe(train_limit=320, validation=32)).validation
    assert sweep.for_trials(load_data(Recipe(train_limit=320, validation=32))).test.inputs.equal(held_out.inputs)


def test_resuming_trains_nothing_again(folder: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/*/*/result.json")}
    assert len(times) == 6
    before = read(folder / "sweep.json")
    space = ["--space", "lr=0.001,0.1,1e30", "pfa:expansion=3", "--final-seeds", "2"]
    assert swept(folder, "--rules", "bp", "pfa", *space, "--resume") == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/*/*/result.json")} == times
    assert read(folder / "sweep.json")["trials"] == before["trials"]


def test_another_sweep_is_not_resumed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert swept(folder, "--rules", "bp", "pfa", "--space", "lr=0.5", "--resume") == 2
    assert "contains a sweep with other settings (space)" in capsys.readouterr().err
    assert swept(folder, "--rules", "bp", "--space", "lr=0.5") == 2


def test_a_sweep_grows_by_a_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, space = tmp_path / "out", ["--space", "lr=0.01,0.1", "--final-seeds", "1", "--resume"]
    assert swept(out, "--rules", "bp", *space) == 0
    times = {path: path.stat().st_mtime_ns for path in out.glob("**/seed-*/result.json")}
    assert len(times) == 3
    assert swept(out, "--rules", "bp", "fa", *space) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times  # nothing was trained again
    assert [t["rule"] for t in read(out / "sweep.json")["trials"]] == ["bp", "bp", "fa", "fa"]
    assert [row["rule"] for row in read(out / "final" / "summary.json")] == ["bp", "fa"]
    assert read(out / "plan.json")["recipes"].keys() == {"bp", "fa"}
    assert swept(out, "--rules", "bp", *space, "--lr", "0.7") == 0  # what an axis sets is another matter in each trial
    assert swept(out, "--rules", "bp", *space, "--batch-size", "16") == 2  # what was swept is kept to
    assert "contains a sweep with other settings (recipe of bp)" in capsys.readouterr().err


def test_the_best_at_an_end_of_what_was_tried_is_not_bracketed(folder: Path) -> None:
    record = read(folder / "sweep.json")
    assert record["edges"] == {"bp": [], "pfa": []}  # the highest diverged; pfa's one expansion is no choice
    grid = [(lr, act) for lr in (0.1, 0.2, 0.4) for act in ("relu", "tanh")]
    trials = [{"rule": "fa", "number": i, "settings": {"lr": lr, "act": act}} for i, (lr, act) in enumerate(grid)]
    ends = [edges(trials, {"fa": i})["fa"] for i in range(len(grid))]
    assert ends == [["lr at its lowest"]] * 2 + [[]] * 2 + [["lr at its highest"]] * 2


def test_data_are_read_once_for_trials_that_share_them() -> None:
    read_for: list[Recipe] = []
    data = sweep.once(lambda recipe: (read_for.append(recipe), load_data(recipe))[1])
    small = Recipe(validation=32, train_limit=320)
    first = data(small)
    assert data(replace(small, lr=(0.5,), seed=3, model="mlp-8")) is first
    assert len(data(replace(small, train_limit=160)).train) == 160
    assert len(read_for) == 2
    assert torch.equal(first.train.inputs, load_data(small).train.inputs)


def test_data_depend_on_the_fields_that_are_named() -> None:
    asked: set[str] = set()

    class Watched:
        def __getattr__(self, name: str) -> Any:
            asked.add(name)
            return getattr(Recipe(), name)

    load_data(Watched())  # type: ignore[arg-type]
    assert asked == set(OF_DATA)


COMMAND = ["--rules", "bp", "--space", "lr=0.01,0.02,0.05,0.1", "--model", "mlp-8", "--train-limit", "320", "--epochs", "12"]


def test_a_killed_driver_loses_no_finished_trial(apical: Callable[..., Command], tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = ["sweep", *COMMAND, "--jobs", "1", "--final-seeds", "0", "--search-seed", "1"]
    assert main([*arguments, "--out", str(whole)]) == 0
    process = apical(*arguments, "--out", cut)
    deadline = time.monotonic() + 120
    while not list(cut.glob("trials/bp/*/*/result.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    kept = {path: path.stat().st_mtime_ns for path in cut.glob("trials/bp/*/*/result.json")}
    assert 0 < len(kept) < 4
    assert main([*arguments, "--out", str(cut), "--resume"]) == 0
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    ours, theirs = ([(t["settings"], t["score"]) for t in read(out / "sweep.json")["trials"]] for out in (cut, whole))
    assert ours == theirs


def test_a_killed_worker_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    recipe, _ = resolve(
        Recipe(model="mlp-8", epochs=30, train_limit=320, validation=32, probe=0, device="cpu", threads=1), 288
    )
    runs = [(replace(recipe, seed=seed), tmp_path / str(seed)) for seed in range(2)]
    killed: list[int] = []
    others = {child.pid for child in multiprocessing.active_children()}  # ranks of tests on two ranks stay alive

    def kill_one() -> None:
        deadline = time.monotonic() + 120
        while not (tmp_path / "0" / "checkpoint.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        for child in multiprocessing.active_children():
            if not killed and child.pid is not None and child.pid not in others:
                os.kill(child.pid, signal.SIGKILL)
                killed.append(child.pid)

    watcher = threading.Thread(target=kill_one)
    watcher.start()
    with StopSignals() as stop:
        sweep.in_processes(make_rule, "", 2)(runs, stop, lambda: None)
    watcher.join()
    assert killed
    plain = tmp_path / "plain"
    sweep.train(runs[0][0], plain, make_rule, "")
    for name in ("0", "plain"):
        lines = RunFolder(tmp_path / name).read_metrics()
        assert [line["epoch"] for line in lines] == list(range(31))
    first, second = (read(tmp_path / name / "result.json") for name in ("0", "plain"))
    assert first["test_loss"] == second["test_loss"]
    assert read(tmp_path / "1" / "result.json")["status"] == "finished"


def test_a_search_by_optuna_repeats_itself() -> None:
    axes = [Axis("lr", low=1e-3, high=1.0, log=True), Axis("momentum", (0.0, 0.9))]

    def asked(seed: int, *, random: bool) -> list[dict[str, Any]]:
        search, found = Optuna(axes, 14, seed, random=random), []
        while batch := search.ask(2):
            found += batch
            search.tell([None if each["lr"] > 0.5 else -abs(each["lr"] - 0.1) for each in batch])
        return found

    for random in (True, False):
        first = asked(0, random=random)
        assert len(first) == 14
        assert asked(0, random=random) == first
        assert asked(1, random=random) != first
        assert all(1e-3 <= each["lr"] <= 1.0 and each["momentum"] in (0.0, 0.9) for each in first)


def test_a_random_sweep(tmp_path: Path) -> None:
    arguments = ["--rules", "bp", "--space", "lr=log(0.001,0.2)", "--search", "random", "--trials", "3", "--seeds", "2"]
    assert swept(tmp_path / "out", *arguments, "--final-seeds", "0") == 0
    trials = read(tmp_path / "out" / "sweep.json")["trials"]
    assert len(trials) == 3
    assert len({t["settings"]["lr"] for t in trials}) == 3
    assert len(list(tmp_path.glob("out/trials/bp/*/seed-*/result.json"))) == 6


@pytest.mark.xdist_group("ray")
@pytest.mark.usefixtures("local_cluster")
def test_a_cluster_gives_the_same_trials(folder: Path, tmp_path: Path) -> None:
    arguments = ["--rules", "bp", "--space", "lr=0.001,0.1", "--final-seeds", "0", "--ray", "local"]
    assert swept(tmp_path / "out", *arguments) == 0
    ours = [t["score"] for t in read(tmp_path / "out" / "sweep.json")["trials"]]
    assert ours == [t["score"] for t in read(folder / "sweep.json")["trials"] if t["rule"] == "bp"][:2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--space", "lr"], "write KEY=VALUE,VALUE"),
        (["--space", "lr=log(1,0.1)"], "log needs LOW < HIGH"),
        (["--space", "lr=log(0,1)", "--search", "random"], "LOW > 0"),
        (["--space", "lr=log(0.1,1)"], "lr is a range, but a grid needs values"),
        (["--space", "lt=0.1"], "unknown setting in --space 'lt'; did you mean 'lr'?"),
        (["--space", "epochs=1,2"], "epochs is the same in all trials"),
        (["--space", "seed=1,2"], "seed is the same in all trials"),
        (["--space", "lr=abc"], "'abc' is not a number"),
        (["--space", "model=mlp-8,mpl-8"], "unknown model 'mpl-8'"),
        (["--space", "lr=0.1", "--tensorboard"], "--tensorboard is for train and compare"),
        (["--space", "lr=0.1", "lr=0.2"], "--space has lr twice for bp"),
        (["--space", "lr=0.1,0.1"], "a value occurs twice"),
        (["--space", "dfa:lr=0.1"], "unknown rule in --space 'dfa'"),
        (["--space", "lr=0.1", "pfa:expansion=2,4"], "the grids have different sizes (bp 1, pfa 2)"),
        (["--space", "lr=0.1", "--trials", "3"], "--trials is for --search random and optuna"),
        (["--space", "batch_size=8.5"], "8.5 is not a whole number"),
        (["--space", "lr=0.1", "--final-seeds", "-1"], "--final-seeds must be at least 0"),
        (["--space", "lr=0.1", "--clip-over", "network"], "no effect here: --clip-over (--clip is off); drop it"),
        (["--space", "lr_min=0.1,0.2"], "no effect here: --space lr_min (--lr-cosine is off); drop it"),
    ],
)
def test_bad_input(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert swept(tmp_path / "out", "--rules", "bp", "pfa", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--space", "clip=0.1,1", "--clip-over", "network"],
        ["--space", "optimizer=sgd,adam", "--beta2", "0.9"],
        ["--space", "clip=log(0.1,1)", "--search", "random", "--trials", "1", "--clip-over", "network"],
    ],
)
def test_a_setting_that_matters_in_one_trial_is_taken(arguments: list[str], tmp_path: Path) -> None:
    assert swept(tmp_path / "out", "--rules", "bp", *arguments, "--final-seeds", "0") == 0
    assert (tmp_path / "out" / "sweep.json").exists()


def test_two_sweeps_do_not_share_a_folder(apical: Callable[..., Command], tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "out")
    lock.hold("sweeping")
    other = apical("sweep", "--rules", "bp", "--space", "lr=0.1", "--out", tmp_path / "out", *SMALL)
    _, errors = other.communicate(timeout=120)
    lock.release()
    assert other.returncode == 2
    assert "another process is sweeping in" in errors
    assert not (tmp_path / "out" / "plan.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"rows": {"bp": {"learning_rate": 1}}}', "unknown setting in"),
        ('{"rows": {"bp": 3}}', "a recipe is an object of settings, not 3"),
        ('{"rows": {"bp": {"lr": "a"}}}', "a setting has the wrong kind of value"),
        ('{"title": "x"}', "the file has no recipes"),
        ('{"rows": [1', "is damaged"),
    ],
)
def test_a_damaged_file_of_recipes_is_named(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "best.json"
    path.write_text(content)
    assert main(["compare", "--recipe", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "best.json" in error
    assert not (tmp_path / "out").exists()


def test_settings_find_their_place() -> None:
    recipe = applied(Recipe(rule="pfa", lr=(0.1, 0.01), lr_epochs=(3,)), {"lr": 1, "batch_size": 64, "expansion": 2})
    assert (recipe.lr, recipe.lr_epochs, recipe.batch_size, recipe.rule_options) == ((1.0,), (), 64, ("expansion=2",))
    assert parse("pfa:weight-decay=1e-4,1e-3")[1].values == (1e-4, 1e-3)
    axes = space(["bp", "pfa"], ["lr=1,2", "expansion=3"])
    assert [axis.name for axis in axes["pfa"]] == ["lr", "expansion"]
    assert grid(axes["bp"]) == [{"lr": 1}, {"lr": 2}]


def test_a_sweep_in_which_every_trial_diverges_has_no_best_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert swept(tmp_path / "out", "--rules", "bp", "--space", "lr=1e29,1e30") == 3
    assert capsys.readouterr().out.endswith(
        "every trial diverged, so there are no best settings: try other values in --space, such as a smaller lr\n"
    )
    assert not (tmp_path / "out" / "best.json").exists()
    page = (tmp_path / "out" / "sweep.html").read_text()
    assert "the test images were not used" in page
    assert "final/report.html" not in page  # which is not there
