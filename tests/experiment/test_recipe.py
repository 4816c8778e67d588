import dataclasses

import pytest

from apical.errors import ConfigError
from apical.experiment.recipe import Recipe, differences, parse_options


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
    with pytest.raises(ConfigError, match="--batch-size 300 is larger than the 100 training images"):
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
    del saved["momentum"]
    assert "momentum: missing vs 0.9" in differences(saved, asked)
