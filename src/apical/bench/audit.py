"""Audits: train a rule for a few epochs, measure what it needs (:mod:`apical.diagnostics.plausibility`), check claims.

For speed, some rules compute the result of their paper's network in a closed form that reads weights. They are audited in
the form that works as the network would (`Entry.physical`); tests show that the two agree.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from apical.bench.checkpoint import seed_all
from apical.bench.materials import model_for
from apical.bench.measure import probe_batch
from apical.bench.names import find_rule, make_rule, merged, resolve
from apical.bench.papers import claimed
from apical.bench.papers import claims as paper_claims
from apical.bench.plain_loop import train
from apical.bench.recipe import LossName, Recipe, rule_name
from apical.core.credit import CreditRule
from apical.data.dataset import Dataset
from apical.diagnostics.plausibility import Verdict, examine, judge
from apical.errors import ConfigError
from apical.rules.backprop import Backprop

BATCH = 16
"""Number of images on which a rule is examined; memory and time of simulated rules grow with it."""

POSITIONS = 256
"""Sequence positions on which a rule is examined; this sets the number of sequences, which is at least two."""


TESTED = 256
"""Largest number of test sequences on which a rule's accuracy is measured."""

FUSED = {"form": "fused"}
"""The form of product feedback alignment that stores the same as the literal form and is faster for many tokens."""


@dataclass(frozen=True)
class Audited:
    """One rule's row.

    Attributes:
        form: options with which it was examined, if they differ from its defaults.
        accuracy: accuracy on test images or tokens after training.
        claims: by criterion, a paper's claim and whether the verdict agrees.
        placement: layers grouped by what their errors pass through, as one line.
    """

    rule: str
    title: str
    form: str
    accuracy: float
    verdicts: dict[str, Verdict]
    claims: dict[str, dict[str, Any]]
    placement: str

    def record(self) -> dict[str, Any]:
        """Return the row as it is stored in JSON."""
        return asdict(self)


def audit(rule: str, model: str, dataset: Dataset, epochs: int, seed: int, lr: float) -> Audited:
    """Train a rule and examine it in float64.

    Args:
        dataset: the data on which it is trained.
        epochs: passes over the training images before it is examined.
        seed: seed of weights, feedback and data order.
        lr: learning rate of that training.

    Raises:
        ApicalError: the rule cannot train the model, or the data have no classes.
    """
    entry = find_rule(rule)
    if dataset.is_regression:
        raise ConfigError(f"an audit needs classes, but the targets of {dataset.name} are numbers; choose another --data")
    loss: LossName = "token_cross_entropy" if dataset.is_sequences else "cross_entropy"
    plain = Recipe(rule=rule, model=model, data=dataset.name, epochs=epochs, seed=seed, lr=(lr,), probe=0, loss=loss)
    recipe, _ = resolve(plain, len(dataset.train), dataset.classes)
    physical = _options(entry.physical)
    slow = replace(recipe, rule_options=merged(recipe.rule_options, physical))
    examined, trained = _made(slow, dataset).double(), _made(recipe, dataset)
    if _layout(examined) != _layout(trained):
        quick = FUSED if dataset.is_sequences and entry.physical.get("form") == "literal" else {}
        recipe = replace(recipe, rule_options=merged(recipe.rule_options, _options({**entry.physical, **quick})))
        trained = _made(recipe, dataset)
    train(trained, recipe, dataset)  # in the fast form if it has the same weights: the result is the same
    examined.load_state_dict(trained.state_dict())
    answers = dataset.train.answers
    inputs, targets = probe_batch(dataset.train, BATCH if answers == 1 else min(max(POSITIONS // answers, 2), BATCH))
    inputs = _exactly(inputs)
    exact = Backprop(model_for(model, dataset).double(), examined.loss)
    verdicts = judge(examine(examined, inputs, targets, exact))
    claims = {
        key: {"claimed": claim, "agrees": verdicts[key].verdict == claim}
        for key, claim in claimed(rule, paper_claims()).items()
        if verdicts[key].verdict != "not applicable"
    }
    form, accuracy = ", ".join(physical), _accuracy(examined, dataset)
    placement = examined.placement(inputs).layers()
    return Audited(rule_name(rule), entry.title, form, accuracy, verdicts, claims, placement)


def _options(values: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"{key}={value!r}" for key, value in values.items())


def _made(recipe: Recipe, dataset: Dataset) -> CreditRule:
    seed_all(recipe.seed)
    model = model_for(recipe.model, dataset)
    return make_rule(recipe, model, dataset.input_shape)


def _layout(rule: CreditRule) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in rule.state_dict().items()}


def _exactly(inputs: Tensor) -> Tensor:
    """Return inputs in float64; integers, which a model embeds, unchanged."""
    return inputs.double() if inputs.is_floating_point() else inputs


@torch.no_grad()
def _accuracy(rule: CreditRule, dataset: Dataset) -> float:
    number = min(len(dataset.test), TESTED) if dataset.is_sequences else len(dataset.test)
    predicted = rule.answer(_exactly(dataset.test.inputs[:number])).argmax(-1)
    hits = (predicted == dataset.test.targets[:number]).sum()
    return float(hits) / (number * dataset.test.answers)
