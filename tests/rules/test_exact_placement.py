"""Where placement says "exact" or "signal of its own" of chain rules, the gradient is backpropagation's or is not."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import apical
from apical.core.losses import squared_error
from apical.rules.top_down.equivariant import EquivariantNetwork
from apical.testing import check_model

TP, PC = apical.DifferenceTargetPropagation, apical.PredictiveCoding
RULES: dict[str, Callable[..., apical.CreditRule]] = {
    **{variant: partial(TP, variant=variant) for variant in ("dtp", "drl", "lee", "linear", "hidden", "control")},
    "dtp, 2 eta": partial(TP, variant="dtp", normalised=False, eta=0.3),
    "pc": PC,
    "pc-error": partial(PC, inference="error"),
    "pc-incremental": partial(PC, inference="incremental"),
    "pc, half": partial(PC, output_weight=0.5),
    "pc-staged": partial(PC, inference="staged"),
    "pc-staged, half": partial(PC, inference="staged", output_weight=0.5),
    "dfc": apical.DeepFeedbackControl,
    "strong-dfc": apical.StrongDeepFeedbackControl,
    "tdca": apical.TopDownCreditAssignment,
    "tdca, error": lambda model: apical.TopDownCreditAssignment(model, teacher=EquivariantNetwork(output="error").double()),
    "tdca, another loss": lambda model: apical.TopDownCreditAssignment(
        model, squared_error, teacher=EquivariantNetwork(output="error").double()
    ),
    "dfa": apical.DirectFeedbackAlignment,
    "ccl": apical.CounterCurrentLearning,
    "local": apical.LocalClassifiers,
}


def network(widths: tuple[int, ...], frozen: int) -> nn.Sequential:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        parts += [nn.Linear(a, b).double().requires_grad_(i >= frozen), nn.Tanh()]
    return nn.Sequential(*parts[:-1])


@pytest.mark.parametrize(("widths", "frozen"), [((6, 4), 0), ((6, 5, 4), 0), ((6, 5, 5, 4), 0), ((6, 5, 4), 1)])
@pytest.mark.parametrize("name", RULES)
def test_exact_is_backpropagation_and_nothing_else_is(name: str, widths: tuple[int, ...], frozen: int) -> None:
    x, y = torch.rand(7, 6, dtype=torch.float64), torch.arange(7) % 4
    if name.startswith("tdca, ") and len(widths) == 2:
        pytest.skip("refused: there is no hidden layer that credit could be sent to")
    model = network(widths, frozen)
    backprop: dict[str, Any] = {}
    exact = apical.Backprop(model, squared_error if name == "tdca, another loss" else F.cross_entropy)
    exact(x, y).backward()
    for key, parameter in model.named_parameters():
        backprop[key], parameter.grad = parameter.grad, None
    exact.detach()
    rule = RULES[name](model)
    rule(x, y).backward()
    paths = {row.layer: row.path for row in rule.placement(x)}
    for layer, path in paths.items():
        own, its = model.get_submodule(layer).weight.grad, backprop[f"{layer}.weight"]
        if path == "frozen":
            assert own is None or not own.any()
        else:
            assert (path == "exact") == torch.allclose(own, its, rtol=1e-9, atol=0)
    check_model(rule, x, y, skip=("compiled",))
