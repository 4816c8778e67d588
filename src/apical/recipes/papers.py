"""Tables and figures of papers that can be run again by name: `apical reproduce PAPER/TABLE`.

A table is either a study of trainings (:mod:`apical.recipes.catalogue`), run by the engine of `apical compare`, or a module
with a command line of its own. A budget says how much of it is done. A verdict is given only where the budget reaches what
it takes: the epoch that a number is about, enough seeds, data that are not cut; else it is "budget too small to tell".
"""

from dataclasses import dataclass, field
from typing import Literal

from apical.recipes.catalogue import STUDIES

Budget = Literal["smoke", "cpu", "paper"]
BUDGETS: tuple[Budget, ...] = ("smoke", "cpu", "paper")

SEEDS = 3
"""Seeds from which a verdict is given."""

Sizes = dict[str, int | str]
"""Options of a run that decide its size: --epochs, --seeds, --train-limit, --generations ..."""


@dataclass(frozen=True)
class Table:
    """One table or figure.

    Attributes:
        title: one line.
        budgets: sizes of each budget.
        study: name of the study that it is; or empty, and then
        module: with a `main(arguments)` that takes `--out` and the sizes as options.
        needs: sizes of a module's run from which its verdicts are meant.
        result: what the module writes: a "folder" with results.json, or a "file" of rows.
        side_by_side: whether the module takes --jobs.
        hours: measured wall-clock hours on two virtual cores that other work shared, by budget.
    """

    title: str
    budgets: dict[Budget, Sizes]
    study: str = ""
    module: str = ""
    needs: Sizes = field(default_factory=dict)
    result: Literal["folder", "file"] = "folder"
    side_by_side: bool = False
    hours: dict[Budget, float] = field(default_factory=dict)


def _study(name: str, smoke: Sizes, cpu: Sizes, paper: Sizes, hours: dict[Budget, float] | None = None) -> Table:
    study = STUDIES[name]
    if study.default.validation:  # thousands of images, that every rule and seed would look at
        smoke = {**smoke, "validation": 200}
    return Table(study.title, {"smoke": smoke, "cpu": cpu, "paper": paper}, study=name, hours=hours or {})


def _cut(images: int, epochs: int = 1, seeds: int = 2) -> Sizes:
    return {"epochs": epochs, "seeds": seeds, "train_limit": images, "test_limit": 200}


PAPERS: dict[str, dict[str, Table]] = {
    "pfa": {
        "theory": Table(
            "Product feedback alignment: the angle follows the expansion ratio",
            {"smoke": {"draws": 3}, "cpu": {"draws": 100}, "paper": {"draws": 100}},
            module="apical.recipes.pfa_theory",
            needs={"draws": 100},
            result="file",
            hours={"cpu": 0.004},
        ),
        "mnist": _study("pfa-mnist", _cut(640), {"epochs": 5, "seeds": 3}, {"epochs": 40, "seeds": 5}, {"cpu": 0.26}),
        "cifar10-small": _study("pfa-cifar10-small", _cut(128), {"epochs": 8, "seeds": 3}, {"epochs": 8, "seeds": 5}),
        "cifar10": _study("pfa-cifar10", _cut(256), {"epochs": 1, "seeds": 1}, {"epochs": 250, "seeds": 5}),
    },
    "dfc": {
        "toy": Table(
            "Deep feedback control on student-teacher regression",
            {
                "smoke": {"epochs": 2, "seeds": 1, "samples": 512},
                "cpu": {"epochs": 150, "seeds": 3, "samples": 5000},
                "paper": {"epochs": 150, "seeds": 5, "samples": 5000},
            },
            module="apical.recipes.dfc_toy",
            needs={"epochs": 150, "seeds": 3, "samples": 5000},
        ),
        "mnist": _study("dfc-mnist", _cut(256), {"epochs": 10, "seeds": 3}, {"epochs": 100, "seeds": 5}),
    },
    "tp": {
        "digits": _study(
            "tp-digits",
            {"epochs": 1, "seeds": 2},
            {"epochs": 20, "seeds": 5},
            {"epochs": 20, "seeds": 10},
        ),
        "targets": Table(
            "Target propagation: where targets point",
            {"smoke": {"epochs": 1, "seeds": 2}, "cpu": {"epochs": 20, "seeds": 10}, "paper": {"epochs": 20, "seeds": 10}},
            module="apical.recipes.tp_targets",
            side_by_side=True,
            needs={"epochs": 20, "seeds": 10},
            hours={"cpu": 0.25},
        ),
        "mnist": _study("tp-mnist", _cut(1024), {"epochs": 10, "seeds": 3}, {"epochs": 100, "seeds": 10}),
        "fashion": _study("tp-fashion", _cut(1024), {"epochs": 10, "seeds": 3}, {"epochs": 100, "seeds": 10}),
        "cifar10": _study("tp-cifar10", _cut(256), {"epochs": 2, "seeds": 1}, {"epochs": 100, "seeds": 10}),
    },
    "ep": {
        "digits": _study("ep-digits", {"epochs": 1, "seeds": 2}, {"epochs": 20, "seeds": 5}, {"epochs": 20, "seeds": 10}),
        "mnist": _study("ep-mnist", _cut(640), {"epochs": 10, "seeds": 3}, {"epochs": 25, "seeds": 5}),
        "study": Table(
            "Equilibrium propagation: gradients, and weights that learn apart",
            {"smoke": {"epochs": 1, "seeds": 2}, "cpu": {"epochs": 20, "seeds": 5}, "paper": {"epochs": 20, "seeds": 10}},
            module="apical.recipes.equilibrium_study",
            side_by_side=True,
            needs={"epochs": 20, "seeds": 5},
            hours={"cpu": 0.14},
        ),
        "logic": Table(
            "Complete directed networks on exclusive or",
            {"smoke": {"epochs": 2, "seeds": 2}, "cpu": {"epochs": 200, "seeds": 5}, "paper": {"epochs": 200, "seeds": 10}},
            module="apical.recipes.equilibrium_logic",
            side_by_side=True,
            needs={"epochs": 200, "seeds": 3},
            hours={"cpu": 0.17},
        ),
        "noise": Table(
            "Equilibrium propagation with noisy neurons, digits",
            {
                "smoke": {"epochs": 1, "seeds": 2, "train_limit": 200},
                "cpu": {"epochs": 15, "seeds": 5},
                "paper": {"epochs": 15, "seeds": 10},
            },
            module="apical.recipes.equilibrium_noise",
            side_by_side=True,
            needs={"epochs": 15, "seeds": 5},
            hours={"cpu": 0.42},
        ),
    },
    "corinfomax": {
        "digits": _study(
            "corinfomax-digits", {"epochs": 1, "seeds": 2}, {"epochs": 20, "seeds": 10}, {"epochs": 20, "seeds": 10}
        ),
        "study": Table(
            "CorInfoMax: step sizes, forward learning, alignment, sparseness",
            {"smoke": {"epochs": 1, "seeds": 2}, "cpu": {"epochs": 20, "seeds": 10}, "paper": {"epochs": 20, "seeds": 10}},
            module="apical.recipes.corinfomax_study",
            side_by_side=True,
            needs={"epochs": 20, "seeds": 10},
            hours={"cpu": 0.12},
        ),
        "mnist": _study("corinfomax-mnist", _cut(640), {"epochs": 10, "seeds": 3}, {"epochs": 50, "seeds": 10}),
        "fashion": _study("corinfomax-fashion", _cut(640), {"epochs": 10, "seeds": 3}, {"epochs": 50, "seeds": 10}),
        "cifar10": _study("corinfomax-cifar10", _cut(256), {"epochs": 1, "seeds": 1}, {"epochs": 50, "seeds": 10}),
    },
    "ccl": {
        "mnist": _study("ccl-mnist", _cut(1024), {"epochs": 100, "seeds": 3}, {"epochs": 100, "seeds": 5}, {"cpu": 0.79}),
        "fashion": _study("ccl-fashion", _cut(1024), {"epochs": 100, "seeds": 3}, {"epochs": 100, "seeds": 5}),
        "cifar10": _study("ccl-cifar10", _cut(1024), {"epochs": 20, "seeds": 3}, {"epochs": 100, "seeds": 5}),
        "cifar100": _study("ccl-cifar100", _cut(1024), {"epochs": 20, "seeds": 3}, {"epochs": 100, "seeds": 5}),
        "mnist-others": _study("ccl-mnist-others", _cut(1024), {"epochs": 100, "seeds": 3}, {"epochs": 100, "seeds": 5}),
        "fashion-others": _study("ccl-fashion-others", _cut(1024), {"epochs": 100, "seeds": 3}, {"epochs": 100, "seeds": 5}),
        "cifar10-cnn": _study("ccl-cifar10-cnn", _cut(256), {"epochs": 1, "seeds": 1}, {"epochs": 100, "seeds": 5}),
    },
    "tdca": {
        "classification": Table(
            "Top-down credit assignment on classification, with controls",
            {
                "smoke": {"generations": 1, "seeds": 2, "arms": "fresh"},
                "cpu": {"generations": 60},
                "paper": {"generations": 60},
            },
            module="apical.recipes.tdca_classification",
            needs={"generations": 60},
            hours={"cpu": 0.79},
        ),
        "diffusion": Table(
            "Credit diffusion, before and after",
            {
                "smoke": {"generations": 1, "seeds": 2},
                "cpu": {"generations": 40, "seeds": 5},
                "paper": {"generations": 40, "seeds": 5},
            },
            module="apical.recipes.tdca_diffusion",
            needs={"generations": 40, "seeds": 5},
        ),
        "functions": Table(
            "Top-down credit assignment on non-convex functions",
            {
                "smoke": {
                    "generations": 2,
                    "generations_further": 2,
                    "generations_large": 1,
                    "seeds": 2,
                    "starts": 16,
                },
                "cpu": {"generations": 400, "seeds": 5},
                "paper": {"generations": 400, "seeds": 5},
            },
            module="apical.recipes.tdca_functions",
            needs={"generations": 400, "seeds": 5},
        ),
        "reinforcement": Table(
            "Top-down credit assignment on CartPole",
            {
                "smoke": {"generations": 1, "seeds": 2, "lifetimes": 4},
                "cpu": {"generations": 200, "seeds": 5},
                "paper": {"generations": 200, "seeds": 5},
            },
            module="apical.recipes.tdca_reinforcement",
            needs={"generations": 200, "seeds": 5},
        ),
    },
}
"""All tables by paper and name. The paper's own sizes of the TDCA studies are not known; "paper" is then what "cpu" is."""


def too_small(table: Table, sizes: Sizes) -> bool:
    """Whether a module's run is smaller than its verdicts are meant for."""
    return any(int(sizes[name]) < int(least) for name, least in table.needs.items() if name in sizes)
