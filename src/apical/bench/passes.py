"""The passes over the training images that make up an epoch: forward and feedback weights may learn in turn.

The order is that of the authors of deep feedback control (arXiv 2106.07887): passes that pre-train the feedback weights
before the first epoch; then in each epoch one feedback pass, the forward pass, and any further feedback passes. Without
feedback passes, an epoch is a single pass in which each step trains all weights.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from apical.bench.recipe import Recipe
from apical.bench.schedule import data_order, generator
from apical.core.credit import Phase


@dataclass(frozen=True)
class Pass:
    """One pass.

    Attributes:
        kind: "main" for the pass in which the forward weights learn, otherwise "feedback" or "pretrain".
        phase: weights that the rule learns in this pass.
        epoch: its epoch: 1, 2, ...
        number: its index among the passes of its kind in the epoch: 0, 1, ...
        first: number of steps in the epoch before this pass.
        steps: number of steps in this pass.
    """

    kind: Literal["pretrain", "feedback", "main"]
    phase: Phase
    epoch: int
    number: int
    first: int
    steps: int

    @property
    def is_main(self) -> bool:
        """Whether the forward weights learn in this pass."""
        return self.kind == "main"

    @property
    def end(self) -> int:
        """Number of steps in the epoch up to the end of this pass."""
        return self.first + self.steps

    def order(self, examples: int, seed: int) -> Tensor:
        """Return the order (examples,) in which this pass visits the training images; on the CPU."""
        if self.is_main:
            return data_order(examples, seed, self.epoch)
        draw = generator("cpu", seed, f"{self.kind} order", self.epoch, self.number)
        return torch.randperm(examples, generator=draw)

    def augmentation(self, device: torch.device, seed: int, step: int) -> torch.Generator:
        """Return the random generator for augmentation in step `step` of this pass."""
        if self.is_main:
            return generator(device, seed, "augment", self.epoch, step)
        return generator(device, seed, f"{self.kind} augment", self.epoch, self.number, step)


def passes(recipe: Recipe, epoch: int, steps: int) -> list[Pass]:
    """Return the passes of epoch `epoch` (1, 2, ...) in order; the main pass has `steps` steps.

    >>> recipe = Recipe(pretrain_epochs=1, feedback_passes=2, feedback_fraction=0.5)
    >>> [(item.kind, item.phase, item.first, item.steps) for item in passes(recipe, 1, 10)]  # doctest: +NORMALIZE_WHITESPACE
    [('pretrain', 'feedback', 0, 5), ('feedback', 'feedback', 5, 5), ('main', 'forward', 10, 10),
     ('feedback', 'feedback', 20, 5)]
    >>> [(item.kind, item.phase, item.steps) for item in passes(Recipe(), 2, 10)]
    [('main', 'both', 10)]
    """
    short = max(1, round(recipe.feedback_fraction * steps))
    plan: list[Pass] = []

    def add(kind: Literal["pretrain", "feedback", "main"], phase: Phase) -> None:
        first = plan[-1].end if plan else 0
        number = sum(item.kind == kind for item in plan)
        plan.append(Pass(kind, phase, epoch, number, first, steps if kind == "main" else short))

    for _ in range(recipe.pretrain_epochs if epoch == 1 else 0):
        add("pretrain", "feedback")
    if recipe.feedback_passes:
        add("feedback", "feedback")
    add("main", "forward" if recipe.feedback_passes else "both")
    for _ in range(recipe.feedback_passes - 1):
        add("feedback", "feedback")
    return plan


def total_steps(recipe: Recipe, epochs: int, steps: int) -> int:
    """Return the number of steps in all passes of the first `epochs` epochs."""
    return sum(passes(recipe, epoch, steps)[-1].end for epoch in range(1, epochs + 1))
