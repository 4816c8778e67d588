"""Credit diffusion, before and after: a credit per weight, per unit, and from K sites, on a learner small enough for all.

Run `python -m apical_papers.tdca.diffusion.study --out results/tdca-diffusion`. Learners have one hidden layer of eight tanh
units and learn four classes of the handwritten digits, with the credit of the authors' code, as in the arm "released" of the
classification study; or, with `--credit logits`, with credit as in its other arms. All evolutions of a meta-seed take turns,
generation by generation, so that other load on the machine slows them equally. Each meta-seed is saved in the folder when it
is finished, so an interrupted study continues.
"""

import statistics
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from tyro.conf import arg

from apical.bench.cells import kept
from apical.bench.evolve.loop import Evolution
from apical.bench.program import in_order, run_command
from apical.evolution.classification import Classification, Images
from apical.evolution.workers import Here
from apical_papers.tdca.classification.study import BASE, RELEASED, SEEN, STRATEGY, digits, measures, plain
from apical_papers.tdca.diffusion.report import BY_HAND, report
from apical_papers.tdca.synapses import SynapticClassification
from apical_papers.tdca.trials import GRID

CREDITS = {"probabilities": replace(RELEASED, model="mlp-tanh-8"), "logits": replace(BASE, model="mlp-tanh-8")}
"""As in the authors' code: on probabilities, not relative; or on logits, relative, as with a shipped teacher."""
LIFETIME = BASE.lifetime
"""Rules of the tests, whose learning rates are tuned."""
GENERATIONS = 60
TASKS = 16
VALIDATION = 8
"""Number of tasks for choosing learning rates."""
SITES = (8, 4, 2, 1)
ARMS = ("weight-alone", "weight", "unit", *(f"sites-{k}" for k in SITES))
"""From most credits to fewest."""


@dataclass(frozen=True)
class Options:
    """Credit diffusion, before and after; finished meta-seeds in --out are kept."""

    out: Annotated[Path, arg(metavar="DIR")]
    """Folder of the study."""
    seeds: int = 5
    """Meta-seeds: independent evolutions of each kind."""
    generations: int = GENERATIONS
    """Generations of each evolution."""
    credit: Literal["probabilities", "logits"] = "probabilities"
    """Quantity to which the output's credit applies; on logits, credit is also relative."""
    jobs: int = 0
    """Meta-seeds run in parallel; 0: one per core."""


def task(arm: str, images: Images, seed: int, credit: str = "probabilities") -> Classification:
    """Return the task on which an arm is evolved or tested."""
    setting = replace(CREDITS[credit], seed=seed)
    if arm.startswith("weight"):
        return SynapticClassification([images], setting, local=arm == "weight")
    return Classification([images], replace(setting, sites=int(arm.removeprefix("sites-")) if arm != "unit" else None))


def kept_seed(options: Options, config: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return a meta-seed, loaded from the folder or computed, and the hand-built teachers on its tasks."""
    path = options.out / "cells" / f"seed-{seed}.json"
    evolved = kept(path, config, partial(meta_seed, seed, options.generations, options.credit))
    by_hand = kept(path.with_name(f"by-hand-{seed}.json"), config, partial(hand_built, seed, options.credit))
    return {**evolved, **{rule: by_hand[rule] for rule in BY_HAND}, "seconds": evolved["seconds"] + by_hand["seconds"]}


def hand_built(seed: int, credit: str) -> dict[str, Any]:
    """Test hand-built teachers on the tasks of a meta-seed: they show what harness and marks allow."""
    return trials(task("unit", digits()[1], 0, credit), seed, dict.fromkeys(BY_HAND))


def meta_seed(seed: int, generations: int, credit: str) -> dict[str, Any]:
    """Run one evolution of each kind, in turns, and then their trials on unseen tasks."""
    train, test = digits()
    evolutions = {arm: Evolution(task(arm, train, seed, credit), STRATEGY, Here(32), seed) for arm in ARMS}
    lines: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for generation in range(generations):
        shift = generation % len(ARMS)  # so that no kind always follows the same one
        for arm in (*ARMS[shift:], *ARMS[:shift]):
            lines[arm].append(evolutions[arm].step())
    arms = {
        arm: {
            "parameters": evolution.task.start.numel(),
            "curve": [line["center"] for line in lines[arm]],
            "seconds_per_generation": statistics.median(line["seconds"] for line in lines[arm]),
            **trials(task(arm, test, 0, credit), seed, {"tdca": evolution.search.center, "unevolved": evolution.task.start}),
        }
        for arm, evolution in evolutions.items()
    }
    return {"arms": arms, **trials(task("unit", test, 0, credit), seed, {"bp": None})}


def trials(unseen: Classification, seed: int, teachers: dict[str, torch.Tensor | None]) -> dict[str, Any]:
    """Test each rule on unseen tasks; all arms of a meta-seed have the same tasks."""
    return measures(unseen, (f"validation {seed}", f"test {seed}"), (VALIDATION, TASKS), teachers, LIFETIME)


def study(options: Options, command: str) -> dict[str, Any]:
    """Run the unfinished parts, then write results.json, the figure and report.html.

    Raises:
        CheckpointError: the folder contains parts of a study with other options.
    """
    config = {
        "generations": options.generations,
        "strategy": asdict(STRATEGY),
        "tasks": TASKS,
        "images for evolution": SEEN,
        "learning rates": list(GRID),
        **plain(asdict(CREDITS[options.credit])),
    }
    make, seeds = partial(kept_seed, options, config), range(options.seeds)
    cells = in_order(options.jobs, seeds, make, options.out, lambda seed, _: f"meta-seed {seed}")
    return report(options.out, cells, command, config)


main = partial(run_command, "apical_papers.tdca.diffusion.study", Options, study)


if __name__ == "__main__":
    sys.exit(main())
