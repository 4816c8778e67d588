import os
from dataclasses import replace
from pathlib import Path

import pytest

from apical.bench.recipe import Recipe
from apical.bench.run_folder import RunFolder, commit, environment, write_json
from apical.errors import CheckpointError, ConfigError


def made(path: Path, recipe: Recipe) -> RunFolder:
    folder = RunFolder(path)
    folder.create(recipe, command="apical train", notes=[], environment={"commit": None})
    folder.checkpoint.write_bytes(b"x")
    return folder


def test_checking_a_new_folder_writes_nothing(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "a" / "b").check(Recipe(), resume=False, overwrite=False) == "fresh"
    assert os.listdir(tmp_path) == []


def test_a_used_folder_is_refused_without_a_flag(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="--resume to continue it, --overwrite"):
        RunFolder(tmp_path).check(Recipe(), resume=False, overwrite=False)
    folder = made(tmp_path, Recipe())
    assert folder.check(Recipe(), resume=False, overwrite=True) == "fresh"
    folder.clear()
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is not a folder"):
        RunFolder(tmp_path / "file" / "run").check(Recipe(), resume=False, overwrite=False)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="no permission to write"):
        RunFolder(tmp_path / "run").check(Recipe(), resume=False, overwrite=False)


def test_resuming_with_other_options_lists_them_saved_against_asked(tmp_path: Path) -> None:
    folder = made(tmp_path, Recipe(epochs=5))
    asked = Recipe(lr=(0.5,), seed=3, epochs=9, threads=2)
    with pytest.raises(CheckpointError, match=r"lr: \[0.02\] vs \[0.5\]; seed: 0 vs 3"):
        folder.check(asked, resume=True, overwrite=False)
    assert folder.check(replace(Recipe(), epochs=9, threads=2), resume=True, overwrite=False) == "resumable"


def test_state_of_a_run(tmp_path: Path) -> None:
    folder = made(tmp_path, Recipe(epochs=5))
    folder.checkpoint.unlink()
    assert folder.check(Recipe(epochs=5), resume=True, overwrite=False) == "fresh"
    folder.checkpoint.write_bytes(b"x")
    write_json(folder.result, {"epochs": 5, "status": "finished"})
    assert folder.check(Recipe(epochs=5), resume=True, overwrite=False) == "finished"
    assert folder.check(Recipe(epochs=6), resume=True, overwrite=False) == "resumable"
    with pytest.raises(CheckpointError, match="5 finished epochs, more than --epochs 4"):
        folder.check(Recipe(epochs=4), resume=True, overwrite=False)
    write_json(folder.result, {"epochs": 2, "status": "diverged"})
    assert folder.check(Recipe(epochs=5), resume=True, overwrite=False) == "diverged"


def test_damaged_config_is_named(tmp_path: Path) -> None:
    folder = made(tmp_path, Recipe())
    folder.config.write_text('{"lr": [0.')
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        folder.check(Recipe(), resume=True, overwrite=False)


def test_rewinding_drops_newer_and_torn_lines_and_restores_a_lost_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for epoch in range(4):
        folder.append_metrics({"epoch": epoch, "x": 1})
    with open(folder.metrics, "a") as file:
        file.write('{"epoch": 4, "tes')
    assert [line["epoch"] for line in folder.read_metrics()] == [0, 1, 2, 3]
    folder.rewind_metrics({"epoch": 2, "x": 2})
    assert folder.read_metrics() == [{"epoch": 0, "x": 1}, {"epoch": 1, "x": 1}, {"epoch": 2, "x": 2}]
    folder.rewind_metrics({"epoch": 3, "x": 3})
    assert folder.read_metrics()[-1] == {"epoch": 3, "x": 3}
    with pytest.raises(CheckpointError, match="lacks an epoch before 6"):
        folder.rewind_metrics({"epoch": 6})
    folder.metrics.write_text('{"epoch": 0}\nnonsense\n{"epoch": 1}\n')
    with pytest.raises(CheckpointError, match="line 2"):
        folder.read_metrics()


@pytest.mark.skipif(os.name != "posix", reason="locks are POSIX")
def test_two_trainings_cannot_share_a_folder(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.lock()
    with pytest.raises(ConfigError, match="another process is training"):
        second.lock(wait=0.2)
    first.unlock()
    second.lock()
    second.unlock()


def test_environment_says_what_ran_where() -> None:
    said = environment("cpu", threads=2)
    assert {"python", "torch", "apical", "commit", "platform", "cpu", "threads", "device", "started"} <= said.keys()
    assert said["commit"] is None or len(said["commit"].removesuffix("+changes")) == 40
    assert said["commit"] == commit()
