import dataclasses
import re
from typing import Any

import pytest

from apical.bench.idle import refuse_idle
from apical.bench.recipe import Recipe, differences, parse_options
from apical.data import load
from apical.errors import ConfigError


@pytest.mark.parametrize(
    ("fields", "option"),
    [
        ({"batch_size": 0}, "--batch-size"),
        ({"batch_size": -3}, "--batch-size"),
        ({"epochs": 0}, "--epochs"),
        ({"lr": (0.0,)}, "--lr"),
        ({"lr": (-0.1,)}, "--lr"),
        ({"lr": (float("nan"),)}, "--lr"),
        ({"lr": (float("inf"),)}, "--lr"),
        ({"lr": (1e200,)}, "--lr must be positive and at most 1e+30, got 1e+200"),
        ({"weight_decay": (1e200,)}, "--weight-decay"),
        ({"lr": ()}, "--lr"),
        ({"lr": (0.1, 0.01)}, "--lr-epochs"),
        ({"lr": (0.1, 0.01, 0.001), "lr_epochs": (3, 3)}, "--lr-epochs"),
        ({"lr": (0.1, 0.01), "lr_epochs": (0,)}, "--lr-epochs"),
        ({"weight_decay": (-1e-4,)}, "--weight-decay"),
        ({"weight_decay_epochs": (1,)}, "--weight-decay"),
        ({"momentum": 1.0}, "--momentum"),
        ({"crop": -1}, "--crop"),
        ({"train_limit": 0}, "--train-limit"),
        ({"optimizer": "sdg"}, "did you mean 'sgd'"),
        ({"device": "gpu"}, "--device"),
        ({"beta2": 1.0}, "--beta2"),
        ({"eps": -1e-8}, "--eps"),
        ({"clip": -1.0}, "--clip"),
        ({"clip": float("nan")}, "--clip"),
        ({"loss": "msee"}, "did you mean 'mse'"),
        ({"feedback_lr": 0.0}, "--feedback-lr"),
        ({"feedback_beta1": 1.0}, "--feedback-beta1"),
        ({"feedback_beta2": -0.1}, "--feedback-beta2"),
        ({"feedback_eps": -1.0}, "--feedback-eps"),
        ({"feedback_weight_decay": -1.0}, "--feedback-weight-decay"),
        ({"pretrain_epochs": -1}, "--pretrain-epochs"),
        ({"pretrain_lr": 0.0}, "--pretrain-lr"),
        ({"feedback_passes": -1}, "--feedback-passes"),
        ({"feedback_fraction": 0.0}, "--feedback-fraction"),
        ({"feedback_fraction": 1.1}, "--feedback-fraction"),
        ({"rule_options": ("expansion",)}, "key=value"),
        ({"rule_options": ("a=1", "a=2")}, "twice"),
    ],
)
def test_a_value_out_of_range_names_its_option_in_one_line(fields: dict[str, object], option: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe(**fields)  # type: ignore[arg-type]
    assert option in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weight_decay_may_be_zero_and_momentum_too() -> None:
    Recipe(weight_decay=(0.0,), momentum=0.0)


def test_steps_per_epoch_counts_the_last_batch_only_if_it_is_kept() -> None:
    assert Recipe(batch_size=30).steps_per_epoch(100) == 3
    assert Recipe(batch_size=30, drop_last=False).steps_per_epoch(100) == 4
    assert Recipe(batch_size=300, drop_last=False).steps_per_epoch(100) == 1
    with pytest.raises(ConfigError, match="--batch-size 300 is larger than the 100 training samples"):
        Recipe(batch_size=300).steps_per_epoch(100)


def test_options_are_literals_and_bare_words_are_strings() -> None:
    options = ("expansion=2.5", "first-layer=True", "exact=('fc',)", "feedback=orthogonal")
    assert parse_options(options) == {
        "expansion": 2.5,
        "first_layer": True,
        "exact": ("fc",),
        "feedback": "orthogonal",
    }


def test_hash_depends_on_what_decides_the_result_only() -> None:
    recipe = Recipe()
    assert recipe.hash() == dataclasses.replace(recipe, threads=3, device="cpu", checkpoint_steps=7).hash()
    assert recipe.hash() != dataclasses.replace(recipe, seed=1).hash()
    assert recipe.hash() != dataclasses.replace(recipe, epochs=21).hash()


def test_differences_name_fields_and_both_values_and_leave_out_the_free_ones() -> None:
    saved, asked = Recipe(lr=(0.1,), epochs=3).to_json(), Recipe(lr=(0.2,), epochs=9, device="cpu").to_json()
    assert differences(saved, asked) == ["lr: [0.1] vs [0.2]"]


def test_a_field_that_an_older_configuration_lacks_has_its_default() -> None:
    saved = Recipe().to_json()
    del saved["momentum"], saved["feedback_lr"]
    assert differences(saved, Recipe().to_json()) == []
    assert differences(saved, Recipe(momentum=0.5, feedback_lr=0.1).to_json()) == [
        "momentum: 0.9 vs 0.5",
        "feedback_lr: None vs 0.1",
    ]


@pytest.mark.parametrize(
    ("fields", "are_numbers", "said"),
    [
        ({}, True, "add --loss mse"),
        ({"loss": "mse"}, False, "--loss mse needs numbers as targets"),
        ({"loss": "mse", "crop": 1}, True, "--crop"),
        ({"loss": "mse", "flip": True}, True, "--flip"),
    ],
)
def test_loss_and_augmentation_must_go_with_the_targets(fields: dict[str, object], are_numbers: bool, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Recipe(**fields).check_targets(are_numbers=are_numbers)  # type: ignore[arg-type]


def test_loss_that_goes_with_the_targets_is_accepted() -> None:
    Recipe().check_targets(are_numbers=False)
    Recipe(loss="mse").check_targets(are_numbers=True)


@pytest.mark.parametrize("option", ["pretrain_epochs", "feedback_passes"])
def test_feedback_passes_need_a_rule_that_learns_feedback(option: str) -> None:
    recipe = Recipe(rule="fa", **{option: 2})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"--{option.replace('_', '-')} 2: rule 'fa'"):
        recipe.check_phases(two_phase=False)
    recipe.check_phases(two_phase=True)


@pytest.mark.parametrize(
    ("given", "rest", "said"),
    [
        ({"beta2": 0.5, "eps": 0.1}, {}, "--beta2 (--optimizer sgd has none), --eps (--optimizer sgd has none); drop them"),
        ({"lr_min": 0.001}, {}, "--lr-min (--lr-cosine is off); drop it"),
        ({"clip_over": "network"}, {}, "--clip-over (--clip is off)"),
        ({"pretrain_lr": 0.1}, {"feedback_passes": 1}, "--pretrain-lr (--pretrain-epochs is off)"),
        ({"feedback_fraction": 0.5}, {}, "--feedback-fraction (there are no feedback passes)"),
        ({"feedback_lr": 0.1}, {}, "--feedback-lr (no rule here has feedback weights that learn separately)"),
        ({"decay_on": "matrices"}, {"weight_decay": (0.0,)}, "--decay-on (--weight-decay is off)"),
        ({"context": 8}, {}, "--context (the data have no tokens)"),
        ({"tokens": "bytes"}, {}, "--tokens (the data are not text)"),
    ],
)
def test_settings_without_effect_are_refused(given: dict[str, Any], rest: dict[str, Any], said: str) -> None:
    recipe, digits = Recipe(**given, **rest), load("digits")
    with pytest.raises(ConfigError, match=re.escape(said)):
        refuse_idle(given, [recipe], digits, has_feedback=False)
    defaults = {name: getattr(Recipe(), name) for name in given}
    refuse_idle(defaults, [recipe], digits, has_feedback=False)


def test_settings_that_one_of_the_rules_uses_are_none_of_these() -> None:
    used = {"optimizer": "adam", "beta2": 0.5, "lr_cosine": 3, "lr_min": 0.001, "clip": 1.0, "clip_over": "network"}
    used |= {"pretrain_epochs": 1, "pretrain_lr": 0.1, "feedback_lr": 0.1, "feedback_fraction": 0.5, "context": 8}
    used |= {"weight_decay": (0.1,), "decay_on": "matrices"}
    refuse_idle(used, [Recipe(), Recipe(**used)], load("copy", context=8), has_feedback=True)  # type: ignore[arg-type]
