"""Trajectories of finished runs on one loss surface: reading the runs, and computing the content of landscape.json."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from apical.bench.recipe import Recipe
from apical.bench.run_folder import RunFolder
from apical.bench.schedule import generator
from apical.bench.state import read_json
from apical.bench.trajectory import Trajectory, load
from apical.diagnostics.landscape import (
    Losses,
    Plane,
    barrier,
    losses_along,
    principal_plane,
    random_plane,
    surface,
    tortuosity,
    travelled,
)
from apical.errors import CheckpointError, ConfigError

PlaneName = Literal["pca", "random"]
ALIKE = ("data", "model", "loss", "train_limit", "validation")
"""Fields of the recipe that determine the surface."""


@dataclass(frozen=True, eq=False)
class Run:
    """One finished run with its trajectory.

    Attributes:
        label: the rule's short name, with the folder's name if several runs have the same rule and seed.
        folder: the run's folder.
        trajectory: its snapshots.
    """

    label: str
    folder: Path
    recipe: Recipe
    trajectory: Trajectory


def find(folders: Sequence[Path]) -> tuple[list[Run], list[Path]]:
    """Return the runs of run folders and comparisons' folders, and the folders of those left out because they diverged.

    Raises:
        ConfigError: a folder contains no run, or an unfinished one or one without a trajectory, or the runs do not match.
        CheckpointError: a file is damaged.
    """
    entries: list[tuple[Path, Path, Recipe]] = []
    diverged = []
    for source in folders:
        for path in run_folders(source):
            folder = RunFolder(path)
            if not folder.result.exists():
                raise ConfigError(f"{path} is not finished; continue it with --resume")
            if read_json(folder.result).get("status") == "diverged":
                diverged.append(path)
                continue
            recipe = folder.recipe()
            if not recipe.trajectory:
                raise ConfigError(f"{path} has no trajectory: train with --trajectory N")
            entries.append((source, path, recipe))
    if not entries:
        raise ConfigError(f"every run diverged: {', '.join(map(str, diverged))}")
    paths = [path.resolve() for _, path, _ in entries]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice} is given twice")
    for _, path, recipe in entries[1:]:
        for field in ALIKE:
            first, other = getattr(entries[0][2], field), getattr(recipe, field)
            if first != other:
                where = f"{entries[0][1]} has {first}"
                raise ConfigError(f"{path} has a different loss surface: {field} {other}, but {where}; plot them separately")
    cells = [(recipe.rule_name, recipe.seed) for _, _, recipe in entries]
    repeated = {rule for rule, seed in cells if cells.count((rule, seed)) > 1}
    runs = []
    for source, path, recipe in entries:
        name = recipe.rule_name
        label = f"{name} ({source.name})" if name in repeated else name
        runs.append(Run(label, path, recipe, load(RunFolder(path).trajectory)))
    return runs, diverged


def run_folders(source: Path) -> list[Path]:
    """Return the folders of the runs in a run's or a comparison's folder, by rule and seed.

    Raises:
        ConfigError: it is neither.
    """
    if (source / "config.json").exists():
        return [source]
    if (source / "compare.json").exists():
        plan = read_json(source / "compare.json")
        cells = itertools.product(plan.get("rules", ()), plan.get("seeds", ()))
        return [source / "runs" / str(rule) / f"seed-{seed}" for rule, seed in cells]
    raise ConfigError(f"{source} is not the folder of a run or a comparison")


def check_weights(runs: Iterable[Run], model: nn.Module) -> None:
    """Raise an error if a trajectory belongs to a model other than `model`.

    Raises:
        CheckpointError: names or shapes of the parameters differ.
    """
    own = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    for run in runs:
        if list(zip(run.trajectory.names, run.trajectory.shapes, strict=True)) != own:
            raise CheckpointError(f"{run.folder}: its trajectory does not match the weights of {run.recipe.model}")


def plane_of(runs: Sequence[Run], name: PlaneName, model: nn.Module) -> Plane:
    """Return the principal plane of all snapshots, or a random one through the end of the first run; sets `model` to it.

    Raises:
        ConfigError: the snapshots span no plane.
    """
    if name == "pca":
        try:
            return principal_plane([run.trajectory.weights for run in runs])
        except ConfigError as error:
            raise ConfigError(f"{runs[0].folder}: {error}") from error
    nn.utils.vector_to_parameters(runs[0].trajectory.weights[-1], model.parameters())
    return random_plane(model, generator("cpu", 0, "landscape"))


def measure(
    runs: Sequence[Run], losses: Losses, plane: Plane, *, grid: int, span: float, chunk: int, whole: bool
) -> dict[str, Any]:
    """Return the surface, the runs on it and the numbers independent of the plane, ready for JSON; None if not finite.

    Args:
        losses: the loss as a function of the weights.
        plane: the plane on which to show it.
        span: half the side, relative to the largest distance of a snapshot's coordinate from the middle of all if `whole`;
            otherwise relative to the plane's axes.
        whole: show all snapshots, instead of the surroundings of the plane's origin.
    """
    places = [plane.coordinates(run.trajectory.weights) for run in runs]
    low, high = torch.cat(places).amin(0), torch.cat(places).amax(0)
    middle = (low + high) / 2 if whole else torch.zeros(2, dtype=torch.float64)
    half = span * (float((high - low).max()) / 2 if whole else 1.0)
    x, y = (torch.linspace(-half, half, grid, dtype=torch.float64) + centre for centre in middle)
    rows = [_row(run, place, losses, plane, chunk) for run, place in zip(runs, places, strict=True)]
    return {
        "explained_variance": None if plane.explained is None else list(plane.explained),
        "x": x.tolist(),
        "y": y.tolist(),
        "losses": _finite(surface(losses, plane, x, y, chunk)),
        "runs": rows,
        "barriers": list(_barriers(runs, losses, grid - 1, chunk)),
        "same_start": _same_start(runs),
    }


def evaluations(runs: Sequence[Run], grid: int) -> int:
    """Return the number of losses that :func:`measure` computes."""
    pairs = sum(run.recipe.seed == other.recipe.seed for run, other in itertools.combinations(runs, 2))
    return grid**2 + (pairs + len(runs)) * grid + sum(len(run.trajectory.steps) for run in runs)


def watched(losses: Losses, advance: Callable[[int], None]) -> Losses:
    """Wrap `losses` to report to `advance` how many it computed."""

    def told(points: Tensor) -> Tensor:
        values = losses(points)
        advance(len(points))
        return values

    return told


def _row(run: Run, place: Tensor, losses: Losses, plane: Plane, chunk: int) -> dict[str, Any]:
    weights = run.trajectory.weights
    straight = float((weights[-1].double() - weights[0].double()).norm())
    length = travelled(weights)
    return {
        "label": run.label,
        "rule": run.recipe.rule_name,
        "seed": run.recipe.seed,
        "folder": str(run.folder),
        "steps": list(run.trajectory.steps),
        "coordinates": place.tolist(),
        "distances": plane.distances(weights).tolist(),
        "losses": _finite(losses_along(losses, weights, chunk)),
        "travelled": length,
        "start_to_end": straight,
        "tortuosity": tortuosity(weights) if length and straight else None,
    }


def _barriers(runs: Sequence[Run], losses: Losses, steps: int, chunk: int) -> Iterable[dict[str, Any]]:
    """Yield the lines between start and end of each run, and between the ends of each two runs with the same seed."""
    pairs = itertools.combinations(runs, 2)
    lines = [(run, "start", run) for run in runs]
    lines += [(run, "end", other) for run, other in pairs if run.recipe.seed == other.recipe.seed]
    for run, place, other in lines:
        start, end = run.trajectory.weights[0 if place == "start" else -1], other.trajectory.weights[-1]
        wall = barrier(losses, start, end, steps, chunk)
        height = wall.height if math.isfinite(wall.height) else None
        yield {
            "seed": run.recipe.seed,
            "from": f"{run.label} {place}",
            "to": f"{other.label} end",
            "height": height,
            "at": None if height is None else wall.at,
            "losses": _finite(wall.along),
        }


def _same_start(runs: Sequence[Run]) -> dict[str, bool]:
    """Return for each seed with several runs whether all of them start from the same weights."""
    seeds: dict[int, list[Tensor]] = {}
    for run in runs:
        seeds.setdefault(run.recipe.seed, []).append(run.trajectory.weights[0])
    several = {seed: starts for seed, starts in seeds.items() if len(starts) > 1}
    return {str(seed): all(torch.equal(starts[0], start) for start in starts) for seed, starts in several.items()}


def _finite(values: Tensor) -> Any:
    """Return nested lists of the values, None for values that are not finite."""
    if values.dim() > 1:
        return [_finite(row) for row in values]
    return [value if math.isfinite(value) else None for value in values.tolist()]
