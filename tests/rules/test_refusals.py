"""Refusals by name, each of one option or one batch that the documentation rules out, and answers without gradient."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import apical
from apical.core.attention import attend, multi_head
from apical.core.spike_times import SpikingLinear
from apical.errors import ApicalError, ConfigError, UnsupportedModelError

X, Y = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 4))


def set_b_of_dfa() -> None:
    rule = apical.DirectFeedbackAlignment(perceptron(), F.cross_entropy)
    rule(X, Y)
    rule.set_feedback("1", torch.zeros(7, 4))


def turned_pfa() -> None:
    apical.ProductFeedbackAlignment(perceptron(), F.cross_entropy).set_feedback("2", B=torch.zeros(7, 4))


def own_feedback(widths: tuple[int, int]) -> None:
    feedback = nn.ModuleList([nn.Linear(4, widths[0]), nn.Linear(widths[0], widths[1])])
    apical.CounterCurrentLearning(perceptron(), F.cross_entropy, feedback=feedback)


def static_keys() -> None:
    m = nn.MultiheadAttention(8, 2)
    q = torch.randn(5, 3, 8)
    none: tuple[Any, ...] = (None, None, False, 0.0)
    given = (m.in_proj_weight, m.in_proj_bias, *none, m.out_proj.weight, m.out_proj.bias)
    multi_head(q, q, q, 8, 2, *given, static_k=q)


def narrow_queries() -> None:
    q = torch.randn(5, 3, 6)
    attend(nn.MultiheadAttention(8, 2), q, q, q)


REFUSALS: dict[str, tuple[Callable[[], object], type[ApicalError], str]] = {
    "B of a unit turned": (set_b_of_dfa, ConfigError, "B of unit '1' is (4, 7), outputs by neurons, not (7, 4)"),
    "B of a layer turned": (turned_pfa, ConfigError, "B of layer '2' must have 4 rows, one per output channel, not (7, 4)"),
    "a feedback network of other widths": (lambda: own_feedback((6, 8)), ConfigError, "'2' returns shape (6,), not (7,)"),
    "a mask of no classes": (
        lambda: apical.CounterCurrentLearning(perceptron(), F.mse_loss, pair="match", mask=True),
        *(ConfigError, "pair='match' uses no class labels"),
    ),
    "a feedback of no kind": (
        lambda: apical.CounterCurrentLearning(perceptron(), F.cross_entropy, feedback="mirrored"),  # type: ignore[arg-type]
        *(ConfigError, "unknown feedback 'mirrored'; did you mean 'mirror'?"),
    ),
    "goodness of labels without labels": (
        lambda: apical.ForwardForward(perceptron(), negatives="images", answers="goodness"),
        *(ConfigError, "use answers='read-out'"),
    ),
    "whole numbers to be normalised": (
        lambda: apical.ForwardForward(perceptron())(torch.ones(6, 8, dtype=torch.long), Y),
        *(ConfigError, "torch.int64; pass floating-point numbers"),
    ),
    "a proximal step of what is no matrix": (
        lambda: apical.SemiImplicit(
            nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Unflatten(1, (2, 3)), nn.Flatten(), nn.Linear(6, 4))
        ),
        *(UnsupportedModelError, "layer '4' (Linear) is not a matrix on vectors"),
    ),
    "times of other inputs": (lambda: SpikingLinear(3, 2)(torch.rand(2, 5)), ConfigError, "times (batch, 3), not (2, 5)"),
    "static keys": (static_keys, UnsupportedModelError, "static keys or values of attention are not supported"),
    "narrow queries": (narrow_queries, ConfigError, "attention of width 8 was given queries of width 6"),
    "half a depth of a residual network": (lambda: apical.models.CifarResNet(21, 3, 10), ConfigError, "6n + 2 layers"),
    "an autoencoder of other images": (
        lambda: apical.models.build("conv-autoencoder-8-8", (1, 8, 8), 10),
        *(ConfigError, "an autoencoder reconstructs its input and needs 64 outputs; got 10"),
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_ruled_out_is_refused_by_name(name: str) -> None:
    act, kind, message = REFUSALS[name]
    with pytest.raises(kind, match=re.escape(message)):
        act()


RULES: dict[str, Callable[[nn.Module], apical.CreditRule]] = {
    "local": lambda model: apical.LocalClassifiers(model, F.cross_entropy),
    "dualprop": lambda model: apical.DualPropagation(model, F.cross_entropy),
    "pc": lambda model: apical.PredictiveCoding(model, F.cross_entropy),
}


@pytest.mark.parametrize("name", RULES)
def test_without_gradient_a_rule_says_the_models_loss_and_teaches_nothing(name: str) -> None:
    model = perceptron()
    rule = RULES[name](model)
    with torch.no_grad():
        credit = rule(X, Y)
    torch.testing.assert_close(credit.output, model(X).detach())
    torch.testing.assert_close(credit.loss, F.cross_entropy(model(X), Y).detach())
    with pytest.raises(ConfigError, match="nothing learns"):
        credit.backward()


def test_the_semi_implicit_step_says_which_optimiser_takes_it() -> None:
    (remark,) = apical.SemiImplicit(perceptron()).remarks
    assert "SGD with lr 1" in remark


def test_images_that_are_matched_have_no_classes_to_be_read_out() -> None:
    rule = apical.CounterCurrentLearning(
        nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 8)), F.mse_loss, pair="match"
    )
    assert rule.read_outs(X) == {}
