"""Which weight is read of a layer that does more in its own forward than its product: gains and angles go by it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical.diagnostics.alignment import layer_alignment
from apical.errors import UnsupportedModelError
from apical.rules.modulated import Modulated
from apical.rules.node_importance import NodeImportance


class Rectified(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class NormFirst(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.layer_norm(x, x.shape[-1:]))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1), self.bias)


class Wide(nn.Linear):
    """Has more rows than outputs."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out + 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., :-2]


def network(kind: type[nn.Linear]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), kind(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 3


@pytest.mark.parametrize(("kind", "factor"), [(Rectified, 1), (NormFirst, 1), (Doubled, 2)])
def test_gains_go_by_the_weight_that_multiplies(kind: Any, factor: float) -> None:
    """The derivative at inputs of zero, which was read, lacks the rows of units that rest there."""
    model, plain = network(kind), network(nn.Linear)
    with torch.no_grad():
        plain[2].weight.mul_(factor)
    found = []
    for own in (model, plain):
        rule = Modulated(apical.Backprop(own), NodeImportance())
        rule(*batch())
        found.append(rule.gains()["2"])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", [Cosine, Wide])
def test_gains_of_unknown_weights_are_refused_by_name(kind: Any) -> None:
    """They were silently others, or a raw error."""
    rule = Modulated(apical.Backprop(network(kind)), NodeImportance())
    with pytest.raises(UnsupportedModelError, match=rf"layer '2' \({kind.__name__}\).*weights of its units are unknown"):
        rule(*batch())


@pytest.mark.parametrize("kind", [Rectified, NormFirst])
def test_angles_are_those_to_the_weight_that_multiplies(kind: Any) -> None:
    model = network(kind)
    rule = apical.FeedbackAlignment(model)
    rule(*batch())
    rule.set_feedback("2", model[2].weight.detach().clone())
    assert layer_alignment(rule)["2"]["weight_alignment"] < 1e-4
