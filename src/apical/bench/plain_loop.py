"""Training without a run folder: nothing is measured, saved or resumed. For audits and the scikit-learn estimator."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from apical.bench.checkpoint import seed_all
from apical.bench.optimizer import begin_pass, make_optimizer, set_rate, shape_gradients
from apical.bench.own_rules import checked
from apical.bench.passes import Pass
from apical.bench.recipe import Recipe
from apical.core.credit import CreditRule
from apical.data import Dataset, Split
from apical.errors import ConfigError


def train(rule: CreditRule, recipe: Recipe, dataset: Dataset, on_step: Callable[[int, Tensor], None] | None = None) -> None:
    """Train a rule by its recipe, in one pass per epoch that learns forward and feedback weights together.

    Args:
        on_step: called with the number of finished steps, and the loss of the last step before its update.

    Raises:
        ConfigError: a weight is no longer finite.
    """
    rule.train()
    steps, step = recipe.steps_per_epoch(len(dataset.train)), 0
    inputs, targets = dataset.train.inputs, dataset.train.targets
    seed_all(recipe.seed)
    optimizer = make_optimizer(recipe, rule)
    for epoch in range(recipe.epochs):
        current = Pass("main", "both", epoch + 1, 0, 0, steps)
        begin_pass(optimizer, recipe, current)
        order = current.order(len(inputs), recipe.seed)
        for batch in order[: steps * recipe.batch_size].split(recipe.batch_size):
            set_rate(optimizer, recipe, step, steps)
            rule.restart()
            losses = []
            for _ in range(rule.repeats):
                optimizer.zero_grad()
                credit = checked(rule, rule(inputs[batch], targets[batch]))
                credit.backward()
                losses.append(credit.loss)
                shape_gradients(optimizer, recipe, step)
                optimizer.step()
                rule.constrain_()
            step += 1
            if on_step is not None:
                on_step(step, losses[0])
    optimizer.zero_grad()
    if not all(bool(parameter.isfinite().all()) for parameter in rule.parameters()):
        raise ConfigError(
            f"rule {recipe.rule!r} diverged on {recipe.data} within {recipe.epochs} epochs; try a learning rate "
            f"below {recipe.lr[0]:g}"
        )


def fit(
    rule: CreditRule,
    optimizer: Optimizer,
    train: Split,
    batch: int,
    generator: torch.Generator | None = None,
    *,
    drop_last: bool = False,
) -> None:
    """Train for one pass over the samples in a new random order, one step per batch."""
    order = torch.randperm(len(train), generator=generator)
    for samples in order[: len(order) // batch * batch if drop_last else None].split(batch):
        optimizer.zero_grad()
        rule(train.inputs[samples], train.targets[samples]).backward()
        optimizer.step()
        rule.constrain_()


@torch.no_grad()
def accuracy(rule: CreditRule, test: Split, batch: int | None = None) -> float:
    """Return the share of samples that the rule's network classifies correctly, computed in batches if asked for."""
    answers = torch.cat([rule.answer(part) for part in test.inputs.split(batch or len(test))])
    return float((answers.argmax(1) == test.targets).double().mean())
