"""TDCA on classification: does an evolved top-down network train better than backpropagation, and what does it need?

Run `python -m apical_papers.tdca.classification.study --out results/tdca-classification`. Tasks are four classes of the
handwritten digits, drawn anew and numbered anew; top-down networks are evolved on tasks from some of the images and tested
on tasks with other images, other initial weights and, in the rows for other data, other data sets. Each evolution is a
meta-seed; intervals are over meta-seeds. What is finished stays in the folder, so an interrupted study continues.

The paper's numbers could not be read; its claims can be tested all the same. The weak form of "better than
backpropagation" is a lower training loss than backpropagation's at the same learning rate, the strong form the same
against backpropagation with its learning rate tuned, at no loss of accuracy.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apical import data
from apical.bench.evolve.loop import Evolution
from apical.bench.run_folder import commit, environment
from apical.bench.state import read_json, write_json
from apical.errors import DataError
from apical.evolution.classification import Classification, Images, Setting
from apical.evolution.population import Lifetime
from apical.evolution.strategy import Strategy
from apical.evolution.workers import Here
from apical_papers.tdca.classification.report import finish
from apical_papers.tdca.trials import GRID, Bench, tuned

LIFETIME = Lifetime(steps=50, lr=0.02)
BASE = Setting(model="mlp-tanh-32", lifetime=LIFETIME, hidden=16, ways=4, examples=128)
STRATEGY = Strategy(population=64, step=0.3)
GENERATIONS = 60
TASKS = 16
SEEN = 800
"""Of 1797 digits, those that evolution draws its tasks from."""

ARMS: dict[str, tuple[Setting, int]] = {
    "fresh": (BASE, 5),
    "fixed": (replace(BASE, starts="fixed"), 5),
    "sites-1": (replace(BASE, sites=1), 5),
    "sites-2": (replace(BASE, sites=2), 5),
    "sites-4": (replace(BASE, sites=4), 5),
    "sites-8": (replace(BASE, sites=8), 5),
    "zeros": (replace(BASE, zeros=True), 3),
    "relu": (replace(BASE, model="mlp-32"), 3),
    "two-layers": (replace(BASE, model="mlp-tanh-32-32"), 3),
    "three-layers": (replace(BASE, model="mlp-tanh-32-32-32"), 3),
    "residual": (replace(BASE, model="mlp-residual-32-32-32"), 3),
    "conv": (replace(BASE, model="cnn-elu-6-12", examples=64), 2),
}
"""What is evolved, and for how many meta-seeds: tasks and initial weights fresh each generation, weights fixed, credit
diffusion from K sites, learners whose weights begin at zero, other learners."""

ELSEWHERE = ("mnist", "fashion-mnist", "kmnist", "usps")
"""Data sets whose tasks the networks evolved on digits are tested on."""

WIDTHS = (8, 16, 64, 128)
"""Hidden widths that the network with four sites, evolved at width 32, is tested on."""


def digits() -> tuple[Images, Images]:
    """The handwritten digits in two: images for evolution, and images that it never sees."""
    loaded = data.load("digits")
    inputs = torch.cat([loaded.train.inputs, loaded.test.inputs])
    targets = torch.cat([loaded.train.targets, loaded.test.targets])
    seen, unseen = slice(SEEN), slice(SEEN, None)
    return Images(inputs[seen], targets[seen], 10, "digits"), Images(inputs[unseen], targets[unseen], 10, "digits")


def unseen(name: str) -> Images:
    """Test images of a data set."""
    loaded = data.load(name)
    return Images(loaded.test.inputs, loaded.test.targets, loaded.classes, name)


def evolved(arm: str, seed: int, train: Images, generations: int) -> dict[str, Any]:
    """One evolution: weights of the centre and of the fittest, curve, seconds per generation."""
    setting = replace(ARMS[arm][0], seed=seed)
    task = Classification([train], setting)
    evolution = Evolution(task, STRATEGY, Here(32), seed)
    lines = [evolution.step() for _ in range(generations)]
    return {
        "seed": seed,
        "parameters": task.start.numel(),
        "start": task.start.tolist(),
        "center": evolution.search.center.tolist(),
        "fittest": evolution.fittest.tolist(),
        "curve": [line["center"] for line in lines],
        "seconds_per_generation": sorted(line["seconds"] for line in lines)[len(lines) // 2],
    }


def trials(arm: str, found: dict[str, Any], test: Images, others: dict[str, Images]) -> dict[str, Any]:
    """Everything one evolved network is measured on, against the other rules on the same tasks."""
    setting = ARMS[arm][0]
    task = Classification([test], setting)
    seed = found["seed"]
    validation, bench = Bench(task, 8, f"validation {seed}"), Bench(task, TASKS, f"test {seed}")
    teachers = {name: torch.tensor(found[name]) for name in ("center", "fittest", "start")}
    result: dict[str, Any] = {"same_rate": {}, "tuned": {}}
    lineup: list[tuple[str, str, Tensor | None]] = [
        ("tdca", "tdca", teachers["center"]),
        ("tdca-fittest", "tdca", teachers["fittest"]),
        ("unevolved", "unevolved", teachers["start"]),
        ("silent", "silent", teachers["center"]),
        ("bp", "bp", None),
        ("dfa", "dfa", None),
    ]
    for name, rule, teacher in lineup:
        result["same_rate"][name] = asdict(bench.run(rule, [LIFETIME.lr], LIFETIME, teacher)[0])
        rate = tuned(validation, rule, LIFETIME, teacher)
        result["tuned"][name] = asdict(bench.run(rule, [rate], LIFETIME, teacher)[0])
    if arm == "fresh":
        result["elsewhere"] = {
            other.name: _against(Classification([other], setting), f"{other.name} {seed}", teachers)
            for other in others.values()
        }
    if arm == "sites-4":
        result["widths"] = {
            str(width): _against(
                Classification([test], replace(setting, model=f"mlp-tanh-{width}")), f"{width} {seed}", teachers
            )
            for width in WIDTHS
        }
    if setting.starts == "fixed":
        known = Bench(task, TASKS, f"test {seed}")
        known.seeds = [0] * TASKS  # the initial weights that evolution used
        result["known_start"] = {
            "tdca": asdict(known.run("tdca", [LIFETIME.lr], LIFETIME, teachers["center"])[0]),
            "bp": asdict(known.run("bp", [LIFETIME.lr], LIFETIME)[0]),
        }
        fresh = Bench(Classification([test], replace(setting, starts="fresh")), TASKS, f"test {seed}")
        result["fresh_start"] = {
            "tdca": asdict(fresh.run("tdca", [LIFETIME.lr], LIFETIME, teachers["center"])[0]),
            "bp": asdict(fresh.run("bp", [LIFETIME.lr], LIFETIME)[0]),
        }
    return result


def _against(task: Classification, name: str, teachers: dict[str, Tensor]) -> dict[str, Any]:
    bench, validation = Bench(task, TASKS, f"elsewhere {name}"), Bench(task, 8, f"elsewhere validation {name}")
    rows = {}
    for label, rule, teacher in (
        ("tdca", "tdca", teachers["center"]),
        ("unevolved", "unevolved", teachers["start"]),
        ("bp", "bp", None),
        ("dfa", "dfa", None),
    ):
        rate = tuned(validation, rule, LIFETIME, teacher)
        rows[label] = asdict(bench.run(rule, [rate], LIFETIME, teacher)[0])
    return rows


def cell(out: Path, arm: str, seed: int, train: Images, test: Images, others: dict[str, Images], generations: int) -> Path:
    """The file of one evolution and its trials; made unless it is there."""
    path = out / "cells" / f"{arm}-{seed}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        begun = time.perf_counter()
        found = evolved(arm, seed, train, generations)
        measured = trials(arm, found, test, others)
        kept = {name: value for name, value in found.items() if name not in ("start", "fittest")}
        write_json(path, {"arm": arm, "commit": commit(), **kept, **measured, "seconds": time.perf_counter() - begun})
        print(f"{arm} seed {seed}: {time.perf_counter() - begun:.0f} s", flush=True)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and write results.json, figures and report.html."""
    parser = argparse.ArgumentParser(description="TDCA on classification: evolution, controls, statistics")
    parser.add_argument("--out", type=Path, required=True, help="folder; finished evolutions in it are kept")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="which to evolve")
    parser.add_argument("--report", action="store_true", help="evolve nothing; report what is finished")
    parser.add_argument("--generations", type=int, default=GENERATIONS)
    parser.add_argument("--seeds", type=int, default=None, help="meta-seeds of each arm, at most; all that are planned")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    missing = [
        (arm, seed)
        for seed in range(max(ARMS[arm][1] for arm in options.arms))
        for arm in options.arms
        if seed < min(ARMS[arm][1], options.seeds or ARMS[arm][1]) and not options.report
    ]
    train, test = digits()
    others = {}
    for name in ELSEWHERE:
        try:
            others[name] = unseen(name)
        except DataError as error:
            print(f"without {name}: {error}")
    for arm, seed in missing:
        cell(options.out, arm, seed, train, test, others, options.generations)
    finish(
        options.out,
        cells(options.out),
        f"python -m apical_papers.tdca.classification.study --out {options.out} --generations {options.generations}",
        {
            "generations": options.generations,
            "evolved at commit": sorted({each["commit"] or "unknown" for each in cells(options.out)}),
            "meta-seeds planned": {arm: count for arm, (_, count) in ARMS.items()},
            "strategy": asdict(STRATEGY),
            "tasks": TASKS,
            "images for evolution": SEEN,
            "learning rates": list(GRID),
            **{key: value for key, value in asdict(BASE).items() if value is not None},
        },
        environment("cpu", torch.get_num_threads()),
    )


def cells(out: Path) -> list[dict[str, Any]]:
    """What is finished, in the order of arms and meta-seeds."""
    found = [read_json(path) for path in sorted((out / "cells").glob("*.json"))]
    return sorted(found, key=lambda cell: (list(ARMS).index(cell["arm"]), cell["seed"]))


if __name__ == "__main__":
    main()
