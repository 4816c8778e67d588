"""Equilibrium propagation with noisy neurons: small nudges fail, large holomorphic ones do not (arXiv 2209.00530).

Run `python -m apical_papers.equilibrium.noise --out results/ep-noise`. Gaussian noise of standard deviation 0.04 is added to
every potential at every step of training; accuracies are measured without noise. The estimate from one small nudge divides
the residual noise and settling error by that nudge. Each training is saved in the folder when it is finished, so an
interrupted study continues. With `--data mnist`, networks and phases are those of the published logs (50 epochs there).
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from tyro.conf import arg

from apical import models
from apical.bench.cells import kept
from apical.bench.finding import at_least, difference, table
from apical.bench.plain_loop import fit
from apical.bench.program import about_study, in_order, keep_results, run_command
from apical.data import load
from apical.errors import InstabilityError
from apical.rules.equilibrium.equilibrium_propagation import EquilibriumPropagation

NOISE = 0.04


@dataclass(frozen=True)
class Setting:
    """A data set, its network, and the methods compared on it."""

    data: str
    model: str
    lr: float
    batch: int
    methods: dict[str, dict[str, Any]]
    published: dict[str, tuple[str, str]]


def _one_sided(beta: float, free: int, nudged: int) -> dict[str, Any]:
    return {"estimator": "one-sided", "beta": beta, "free_steps": free, "nudged_steps": nudged}


def _holomorphic(points: int, beta: float, free: int, nudged: int) -> dict[str, Any]:
    return {"estimator": "holomorphic", "points": points, "beta": beta, "free_steps": free, "nudged_steps": nudged}


SETTINGS = {
    "digits": Setting(
        "digits",
        "mlp-sigmoid-64-64",
        0.05,
        20,
        {
            "one-sided, 0.02": _one_sided(0.02, 60, 30),
            "one-sided, 0.1": _one_sided(0.1, 60, 30),
            "one-sided, 1": _one_sided(1.0, 60, 30),
            "N = 2, 0.4": _holomorphic(2, 0.4, 60, 30),
            "N = 6, 0.4": _holomorphic(6, 0.4, 60, 30),
        },
        {},
    ),
    "mnist": Setting(
        "mnist-raw",
        "mlp-sigmoid-256-256",
        0.05,
        20,
        {
            "one-sided, 0.1": _one_sided(0.1, 350, 350),
            "one-sided, 0.4": _one_sided(0.4, 350, 350),
            "N = 10, 0.4": _holomorphic(10, 0.4, 200, 50),
        },
        {
            "one-sided, 0.1": ("98.03 ± 0.10", "10.5 ± 0.8"),
            "one-sided, 0.4": ("97.65 ± 0.08", "96.41 ± 0.43"),
            "N = 10, 0.4": ("97.67 ± 0.31", "97.80 ± 0.29"),
        },
    ),
}
"""Published: test accuracy in percent after 50 epochs, from the authors' logs, without and with noise."""


@dataclass(frozen=True)
class Options:
    """Equilibrium propagation with noisy neurons."""

    out: Annotated[Path, arg(metavar="DIR")] = Path("results/ep-noise")
    """Folder for the results; trainings already in it are kept."""
    data: Annotated[Literal["digits", "mnist"], arg(metavar="digits|mnist")] = "digits"
    """Data set."""
    seeds: Annotated[int, arg(metavar="K")] = 5
    """Number of seeds, for initial weights, data orders and noise."""
    epochs: Annotated[int, arg(metavar="N")] = 15
    """Passes over the training images."""
    train_limit: Annotated[int, arg(metavar="N")] = 0
    """Training images, 0 for all."""
    jobs: Annotated[int, arg(metavar="N")] = 0
    """Trainings run in parallel; 0: one per core."""


def train(data: str, method: str, noise: float, seed: int, epochs: int, limit: int) -> dict[str, Any]:
    """Return the test accuracy (0 to 1) after training; chance level if training stopped because states diverged."""
    setting = SETTINGS[data]
    dataset = load(setting.data, train_limit=limit or None)
    torch.manual_seed(seed)
    rule = EquilibriumPropagation(
        models.build(setting.model, dataset.input_shape, dataset.classes), noise=noise, **setting.methods[method]
    )
    optimizer = torch.optim.SGD(rule.parameters(), setting.lr)
    try:
        for _ in range(epochs):
            fit(rule, optimizer, dataset.train, setting.batch)
    except InstabilityError as error:
        return {"accuracy": 1 / dataset.classes, "diverged": str(error)}
    with torch.no_grad():
        batches = zip(dataset.test.inputs.split(1000), dataset.test.targets.split(1000), strict=True)
        hits = [(rule.answer(x).argmax(1) == y).sum() for x, y in batches]
    return {"accuracy": float(torch.stack(hits).sum() / len(dataset.test))}


def _cell(options: Options, part: tuple[str, float, int]) -> dict[str, Any]:
    method, noise, seed = part
    config = {"data": options.data, "epochs": options.epochs, "train limit": options.train_limit}
    path = options.out / "cells" / f"{method.replace(' ', '').replace(',', '-')}-{noise:g}-{seed}.json"
    return kept(path, config, partial(train, options.data, method, noise, seed, options.epochs, options.train_limit))


def _said(part: tuple[str, float, int], content: dict[str, Any]) -> str:
    method, noise, seed = part
    return f"seed {seed}  noise {noise:g}  {method}: {100 * content['accuracy']:.2f} %"


def study(options: Options, command: str) -> dict[str, Any]:
    """Run the unfinished parts, then write results.json and report.html."""
    setting = SETTINGS[options.data]
    parts = [(m, noise, seed) for seed in range(options.seeds) for noise in (0.0, NOISE) for m in setting.methods]
    cells = dict(zip(parts, in_order(options.jobs, parts, partial(_cell, options), options.out, _said), strict=True))

    def values(method: str, noise: float) -> list[float]:
        return [cells[method, noise, seed]["accuracy"] for seed in range(options.seeds)]

    about = about_study(
        f"Equilibrium propagation with noisy neurons, {options.data}",
        "Test accuracy of networks whose potentials were disturbed at every step of training, by how the "
        "derivative with respect to the nudge was taken: from one nudge, or from N nudges on a circle in the complex plane.",
        "Reproduced means that the 95 % interval (Student's t, paired over seeds) lies on the better side "
        "of the mark; or, where the mark is a mean's (not worse than one-sided), that the mean reaches it.",
    )
    settings = {
        "data": setting.data,
        "model": setting.model,
        "sgd": setting.lr,
        "batch size": setting.batch,
        "epochs": options.epochs,
        "training images": options.train_limit or "all",
        "seeds": options.seeds,
    }
    note = "From 0 to 1, mean over seeds with 95 % interval; the number in a method's name is the size of its nudge."
    accuracies = table(
        "Test accuracy",
        note + (" Published: percent after 50 epochs." if setting.published else ""),
        ["method", "no noise", f"noise {NOISE:g}", *(["published", "with noise"] if setting.published else [])],
        ([m, values(m, 0.0), values(m, NOISE), *setting.published.get(m, ())] for m in setting.methods),
    )
    rows = verdicts(options.data, values)
    return keep_results(options.out, command, about, settings, cells.values(), rows, [accuracies])


def verdicts(data: str, values: Any) -> list[dict[str, Any]]:
    """Judge the claims: small one-sided nudges fail under noise, large symmetric or holomorphic ones do not."""

    def against(figure: str, method: str, noise: float, mark: float, *, less: bool) -> dict[str, Any]:
        what = f"{method}, noise {noise:g}: accuracy minus {mark:g}"
        return difference(figure, "hep" if "N" in method else "ep", what, values(method, noise), mark, less=less)

    if data == "mnist":
        best, small = "N = 10, 0.4", "one-sided, 0.1"
        rows = [against("noise", small, NOISE, 0.5, less=True), against("noise", best, NOISE, 0.8, less=False)]
        what = "N = 10: accuracy with noise minus that without, plus 2 points"
        loss = difference("noise", "hep", what, [v + 0.02 for v in values(best, NOISE)], values(best, 0.0), less=False)
        return [*rows, loss]
    two = "N = 2, 0.4"
    rows = [against("K1", two, 0.0, 0.93, less=False)]
    for other in ("one-sided, 0.02", "one-sided, 0.1", "one-sided, 1"):
        what = f"N = 2, 0.4, without noise: accuracy minus that of {other}"
        gained = [a - b for a, b in zip(values(two, 0.0), values(other, 0.0), strict=True)]
        rows.append(at_least("K1", "ep", what, gained, 0.0))
    rows += [against("K2", two, NOISE, 0.9, less=False), against("K2", "N = 6, 0.4", NOISE, 0.9, less=False)]
    return [*rows, against("K2", "one-sided, 0.02", NOISE, 0.5, less=True)]


main = partial(run_command, "apical_papers.equilibrium.noise", Options, study)


if __name__ == "__main__":
    sys.exit(main())
