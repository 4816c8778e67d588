"""Local classifiers on part of MNIST: local losses with and without BatchNorm, compared with backpropagation.

Run `python -m apical_papers.local.study --out results/local-study`. 784-256-256-10, pixels in [0, 1], Adam at 1e-3, batches
of 100, for a few epochs. Marks were set from a prototype's two seeds, before this was run. Each seed is saved in the folder
when it is finished, so an interrupted study continues.
"""

import sys
from dataclasses import replace
from typing import Any

import torch

from apical import models
from apical.bench.finding import Row, at_least, count, difference, series, table
from apical.bench.plain_loop import accuracy, fit
from apical.bench.program import Cells, SeedStudy, about_study
from apical.core.credit import CreditRule
from apical.core.losses import squared_error
from apical.data import Dataset, load
from apical.rules.backprop import Backprop
from apical.rules.local_classifiers import LocalClassifiers

SETTINGS: dict[str, Any] = {
    "data": "mnist",
    "train images": 5000,
    "test images": 2000,
    "widths": "256-256",
    "batch size": 100,
    "adam": 1e-3,
    "epochs for silent samples": 5,
}
"""The last entry multiplies the epochs of one training of each similarity loss without normalisation."""

PLAIN: dict[str, dict[str, Any]] = {
    "bp": {},
    "last layer": {},
    "prediction": {"local": "prediction"},
    "projection": {"local": "projection"},
    "projection, squared error": {"local": "projection", "loss": squared_error},
    "similarity": {"local": "similarity"},
    "both": {"local": "both"},
}
"""Trainings without normalisation; "last layer" is the control whose hidden layers are not trained."""

NORMALISED = ("bp", "last layer", "prediction", "similarity", "both")

ABOUT = about_study(
    "Local classifiers on 5000 digits of MNIST: which local loss",
    "Test accuracy after few epochs, at one learning rate for all, which is nobody's best.",
    "Reproduced means that the mean reaches the mark, or that the 95 % interval (Student's t, paired over "
    "seeds) of the difference lies on its better side. Marks come from a prototype of ours.",
)


def pixels(name: str, train: int, test: int) -> Dataset:
    """Return part of a data set, with pixels scaled back to [0, 1]."""
    data = load(name, train_limit=train, test_limit=test)

    def raw(images: torch.Tensor) -> torch.Tensor:
        return images * torch.tensor(data.std).view(-1, 1, 1) + torch.tensor(data.mean).view(-1, 1, 1)

    parts = {part: replace(getattr(data, part), inputs=raw(getattr(data, part).inputs)) for part in ("train", "test")}
    return replace(data, **parts)


def trained(data: Dataset, seed: int, epochs: int, arm: str, norm: bool) -> dict[str, float]:
    """Return the test accuracy, and whether every weight is finite."""
    torch.manual_seed(seed)
    model = models.build(f"mlp{'-bn' if norm else ''}-{SETTINGS['widths']}", data.input_shape, data.classes)
    if arm == "last layer":
        for parameter in [*model.parameters()][:-2]:
            parameter.requires_grad_(False)
    options = PLAIN[arm]
    rule: CreditRule = LocalClassifiers(model, **options) if options else Backprop(model)
    optimizer = torch.optim.Adam([p for p in rule.parameters() if p.requires_grad], SETTINGS["adam"])
    for _ in range(epochs):
        fit(rule, optimizer, data.train, SETTINGS["batch size"])
    rule.eval()
    finite = all(bool(parameter.isfinite().all()) for parameter in rule.parameters())
    return {"accuracy": accuracy(rule, data.test), "finite": float(finite)}


def _cell(seed: int, epochs: int) -> dict[str, Any]:
    data = pixels(SETTINGS["data"], SETTINGS["train images"], SETTINGS["test images"])
    longer = epochs * SETTINGS["epochs for silent samples"]
    return {
        "plain": {arm: trained(data, seed, epochs, arm, norm=False) for arm in PLAIN},
        "normalised": {arm: trained(data, seed, epochs, arm, norm=True) for arm in NORMALISED},
        "long": {arm: trained(data, seed, longer, arm, norm=False) for arm in ("similarity", "both")},
    }


def verdicts(cells: Cells) -> list[Row]:
    """The marks."""

    def of(kind: str, arm: str) -> list[float]:
        return series(cells, kind, arm, "accuracy")

    finite = [bool(cell["long"][arm]["finite"]) for cell in cells for arm in ("similarity", "both")]
    stays = "trainings without normalisation that stay finite"
    both, prediction, last = (of("normalised", arm) for arm in ("both", "prediction", "last layer"))
    squared, entropy = of("plain", "projection, squared error"), of("plain", "projection")
    halfway, near_bp = "with BatchNorm, minus local-pred, minus 0.5 points", "with BatchNorm, minus bp, plus 1.5 points"
    better, alone = "squared error minus cross entropy, minus 2 points", "with BatchNorm, minus the last layer alone"
    return [
        at_least("L1", "local-pred", "accuracy without normalisation", of("plain", "prediction"), 0.86),
        at_least("L1", "local-pred", "accuracy with BatchNorm", prediction, 0.89),
        difference("L1", "local-both", halfway, both, prediction, less=False, margin=0.005),
        difference("L1", "local-both", near_bp, [a + 0.015 for a in both], of("normalised", "bp"), less=False),
        count("L2", "local-sim, local-both", stays, finite, len(finite)),
        difference("L3", "mono-forward", better, squared, entropy, less=False, margin=0.02),
        difference("L4", "local-pred", alone, prediction, last, less=False),
    ]


def tables(cells: Cells) -> list[Row]:
    """Every training."""
    kinds = {"plain": "no normalisation", "normalised": "BatchNorm", "long": "no normalisation, 5 times the epochs"}

    def cell_of(kind: str, arm: str) -> str | list[float]:
        return series(cells, kind, arm, "accuracy") if arm in cells[0][kind] else "-"

    note = "0 to 1; mean over seeds with 95 % interval. One learning rate for all."
    rows = ([arm, *(cell_of(kind, arm) for kind in kinds)] for arm in PLAIN)
    return [table("Test accuracy", note, ["training", *kinds.values()], rows)]


main = SeedStudy("apical_papers.local.study", ABOUT, SETTINGS, _cell, verdicts, tables, epochs=4)


if __name__ == "__main__":
    sys.exit(main())
