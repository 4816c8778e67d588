"""The scikit-learn classifier against scikit-learn's own conformance suite, and in its company."""

import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import apical
from apical import CreditClassifier
from apical.errors import ConfigError

SMALL = {"hidden": (16,), "epochs": 15, "batch_size": 16, "lr": 0.05}


@parametrize_with_checks([CreditClassifier(rule="fa", random_state=0, **SMALL)])  # type: ignore[arg-type]
def test_it_is_an_estimator(estimator, check):  # type: ignore[no-untyped-def]
    check(estimator)


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    images, labels = load_digits(return_X_y=True)
    return images[:600], labels[:600]


def test_tdca_learns_three_classes_of_digits(digits: tuple[np.ndarray, np.ndarray]) -> None:
    """The name's own teacher is for ten."""
    images, labels = (part[digits[1] < 3] for part in digits)
    classifier = CreditClassifier(rule="tdca", hidden=(32, 32), epochs=15, random_state=0).fit(images[:120], labels[:120])
    assert classifier.score(images[120:], labels[120:]) > 0.8


@pytest.mark.parametrize("rule", ["bp", "dfa", "pfa", "kp", "dfc-ssa"])
def test_rules_learn_digits(rule: str, digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = digits
    classifier = CreditClassifier(rule=rule, hidden=(32, 32), epochs=15, random_state=0).fit(images[:400], labels[:400])
    assert classifier.score(images[400:], labels[400:]) > 0.7
    assert type(classifier.model_) is torch.nn.Sequential
    assert not any("forward" in module.__dict__ or module._forward_hooks for module in classifier.model_.modules())
    again = pickle.loads(pickle.dumps(classifier))
    assert np.array_equal(again.predict_proba(images), classifier.predict_proba(images))


def test_one_seed_one_classifier_and_the_global_generator_is_left_alone(digits: tuple[np.ndarray, np.ndarray]) -> None:
    before = torch.random.get_rng_state()
    fitted = [CreditClassifier(rule="brsf", random_state=seed, **SMALL | {"epochs": 2}).fit(*digits) for seed in (0, 0, 1)]  # type: ignore[arg-type]
    first, second, third = (each.predict_proba(digits[0]) for each in fitted)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, third)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_grid_in_a_pipeline(digits: tuple[np.ndarray, np.ndarray]) -> None:
    pipeline = make_pipeline(MinMaxScaler(), CreditClassifier(hidden=(16,), epochs=8, random_state=0))
    names = {"creditclassifier__rule": ["bp", "fa"], "creditclassifier__lr": [1e-5, 0.05]}
    search = GridSearchCV(pipeline, names, cv=2).fit(digits[0][:300], digits[1][:300])
    assert search.best_params_["creditclassifier__lr"] == 0.05


def test_options_of_rules(digits: tuple[np.ndarray, np.ndarray]) -> None:
    CreditClassifier(rule="pfa", rule_options={"expansion": 2}, random_state=0, **SMALL | {"epochs": 1}).fit(*digits)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has no option 'expanse'; did you mean 'expansion'"):
        CreditClassifier(rule="pfa", rule_options={"expanse": 2}).fit(*digits)
    with pytest.raises(ConfigError, match="unknown rule 'pfaa'"):
        CreditClassifier(rule="pfaa").fit(*digits)


def test_the_package_stays_light() -> None:
    code = "import apical, sys; print('sklearn' in sys.modules, 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("unit", [1e300, 1.0, 1e-300])
def test_features_of_any_unit_and_a_column_that_is_constant_to_rounding(unit: float) -> None:
    """0.1 many times has a deviation of 1e-17; a value next to it must not be 1e13 deviations away."""
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 2
    features = generator.normal(size=(60, 3)) + 4 * labels[:, None]
    columns = np.hstack([features * unit, np.full((60, 1), 0.1)])
    fitted = CreditClassifier(rule="bp", hidden=8, epochs=10, random_state=0).fit(columns, labels)
    plain = CreditClassifier(rule="bp", hidden=(8,), epochs=10, random_state=0).fit(columns / [unit, unit, unit, 1], labels)
    assert fitted.score(columns, labels) > 0.9
    assert np.allclose(fitted.predict_proba(columns), plain.predict_proba(columns / [unit, unit, unit, 1]), atol=1e-5)
    moved = columns + np.array([0, 0, 0, 1e-4])
    assert np.allclose(fitted.predict_proba(moved), fitted.predict_proba(columns), atol=1e-3)


def test_a_rule_is_a_name_or_a_class(digits: tuple[np.ndarray, np.ndarray]) -> None:
    quick: dict[str, Any] = {**SMALL, "epochs": 1, "random_state": 0}
    by_class = CreditClassifier(rule=apical.DirectFeedbackAlignment, **quick).fit(*digits)
    assert isinstance(by_class.rule_, apical.DirectFeedbackAlignment)
