"""The rules by their short names on the command line, with the defaults each one needs. The library has no registry."""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from apical.core.credit import CreditRule
from apical.errors import ApicalError, ConfigError, unknown_name
from apical.experiment.recipe import Recipe, parse_options
from apical.experiment.schedule import alignment_decay
from apical.rules.backprop import Backprop
from apical.rules.direct_feedback_alignment import DirectFeedbackAlignment
from apical.rules.feedback_alignment import FeedbackAlignment
from apical.rules.kolen_pollack import KolenPollack
from apical.rules.product_feedback_alignment import ProductFeedbackAlignment
from apical.rules.sign_symmetry import SignSymmetry
from apical.rules.weight_mirror import WeightMirror

DECAY = 1e-4
"""Weight decay of every rule that does not learn its feedback by decay, and of the others after their alignment phase."""


@dataclass(frozen=True)
class Entry:
    """One short name: the class behind it, the options that the name fixes, and a line for people.

    Attributes:
        aligns: the rule's feedback aligns through weight decay, so it starts with an alignment phase.
    """

    build: Callable[..., CreditRule]
    title: str
    options: dict[str, Any] = field(default_factory=dict)
    aligns: bool = False


RULES: dict[str, Entry] = {
    "bp": Entry(Backprop, "backpropagation"),
    "fa": Entry(FeedbackAlignment, "feedback alignment: fixed random feedback weights"),
    "dfa": Entry(DirectFeedbackAlignment, "direct feedback alignment: the output error straight to every layer"),
    "usf": Entry(SignSymmetry, "sign symmetry: the signs of the weights, one magnitude", {"variant": "uniform"}),
    "brsf": Entry(SignSymmetry, "sign symmetry: magnitudes drawn for every batch", {"variant": "batchwise"}),
    "frsf": Entry(SignSymmetry, "sign symmetry: magnitudes drawn once", {"variant": "fixed"}),
    "kp": Entry(KolenPollack, "Kolen-Pollack: feedback gets the same updates and decay", aligns=True),
    "wm": Entry(WeightMirror, "weight mirror: feedback learned from noise"),
    "pfa": Entry(ProductFeedbackAlignment, "product feedback alignment, expansion 10", {"expansion": 10}, True),
    "pfa-o": Entry(ProductFeedbackAlignment, "product feedback alignment, orthogonal", {"feedback": "orthogonal"}, True),
}


def find_rule(name: str) -> Entry:
    """The entry of a short name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name not in RULES:
        raise unknown_name("rule", name, RULES)
    return RULES[name]


def constructor_options(entry: Entry) -> list[str]:
    """Names of the options the rule's constructor takes besides model and loss."""
    return [name for name in inspect.signature(entry.build).parameters if name not in ("model", "loss")]


def resolve(recipe: Recipe, examples: int) -> tuple[Recipe, list[str]]:
    """The recipe with the rule's defaults filled in, for `examples` training images, and notes on what was chosen.

    Raises:
        ConfigError: unknown rule or option, or a batch larger than the data.
    """
    entry, notes = find_rule(recipe.rule), []
    given, known = parse_options(recipe.rule_options), constructor_options(entry)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            known_text = ", ".join(known) or "none"
            raise ConfigError(f"rule {recipe.rule!r} has no option {key!r}{hint} Its options: {known_text}")
    added = []
    if entry.aligns and recipe.optimizer != "sgd" and "form" not in given:
        added.append("form='explicit'")
        notes.append(f"{recipe.rule} keeps its feedback explicitly, because {recipe.optimizer} is not linear")
    if recipe.probe and "first_layer" in known and "first_layer" not in given:
        added.append("first_layer=True")
        notes.append("feedback is kept for the first layer too, to read its alignment (--probe 0 leaves it out)")
    steps = recipe.steps_per_epoch(examples)
    decay, decay_epochs = recipe.weight_decay, recipe.weight_decay_epochs
    if not decay:
        decay = (DECAY,)
        if entry.aligns and recipe.optimizer == "sgd":
            high, epochs = alignment_decay(recipe.lr[0], steps, recipe.momentum)
            decay, decay_epochs = (high, DECAY), (epochs,)
            notes.append(f"weight decay {high:g} in the first {epochs} epochs aligns the feedback of {recipe.rule}")
    options = (*recipe.rule_options, *added)
    return replace(recipe, rule_options=options, weight_decay=decay, weight_decay_epochs=decay_epochs), notes


def make_rule(recipe: Recipe, model: nn.Module) -> CreditRule:
    """The recipe's rule around `model`.

    Raises:
        ConfigError: an option's value is not usable.
        UnsupportedModelError: the rule cannot train a module of the model.
    """
    entry = find_rule(recipe.rule)
    options = {**entry.options, **parse_options(recipe.rule_options)}
    try:
        return entry.build(model, **options)
    except ApicalError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"rule {recipe.rule!r} with options {options}: {error}") from error
