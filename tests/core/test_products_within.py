"""Layers that go on behind their product in their own forward: no unit below may end there, as its error would pass the weight."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical


class Tripled(nn.Linear):
    """Goes on by a function."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class ByMatmul(nn.Linear):
    """Adds its bias apart."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Rectified(nn.Linear):
    """Rectifies in its own forward, and goes on."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu() * 2


class RectifiedByModule(nn.Linear):
    """The same by a module."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x)) * 2  # type: ignore[no-any-return]


class Halves(nn.Linear):
    """Two products with parts of one weight."""

    def forward(self, x: Tensor) -> Tensor:
        half = self.out_features // 2
        upper, lower = F.linear(x, self.weight[:half]), F.linear(x, self.weight[half:])
        return torch.cat([upper, lower], -1) + self.bias


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float)


@pytest.mark.parametrize("make", [apical.DirectFeedbackAlignment, apical.TopDownCreditAssignment])
@pytest.mark.parametrize("place", ["head", "hidden"])
@pytest.mark.parametrize("kind", [Tripled, ByMatmul, Rectified, RectifiedByModule, Halves])
def test_no_error_passes_the_weight_of_such_a_layer(kind: type[nn.Linear], place: str, make: Any) -> None:
    """With no activation below it; another weight that makes the same activities leaves what is below as it learns.

    Its input is zero, so that every weight makes the same activities, and the layer below still has an error.
    """
    upper = kind(6, 4) if place == "head" else nn.Sequential(kind(6, 6), nn.Tanh(), nn.Linear(6, 4))
    below = nn.Linear(8, 6)
    nn.init.zeros_(below.weight), nn.init.zeros_(below.bias)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), below, upper)
    changed = upper if place == "head" else upper[0]
    assert isinstance(changed, nn.Linear)
    torch.nn.init.ones_(changed.bias)
    rule = make(model)
    inputs, targets = torch.randn(7, 5), torch.arange(7) % 4

    def learned() -> Tensor:
        model.zero_grad()
        rule(inputs, targets).backward()
        assert below.weight.grad is not None
        return below.weight.grad.clone()

    before = learned()
    assert before.any()
    with torch.no_grad():
        changed.weight.normal_()
    torch.testing.assert_close(learned(), before, rtol=0, atol=1e-12)
    assert "merged" not in rule.placement(inputs).path("2")
