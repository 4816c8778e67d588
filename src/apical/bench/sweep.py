"""Trials of a sweep: each is one or more ordinary trainings in separate run folders, scored on validation images.

The run folders are the record. After any interruption, a trial with a `result.json` is not trained again, and an unfinished
one continues from its checkpoint. In a trial the validation images take the place of the test images, so that the test set
is never used.

Only Ray's tasks are used, not Ray Tune, which starts a process for each trial; a trial may be shorter than that. The folders
contain what Tune's snapshots would.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from apical.bench import workers
from apical.bench.cluster import cluster
from apical.bench.distributed import World, pick_device
from apical.bench.folders import refuse_links, remove_tree
from apical.bench.loop import MakeRule, Training
from apical.bench.materials import OF_DATA, load_data
from apical.bench.recipe import Recipe
from apical.bench.run_folder import RunFolder
from apical.bench.signals import StopSignals
from apical.bench.state import write_state
from apical.data import Dataset
from apical.errors import ApicalError, DivergenceError

ATTEMPTS = 3
"""How many times in a row trainings may be killed without progress."""

NOTE = "a trial of a sweep: what is called test here are its validation images"


@dataclass(frozen=True)
class Trial:
    """One setting of one rule.

    Attributes:
        number: 0, 1, ... among the rule's trials.
        recipes: one per seed.
        folders: their run folders.
    """

    rule: str
    number: int
    settings: dict[str, Any]
    recipes: tuple[Recipe, ...]
    folders: tuple[Path, ...]

    def results(self) -> list[dict[str, Any]]:
        """Return the results of its finished trainings."""
        return [RunFolder(path).read_result() for path in self.folders if finished(path)]

    @property
    def score(self) -> float | None:
        """Mean validation accuracy, or minus the mean loss if there are no classes; None if a training diverged."""
        values = []
        for result in self.results():
            accuracy, loss = result.get("test_accuracy"), result.get("test_loss")
            if result["status"] != "finished" or (accuracy is None and loss is None):
                return None
            values.append(-float(loss or 0.0) if accuracy is None else float(accuracy))
        return sum(values) / len(values) if len(values) == len(self.folders) else None

    def record(self) -> dict[str, Any]:
        """Return the record for sweep.json."""
        return {
            "rule": self.rule,
            "number": self.number,
            "settings": self.settings,
            "score": self.score,
            "seconds": sum(result.get("seconds") or 0.0 for result in self.results()),
        }


def finished(folder: Path) -> bool:
    """Return whether the training in the folder has ended."""
    return (folder / "result.json").exists()


def for_trials(dataset: Dataset) -> Dataset:
    """Return the data of a trial: validation images in place of the test images, which it must not see."""
    assert dataset.validation is not None
    return replace(dataset, test=dataset.validation, validation=None)


def once(read: Callable[[Recipe], Dataset]) -> Callable[[Recipe], Dataset]:
    """Wrap `read` to read again only if a recipe uses other data than the previous one."""
    cached = lru_cache(maxsize=1)(read)
    return lambda recipe: cached(Recipe(**{name: getattr(recipe, name) for name in OF_DATA}))


def train(
    recipe: Recipe,
    path: Path,
    make_rule: MakeRule,
    command: str,
    stop: StopSignals | None = None,
    load: Callable[[Recipe], Dataset] = load_data,
) -> None:
    """Run one training of a trial in this process, from its checkpoint if there is one; divergence also finishes it.

    Raises:
        Interrupted: a signal was received; the training is saved.
        ApicalError: the recipe cannot be trained.
    """
    folder = RunFolder(path)
    state = folder.claim(recipe, resume=True, overwrite=False)
    if state in ("finished", "diverged"):
        folder.unlock()
        return
    try:
        device = pick_device(recipe.device)
        training = Training(recipe, for_trials(load(recipe)), make_rule, folder, World(0, 1, device), stop)
        training.start(resume=state == "resumable", command=command, notes=[NOTE])
        while training.epoch < recipe.epochs:
            training.train_epoch()
        write_state(folder.result, training.result())
    except DivergenceError:
        pass  # recorded in its result.json
    finally:
        folder.unlock()


Execute = Callable[[Sequence[tuple[Recipe, Path]], StopSignals, Callable[[], None]], None]
"""Trains unfinished runs; calls the last argument periodically."""


def in_processes(make_rule: MakeRule, command: str, jobs: int) -> Execute:
    """Train in processes of this machine, `jobs` at a time; killed trainings are restarted from their checkpoints."""

    def execute(runs: Sequence[tuple[Recipe, Path]], stop: StopSignals, refresh: Callable[[], None]) -> None:
        attempts, load = 0, once(load_data)
        while left := [(recipe, path) for recipe, path in runs if not finished(path)]:
            if jobs == 1:
                for recipe, path in left:
                    train(recipe, path, make_rule, command, stop, load)
                    refresh()
                continue
            before = _progress(left)
            try:
                count = min(jobs, len(left))
                workers.run(range(count), count, partial(_share, left, count, make_rule, command), stop, refresh)
            except ApicalError as error:
                if "was killed by signal" not in str(error):
                    raise
                attempts = 0 if _progress(left) != before else attempts + 1
                if attempts == ATTEMPTS:
                    raise

    return execute


def _progress(runs: Sequence[tuple[Recipe, Path]]) -> list[tuple[bool, float]]:
    """Return a measure of what has been saved of each training: it grows with every checkpoint."""
    checkpoints = [(path, path / "checkpoint.pt") for _, path in runs]
    return [(finished(path), checkpoint.stat().st_mtime if checkpoint.exists() else 0.0) for path, checkpoint in checkpoints]


def _share(
    runs: Sequence[tuple[Recipe, Path]], count: int, make_rule: MakeRule, command: str, number: int, stop: StopSignals
) -> None:
    """Run every `count`-th training in one process: starting one for each would often take longer than training."""
    torch.set_num_threads(1)
    load = once(load_data)
    for recipe, path in runs[number::count]:
        train(recipe, path, make_rule, command, stop, load)


@contextmanager
def on_ray(address: str, make_rule: MakeRule, command: str, jobs: int | None) -> Iterator[Execute]:
    """Train on a Ray cluster that sees the folders; trainings lost with a worker or its machine are restarted.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers.
    """
    with cluster(address, jobs) as tasks:

        def execute(runs: Sequence[tuple[Recipe, Path]], stop: StopSignals, refresh: Callable[[], None]) -> None:
            left = [(recipe, path.resolve(), make_rule, command) for recipe, path in runs if not finished(path)]
            tasks(_alone, left, stop, refresh)

        yield execute


def _alone(recipe: Recipe, path: Path, make_rule: MakeRule, command: str) -> None:
    torch.set_num_threads(1)
    train(recipe, path, make_rule, command)


def clear(out: Path) -> None:
    """Remove the trials and the files computed from them, and nothing outside the folder.

    Raises:
        ConfigError: a folder of trials is a link to elsewhere.
    """
    for name in ("trials", "final"):
        refuse_links(out / name, out)
    for name in ("trials", "final"):
        remove_tree(out / name, out)
    for name in ("plan.json", "sweep.json", "best.json", "sweep.png", "sweep.svg", "sweep.html"):
        (out / name).unlink(missing_ok=True)
