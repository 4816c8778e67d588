"""Spiking networks on MNIST and controls, every rate chosen on held-out images with the same budget.

Run `python -m apical_papers.spikes.mnist --out results/spikes-mnist`. For each seed and training: six rates of Adam, one
pass over 15000 training images each; the rate with the best accuracy on 6000 held-out images is used for a new training of
four passes over 30000. Plasticity is 784-256-64-10 with 40 steps per stimulus, compared with the same network with only its
read-outs trained; first spikes are 784-340-10. Controls trained by backpropagation are perceptrons with ReLU of the same
widths, and a linear classifier. Marks were set before the first run, which had four rates and a read-out of spike times with
scale 1: first spikes had 56.6 %, most output neurons were silent, and each seed had chosen the lowest rate. The scale of 16
was then chosen among 1, 4, 8, 16 and 32 on held-out images of seed 0. With it, two passes and trials of 2000 images,
plasticity and first spikes missed their marks; on held-out images of seed 100 both still rose after two passes, and the best
rate of plasticity after 20 steps was not the best after 100. The next run had four passes, and longer trials, over 10000
images: 89.1 and 94.0 %, where the mean must reach 90 and 94. A training took about a minute, so 30000 images are used now.
Each seed is saved in the folder when it is finished, so an interrupted study continues.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from tyro.conf import arg

from apical import models
from apical.bench.finding import Row, at_least, difference, series, table
from apical.bench.program import Cells, SeedOptions, about_study, by_seed, run_command
from apical.core.credit import CreditRule
from apical.data import Split, load
from apical.rules.backprop import Backprop
from apical.rules.contrastive_plasticity.contrastive_signal_plasticity import ContrastiveSignalPlasticity
from apical_papers.spikes.study import trained

SLOW, QUICK = (1e-2, 2e-2, 4e-2, 8e-2, 1.6e-1, 3.2e-1), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Learning rates of plasticity, and of trainings with derivatives."""

DATA = "mnist-raw"
IMAGES = 30000
"""Training images; half as many for each trial of a rate, a fifth as many for the choice."""

PUBLISHED = {"S4NN": 0.974, "arXiv 2410.23619": 0.9948}
"""Test accuracy of other networks of single spikes on MNIST, from their abstracts, all 60000 images."""

ABOUT = about_study(
    "Spiking networks on MNIST",
    "Test accuracy on all 10000 images, at rates that held-out images chose.",
    "Set before the study was first run. That run missed the marks of first spikes, with four rates and "
    "read-outs of scale 1; six rates and the scale of 16, chosen on held-out images of seed 0, came after "
    "it. A second run missed those of plasticity and first spikes, with two passes and shorter trials of "
    "rates; four passes and longer trials, chosen on held-out images of seed 100, came after that. A third run, "
    "of 10000 images, missed two marks by less than a point; 30000 images came after that.",
)


class Arm(NamedTuple):
    """One way to train: the rule with a fresh model, samples in a batch, and rates to choose from."""

    rule: Callable[[], CreditRule]
    batch: int
    rates: tuple[float, ...]


def plasticity(**options: Any) -> CreditRule:
    """784-256-64-10."""
    return ContrastiveSignalPlasticity(models.spiking(784, [256, 64], 10), **options)


def read_outs_alone() -> CreditRule:
    """The same, with untrained hidden neurons."""
    rule = plasticity()
    for name, parameter in rule.named_parameters():
        parameter.requires_grad_(name.startswith(("read.", "model.linear3.")))
    return rule


def perceptron(*widths: int) -> CreditRule:
    """Backpropagation in an ordinary network; a linear classifier without widths."""
    return Backprop(models.mlp(784, widths, 10))


def first_spike() -> CreditRule:
    """784-340-10."""
    return Backprop(models.first_spike(784, [340], 10))


ARMS: dict[str, Arm] = {
    "csdp": Arm(plasticity, 100, SLOW),
    "csdp, read-outs alone": Arm(read_outs_alone, 100, SLOW),
    "first spikes": Arm(first_spike, 32, QUICK),
    "bp, 784-256-64-10": Arm(partial(perceptron, 256, 64), 100, QUICK),
    "bp, 784-340-10": Arm(partial(perceptron, 340), 32, QUICK),
    "linear": Arm(perceptron, 100, QUICK),
}


@dataclass(frozen=True)
class Options(SeedOptions):
    """Spiking networks on MNIST and controls."""

    out: Annotated[Path, arg(metavar="DIR")] = Path("results/spikes-mnist")
    epochs: Annotated[int, arg(metavar="N")] = 4
    """Passes over the training images, once the rate is chosen."""
    images: Annotated[int, arg(metavar="N")] = IMAGES
    """Images for training, and at most for the test; half as many per trial of a rate, a fifth as many for the choice."""


def settings(images: int) -> dict[str, Any]:
    """Return the settings to save and show."""
    return {
        "data": DATA,
        "training images": images,
        "held-out images": images // 5,
        "images for a rate": images // 2,
        "rates of plasticity": list(SLOW),
        "other rates": list(QUICK),
    }


def cell(seed: int, epochs: int, images: int = IMAGES) -> dict[str, Any]:
    """Return rate, accuracies and seconds of each training."""
    few = images // 2
    data = load(DATA, validation=images // 5, train_limit=images, test_limit=min(images, 10000), seed=seed)
    assert data.validation is not None
    trial = replace(data, train=Split(data.train.inputs[:few], data.train.targets[:few]), test=data.validation)
    cells: dict[str, Any] = {}
    for name, (rule, batch, rates) in ARMS.items():
        held_out: dict[float, float] = {}
        for rate in rates:
            torch.manual_seed(seed)
            held_out[rate] = trained(rule(), trial, 1, batch, rate)["accuracy"]
        best = max(rates, key=lambda rate: held_out[rate])
        torch.manual_seed(seed)
        cells[name] = {"rate": best, "held out": list(held_out.values()), **trained(rule(), data, epochs, batch, best)}
    return cells


def study(options: Options, command: str) -> dict[str, Any]:
    """Run the seeds that are not saved yet, then write results.json and report.html."""
    make = partial(cell, images=options.images)
    return by_seed(options, command, make, verdicts, tables, settings=settings(options.images), about=ABOUT)


def bracketed(rates: Sequence[float], rate: float) -> bool:
    """Return whether lower and higher rates were tried."""
    return min(rates) < rate < max(rates)


def verdicts(cells: Cells) -> list[Row]:
    """The marks."""

    def of(arm: str) -> list[float]:
        return series(cells, arm, "accuracy")

    return [
        at_least("S4", "csdp", "test accuracy", of("csdp"), 0.9, 0.89),
        difference("S4", "csdp", "less read-outs alone", of("csdp"), of("csdp, read-outs alone"), less=False),
        difference("S4", "csdp", "less a linear classifier", of("csdp"), of("linear"), less=False),
        at_least("S5", "bp", "first spikes: test accuracy", of("first spikes"), 0.94, 0.93),
        difference("S5", "bp", "first spikes less a linear classifier", of("first spikes"), of("linear"), less=False),
    ]


def tables(cells: Cells) -> list[Row]:
    """Return tables of every training, and of the distance of first spikes from published accuracies."""
    rows = []
    for arm in ARMS:
        rates = series(cells, arm, "rate")
        between = sum(bracketed(ARMS[arm].rates, rate) for rate in rates)
        chosen = ", ".join(f"{rate:g}" for rate in rates)
        tried = f"{between} of {len(cells)}"
        rows.append([arm, series(cells, arm, "accuracy"), chosen, tried, series(cells, arm, "seconds")])
    spikes = series(cells, "first spikes", "accuracy")
    below = [[name, f"{100 * value:g}", [100 * (value - ours) for ours in spikes]] for name, value in PUBLISHED.items()]
    note = (
        "Test accuracy, 0 to 1, mean over seeds with 95 % interval; the rates chosen; seeds for which lower and higher ones "
        "were tried; seconds of one core, busy with other work too."
    )
    about = "Points of accuracy below other networks of single spikes, which saw all 60000 images for many epochs."
    title = "Distance of first spikes to published accuracies"
    return [
        table("Trainings", note, ["training", "accuracy", "rates chosen", "bracketed", "seconds"], rows),
        table(title, about, ["network", "published", "points below"], below),
    ]


main = partial(run_command, "apical_papers.spikes.mnist", Options, study)


if __name__ == "__main__":
    sys.exit(main())
