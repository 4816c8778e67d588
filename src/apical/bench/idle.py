"""Settings that would have no effect raise an error instead of being ignored."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from apical.bench.recipe import Recipe, flag
from apical.data import Dataset
from apical.errors import ConfigError

_GOVERNED = {"lr_min": "lr_cosine", "clip_over": "clip", "pretrain_lr": "pretrain_epochs"}
"""Settings that matter only if another setting is on."""
_RATES = ("feedback_lr", "feedback_beta1", "feedback_beta2", "feedback_eps", "feedback_weight_decay")


def refuse_idle(
    given: Mapping[str, Any], recipes: Sequence[Recipe], dataset: Dataset, *, has_feedback: bool, axes: Collection[str] = ()
) -> None:
    """Raise an error if none of the recipes uses a given setting.

    Args:
        given: the recipe's fields that the user set, and their values; values equal to the default are accepted.
        recipes: complete recipes of all rules.
        has_feedback: whether a rule has feedback weights that learn separately.
        axes: fields varied by a search; they count as given.

    Raises:
        ConfigError: names the options, and why.
    """
    reasons = {
        name: f"{flag(other)} is off"
        for name, other in _GOVERNED.items()
        if not any(getattr(recipe, other) for recipe in recipes)
    }
    if all(recipe.optimizer == "sgd" for recipe in recipes):
        reasons |= dict.fromkeys(("beta2", "eps", "feedback_beta2", "feedback_eps"), "--optimizer sgd has none")
    if not any(recipe.has_feedback_passes for recipe in recipes):
        reasons["feedback_fraction"] = "there are no feedback passes"
    if not has_feedback:
        reasons |= dict.fromkeys(_RATES, "no rule here has feedback weights that learn separately")
    if not any(any(recipe.weight_decay) for recipe in recipes):
        reasons["decay_on"] = "--weight-decay is off"
    if not dataset.is_sequences:
        reasons["context"] = "the data have no tokens"
    if not dataset.is_text:
        reasons["tokens"] = "the data are not text"
    defaults = Recipe.__dataclass_fields__
    idle = {name: flag(name) for name, value in given.items() if name in reasons and value != defaults[name].default}
    idle |= {name: f"--space {name}" for name in axes if name in reasons}
    if idle:
        said = ", ".join(f"{option} ({reasons[name]})" for name, option in idle.items())
        raise ConfigError(f"no effect here: {said}; drop {'it' if len(idle) == 1 else 'them'}")
