"""Learners trained on tasks that no evolution saw, under every rule: what the classification study compares.

All learners of a task begin with the same weights and see the same images. Each rule gets its learning rate from one
grid, on validation tasks, by the mean loss there; TDCA and backpropagation are also compared at the same rate.

A study's harness is sound where the hand-built teacher, which needs no evolution, comes near backpropagation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor, nn

from apical.core.credit import CreditRule
from apical.evolution.classification import Classification
from apical.evolution.population import Lifetime, Population, accuracies, losses
from apical.evolution.seeds import seed_of
from apical.rules.backprop import Backprop
from apical.rules.direct_feedback_alignment import DirectFeedbackAlignment
from apical.rules.top_down.hand_built import HandBuiltTeacher, ShuffledTeacher
from apical.rules.top_down.top_down_credit_assignment import TopDownCreditAssignment

GRID = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Learning rates that every rule is tuned over."""

EVOLVED = ("tdca", "unevolved", "silent", "shuffled")
"""Rules that take a top-down network's weights."""


@dataclass(frozen=True)
class Trial:
    """Mean over tasks of the loss on training images (nats) and the accuracy on held-out images, and both by task."""

    rule: str
    lr: float
    loss: float
    accuracy: float
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]


class Bench:
    """Unseen tasks, drawn once, with unseen initial weights.

    Args:
        task: says what tasks and learners are like.
        number: of tasks.
        name: draws other tasks under another name.
    """

    def __init__(self, task: Classification, number: int, name: str) -> None:
        self.task = task
        self.samples = [self.task.sample(seed_of("unseen", name, k), k) for k in range(number)]
        self.seeds = [seed_of("unseen start", name, k) for k in range(number)]

    def population(self, rule: str, teacher: Tensor | None) -> tuple[Population, Tensor | None]:
        """Learners under a rule, and the teacher's flat weights (D,), the same for all, where there is one.

        Args:
            rule: "tdca" or "unevolved"; "silent", without credit for hidden units; "shuffled", with the credits of other
                examples; "hand-silent" or "hand-random", with a hand-built teacher; "bp" or "dfa".
            teacher: flat weights, for the first four.
        """
        model = self.task.learner(0)
        inputs = self.samples[0].inputs[:2]
        targets = torch.zeros(len(inputs), dtype=torch.long)
        if rule in EVOLVED:
            assert teacher is not None
            network = self.task.network(0)
            if rule == "shuffled":
                shuffled = ShuffledTeacher(network, self.task.widths())
                inner: CreditRule = TopDownCreditAssignment(model, teacher=shuffled, credit=network.credit)
                return Population(inner, inputs, targets, "teacher.", record=True), teacher
            inner = self.task.rule(model, network, silent=rule == "silent")
            return Population(inner, inputs, targets, "teacher.", record=True), teacher
        return Population(self._plain(rule, model), inputs, targets, record=True), None

    def _plain(self, rule: str, model: nn.Module) -> CreditRule:
        """A rule without evolved weights."""
        if rule in ("hand-silent", "hand-random"):
            hidden: Literal["silent", "random"] = "silent" if rule == "hand-silent" else "random"
            built = HandBuiltTeacher(self.task.outputs, self.task.widths(), hidden, seed=seed_of("feedback") % 2**31)
            return TopDownCreditAssignment(model, teacher=built)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed_of("feedback"))
            return Backprop(model) if rule == "bp" else DirectFeedbackAlignment(model)

    def run(self, rule: str, rates: Sequence[float], lifetime: Lifetime, teacher: Tensor | None = None) -> list[Trial]:
        """One trial per learning rate; the learners of all tasks and rates are trained at once."""
        population, weights = self.population(rule, teacher)
        repeats = len(rates)
        fewest = min(len(sample.other_targets) for sample in self.samples)  # held-out images, where a set is small
        size = {"inputs": None, "targets": None, "other_inputs": fewest, "other_targets": fewest}
        inputs, targets, other_inputs, other_targets = (
            torch.stack([getattr(sample, name)[: size[name]] for sample in self.samples]).repeat_interleave(repeats, 0)
            for name in ("inputs", "targets", "other_inputs", "other_targets")
        )
        start = torch.stack([population.start(self.task.learner(seed)) for seed in self.seeds]).repeat_interleave(repeats, 0)
        others = None if weights is None else weights.expand(len(start), -1)
        lr = torch.tensor(rates).repeat(len(self.samples))
        trained = population.train(start, others, inputs, targets, lifetime, lr=lr, own=True)
        loss = losses(population.outputs(trained, inputs, own=True), targets, own=True).nan_to_num(nan=1e6, posinf=1e6)
        right = accuracies(population.outputs(trained, other_inputs, own=True), other_targets, own=True)
        by_rate = zip(rates, loss.view(-1, repeats).T.tolist(), right.view(-1, repeats).T.tolist(), strict=True)
        return [Trial(rule, lr, fmean(loss), fmean(right), tuple(loss), tuple(right)) for lr, loss, right in by_rate]


def tuned(validation: Bench, rule: str, lifetime: Lifetime, teacher: Tensor | None = None) -> float:
    """The learning rate of the grid with the lowest mean loss on validation tasks."""
    return min(validation.run(rule, GRID, lifetime, teacher), key=lambda trial: trial.loss).lr
