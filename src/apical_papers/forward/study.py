"""Forward-forward on part of MNIST, and its read-out on untrained hidden layers.

Run `python -m apical_papers.forward.study --out results/ff-study`. 784-300-300-300-10, pixels in [0, 1], Adam at 1e-3 (the
read-out at 1e-2), batches of 100. The read-out sees the two upper hidden layers; goodness is summed over the same layers.
Initial weights are those of the published code: normal, with deviation 1/sqrt(outputs). Marks were set from a prototype's
single seed, before this was run. Each seed is saved in the folder when it is finished, so an interrupted study continues.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from apical import models
from apical.bench.finding import Row, at_least, difference, series, table
from apical.bench.plain_loop import accuracy, fit
from apical.bench.program import Cells, SeedStudy, about_study
from apical.core.credit import CreditRule
from apical.data import Dataset
from apical.rules.backprop import Backprop
from apical.rules.forward_forward import ForwardForward
from apical.rules.local_classifiers import LocalClassifiers
from apical_papers.local.study import pixels

SETTINGS: dict[str, Any] = {
    "data": "mnist",
    "train images": 5000,
    "test images": 2000,
    "widths": "300-300-300",
    "batch size": 100,
    "adam": 1e-3,
    "adam, read-out": 1e-2,
    "first look at": 0.4,
}
"""The last entry is the share of the epochs after which accuracies are first measured."""

ARMS: dict[str, dict[str, Any]] = {
    "ff": {},
    "symba": {"objective": "difference"},
    "ff, all negatives": {"negatives": "all"},
    "symba, all negatives": {"negatives": "all", "objective": "difference"},
    "scff": {"negatives": "images"},
    "hidden layers untrained": {"train_hidden": False},
}
SHORT = ("ff, all negatives", "symba, all negatives")
"""Trainings that end at the first measurement: nine negatives per image cost five times as much."""

BASELINES: dict[str, Callable[[nn.Module], CreditRule]] = {"bp": Backprop, "local-pred": LocalClassifiers}

ABOUT = about_study(
    "Forward-forward on 5000 digits of MNIST, and the read-out alone",
    "Test accuracy by the read-out and by the goodness of each label. The control has the same read-out on hidden "
    "layers that stay as they were drawn: what a read-out reaches there says nothing of forward-forward.",
    "Reproduced means that the mean reaches the mark, or that the 95 % interval (Student's t, paired over "
    "seeds) of the difference lies on its better side. Marks come from a prototype of ours.",
)


def trained(data: Dataset, seed: int, epochs: Sequence[int], arm: str) -> list[dict[str, float]]:
    """Return test accuracies by the answer and, if labels are written into the input, by goodness; after given epochs."""
    torch.manual_seed(seed)
    model = models.build(f"mlp-{SETTINGS['widths']}", data.input_shape, data.classes)
    if arm in ARMS:
        for layer in [layer for layer in model.modules() if isinstance(layer, nn.Linear)][:-1]:
            nn.init.normal_(layer.weight, 0, layer.out_features**-0.5)
            nn.init.zeros_(layer.bias)
    rule = ForwardForward(model, **ARMS[arm]) if arm in ARMS else BASELINES[arm](model)
    last = [*model.parameters()][-2:]
    read = [*last, *rule.read.parameters()] if isinstance(rule, ForwardForward) else []
    apart = set(map(id, read))
    groups = [
        {"params": [p for p in rule.parameters() if p.requires_grad and id(p) not in apart], "lr": SETTINGS["adam"]},
        {"params": read, "lr": SETTINGS["adam, read-out"]},
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    looks = []
    for epoch in range(1, epochs[-1] + 1):
        fit(rule, optimizer, data.train, SETTINGS["batch size"])
        if epoch in epochs:
            looks.append(_accuracies(rule, data))
    return looks


@torch.no_grad()
def _accuracies(rule: CreditRule, data: Dataset) -> dict[str, float]:
    accuracies = {"answer": accuracy(rule, data.test)}
    if isinstance(rule, ForwardForward) and not rule.self_contrastive:
        rule.answers = "goodness"
        accuracies["goodness"] = accuracy(rule, data.test)
        rule.answers = "read-out"
    return accuracies


def _cell(seed: int, epochs: int) -> dict[str, Any]:
    data = pixels(SETTINGS["data"], SETTINGS["train images"], SETTINGS["test images"])
    first = max(1, round(SETTINGS["first look at"] * epochs))
    both = [first, epochs] if first < epochs else [epochs]
    cell: dict[str, Any] = {}
    for arm in (*ARMS, *BASELINES):
        looks = trained(data, seed, both[:1] if arm in SHORT else both, arm)
        cell[arm] = {"first": looks[0], **({} if arm in SHORT else {"last": looks[-1]})}
    return cell


def verdicts(cells: Cells) -> list[Row]:
    """The marks."""

    def of(arm: str, look: str, by: str = "answer") -> list[float]:
        return series(cells, arm, look, by)

    control = "hidden layers untrained"
    apart = [abs(a - b) for a, b in zip(of("ff", "last"), of("ff", "last", "goodness"), strict=True)]
    what = "read-out minus that of untrained layers, minus 3 points, first look"
    rows = [
        at_least("F1", "ff", "accuracy by the read-out, first look", of("ff", "first"), 0.87),
        difference("F1", "ff", what, of("ff", "first"), of(control, "first"), less=False, margin=0.03),
        at_least("F1", "ff", "accuracy by goodness, first look", of("ff", "first", "goodness"), 0.82),
        at_least("F2", "ff", "accuracy by the read-out, in the end", of("ff", "last"), 0.88),
        at_least("F2", "ff", "accuracy by goodness, in the end", of("ff", "last", "goodness"), 0.88),
        difference("F2", "ff", "read-out minus bp", of("ff", "last"), of("bp", "last"), less=True),
        difference("F2", "ff", "read-out and goodness, distance, minus 3 points", apart, 0.03, less=True),
        difference("F3", "scff", "minus untrained layers, in the end", of("scff", "last"), of(control, "last"), less=False),
        difference("F3", "ff", "minus local-pred, in the end", of("ff", "last"), of("local-pred", "last"), less=True),
    ]
    for arm in ("ff", "symba"):
        more, fewer = of(f"{arm}, all negatives", "first", "goodness"), of(arm, "first", "goodness")
        rows.append(difference("F4", arm, "all negatives minus one, by goodness, first look", more, fewer, less=False))
    return rows


def tables(cells: Cells) -> list[Row]:
    """Every training."""

    def cell_of(arm: str, look: str, by: str) -> str | list[float]:
        return series(cells, arm, look, by) if by in cells[0][arm].get(look, {}) else "-"

    looks = [(look, by) for look in ("first", "last") for by in ("answer", "goodness")]
    note = "0 to 1; mean over seeds with 95 % interval, by the read-out (of bp: the output) and by goodness."
    header = [f"{look}: {by}" for look in ("first look", "in the end") for by in ("read-out", "goodness")]
    rows = ([arm, *(cell_of(arm, *each) for each in looks)] for arm in (*ARMS, *BASELINES))
    return [table("Test accuracy", note, ["training", *header], rows)]


main = SeedStudy("apical_papers.forward.study", ABOUT, SETTINGS, _cell, verdicts, tables, out="results/ff-study", epochs=30)


if __name__ == "__main__":
    sys.exit(main())
