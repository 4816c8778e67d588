"""Audits: train a rule for a few epochs, measure what it needs (:mod:`apical.diagnostics.plausibility`), hold it to claims.

Some rules compute what their papers' networks would do in a closed form that reads weights, because it is faster. They are
audited in the form that does it as the network would (`Entry.physical`); tests show that the two agree.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from apical import models
from apical.core.credit import CreditRule
from apical.data.dataset import Dataset
from apical.diagnostics.plausibility import Verdict, examine, judge
from apical.errors import ConfigError
from apical.experiment.measure import probe_batch
from apical.experiment.optimizer import make_optimizer, scheduled, shape_gradients
from apical.experiment.recipe import Recipe, rule_name
from apical.experiment.schedule import data_order
from apical.recipes.claims import claimed
from apical.recipes.rules import find_rule, make_rule, merged, resolve
from apical.rules.backprop import Backprop

BATCH = 16
"""Images on which a rule is examined; memory and time of simulated rules grow with them."""


@dataclass(frozen=True)
class Audited:
    """One rule's row.

    Attributes:
        rule: short name.
        title: what it is.
        form: options under which it was examined, if they are not its defaults.
        accuracy: of the test images after training.
        verdicts: by criterion.
        claims: what a paper claims, by criterion, and whether the verdict agrees.
    """

    rule: str
    title: str
    form: str
    accuracy: float
    verdicts: dict[str, Verdict]
    claims: dict[str, dict[str, Any]]

    def record(self) -> dict[str, Any]:
        """The row as JSON keeps it."""
        return asdict(self)


def audit(rule: str, model: str, dataset: Dataset, epochs: int, seed: int) -> Audited:
    """Train a rule, and examine it in float64.

    Args:
        rule: short name.
        model: name of the network.
        dataset: what it is trained on.
        epochs: passes over the training images before it is examined.
        seed: of weights, feedback and data order.

    Raises:
        ApicalError: the rule cannot train the model.
    """
    entry = find_rule(rule)
    recipe, _ = resolve(Recipe(rule=rule, model=model, epochs=epochs, seed=seed, probe=0), len(dataset.train))
    physical = tuple(f"{key}={value!r}" for key, value in entry.physical.items())
    slow = replace(recipe, rule_options=merged(recipe.rule_options, physical))
    examined, trained = _made(slow, dataset).double(), _made(recipe, dataset)
    if _layout(examined) != _layout(trained):
        recipe, trained = slow, _made(slow, dataset)
    train(trained, recipe, dataset)  # in the fast form where it keeps the same weights: it learns the same
    examined.load_state_dict(trained.state_dict())
    inputs, targets = probe_batch(dataset.train, BATCH)
    exact = Backprop(models.build(model, dataset.input_shape, dataset.classes).double())
    verdicts = judge(examine(examined, inputs.double(), targets, exact))
    claims = {
        key: {"claimed": claim, "agrees": verdicts[key].verdict == claim}
        for key, claim in claimed(rule).items()
        if verdicts[key].verdict != "not applicable"
    }
    return Audited(rule_name(rule), entry.title, ", ".join(physical), _accuracy(examined, dataset), verdicts, claims)


def _made(recipe: Recipe, dataset: Dataset) -> CreditRule:
    torch.manual_seed(recipe.seed)
    model = models.build(recipe.model, dataset.input_shape, dataset.classes)
    return make_rule(recipe, model, dataset.input_shape)


def _layout(rule: CreditRule) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in rule.state_dict().items()}


def train(rule: CreditRule, recipe: Recipe, dataset: Dataset) -> None:
    """Train a rule by its recipe, in one pass per epoch that learns forward and feedback weights together.

    Raises:
        ConfigError: a weight is no longer finite.
    """
    rule.train()
    steps, step = recipe.steps_per_epoch(len(dataset.train)), 0
    inputs, targets = dataset.train.inputs, dataset.train.targets
    torch.manual_seed(recipe.seed)
    optimizer = make_optimizer(recipe, rule)
    for epoch in range(recipe.epochs):
        lr, decay = scheduled(recipe, epoch)
        for number, group in enumerate(optimizer.param_groups):
            feedback = number > 0 and recipe.feedback_weight_decay is not None
            group["lr"], group["weight_decay"] = lr, recipe.feedback_weight_decay if feedback else decay
        order = data_order(len(inputs), recipe.seed, epoch + 1)
        for chosen in order[: steps * recipe.batch_size].split(recipe.batch_size):
            optimizer.zero_grad()
            rule(inputs[chosen], targets[chosen]).backward()
            shape_gradients(optimizer, recipe, step)
            optimizer.step()
            step += 1
    optimizer.zero_grad()
    if not all(bool(parameter.isfinite().all()) for parameter in rule.parameters()):
        raise ConfigError(
            f"rule {recipe.rule!r} diverged on {recipe.data} within {recipe.epochs} epochs; audit it with fewer"
        )


@torch.no_grad()
def _accuracy(rule: CreditRule, dataset: Dataset) -> float:
    predicted = rule.model(dataset.test.inputs.double()).argmax(1)
    return float((predicted == dataset.test.targets).double().mean())
