"""One evolution in its folder: config.json, environment.json, metrics.jsonl, checkpoint.pt, and the teachers at its end.

`teacher.pt` is the average of the search distribution's centres, which fluctuates less than the last centre; `best.pt` is
the fittest individual of the last generation, which is selected partly by chance. A generation is either finished and saved
or not started: an interrupted evolution continues with the same result.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apical import data
from apical.bench.checkpoint import read_sealed, write_sealed
from apical.bench.evolve.recipe import ADDED, FREE_FIELDS, EvolutionRecipe
from apical.bench.folders import check_writable, refuse_unlike, refuse_used
from apical.bench.run_folder import FolderLock
from apical.bench.state import append_line, brief, read_json, read_lines, write_lines, write_state
from apical.errors import CheckpointError, DataError, DivergenceError
from apical.evolution.classification import AnyClasses, Classification, Images, Setting
from apical.evolution.population import Lifetime
from apical.evolution.seeds import seed_of
from apical.evolution.strategy import Search, Strategy, finite
from apical.evolution.workers import Task, Workers
from apical.rules.top_down.equivariant import Network


class EvolutionFolder:
    """Paths, checks, reading and writing of one evolution's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.environment = path / "config.json", path / "environment.json"
        self.metrics, self.checkpoint = path / "metrics.jsonl", path / "checkpoint.pt"
        self.teacher, self.best, self.result = path / "teacher.pt", path / "best.pt", path / "result.json"
        self.lock = FolderLock(path)

    def check(self, recipe: EvolutionRecipe, *, resume: bool, overwrite: bool) -> bool:
        """Return whether there is a checkpoint to continue from. Writes nothing.

        Raises:
            ConfigError: the folder cannot be written, or is not empty and neither flag is given.
            CheckpointError: the evolution in it has other options, or is longer than requested.
        """
        check_writable(self.path, self.config.name)
        if not (resume or overwrite):
            refuse_used(self.path)
        if overwrite or not self.config.exists():
            return False
        saved, options = {**ADDED, **read_json(self.config)}, recipe.to_json()
        unlike = [f"{k}: {saved.get(k)} vs {v}" for k, v in options.items() if k not in FREE_FIELDS and saved.get(k) != v]
        refuse_unlike(self.path, unlike)
        if odd := [name for name in FREE_FIELDS if type(saved.get(name)) is not type(options[name])]:
            raise CheckpointError(
                f"{self.config} is damaged ({odd[0]} is {saved.get(odd[0])!r}); start again with --overwrite"
            )
        return self.checkpoint.exists()

    @contextmanager
    def held(self, recipe: EvolutionRecipe, *, resume: bool, overwrite: bool) -> Iterator[bool]:
        """Lock the folder against other processes, then :meth:`check` it again: a previous holder may have left files.

        Raises:
            ConfigError: another process runs an evolution here; or as :meth:`check` does.
            CheckpointError: as :meth:`check` does.
        """
        with self.lock.held("evolving"):
            yield self.check(recipe, resume=resume, overwrite=overwrite)

    def create(self, recipe: EvolutionRecipe, command: str, environment: dict[str, Any]) -> None:
        """Create the folder, remove an older evolution's files, write config.json and environment.json."""
        self.path.mkdir(parents=True, exist_ok=True)
        for old in (self.result, self.checkpoint, self.metrics, self.teacher, self.best):
            old.unlink(missing_ok=True)
        write_state(self.config, {**recipe.to_json(), "command": command})
        write_state(self.environment, environment)

    def lines(self) -> list[dict[str, Any]]:
        """Return the finished generations; an incomplete last line is left out.

        Raises:
            CheckpointError: a line is damaged.
        """
        return read_lines(self.metrics, check_line)


_NUMBERS: dict[str, Any] = {"generation": int, "failed": int, "center": float | None}
_NUMBERS |= dict.fromkeys(("best", "mean", "sigma", "seconds"), float)


def check_line(line: dict[str, Any]) -> None:
    """Refuse a line that does not describe a finished generation.

    Raises:
        ValueError: it lacks a measurement, or has one of another type.
    """
    for name, kind in _NUMBERS.items():
        value = line.get(name, "")
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{name} is {line.get(name)!r}")


class Evolution:
    """A search for top-down networks, generation by generation.

    Args:
        task: the task for which they are evolved.
        folder: where finished generations are saved; None saves nothing.

    Attributes:
        average: average of the centres, weighted by about the third power of their generation.
        line: measurements of the last generation: fitness of the centre, the best and the mean, number of individuals whose
            fitness was not finite, mean standard deviation, seconds.
    """

    def __init__(
        self, task: Task, strategy: Strategy, workers: Workers, seed: int = 0, folder: EvolutionFolder | None = None
    ) -> None:
        self.task, self.workers, self.seed, self.folder = task, workers, seed, folder
        self.search = Search(strategy, task.start)
        self.generation = 0
        self.line: dict[str, Any] = {}
        self.fittest = self.average = task.start

    def step(self) -> dict[str, Any]:
        """Run one generation and return its line. The centre is evaluated only for reporting; the search does not use it."""
        start = time.perf_counter()
        population = self.search.ask(seed_of(self.seed, "population", self.generation))
        everyone = torch.cat([population, self.search.center[None]])
        fitness = self.workers.evaluate(self.task, everyone, self.generation)
        ranked = finite(fitness[:-1])
        self.fittest = population[int(ranked.argmax())].clone()
        self.search.tell(population, fitness[:-1])
        self.generation += 1
        if not all(bool(values.isfinite().all()) for values in (ranked, self.search.center, self.search.sigma)):
            raise DivergenceError(
                f"the evolution diverged in generation {self.generation}: fitness or weights are not finite; use a smaller "
                "--sigma or --step"
            )
        self.average = self.average + averaging(self.generation) * (self.search.center - self.average)
        self.line = {
            "generation": self.generation,
            "center": _number(fitness[-1]),
            "best": float(ranked.max()),
            "mean": float(ranked.mean()),
            "failed": int((~fitness[:-1].isfinite()).sum()),
            "sigma": float(self.search.sigma.mean()),
            "seconds": time.perf_counter() - start,
        }
        self._keep()
        return self.line

    def restore(self) -> None:
        """Continue from the folder's checkpoint.

        Raises:
            CheckpointError: the checkpoint is damaged, or belongs to another evolution.
        """
        assert self.folder is not None
        path = self.folder.checkpoint
        try:
            saved = read_sealed(path, f"checkpoint {path}")
            self.search.restore(saved["search"])
            self.generation, self.line, self.fittest = saved["generation"], saved["line"], saved["fittest"]
            self.average = saved["average"]
            check_line(self.line)
            if type(self.generation) is not int or self.line["generation"] != self.generation:
                raise ValueError("its last line belongs to another generation")
            vectors = (self.search.center, self.search.sigma, self.fittest, self.average)
            if any(vector.shape != self.task.start.shape for vector in vectors):
                raise ValueError("it has a different number of weights")
            if not all(bool(vector.isfinite().all()) for vector in vectors):
                raise ValueError("weights in it are not finite")
            self.search.ask(0)  # raises if the restored parts do not fit together
        except (CheckpointError, OSError):
            raise
        except Exception as error:  # the format of the state depends on the strategy
            raise CheckpointError(f"checkpoint {path} is damaged ({brief(error)}); start again with --overwrite") from error
        lines = [line for line in self.folder.lines() if line["generation"] < self.generation]
        if [line["generation"] for line in lines] != list(range(1, self.generation)):
            raise CheckpointError(
                f"{self.folder.metrics} lacks a generation before {self.generation}; start again with --overwrite"
            )
        write_lines(self.folder.metrics, [*lines, self.line])

    def _keep(self) -> None:
        if self.folder is None:
            return
        state = {
            "search": self.search.state(),
            "generation": self.generation,
            "line": self.line,
            "fittest": self.fittest,
            "average": self.average,
        }
        self.folder.lock.check()
        write_sealed(self.folder.checkpoint, state)
        append_line(self.folder.metrics, self.line)


def averaging(generation: int, power: int = 3) -> float:
    """Return the weight of the newest centre in the average of this many (polynomial decay, Shamir & Zhang 2013).

    >>> averaging(1), averaging(97)
    (1.0, 0.04)
    """
    return (power + 1) / (generation + power)


def _number(value: Tensor) -> float | None:
    return float(value) if bool(value.isfinite()) else None


def classification(recipe: EvolutionRecipe) -> Classification:
    """Return the recipe's task, with its data loaded.

    Raises:
        ApicalError: a name or size is invalid, the data are missing or damaged, or the initial teacher does not match.
    """
    sets = []
    for name in recipe.data:
        loaded = data.load(name)
        if loaded.is_regression:
            raise DataError(f"{name} has numeric targets, but top-down networks are evolved for classification")
        sets.append(Images(loaded.train.inputs, loaded.train.targets, loaded.classes, name))
    task = (AnyClasses if recipe.by_class else Classification)(sets, setting(recipe))
    if recipe.begin:
        task.start = task.weights_of(recipe.begin)
    return task


def setting(recipe: EvolutionRecipe) -> Setting:
    """Return the kind of top-down network that the recipe evolves."""
    lifetime = Lifetime(recipe.steps, recipe.lr, recipe.optimizer, recipe.clip, recipe.batch_size or None)
    names = {item.name for item in fields(Setting)} & {item.name for item in fields(recipe)}
    values: dict[str, Any] = {name: getattr(recipe, name) for name in names - {"model"}}
    values |= {name: values[name] or None for name in ("sites", "ways", "examples")}
    return Setting(recipe.model[0], recipe.model[1:], lifetime, **values)


def strategy(recipe: EvolutionRecipe) -> Strategy:
    """Return the recipe's evolution strategy."""
    return Strategy(recipe.strategy, recipe.population, recipe.sigma, recipe.step, recipe.decay)


def teacher(task: Classification, weights: Tensor) -> Network:
    """Return the top-down network with flat weights (D,)."""
    network = task.network(0)
    other = task.population.other
    assert other is not None
    network.load_state_dict({name.removeprefix("teacher."): value for name, value in other.named(weights.clone()).items()})
    return network


def evolve(
    task: Classification,
    recipe: EvolutionRecipe,
    workers: Workers,
    folder: EvolutionFolder,
    *,
    resume: bool,
    provenance: dict[str, Any],
    on_generation: Callable[[dict[str, Any]], bool] = lambda line: False,
) -> dict[str, Any] | None:
    """Run an evolution to its end and write teacher.pt, best.pt and result.json; return the content of result.json.

    Args:
        on_generation: called with the line of each finished generation; if it returns True, stop there and return None.

    Raises:
        CheckpointError: the checkpoint is damaged, or has more generations than requested.
    """
    evolution = Evolution(task, strategy(recipe), workers, recipe.seed, folder)
    if resume:
        evolution.restore()
    if evolution.generation > recipe.generations:
        raise CheckpointError(
            f"{folder.path} has {evolution.generation} finished generations, more than --generations {recipe.generations}"
        )
    while evolution.generation < recipe.generations:
        if on_generation(evolution.step()):
            return None
    result = {
        "status": "finished",
        "generations": evolution.generation,
        "parameters": int(task.start.numel()),
        "fitness": evolution.line["center"],
        "seconds": sum(line["seconds"] for line in folder.lines()),
    }
    origin = {**provenance, "recipe": recipe.to_json(), "result": result}
    average = "average of the search distribution's centres, weighted to the later ones"
    teacher(task, evolution.average).save(folder.teacher, {**origin, "which": average})
    teacher(task, evolution.fittest).save(folder.best, {**origin, "which": "fittest of the last generation"})
    write_state(folder.result, result)
    return result
