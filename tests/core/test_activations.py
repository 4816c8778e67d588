"""Derivatives against autograd, differences against higher precision."""

import copy

import pytest
import torch
from torch import Tensor, nn

from apical.core.activations import TYPES, derivative, difference, plain

ELEMENTWISE = [
    kind for kind, known in TYPES.items() if known.elementwise and kind.__module__.startswith(("torch", "apical"))
]
MODULES = [kind(0.5, 0.1) if kind is nn.Threshold else kind() for kind in ELEMENTWISE]
MODULES += [nn.Identity(), nn.LeakyReLU(0.3), nn.Softplus(2.0, 5.0), nn.Hardtanh(-0.3, 0.7), nn.ELU(0.4), nn.GELU("tanh")]
EXACT = (nn.Identity(), nn.Tanh(), nn.Sigmoid(), nn.ReLU(), nn.LeakyReLU(0.3))
"""Those whose difference must not cancel."""


def by_name(module: nn.Module) -> str:
    return str(module)


def points() -> Tensor:
    """On both sides of every kink, and on the kinks."""
    return torch.cat([torch.linspace(-5, 5, 97), torch.tensor([0.0, 0.5, -0.5, 3.0, -3.0, 1.0, -1.0, 6.0])]).double()


@pytest.mark.parametrize("module", MODULES, ids=by_name)
def test_derivative_is_autograds(module: nn.Module) -> None:
    v = points().requires_grad_()
    expected = torch.autograd.grad(module(v).sum(), v)[0]
    with torch.no_grad():
        ours = derivative(module, v.detach(), module(v.detach()))
    assert ours.dtype == torch.double
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("step", [1e-9, 0.3, 3.0, 40.0])
@pytest.mark.parametrize("module", MODULES, ids=by_name)
def test_difference_is_the_difference(module: nn.Module, step: float) -> None:
    v = points()
    d = step * torch.linspace(-1, 1, len(v)).double()
    torch.testing.assert_close(difference(module, v, module(v), d), module(v + d) - module(v), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("step", [1e-8, 1e-3, 0.7, 5.0])
@pytest.mark.parametrize("module", EXACT, ids=by_name)
def test_differences_keep_the_digits_of_float32(module: nn.Module, step: float) -> None:
    """Against float64 at the same float32 numbers; beyond 2 the slope of tanh itself has lost its digits."""
    generator = torch.Generator().manual_seed(0)
    v = 4 * torch.rand(500, generator=generator) - 2
    d = step * (torch.rand(500, generator=generator) - 0.5)
    ours = difference(module, v, module(v), d)
    assert ours.dtype == torch.float32
    wide = v.double()
    if isinstance(module, nn.Tanh | nn.Sigmoid):  # the identity in float64 is exact enough to judge float32 by
        half = 1.0 if isinstance(module, nn.Tanh) else 0.5
        exact = half * torch.sinh(half * d.double()) / (torch.cosh(half * wide) * torch.cosh(half * (wide + d)))
    else:
        exact = module(wide + d) - module(wide)
    torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=1e-12 * step)


def test_plain_differences_would_lose_them() -> None:
    v, d = torch.full((1,), 0.7), torch.full((1,), 1e-6)
    exact = float(1e-6 / torch.cosh(torch.tensor(0.7, dtype=torch.double)) ** 2)
    assert abs(float(torch.tanh(v + d) - torch.tanh(v)) / exact - 1) > 1e-3
    assert abs(float(difference(nn.Tanh(), v, torch.tanh(v), d)) / exact - 1) < 1e-5


@pytest.mark.parametrize("module", [nn.ReLU(), nn.LeakyReLU(0.3), nn.ELU(), nn.SiLU(), nn.Hardtanh()], ids=by_name)
def test_in_place_activations_leave_their_arguments(module: nn.Module) -> None:
    inplace = copy.copy(module)
    inplace.inplace = True
    v = points()
    r, d = module(v), 0.1 * torch.ones_like(v)
    assert torch.equal(derivative(inplace, v, r), derivative(module, v, r))
    assert torch.equal(difference(inplace, v, r, d), difference(module, v, r, d))
    assert torch.equal(v, points())
    assert inplace.inplace
    assert not plain(inplace).inplace
    assert plain(module) is module


def test_nan_stays_nan() -> None:
    v, d = torch.zeros(2), torch.tensor([float("nan"), 0.1])
    for module in EXACT:
        assert bool(difference(module, v, module(v), d)[0].isnan())


def test_empty_tensors() -> None:
    nothing = torch.zeros(0)
    assert difference(nn.Tanh(), nothing, nothing, nothing).shape == (0,)
