"""Policies trained by evolved top-down networks, against REINFORCE, on classic control tasks (arXiv 2208.01416).

    python -m apical_papers.tdca.reinforcement.study --out results/tdca-reinforcement
    python -m apical_papers.tdca.reinforcement.study --cases acrobot --out results/tdca-acrobot

In two stages, networks are evolved from several meta-seeds on a narrow range of settings (see
:mod:`apical.evolution.reinforcement`): gated by the advantage and without access to the state; then, starting from the first
stage, with the state, progress and return as further inputs. They then train new policies, from unused initial weights, on
settings of that range and on six far outside it. Every rule has its learning rate from one grid, chosen on validation
lifetimes of the training range. Every network is also tested with shuffled advantages: a network that still scores has
memorised the task. Finished parts are kept in the folder, evolution generation by generation; the same command continues
from there."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apical.bench.cells import kept
from apical.bench.program import in_order, run_command
from apical.errors import ConfigError, require_choice
from apical.evolution.environments import Array
from apical.evolution.population import Lifetime
from apical.evolution.reinforcement import Credits, Reinforcement, Setting, by_hand, reinforce, shuffled, together
from apical.evolution.seeds import seed_of
from apical.evolution.strategy import Strategy
from apical_papers.tdca.evolution import evolve
from apical_papers.tdca.reinforcement.report import report

FIRST = 20
"""The first meta-seed; settings were chosen on lower ones."""
RATES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
"""Learning rates of every rule."""
STRATEGY = Strategy(name="pgpe", population=64, sigma=0.2, step=0.15)
SECOND = replace(STRATEGY, sigma=0.06)
"""Strategy of the second stage, which starts where the first ended."""
TRAIN = "training range"


@dataclass(frozen=True)
class Case:
    """An environment of the study.

    Attributes:
        stem: stem of file names.
        title: display name.
        setting: the evolved task and its range.
        unseen: name -> setting and its value, far outside the range; everything else is gymnasium's default.
        gain: mark for the return at the end minus that before learning.
        harmless: mark for the largest change of the return, in either direction, under shuffled advantages.
    """

    stem: str
    title: str
    setting: Setting
    unseen: dict[str, tuple[str, float]] = field(default_factory=dict)
    gain: float = 50.0
    harmless: float = 10.0


CART_POLE = Case(
    "cart-pole",
    "CartPole",
    Setting(),
    {
        "half-length 0.25 m": ("length", 0.25),
        "half-length 1 m": ("length", 1.0),
        "force 5 N": ("force_mag", 5.0),
        "force 15 N": ("force_mag", 15.0),
        "gravity 5 m/s²": ("gravity", 5.0),
        "gravity 15 m/s²": ("gravity", 15.0),
    },
)
PENDULUM = Case(
    "pendulum",
    "Pendulum with three torques",
    Setting("pendulum", {"m": (0.8, 1.2), "l": (0.8, 1.2)}, lifetime=Lifetime(steps=20, lr=0.02, clip=1.0), returns=1000.0),
    {
        "mass 0.5 kg": ("m", 0.5),
        "mass 2 kg": ("m", 2.0),
        "length 0.5 m": ("l", 0.5),
        "length 1.5 m": ("l", 1.5),
        "gravity 5 m/s²": ("g", 5.0),
        "gravity 15 m/s²": ("g", 15.0),
    },
    gain=100.0,
    harmless=50.0,
)
ACROBOT = Case(
    "acrobot",
    "Acrobot",
    Setting(
        "acrobot",
        {"LINK_MASS_1": (0.8, 1.2), "LINK_MASS_2": (0.8, 1.2)},
        lifetime=Lifetime(steps=20, lr=0.02, clip=1.0),
        steps=500,
        returns=500.0,
    ),
    {
        "upper link 0.5 kg": ("LINK_MASS_1", 0.5),
        "upper link 2 kg": ("LINK_MASS_1", 2.0),
        "lower link 0.5 kg": ("LINK_MASS_2", 0.5),
        "lower link 2 kg": ("LINK_MASS_2", 2.0),
        "upper link 0.5 m": ("LINK_LENGTH_1", 0.5),
        "upper link 1.5 m": ("LINK_LENGTH_1", 1.5),
    },
    harmless=25.0,
)
"""With gymnasium's own limit of 500 steps; within 200, few episodes of an untrained policy end at all. On development seeds
REINFORCE gained some 130 steps, and 80 or more on each of the six settings; TDCA was not run on them."""
CASES = {case.stem: case for case in (CART_POLE, PENDULUM, ACROBOT)}


@dataclass(frozen=True)
class Options:
    """Evolved top-down networks against REINFORCE on classic control tasks."""

    out: Path
    """Output folder; finished parts in it are kept."""
    seeds: int = 5
    """Meta-seeds: independent evolutions."""
    generations: int = 60
    """Generations of the first stage."""
    generations_state: int = 20
    """Generations of the second stage, in which networks see the state."""
    generations_ungated: int = 15
    """Generations of networks with ungated credit, on CartPole."""
    lifetimes: int = 16
    """New policies per setting and meta-seed for tests, and per learning rate for choosing it."""
    cases: tuple[str, ...] = ("cart-pole", "pendulum")
    """Cases to run, from cart-pole, pendulum and acrobot."""
    jobs: int = 0
    """Cases run in parallel; 0: one per core."""


def new_policies(task: Reinforcement, name: str, seed: int, count: int) -> tuple[Tensor, list[int]]:
    """Return initial policies (count, n) and the seeds of their lifetimes."""
    seeds = [seed_of(name, seed, k) for k in range(count)]
    return torch.stack([task.policy.start(seed_of(item, "policy")) for item in seeds]), seeds


CreditsOf = Callable[[int], Credits]
"""Maps a number of policies to the source of their credits."""


def tuned(task: Reinforcement, credits_of: CreditsOf, seed: int, count: int) -> dict[str, Any]:
    """Return the mean final return of `count` validation lifetimes in the training range by rate, and the best rate."""
    start, seeds = new_policies(task, "validation", seed, count)
    settings = {name: np.tile(values, len(RATES)) for name, values in task.drawn(seed_of("validation", seed), count).items()}
    rates = torch.tensor(RATES).repeat_interleave(count)
    returns, _ = task.live(start.repeat(len(RATES), 1), credits_of(len(rates)), settings, seeds * len(RATES), rates)
    returns_of = dict(zip(RATES, task.end(returns).view(-1, count).mean(1).tolist(), strict=True))
    return {
        "rate": max(returns_of, key=returns_of.__getitem__),
        "returns": {f"{rate:g}": value for rate, value in returns_of.items()},
    }


def places_of_test(case: Case, task: Reinforcement, seed: int, count: int) -> dict[str, Array]:
    """Return settings of the training range, `count` times, then each of the unseen ones, `count` times."""
    drawn, usual = task.drawn(seed_of("test", seed), count), task.environment.settings
    names = {*drawn, *(name for name, _ in case.unseen.values())}
    return {
        name: np.concatenate(
            [
                drawn.get(name, np.full(count, usual[name])),
                *(np.full(count, value if key == name else usual[name]) for key, value in case.unseen.values()),
            ]
        )
        for name in sorted(names)
    }


def trial(case: Case, task: Reinforcement, seed: int, count: int, credits_of: CreditsOf, rate: float) -> dict[str, Any]:
    """Return the mean return at the end of lifetimes for each setting, and in every update in the training range."""
    start, seeds = new_policies(task, "test", seed, count)
    places = (TRAIN, *case.unseen)
    returns, _ = task.live(
        start.repeat(len(places), 1),
        credits_of(count * len(places)),
        places_of_test(case, task, seed, count),
        seeds * len(places),
        torch.full((count * len(places),), rate),
    )
    ends = task.end(returns).view(len(places), count).mean(1).tolist()
    return {"rate": rate, "end": dict(zip(places, ends, strict=True)), "curve": returns[:, :count].mean(1).tolist()}


def measured(case: Case, networks: dict[str, tuple[Reinforcement, Tensor]], seed: int, count: int) -> dict[str, Any]:
    """Test a meta-seed: every network and control at its own rate, then each with shuffled advantages.

    Args:
        networks: name -> the task in the form the network sees, and the network's weights.
    """
    task = next(iter(networks.values()))[0]
    rules: dict[str, tuple[Reinforcement, CreditsOf]] = {
        name: (learner, lambda n, learner=learner, weights=weights: learner.credits(weights.expand(n, -1)))  # type: ignore[misc]
        for name, (learner, weights) in networks.items()
    }
    rules |= {"by-hand": (task, lambda n: by_hand), "reinforce": (task, lambda n: reinforce)}
    methods = {}
    for name, (learner, credits_of) in rules.items():
        best = tuned(learner, credits_of, seed, count)
        methods[name] = {**trial(case, learner, seed, count, credits_of, best["rate"]), "returns": best["returns"]}
        methods[f"{name}-shuffled"] = trial(
            replace(case, unseen={}), learner, seed, count, partial(_shuffled, credits_of, seed), best["rate"]
        )
    return {"methods": methods}


def _shuffled(credits_of: CreditsOf, seed: int, count: int) -> Credits:
    return shuffled(credits_of(count), seed_of("shuffled", seed))


def cell(options: Options, case: Case) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the evolutions of a case, and the saved test of each meta-seed."""
    parts, seeds = options.out / "cells", range(FIRST, FIRST + options.seeds)
    parts.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"setting": asdict(case.setting), "strategy": asdict(STRATEGY), "seeds": options.seeds}
    starts = [(task, task.start) for task in (Reinforcement(replace(case.setting, seed=seed)) for seed in seeds)]
    evolutions: dict[str, Any] = {}
    networks: dict[str, list[tuple[Reinforcement, Tensor]]] = {}

    def stage(name: str, begun: list[tuple[Reinforcement, Tensor]], strategy: Strategy, generations: int) -> None:
        """Evolve from tasks with initial networks, one for each meta-seed."""
        config[f"generations of {name}"] = generations
        tasks, first = zip(*begun, strict=True)
        path = parts / f"{case.stem}-{name}.json"
        length = (strategy, generations, path.with_suffix(".pt"))
        evolutions[name] = kept(path, config, partial(evolve, tasks, seeds, first, together, *length))
        networks[name] = [(task, torch.tensor(c)) for task, c in zip(tasks, evolutions[name]["centers"], strict=True)]

    stage("gated", starts, STRATEGY, options.generations)
    stage("state", [task.with_state(center) for task, center in networks["gated"]], SECOND, options.generations_state)
    if case.stem == CART_POLE.stem:
        plain = [Reinforcement(replace(task.setting, gated=False, hidden=12)) for task, _ in starts]
        stage("ungated", [(task, task.start) for task in plain], STRATEGY, options.generations_ungated)
    networks["unevolved"] = starts
    config["lifetimes"], cells = options.lifetimes, []
    for k, seed in enumerate(seeds):
        of_seed = {name: record[k] for name, record in networks.items()}
        path = parts / f"{case.stem}-test-{seed}.json"
        cells.append(kept(path, config, partial(measured, case, of_seed, seed, options.lifetimes)))
        print(f"{cells[-1]['seconds']:7.1f} s  {case.title}, meta-seed {seed}: {end_returns(cells[-1])}", flush=True)
    return evolutions, cells


def end_returns(test: Mapping[str, Any]) -> dict[str, float]:
    """Format the mean final return of every method in the training range."""
    return {name: round(record["end"][TRAIN], 1) for name, record in test["methods"].items()}


def study(options: Options, command: str) -> dict[str, Any]:
    """Run the unfinished parts, then write results.json, figures and report.html.

    Raises:
        ConfigError: a case is unknown, or named twice.
        CheckpointError: the folder contains parts of a study with other options.
    """
    if not options.cases or len({*options.cases}) < len(options.cases):
        raise ConfigError(f"--cases must name each case once; got {' '.join(options.cases) or 'none'}")
    for name in options.cases:
        require_choice("case", name, CASES)
    cases = [CASES[name] for name in options.cases]
    cells = dict(zip(options.cases, in_order(options.jobs, cases, partial(cell, options), options.out), strict=True))
    task = Reinforcement(cases[0].setting)
    facts = {
        **{key: value for key, value in asdict(options).items() if key not in ("out", "cases", "jobs")},
        "first meta-seed": FIRST,
        "strategy": asdict(STRATEGY),
        "sigma of the second stage": SECOND.sigma,
        f"policy on {cases[0].title}": list(task.policy.sizes),
        "network": list(task.network.sizes),
        **{case.title: dict(case.setting.ranges) for case in cases},
        **{
            key: value
            for key, value in asdict(cases[0].setting).items()
            if key in ("lifetime", "episodes", "steps", "discount", "last")
        },
        "rates": list(RATES),
    }
    return report(options.out, cases, cells, TRAIN, command, facts)


main = partial(run_command, "apical_papers.tdca.reinforcement.study", Options, study)


if __name__ == "__main__":
    sys.exit(main())
