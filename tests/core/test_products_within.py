"""Layers that go on behind their product in their own forward: a unit that ended there would pass their weight."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import apical
from apical.testing import check_model


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


class GatedBias(nn.Linear):
    """Its weight has a second use, on its bias alone."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias * (1 + 0 * self.weight.mean()))


class Adapted(nn.Linear):
    """Has a layer of its own inside, whose output it adds."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.inner = nn.Linear(n_in, n_out)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.inner(x)  # type: ignore[no-any-return]


def hooked(n_in: int, n_out: int) -> nn.Linear:
    """A hook goes on."""
    layer = nn.Linear(n_in, n_out)
    layer.register_forward_hook(lambda _, inputs, output: 3 * output)
    return layer


def spectral(n_in: int, n_out: int) -> nn.Linear:
    """Its weight is made by products of its own, and doubled at the end."""
    layer = parametrizations.spectral_norm(nn.Linear(n_in, n_out)).eval()
    layer.register_forward_hook(lambda _, inputs, output: 3 * output)
    return layer  # type: ignore[no-any-return]


class Halves(nn.Linear):
    """Two products with parts of one weight."""

    def forward(self, x: Tensor) -> Tensor:
        half = self.out_features // 2
        upper, lower = F.linear(x, self.weight[:half]), F.linear(x, self.weight[half:])
        return torch.cat([upper, lower], -1) + self.bias


KINDS = [Tripled, ByMatmul, Rectified, RectifiedByModule, GatedBias, Adapted, hooked, spectral, Halves]


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float)


@pytest.mark.parametrize("make", [apical.DirectFeedbackAlignment, apical.TopDownCreditAssignment])
@pytest.mark.parametrize("place", ["head", "hidden"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_error_passes_the_weight_of_such_a_layer(kind: Any, place: str, make: Any) -> None:
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
        for parameter in changed.parameters():
            if parameter.dim() > 1:
                parameter.normal_()
    torch.testing.assert_close(learned(), before, rtol=0, atol=1e-12)
    assert "merged" not in rule.placement(inputs).path("2")


class Tanh(torch.autograd.Function):
    """An activation whose own forward calls one of PyTorch's, where no graph is kept."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        """`tanh v`."""
        result = v.tanh()
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Tensor:
        """`(1 - tanh^2) delta`."""
        return delta * (1 - ctx.saved_tensors[0] ** 2)  # type: ignore[no-any-return]


class TanhModule(nn.Module):
    """The same as a module."""

    def forward(self, v: Tensor) -> Tensor:
        return Tanh.apply(v)  # type: ignore[no-any-return, no-untyped-call]


class Bare(nn.Module):
    """The function itself between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(Tanh.apply(self.b(torch.tanh(self.a(x)))))  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize("make", [apical.DirectFeedbackAlignment, apical.TopDownCreditAssignment])
@pytest.mark.parametrize(
    "model",
    [Bare, lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), TanhModule(), nn.Linear(6, 4))],
    ids=["bare", "module"],
)
def test_an_activation_called_in_a_functions_own_forward_is_no_end_of_a_unit(model: Any, make: Any) -> None:
    """Such models were refused as if they took another path at each call."""
    inputs, targets = torch.randn(7, 5), torch.arange(7) % 4
    rule = make(model())
    rule(inputs, targets).backward()
    assert all(parameter.grad is not None for parameter in rule.model.parameters())
    check_model(make(model()), inputs, targets, skip=("compiled",))
