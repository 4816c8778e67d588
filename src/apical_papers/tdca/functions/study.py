"""Minima of non-convex functions by evolved top-down networks, against gradient descent and Adam (arXiv 2208.01416).

    python -m apical_papers.tdca.functions.study --out results/tdca-functions

For every function and both inputs (see :mod:`apical.evolution.functions`), networks are evolved from several meta-seeds and
then tested, with the same weights, from held-out starts: with the minimum where evolution without shifts had it, and with
minima shifted by numbers that evolution did not see. The baselines follow the true gradient for as many steps, with learning
rates chosen on validation starts. What is finished stays in the folder `cells`; the same command goes on from there.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from apical.bench.cells import kept
from apical.bench.evolve.loop import Evolution
from apical.bench.program import run_command
from apical.bench.run_folder import check_writable, environment
from apical.errors import ConfigError
from apical.evolution.functions import (
    FUNCTIONS,
    Function,
    Input,
    Minimisation,
    Setting,
    basin,
    best_of_random,
    descend,
    draw,
    function,
)
from apical.evolution.seeds import seed_of
from apical.evolution.strategy import Strategy
from apical.evolution.workers import Here
from apical_papers.tdca.functions.report import report

INPUTS: tuple[Input, ...] = ("absolute", "relative")
SHIFT = 1.5
NEAR = 0.25
"""A point is at a minimum if it is at most so far from it, in the learner's coordinates."""
RATES = tuple(10 ** (k / 2) for k in range(-10, 1))
"""Learning rates of both baselines, from 1e-5 to 1."""
STRATEGY = Strategy(name="pgpe", population=64, sigma=0.1, step=0.3)
SHIFTS = {"same": 0.0, "shifted": SHIFT}
"""Where test functions have their minima: half-width of the shifts."""


class Case(NamedTuple):
    """A function in so many dimensions."""

    function: str
    dimension: int

    @property
    def stem(self) -> str:
        """Name of files."""
        return f"{self.function}-{self.dimension}d"

    @property
    def title(self) -> str:
        """The function's name, for people."""
        return self.of.title

    @property
    def of(self) -> Function:
        """The function."""
        return function(self.function, self.dimension)


CORE = (Case("rastrigin", 2), Case("ackley", 2), Case("himmelblau", 2))
"""The functions that decide."""
FURTHER = tuple(Case(name, 2) for name in ("griewank", "schwefel", "styblinski-tang", "rosenbrock"))
LARGE = (Case("rastrigin", 10), Case("ackley", 10))


@dataclass(frozen=True)
class Options:
    """Evolved top-down networks against gradient descent and Adam on non-convex functions."""

    out: Path
    """Folder to write; what is finished in it is kept."""
    seeds: int = 5
    """Meta-seeds: independent evolutions of each kind."""
    generations: int = 400
    """Of evolution on Rastrigin, Ackley and Himmelblau in two dimensions, which decide."""
    generations_further: int = 160
    """Of evolution on the other functions in two dimensions."""
    generations_large: int = 80
    """Of evolution in ten dimensions."""
    starts: int = 256
    """Held-out starts per meta-seed."""

    def length(self, case: Case) -> int:
        """Generations of a case."""
        if case in LARGE:
            return self.generations_large
        return self.generations if case in CORE else self.generations_further


def measured(case: Case, ends: Tensor, shifts: Tensor, path: Tensor | None = None) -> dict[str, float]:
    """Mean final value, starts that end at a global minimum, and what the path (T, S, d) says, if given.

    `crossed` is how many starts end in the basin of another minimum than they began in, `detour` the median of distance
    travelled over distance from start to end.
    """
    minima = case.of.minima(case.dimension).to(ends)
    nearest = (ends - shifts - minima[:, None]).norm(dim=-1).min(0).values
    values = case.of(ends - shifts)
    if path is not None:  # a start that diverges counts as if it had stayed
        values = torch.where(values.isfinite(), values, case.of(path[0] - shifts))
    found = {"final": float(values.mean()), "successes": int((nearest <= NEAR).sum())}
    if path is None:
        return found
    travelled, across = (path[1:] - path[:-1]).norm(dim=-1).sum(0), (ends - path[0]).norm(dim=-1)
    found["detour"] = float((travelled / across.clamp_min(1e-12)).nanmedian())
    if case.of.multimodal and case.dimension == 2:
        moved = (basin(case.of, path[0], shifts) - basin(case.of, ends, shifts)).norm(dim=-1)
        found["crossed"] = int((moved > NEAR).sum())
    return found


def tuned(case: Case, starts: int) -> dict[str, Any]:
    """Per condition and method, the mean final value on validation starts for every rate, and the best rate and method."""
    chosen: dict[str, Any] = {}
    for place, shift in SHIFTS.items():
        x, shifts = draw(starts, case.dimension, shift, seed_of("validation", case.stem, place))
        found: dict[str, dict[float, float]] = {}
        for method in ("gd", "adam"):
            ends = [descend(case.of, x, shifts, method, rate)[-1] for rate in RATES]
            values = [float(case.of(end - shifts).mean()) for end in ends]
            found[method] = {r: v for r, v in zip(RATES, values, strict=True) if v < float("inf")}
        rates = {method: min(values, key=values.__getitem__) for method, values in found.items()}
        best = min(rates, key=lambda method: found[method][rates[method]])
        chosen[place] = {
            "rates": rates,
            "best": best,
            "values": {method: {f"{rate:.3g}": value for rate, value in each.items()} for method, each in found.items()},
        }
    return {"places": chosen}


def held_out(case: Case, options: Options, seed: int, place: str) -> tuple[Tensor, Tensor]:
    """The test starts and shifts of a meta-seed."""
    return draw(options.starts, case.dimension, SHIFTS[place], seed_of("test", case.stem, place, seed))


def baselines(case: Case, options: Options, seed: int, rates: dict[str, Any]) -> dict[str, Any]:
    """Measures of gradient descent, Adam and random points per condition."""
    found: dict[str, Any] = {}
    for place in SHIFTS:
        x, shifts = held_out(case, options, seed, place)
        methods: tuple[Literal["gd", "adam"], ...] = ("gd", "adam")
        paths = {m: descend(case.of, x, shifts, m, rates[place]["rates"][m]) for m in methods}
        found[place] = {m: measured(case, path[-1], shifts, path) for m, path in paths.items()}
        ends = best_of_random(case.of, x, shifts, seed_of("random", case.stem, place, seed))
        found[place] |= {"random": measured(case, ends, shifts), "start": measured(case, x, shifts)}
    return {"places": found}


def setting(case: Case, kind: Input, seed: int) -> Setting:
    """What is evolved: networks with absolute input never see a shift."""
    return Setting(case.function, case.dimension, kind, shift=SHIFT if kind == "relative" else 0.0, seed=seed)


def evolved(case: Case, kind: Input, options: Options, seed: int) -> dict[str, Any]:
    """Evolve, then measure the centre and the unevolved network per condition."""
    task = Minimisation(setting(case, kind, seed))
    evolution = Evolution(task, STRATEGY, Here(), seed)
    curve = [evolution.step()["center"] for _ in range(options.length(case))]
    center = evolution.search.center
    found: dict[str, Any] = {}
    for place in SHIFTS:
        x, shifts = held_out(case, options, seed, place)
        path = task.walk(center.double()[None], x, shifts)[:, 0]
        rest = task.walk(task.start.double()[None], x, shifts)[-1, 0]
        found[place] = {"tdca": measured(case, path[-1], shifts, path), "unevolved": measured(case, rest, shifts)}
    return {"places": found, "center": center.tolist(), "fitness": curve[::10] + curve[-1:]}


def study(options: Options, command: str) -> dict[str, Any]:
    """Run what is not finished yet, then write results.json, figures and report.html.

    Raises:
        ConfigError: the folder cannot be written, or an option is not usable.
        CheckpointError: the folder holds parts of a study with other options.
    """
    counts = (options.generations, options.generations_further, options.generations_large, options.starts)
    if options.seeds < 2 or min(counts) < 1:
        raise ConfigError("--seeds must be at least 2, generations and starts at least 1")
    check_writable(options.out)
    around = environment("cpu", torch.get_num_threads())
    parts = options.out / "cells"
    cells: dict[Case, dict[str, Any]] = {}
    for case in (*CORE, *FURTHER, *LARGE):
        config = {"starts": options.starts, "shift": SHIFT, "near": NEAR}
        best = kept(parts / f"{case.stem}-tuned.json", config, partial(tuned, case, options.starts))
        cells[case] = {"tuned": best["places"], "baselines": [], **{kind: [] for kind in INPUTS}}
        for seed in range(options.seeds):
            path = parts / f"{case.stem}-baselines-{seed}.json"
            cells[case]["baselines"].append(kept(path, config, partial(baselines, case, options, seed, best["places"])))
            for kind in INPUTS:
                asked = {
                    **config,
                    "generations": options.length(case),
                    **asdict(setting(case, kind, seed)),
                    **asdict(STRATEGY),
                }
                path = parts / f"{case.stem}-{kind}-{seed}.json"
                cell = kept(path, asked, partial(evolved, case, kind, options, seed))
                cells[case][kind].append(cell)
                place = "same" if kind == "absolute" else "shifted"
                value = cell["places"][place]["tdca"]["final"]
                print(f"{cell['seconds']:7.1f} s  {case.stem:20} {kind:9} seed {seed}  {place} {value:.4g}", flush=True)
    facts = {
        **{key: value for key, value in asdict(options).items() if key != "out"},
        "strategy": asdict(STRATEGY),
        "steps": Setting().steps,
        "rate": Setting().rate,
        "starts_per_generation": Setting().starts,
        "hidden": [Setting().hidden, Setting().hidden],
        "network_in_10_dimensions": "full: one network sees and moves all coordinates",
        "shift": SHIFT,
        "success_within": NEAR,
        "rates_of_baselines": [float(f"{rate:.3g}") for rate in RATES],
        "units": {name: f.unit for name, f in FUNCTIONS.items()},
    }
    return report(options.out, cells, CORE, command, facts, around)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command("apical_papers.tdca.functions.study", Options, study, arguments)


if __name__ == "__main__":
    sys.exit(main())
