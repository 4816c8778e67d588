"""Learners trained on tasks that no evolution saw, under every rule, as compared in the classification study.

All learners of a task start with the same weights and see the same images. Each rule gets its learning rate from one grid,
by the mean loss on validation tasks; TDCA and backpropagation are also compared at the same rate.

A study's harness is sound if the hand-built teacher, which needs no evolution, comes close to backpropagation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from apical.core.credit import CreditRule
from apical.evolution.classification import Classification
from apical.evolution.population import Lifetime, Population, accuracies, losses
from apical.evolution.seeds import seed_of
from apical.rules.backprop import Backprop
from apical.rules.direct_feedback_alignment import DirectFeedbackAlignment
from apical.rules.top_down.equivariant import Network
from apical.rules.top_down.hand_built import HandBuiltTeacher, MixedTeacher, ShuffledTeacher
from apical.rules.top_down.teacher import TopDownNetwork
from apical.rules.top_down.top_down_credit_assignment import TopDownCreditAssignment

GRID = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Grid of learning rates for every rule."""

EVOLVED = ("tdca", "unevolved", "silent", "shuffled", "hidden-half", "output-half")
"""Rules that use a top-down network's weights."""


LAST, SWING = 10, 0.01
"""Number of monitored steps at the end of a lifetime, and the loss (nats) that none of them should exceed."""


@dataclass(frozen=True)
class Trial:
    """Results of learners, over tasks.

    Attributes:
        loss, accuracy: mean loss on training images (nats) and mean accuracy on held-out images.
        losses, accuracies: both by task.
        logit: mean magnitude of the logits of training images.
        swings: share of tasks whose loss exceeds SWING at one of the last LAST steps.
        dead: share of the last hidden layer's units that are silent for all training images.
    """

    rule: str
    lr: float
    loss: float
    accuracy: float
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    logit: float
    swings: float
    dead: float


class Bench:
    """Unseen tasks, drawn once, with unseen initial weights.

    Args:
        task: defines tasks and learners.
        number: number of tasks.
        name: another name draws other tasks.
        feedback: seed of random feedback; None uses the same in all benches.
    """

    def __init__(self, task: Classification, number: int, name: str, feedback: int | None = None) -> None:
        self.task, self.feedback = task, seed_of("feedback") if feedback is None else feedback
        self.samples = [self.task.sample(seed_of("unseen", name, k), k) for k in range(number)]
        self.seeds = [seed_of("unseen start", name, k) for k in range(number)]

    def population(self, rule: str, teacher: Tensor | None) -> tuple[Population, Tensor | None]:
        """Return learners under a rule, and the teacher's flat weights (D,), the same for all, if there is one.

        Args:
            rule: "tdca" or "unevolved"; "silent", without credit for hidden units; "shuffled", with the credits of other
                examples; "hidden-half" or "output-half", with half of its credit hand-built; "hand-silent" or
                "hand-random", with a hand-built teacher; "bp" or "dfa".
            teacher: flat weights, for the first six.
        """
        inputs = self.samples[0].inputs[:2]
        targets = torch.zeros(len(inputs), dtype=torch.long)
        with torch.random.fork_rng([]):
            torch.manual_seed(self.feedback)
            made = self._taught(rule) if rule in EVOLVED else self._plain(rule, self.task.learner(0))
        if rule in EVOLVED:
            assert teacher is not None
            return Population(made, inputs, targets, "teacher.", record=True), teacher
        return Population(made, inputs, targets, record=True), None

    def _taught(self, rule: str) -> CreditRule:
        """Make a rule with a top-down network that has separate weights for each learner."""
        model, network = self.task.learner(0), self.task.network(0)
        if rule in ("tdca", "unevolved", "silent"):
            return self.task.rule(model, network, silent=rule == "silent")
        return TopDownCreditAssignment(model, teacher=self._changed(rule, network), credit=network.credit)

    def _changed(self, rule: str, network: Network) -> nn.Module:
        """Make a top-down network whose credit is sent to other examples, or only half used."""
        widths = self.task.widths()
        if rule == "shuffled":
            return ShuffledTeacher(network, widths)
        assert isinstance(network, TopDownNetwork)
        return MixedTeacher(network, widths, "hidden" if rule == "hidden-half" else "output", self.feedback % 2**31)

    def _plain(self, rule: str, model: nn.Module) -> CreditRule:
        """Make a rule without evolved weights."""
        if rule in ("hand-silent", "hand-random"):
            hidden: Literal["silent", "random"] = "silent" if rule == "hand-silent" else "random"
            built = HandBuiltTeacher(self.task.outputs, self.task.widths(), hidden, seed=self.feedback % 2**31)
            return TopDownCreditAssignment(model, teacher=built)
        return Backprop(model) if rule == "bp" else DirectFeedbackAlignment(model)

    def run(self, rule: str, rates: Sequence[float], lifetime: Lifetime, teacher: Tensor | None = None) -> list[Trial]:
        """Run one trial per learning rate; the learners of all tasks and rates are trained together."""
        population, weights = self.population(rule, teacher)
        repeats = len(rates)
        fewest = min(len(sample.other_targets) for sample in self.samples)  # held-out images of the smallest set
        size = {"inputs": None, "targets": None, "other_inputs": fewest, "other_targets": fewest}
        inputs, targets, other_inputs, other_targets = (
            torch.stack([getattr(sample, name)[: size[name]] for sample in self.samples]).repeat_interleave(repeats, 0)
            for name in ("inputs", "targets", "other_inputs", "other_targets")
        )
        start = torch.stack([population.start(self.task.learner(seed)) for seed in self.seeds]).repeat_interleave(repeats, 0)
        others = None if weights is None else weights.expand(len(start), -1)
        lr = torch.tensor(rates).repeat(len(self.samples))
        late: list[Tensor] = []

        def watch(done: int, weights: Tensor) -> None:
            if done > lifetime.steps - LAST:
                late.append(losses(population.outputs(weights, inputs, own=True), targets, own=True))

        trained = population.train(start, others, inputs, targets, lifetime, lr=lr, own=True, watch=watch)
        outputs = population.outputs(trained, inputs, own=True)
        right = accuracies(population.outputs(trained, other_inputs, own=True), other_targets, own=True)
        measures = {
            "losses": late[-1].nan_to_num(nan=1e6, posinf=1e6),
            "accuracies": right,
            "logit": outputs.abs().mean((1, 2)),
            "swings": 1 - (torch.stack(late).amax(0) <= SWING).to(right.dtype),  # a NaN loss counts as a swing
            "dead": dead_units(population, trained, inputs),
        }
        by_rate = {name: value.view(-1, repeats).T.tolist() for name, value in measures.items()}
        trials = []
        for number, rate in enumerate(rates):
            own = {name: values[number] for name, values in by_rate.items()}
            means = {name: fmean(own[name]) for name in ("logit", "swings", "dead")}
            loss, right_ones = own["losses"], own["accuracies"]
            trials.append(Trial(rule, rate, fmean(loss), fmean(right_ones), tuple(loss), tuple(right_ones), **means))
        return trials


def dead_units(population: Population, weights: Tensor, inputs: Tensor) -> Tensor:
    """Return the share of each learner's (P,) last hidden units that are 0 for all of its inputs (P, batch, ...)."""
    below = cast(nn.Sequential, population.rule.model)[:-1]
    names = [name for name, _ in below.named_parameters()]

    def activities(own: dict[str, Tensor], x: Tensor) -> Tensor:
        result: Tensor = functional_call(below, {name: own[f"model.{name}"] for name in names}, (x,))
        return result

    with torch.no_grad():
        active = vmap(activities)(population.learner.named(weights), inputs)
    return (active == 0).all(1).to(weights.dtype).mean(1)


def tuned(
    validation: Bench, rule: str, lifetime: Lifetime, teacher: Tensor | None = None, rates: Sequence[float] = ()
) -> float:
    """Return the learning rate, of the grid or of those given, with the lowest mean loss on validation tasks."""
    return min(validation.run(rule, rates or GRID, lifetime, teacher), key=lambda trial: trial.loss).lr
