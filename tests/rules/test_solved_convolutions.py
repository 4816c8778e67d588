"""Local solves of convolutions with more places than inputs, where a gradient's span says nothing of what it is made of."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical.core.credit import CreditRule
from apical.rules.local_solve import LocalSolve
from apical.rules.modulated import Modulated

BATCH = 4


class Rising:
    """Gains 1, 2, 3... of a layer's units."""

    mode = "local"

    def __call__(self, rows: Tensor) -> Tensor:
        return torch.arange(1.0, len(rows) + 1, dtype=rows.dtype)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(75, 3))
    return nn.Sequential(*layers).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, 1, 8, 8, dtype=torch.double, generator=generator), torch.arange(BATCH) % 3


def rows(inputs: Tensor, kernel: int) -> Tensor:
    """Patches and a one for the bias (places, fan_in + 1)."""
    columns = F.unfold(inputs, kernel).transpose(1, 2).flatten(0, 1)
    return torch.cat([columns, columns.new_ones(len(columns), 1)], 1)


def joined(layer: nn.Module) -> Tensor:
    return torch.cat([layer.weight.grad.flatten(1), layer.bias.grad.unsqueeze(1)], 1)


def expected(gradient: Tensor, a: Tensor, damping: float) -> Tensor:
    """`B G (A^T A + lam I)^-1`, lam = damping trace(A^T A) / n."""
    product = a.T @ a
    lam = damping * product.trace() / len(product)
    return BATCH * torch.linalg.solve(product + lam * torch.eye(len(product), dtype=product.dtype), gradient.T).T


@pytest.mark.parametrize("kind", [apical.Backprop, apical.FeedbackAlignment, apical.DirectFeedbackAlignment])
def test_gains_of_single_units_are_seen_to_scale_what_layers_are_given(kind: Callable[..., CreditRule]) -> None:
    """A gradient whose rows have gains is still made of the layer's inputs: `M D` are errors as `D` are."""
    inputs, targets = batch()
    updates = []
    for wrap in (lambda rule: rule, lambda rule: LocalSolve(rule, 0.1)):
        model = network()
        torch.manual_seed(2)
        rule = wrap(Modulated(kind(model), Rising()))
        torch.manual_seed(3)
        rule(inputs, targets).backward()
        updates.append([joined(model[0]), joined(model[2])])
    hidden = model[:2](inputs).detach()
    assert len(rows(inputs[:2], 3)) > 10  # places of two samples, and inputs
    for plain, solved, given in zip(*updates, (rows(inputs, 3), rows(hidden, 2)), strict=True):
        torch.testing.assert_close(solved, expected(plain, given, 0.1))


@pytest.mark.parametrize("inference", ["state", "error"])
def test_derivatives_taken_by_inference_are_not_what_a_layer_learns_from(inference: str) -> None:
    """Predictive coding calls a layer once a step; it learns from the last call, given the relaxed state below."""
    inputs, targets = batch()
    updates = []
    for wrap in (lambda rule: rule, lambda rule: LocalSolve(rule, 0.1)):
        model = network()
        rule = wrap(apical.PredictiveCoding(model, inference=inference, steps=4, input_shape=(1, 8, 8)))
        rule(inputs, targets).backward()
        updates.append([joined(model[0]), joined(model[2])])
    below = apical.PredictiveCoding(model, inference=inference, steps=4, input_shape=(1, 8, 8)).states(inputs, targets)["s"][
        0
    ]
    for plain, solved, given in zip(*updates, (rows(inputs, 3), rows(below, 2)), strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(solved, expected(plain, given, 0.1))
