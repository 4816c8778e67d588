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
MODULES += [nn.CELU(0.6), nn.Softshrink(0.2)]
KINKS = torch.tensor([0.0, 0.2, -0.2, 0.5, -0.5, 0.7, -0.3, 1.0, -1.0, 2.0, 2.5, 3.0, -3.0, 6.0], dtype=torch.double)


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
    torch.testing.assert_close(
        difference(module, v, module(v), d), module(v + d) - module(v), rtol=1e-9, atol=4e-15
    )  # of which the plain one is no surer


def exact_difference(module: nn.Module, v: Tensor, d: Tensor) -> Tensor:
    """In float64: plain where d is large, else the integral of autograd's derivative, in which nothing cancels."""
    if d.abs().max() > 0.1:
        return module(v + d) - module(v)
    total = torch.zeros_like(v)
    nodes, weights = (torch.tensor(each).double() for each in ([-(0.6**0.5), 0.0, 0.6**0.5], [5 / 18, 8 / 18, 5 / 18]))
    for node, weight in zip(nodes, weights, strict=True):
        at = (v + (1 + node) / 2 * d).requires_grad_()
        total = total + weight * torch.autograd.grad(module(at).sum(), at)[0]
    return total * d


@pytest.mark.parametrize("step", [1e-8, 1e-5, 2e-3, 0.7, 5.0])
@pytest.mark.parametrize("module", MODULES, ids=by_name)
def test_differences_keep_the_digits_of_float32(module: nn.Module, step: float) -> None:
    """Against float64 at the same float32 numbers; a slope near zero has the digits of the terms that it is made of."""
    generator = torch.Generator().manual_seed(0)
    v = 8 * torch.rand(2000, generator=generator) - 4
    if step < 0.1:  # no kink within a step
        v = v[((v.double()[:, None] - KINKS).abs() > 1.1 * step).all(1)]
    d = step * (2 * torch.rand(len(v), generator=generator) - 1)
    ours = difference(module, v, module(v), d)
    assert ours.dtype == torch.float32
    exact = exact_difference(module, v.double(), d.double())
    error = (ours.double() - exact).abs() / (exact.abs() + 1e-3 * d.double().abs() + 1e-30)
    assert error.max() < 4e-4


def test_an_activation_without_an_identity_is_evaluated_in_float64() -> None:
    class Bent(nn.Module):
        def forward(self, v: Tensor) -> Tensor:
            return v.sin() + v

    v, d = torch.linspace(-2, 2, 50), torch.full((50,), 1e-6)
    ours = difference(Bent(), v, Bent()(v), d)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), d.double() * (v.double().cos() + 1), rtol=1e-6, atol=1e-12)


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
    for module in MODULES:
        assert bool(difference(module, v, module(v), d)[0].isnan())


def test_empty_tensors() -> None:
    nothing = torch.zeros(0)
    assert difference(nn.Tanh(), nothing, nothing, nothing).shape == (0,)
