"""Minima of non-convex functions by evolved top-down networks, against true gradients and random points (arXiv 2208.01416).

    python -m apical_papers.tdca.functions.study --out results/tdca-functions

For every case, networks (see :mod:`apical.evolution.minimisation`) are evolved from several meta-seeds, with newly shifted
minima for every start, and tested from held-out starts with shifts that evolution did not see. The controls follow the true
gradient for the same number of steps, with learning rates chosen on validation starts, or take the best of as many random
points. Finished parts are kept in the folder `cells`; the same command continues from there.

In ten dimensions, networks of different meta-seeds differed greatly after 200 generations. Longer evolutions from other
meta-seeds, with the same marks, are

    python -m apical_papers.tdca.functions.study --groups large --generations-large 600 --first 40 --seeds 10 \
        --out results/tdca-functions-10d
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apical.bench.cells import kept
from apical.bench.program import in_order, run_command
from apical.errors import require_choice
from apical.evolution.functions import METHODS, Function, best_of_random, descend, draw, function
from apical.evolution.minimisation import Kind, Minimisation, Setting, together
from apical.evolution.seeds import seed_of
from apical.evolution.strategy import Strategy
from apical_papers.tdca.evolution import evolve
from apical_papers.tdca.functions.report import report

FIRST = 20
NEAR = 0.25
"""Largest distance from a minimum, in the learner's coordinates, that counts as reaching it."""
RATES = tuple(10 ** (k / 2) for k in range(-10, 3))
"""Learning rates of every gradient control, from 1e-5 to 10."""
STRATEGY = Strategy(name="pgpe", population=64, sigma=0.1, step=0.15)
VALIDATION = 128
"""Number of starts for choosing learning rates of controls."""
LARGE_CAP = 1.5
"""Longest step of networks that move one coordinate at a time."""


class Case(NamedTuple):
    """A function, its number of dimensions, and the kind of network evolved on it."""

    function: str
    dimension: int
    kind: Kind

    @property
    def stem(self) -> str:
        """Stem of file names."""
        return f"{self.function}-{self.dimension}d-{self.kind}"

    @property
    def title(self) -> str:
        """Display name of the function, with its dimension."""
        return f"{self.of.title}, {self.dimension}-D"

    @property
    def of(self) -> Function:
        """The function."""
        return function(self.function, self.dimension)

    def setting(self, seed: int, starts: int = 32) -> Setting:
        """Return the evolved task."""
        setting = Setting(self.function, self.dimension, self.kind, seed=seed, starts=starts)
        if self.kind == "stateless":
            return replace(setting, cap=0.1, hidden=12)
        return replace(setting, cap=LARGE_CAP) if self.kind == "coordinate" else setting


DECIDING = ("rastrigin", "ackley", "schwefel", "styblinski-tang", "rosenbrock")
PLANE = tuple(Case(name, 2, "recurrent") for name in DECIDING)
FURTHER = tuple(Case(name, 2, "recurrent") for name in ("himmelblau", "griewank"))
LARGE = tuple(Case(name, 10, "coordinate") for name in DECIDING)
STATELESS = tuple(Case(name, 2, "stateless") for name in DECIDING)
HUGE, HUGE_STEPS = 30, 180
"""Dimensions and steps of a further test of networks evolved in ten dimensions: six steps per coordinate, as in ten."""


@dataclass(frozen=True)
class Options:
    """Evolved top-down networks against gradient descent, Adam and random points on non-convex functions."""

    out: Path
    """Output folder; finished parts in it are kept."""
    seeds: int = 5
    """Meta-seeds: independent evolutions of each case."""
    generations: int = 500
    """Generations of evolution on the five judged functions in two dimensions."""
    generations_large: int = 200
    """Generations of evolution in ten dimensions."""
    generations_further: int = 100
    """Generations of every other evolution."""
    starts: int = 256
    """Held-out starts per meta-seed."""
    first: int = FIRST
    """The first meta-seed; settings were chosen on some below 20."""
    groups: tuple[str, ...] = ("plane", "large", "further", "stateless")
    """Groups to run: functions in two dimensions, in ten, two further ones in two, and networks without memory."""
    jobs: int = 0
    """Functions run in parallel; 0: one per core."""

    @property
    def meta_seeds(self) -> range:
        """All meta-seeds."""
        return range(self.first, self.first + self.seeds)

    def length(self, case: Case) -> int:
        """Return the generations of a case."""
        if case in LARGE:
            return self.generations_large
        return self.generations if case in PLANE else self.generations_further


def measured(of: Function, path: Tensor, shifts: Tensor) -> dict[str, float]:
    """Return the mean value at the end of paths (T, S, d) and at their best point, and starts that end at a global minimum.

    A start that diverges counts as if it had not moved.
    """
    values = of(path - shifts)
    final = torch.where(values[-1].isfinite(), values[-1], values[0])
    minima = of.minima(path.shape[-1]).to(path)
    nearest = (path[-1] - shifts - minima[:, None]).norm(dim=-1).amin(0)
    best = values.nan_to_num(torch.inf).amin(0)
    return {"final": float(final.mean()), "best": float(best.mean()), "successes": int((nearest <= NEAR).sum())}


def tuned(case: Case, starts: int, steps: int = 60) -> dict[str, Any]:
    """Return the mean final value on validation starts for every rate of every control, and its best rate."""
    x, shifts = draw(starts, case.dimension, Setting().shift, seed_of("validation", case.function, case.dimension))
    scores_of: dict[str, dict[float, float]] = {}
    for method in METHODS:
        ends = descend(case.of, x, shifts, method, torch.tensor(RATES).to(x).view(-1, 1, 1), steps=steps)[-1]  # (R, S, d)
        values = dict(zip(RATES, case.of(ends - shifts).mean(-1).tolist(), strict=True))
        scores_of[method] = {rate: value for rate, value in values.items() if value < float("inf")}
    return {
        "rates": {method: min(values, key=values.__getitem__) for method, values in scores_of.items()},
        "values": {method: {f"{rate:.3g}": value for rate, value in scores.items()} for method, scores in scores_of.items()},
    }


def controls(case: Case, starts: int, steps: int, seed: int, rates: dict[str, float]) -> dict[str, Any]:
    """Return measures of every control from the held-out starts of a meta-seed."""
    x, shifts = held_out(case, starts, seed)
    paths: dict[str, Tensor] = {m: descend(case.of, x, shifts, m, rates[m], steps=steps) for m in METHODS}
    points = best_of_random(case.of, x, shifts, seed_of("random", case.function, case.dimension, seed), steps)
    paths |= {"random": torch.stack([x, points]), "start": x[None]}
    return {name: measured(case.of, path, shifts) for name, path in paths.items()}


def held_out(case: Case, starts: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the test starts and shifts of a meta-seed."""
    return draw(starts, case.dimension, Setting().shift, seed_of("test", case.function, case.dimension, seed))


def evolved(case: Case, options: Options, seeds: Sequence[int], path: Path) -> dict[str, Any]:
    """Evolve from all meta-seeds, then measure centres and unevolved networks; coordinate-wise networks also in more
    dimensions.

    Args:
        path: file of saved generations.
    """
    tasks = [Minimisation(case.setting(seed)) for seed in seeds]
    evolution = evolve(tasks, seeds, [t.start for t in tasks], together, STRATEGY, options.length(case), path, every=50)
    results = []
    for task, seed, center in zip(tasks, seeds, map(torch.tensor, evolution["centers"]), strict=True):
        methods = _tested(case, task, {"tdca": center, "unevolved": task.start}, options.starts, seed)
        if case.kind == "coordinate":
            larger = case._replace(dimension=HUGE)
            task = Minimisation(replace(larger.setting(seed), steps=HUGE_STEPS))
            methods["tdca-larger"] = _tested(larger, task, {"tdca": center}, options.starts, seed)["tdca"]
        results.append({"methods": methods, "center": center.tolist()})
    return {
        "seeds": results,
        "evolution": evolution["evolution"],
        "fitness": evolution["curve"][::10] + evolution["curve"][-1:],
    }


def _tested(
    case: Case, task: Minimisation, networks: dict[str, Tensor], starts: int, seed: int
) -> dict[str, dict[str, float]]:
    x, shifts = held_out(case, starts, seed)
    paths = task.walk(torch.stack(list(networks.values())).double(), x, shifts)
    return {name: measured(case.of, paths[:, k], shifts) for k, name in enumerate(networks)}


def controls_of(case: Case, options: Options, seeds: Sequence[int]) -> dict[str, Any]:
    """Return rates and measures of the controls of a case, in each of the dimensions tested."""
    results = {}
    for dimension in (case.dimension, HUGE) if case.kind == "coordinate" else (case.dimension,):
        steps, at = HUGE_STEPS if dimension == HUGE else Setting().steps, case._replace(dimension=dimension)
        best = tuned(at, VALIDATION, steps)
        by_seed = [controls(at, options.starts, steps, seed, best["rates"]) for seed in seeds]
        results[str(dimension)] = {"tuned": best, "seeds": by_seed}
    return {"dimensions": results}


def cell(options: Options, case: Case) -> dict[str, Any]:
    """Return the saved results of a case: its evolutions with their tests, and its controls."""
    parts = options.out / "cells"
    config: dict[str, Any] = {"starts": options.starts, "near": NEAR, "seeds": options.seeds}
    seeds = options.meta_seeds
    settings = {**config, "generations": options.length(case), **asdict(case.setting(options.first)), **asdict(STRATEGY)}
    path = parts / f"{case.stem}.pt"
    content = kept(path.with_suffix(".json"), settings, partial(evolved, case, options, seeds, path))
    stem = f"{case.function}-{case.dimension}d-controls.json"
    config |= {"rates": list(RATES), "validation": VALIDATION}
    others = kept(parts / stem, config, partial(controls_of, case, options, seeds))
    return {**content, "controls": others["dimensions"], "seconds": content["seconds"] + others["seconds"]}


def study(options: Options, command: str) -> dict[str, Any]:
    """Run the unfinished parts, then write results.json, figures and report.html.

    Raises:
        CheckpointError: the folder contains parts of a study with other options.
        ConfigError: a group is unknown.
    """
    every = {"plane": PLANE, "large": LARGE, "further": FURTHER, "stateless": STATELESS}
    for group in options.groups:
        require_choice("groups", group, tuple(every))
    groups = {name: cases if name in options.groups else () for name, cases in every.items()}
    cases = [case for each in groups.values() for case in each]
    cells = dict(zip(cases, in_order(options.jobs, cases, partial(cell, options), options.out), strict=True))
    facts = {
        **{key: value for key, value in asdict(options).items() if key not in ("out", "jobs")},
        "strategy": asdict(STRATEGY),
        "steps": Setting().steps,
        "starts per generation": PLANE[0].setting(0).starts,
        "shift": Setting().shift,
        **{f"{case.kind} networks": _network(case) for case in (PLANE[0], LARGE[0], STATELESS[0])},
        "steps of a turn": Setting().turn,
        f"steps in {HUGE}-D": HUGE_STEPS,
        "success within": NEAR,
        "validation starts": VALIDATION,
        "rates of controls": [float(f"{rate:.3g}") for rate in RATES],
    }
    return report(options.out, cells, groups, command, facts)


def _network(case: Case) -> str:
    task = Minimisation(case.setting(0))
    return f"{'-'.join(map(str, task.network.sizes))}, cap {task.setting.cap:g}"


main = partial(run_command, "apical_papers.tdca.functions.study", Options, study)


if __name__ == "__main__":
    sys.exit(main())
