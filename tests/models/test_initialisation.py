"""Initialisers for deep networks: orthogonal, critical by quadrature and by sampling, ReLU networks that are linear."""

import math

import pytest
import torch
from torch import nn

from apical import models
from apical.core.mean_field import critical, fixed_point, moments
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
    assert (model(x) - x @ product.T).abs().max() < 1e-14


def test_looks_linear_with_convolutions() -> None:
    torch.manual_seed(2)
    layers = (nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2))
    model = models.looks_linear_(nn.Sequential(*layers).double())
    x, y = torch.randn(2, 3, 1, 6, 6).double()
    assert torch.allclose(model(2 * x - y), 2 * model(x) - model(y), atol=1e-14)


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
