"""Data and model of a recipe; the user's own must be unchanged since the run began."""

from dataclasses import replace
from typing import Any

from torch import nn

from apical import data, models
from apical.bench.recipe import LossName, Recipe
from apical.data import Dataset
from apical.data.catalogue import ENTRIES
from apical.data.own import sources as own_data
from apical.errors import CheckpointError, require_choice
from apical.models import own as own_models
from apical.models.initialisation import INITIALISERS

_FEW = 2
"""Number of samples on which a user's model is tried."""


OF_DATA = ("data", "validation", "train_limit", "test_limit", "loss", "context", "tokens", "data_sha256")
"""Fields of a recipe that :func:`load_data` reads."""


def load_data(recipe: Recipe) -> Dataset:
    """Return the recipe's data; the split does not depend on the seed, so that seeds differ in nothing else.

    Raises:
        CheckpointError: the user's own data have changed since the recipe was written.
    """
    dataset = data.load(
        recipe.data,
        validation=recipe.validation,
        train_limit=recipe.train_limit,
        test_limit=recipe.test_limit,
        seed=0,
        numbers=recipe.loss == "mse",
        context=recipe.context,
        tokens=recipe.tokens,
    )
    _check(f"the data {recipe.data}", recipe.data_sha256, dataset.sha256)
    return dataset


def build_model(recipe: Recipe, dataset: Dataset) -> nn.Module:
    """Return the recipe's model, with weights from the global torch RNG; a user's model or data are tried on a few samples.

    Raises:
        CheckpointError: the source of a user's model has changed since the recipe was written.
        ConfigError: the model does not fit the data.
    """
    if own_models.is_own(recipe.model):
        _check(f"the model {recipe.model}", recipe.model_sha256, own_models.checksum(recipe.model))
    return initialised(model_for(recipe.model, dataset), recipe.init)


def initialised(model: nn.Module, name: str) -> nn.Module:
    """Return the model with weights redrawn by the named initialiser; unchanged for an empty name.

    Raises:
        ConfigError: there is no such initialiser.
        UnsupportedModelError: it does not support this model.
    """
    if not name:
        return model
    require_choice("--init", name, INITIALISERS)
    return INITIALISERS[name](model)


def model_for(name: str, dataset: Dataset) -> nn.Module:
    """Return the named model for a data set, as :func:`build_model` makes it."""
    model = models.build(name, dataset.input_shape, dataset.classes)
    if own_models.is_own(name) or dataset.sha256:
        few, where = dataset.train.inputs[:_FEW], dataset.name.rpartition("/")[2]
        own_models.check_output(model, name, few, dataset.classes, where, dataset.output_shape(1)[1:-1])
    return model


def located(values: dict[str, str]) -> dict[str, Any]:
    """Return given names of `data` and `model`, with absolute paths for the user's own, whose checksums are cleared."""
    places: dict[str, Any] = dict(values)
    if "data" in values:
        places["data_sha256"] = ""
        if values["data"] not in ENTRIES and own_data.is_own(values["data"]):
            places["data"] = own_data.absolute(values["data"])
    if "model" in values:
        places["model_sha256"] = ""
        if own_models.is_own(values["model"]):
            places["model"] = own_models.absolute(values["model"])
    return places


def identified(recipe: Recipe, dataset: Dataset) -> Recipe:
    """Return the recipe with checksums of the user's own data and model; existing checksums are kept and verified."""
    if not recipe.data_sha256:
        recipe = replace(recipe, data_sha256=dataset.sha256)
    if own_models.is_own(recipe.model) and not recipe.model_sha256:
        recipe = replace(recipe, model_sha256=own_models.checksum(recipe.model))
    return recipe


def loss_for(recipe: Recipe) -> LossName:
    """Return the loss that suits the targets of the recipe's data; data known by name are not loaded for this.

    Raises:
        ApicalError: the data do not exist or are not usable.
    """
    if recipe.data in ENTRIES:
        targets = ENTRIES[recipe.data].targets
    else:
        dataset = load_data(recipe)
        targets = "tokens" if dataset.is_sequences else "numbers" if dataset.is_regression else "labels"
    losses: dict[str, LossName] = {"labels": "cross_entropy", "tokens": "token_cross_entropy"}
    return losses.get(targets, "mse")


def _check(what: str, saved: str, now: str) -> None:
    if saved and saved != now:
        raise CheckpointError(
            f"{what} changed since the run began (sha256 {saved} then, {now or 'unknown'} now); restore it, or pass it "
            "again (--data, --model) with another --out"
        )
