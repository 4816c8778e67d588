"""Initialisers for deep networks: orthogonal, critical by quadrature and by sampling, ReLU networks that are linear."""

import math
from collections.abc import Callable

import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from torch import nn

from apical import models
from apical.core.mean_field import Phi, critical, fixed_point, moments
from apical.errors import ConfigError, UnsupportedModelError


@pytest.mark.parametrize(
    ("s_w2", "s_b2", "q", "chi"), [(1.05, 2.01e-5, 0.0259, 1.000), (1.5, 0.05, 0.418, 0.939), (2.0, 0.1, 0.815, 1.003)]
)
def test_known_fixed_points_of_tanh(s_w2: float, s_b2: float, q: float, chi: float) -> None:
    found = fixed_point(torch.tanh, s_w2, s_b2)
    assert found == pytest.approx(q, rel=3e-3)
    assert s_w2 * moments(torch.tanh, found)[1] == pytest.approx(chi, abs=1e-3)


@pytest.mark.parametrize("phi", [torch.tanh, torch.erf, nn.ELU(), nn.ReLU(), nn.LeakyReLU(0.2), nn.LeakyReLU(-1.0)])
def test_chi_is_one_at_the_solution(phi: nn.Module) -> None:
    s_w, s_b = critical(phi, 0.05)
    q = fixed_point(phi, s_w**2, s_b**2) if s_b else 1.0
    assert s_w**2 * moments(phi, q)[1] == pytest.approx(1, abs=1e-8)


def tanh_moments(q: float) -> tuple[float, float]:
    """E[tanh(sqrt(q) z)^2] and E[tanh'(sqrt(q) z)^2] by adaptive quadrature."""

    def mean(f: Callable[[float], float]) -> float:
        def density(z: float) -> float:
            return f(math.sqrt(q) * z) * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

        return float(quad(density, -12, 12, epsabs=1e-14, epsrel=1e-13)[0])

    return mean(lambda v: math.tanh(v) ** 2), mean(lambda v: math.cosh(v) ** -4)


def erf_moments(q: float) -> tuple[float, float]:
    """In closed form."""
    return 2 / math.pi * math.asin(2 * q / (1 + 2 * q)), 4 / math.pi / math.sqrt(1 + 4 * q)


@pytest.mark.parametrize(("s_b", "far"), [(0.05, 1e-8), (0.3, 1e-7)])  # 60 nodes are less exact for a wider spread
@pytest.mark.parametrize(("phi", "exact"), [(torch.tanh, tanh_moments), (torch.erf, erf_moments)])
def test_critical_without_our_quadrature(
    phi: Phi, exact: Callable[[float], tuple[float, float]], s_b: float, far: float
) -> None:
    s_w, found = critical(phi, s_b)
    assert found == s_b
    q = brentq(lambda q: s_w**2 * exact(q)[0] + s_b**2 - q, 1e-6, 10, xtol=1e-14, rtol=1e-14)
    assert s_w**2 * exact(q)[1] == pytest.approx(1, abs=far)
    assert fixed_point(phi, s_w**2, s_b**2) == pytest.approx(q, abs=far)


def test_critical_draws_of_that_scale() -> None:
    """Deviation s_w over the root of a layer's own fan-in, and that of the biases: within 1.5 % and 3 % of large samples."""
    s_w, s_b = critical(torch.tanh, 0.2)
    model = nn.Sequential(nn.Linear(8, 20_000), nn.Tanh(), nn.Conv2d(3, 20_000, 2)).double()
    torch.manual_seed(3)
    models.critical_(model, 0.2)
    for layer, fan_in in ((model[0], 8), (model[2], 12)):
        assert layer.weight.square().mean().sqrt().item() == pytest.approx(s_w / fan_in**0.5, rel=0.015)
        assert layer.bias.square().mean().sqrt().item() == pytest.approx(s_b, rel=0.03)
        # normal: E x^4 = 3 (E x^2)^2, against 1.8 of uniform ones
        assert (layer.weight**4).mean().item() == pytest.approx(3 * (s_w**2 / fan_in) ** 2, rel=0.06)
    models.critical_(piecewise := nn.Sequential(nn.Linear(8, 20_000), nn.ReLU()).double(), 0.2)
    assert piecewise[0].weight.square().mean().sqrt().item() == pytest.approx((2 / 8) ** 0.5, rel=0.015)
    assert not piecewise[0].bias.any()


def test_piecewise_linear_ones_in_closed_form() -> None:
    assert critical(nn.ReLU(), 0.1) == pytest.approx((math.sqrt(2), 0))
    assert critical(nn.LeakyReLU(-1.0), 0.1) == pytest.approx((1, 0))
    assert critical(nn.LeakyReLU(0.2), 0.1)[0] == pytest.approx(math.sqrt(2 / 1.04))
    with pytest.raises(ConfigError, match="constant"):
        critical(lambda v: 0 * v, 0.1)
    with pytest.raises(ConfigError, match="does not settle"):
        fixed_point(nn.ReLU(), 3.0, 0.1)


def test_errors_keep_their_length_at_criticality() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(20) for m in (nn.Linear(400, 400), nn.Tanh())))
    models.critical_(model, 0.05)
    x = torch.randn(8, 400).requires_grad_()
    first = model[:2](x)
    (error,) = torch.autograd.grad(model[2:](first), first, torch.ones(8, 400))
    assert 0.3 < float(error.norm()) / 8**0.5 / 20 < 3  # 400^(1/2) = 20


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9)])
def test_orthogonal(shape: tuple[int, int]) -> None:
    layer = models.orthogonal_(nn.Linear(shape[1], shape[0]).double(), 1.5)
    values = torch.linalg.svdvals(layer.weight)
    assert (values - 1.5).abs().max() < 1e-12
    assert not layer.bias.any()


def test_looks_linear_is_the_product() -> None:
    torch.manual_seed(1)
    model = models.mlp(6, [8, 12, 10], 3).double()
    models.looks_linear_(model)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    product = torch.eye(6).double()
    for place, layer in enumerate(layers):
        w = layer.weight
        h = w[: len(w) // 2] if place < 3 else w
        h = h[:, : h.shape[1] // 2] if place else h
        product = h @ product
        values = torch.linalg.svdvals(h)
        assert (values - 1).abs().max() < 1e-12
    x = torch.randn(5, 6).double()
    assert (model(x) - x @ product.T).abs().max() < 5e-15


def test_looks_linear_with_convolutions() -> None:
    torch.manual_seed(2)
    layers = (nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2))
    model = models.looks_linear_(nn.Sequential(*layers).double())
    x, y = torch.randn(2, 3, 1, 6, 6).double()
    assert (model(2 * x - y) - (2 * model(x) - model(y))).abs().max() < 1e-14
    assert model(x).abs().max() > 0.1


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), "layer '0' has 3; give it an even number"),
        (nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)), "this one has Tanh"),
        (nn.Linear(2, 4), "it has none that is a module"),
        (nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh()), r"'1' \(ReLU\(\)\), '3' \(Tanh\(\)\)"),
    ],
)
def test_refused_by_name(model: nn.Module, said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        models.looks_linear_(model)
