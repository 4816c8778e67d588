"""Training without a run folder takes a recipe's settings as the training loop does."""

from typing import Any

import pytest

from apical import models
from apical.bench.names import make_rule
from apical.bench.plain_loop import train
from apical.bench.recipe import Recipe
from apical.data.loading import load


@pytest.mark.parametrize(("setting", "rests"), [({"feedback_lr": 1e-30}, True), ({"lr": (1e-30,)}, True), ({}, False)])
def test_feedback_has_the_rate_that_the_recipe_says(setting: dict[str, Any], rests: bool) -> None:
    """And the forward weights' where the recipe says none."""
    digits = load("digits", train_limit=64, test_limit=8)
    shared: dict[str, Any] = {"epochs": 1, "batch_size": 16, "weight_decay": (0.0,), "lr": (0.1,)}
    recipe = Recipe(rule="dtp", model="mlp-tanh-16-16", **{**shared, **setting})
    rule = make_rule(recipe, models.build(recipe.model, digits.input_shape, digits.classes), digits.input_shape)
    before = [parameter.detach().clone() for parameter in rule.feedback_parameters()]
    train(rule, recipe, digits)
    moved = max(float((a.detach() - b).abs().max()) for a, b in zip(rule.feedback_parameters(), before, strict=True))
    assert (moved < 1e-12) == rests
