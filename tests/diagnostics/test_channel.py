"""A network as a channel: its formulas step by step, the bound that is provable, and the table of the pilot."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from apical import models
from apical.diagnostics.channel import capacity, channel, information, jacobians, within_budget
from apical.errors import ConfigError


def tanh_network(gain: float, orthogonal: bool, seed: int, depth: int = 10, width: int = 32) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(width, width, bias=False), nn.Tanh())))
    for layer in model[::2]:
        if orthogonal:
            nn.init.orthogonal_(layer.weight, gain)
        else:
            nn.init.normal_(layer.weight, std=gain / width**0.5)
    return model


@pytest.mark.parametrize("is_white", [True, False])
def test_jacobian_and_noise_step_by_step(is_white: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, noise, root = torch.randn(3, 4).double(), 0.2, torch.randn(4, 4).double()
    covariance = None if is_white else root @ root.T
    s = torch.eye(4).double() if covariance is None else covariance
    nats, at_the_end, values, squares = [], [], [], []
    for sample in x:
        j, n = torch.eye(4).double(), torch.zeros(4, 4).double()
        h, slope = sample, torch.ones(4).double()
        for layer in model[::2]:  # the noise of a layer's output passes its activation and the layers above
            d = layer.weight * slope
            j, n = d @ j, d @ n @ d.T + noise**2 * torch.eye(len(layer.weight)).double()
            v = layer(h)
            h, slope = v.tanh(), 1 - v.tanh() ** 2
        expected = torch.autograd.functional.jacobian(model, sample)
        assert (j - expected).abs().max() < 1e-14
        nats.append(0.5 * torch.logdet(torch.eye(3).double() + torch.linalg.solve(n, j @ s @ j.T)))
        budget = j * (3 / j.square().sum()).sqrt()
        at_the_end.append(0.5 * torch.logdet(torch.eye(3).double() + budget @ s @ budget.T / noise**2))
        values.append(np.linalg.svd(expected.numpy(), compute_uv=False))
        squares.append(float((expected @ expected.T).trace()) / 3)
    found = channel(model, x, noise, "every", covariance)
    assert found.nats == pytest.approx(float(torch.stack(nats).mean().detach()), abs=1e-12)
    assert found.nats < found.bound
    end = channel(model, x, noise, "end", covariance)
    assert end.nats == pytest.approx(float(torch.stack(at_the_end).mean().detach()), abs=1e-12)
    assert end.nats < end.bound == pytest.approx(1.5 * math.log1p(float(torch.linalg.eigvalsh(s)[-1]) / noise**2), abs=1e-12)
    for report in (found, end):
        assert report.largest == pytest.approx(np.mean([v[0] for v in values]), abs=1e-14)
        assert report.smallest == pytest.approx(np.mean([v[-1] for v in values]), abs=1e-14)
        assert report.log10_condition == pytest.approx(np.mean([math.log10(v[0] / v[-1]) for v in values]), abs=1e-12)
        assert report.mean_square == pytest.approx(np.mean(squares), abs=1e-14)
    inner = jacobians(model, x)[1]
    assert [layer.shape[1:] for layer in inner] == [(3, 5), (3, 6)]


def test_the_bound_for_a_power_budget() -> None:
    torch.manual_seed(1)
    noise = torch.eye(8).double()
    bound = capacity(8, 1.0)
    assert bound == pytest.approx(4 * math.log(2))
    orthogonal = torch.linalg.qr(torch.randn(8, 8).double())[0]
    assert float(information(orthogonal, None, noise)) == pytest.approx(bound, abs=1e-12)
    drawn = [float(information(within_budget(torch.randn(8, 8).double()), None, noise)) for _ in range(20)]
    assert max(drawn) < bound - 0.1
    singular = torch.rand(8).double()
    by_hand = 0.5 * torch.log1p(within_budget(singular.diag()).diagonal() ** 2).sum()
    assert float(information(within_budget(singular.diag()), None, noise)) == pytest.approx(float(by_hand), abs=1e-12)


def test_information_does_not_depend_on_the_basis() -> None:
    torch.manual_seed(2)
    j, n = torch.randn(4, 6).double(), torch.eye(4).double()
    u, v = (torch.linalg.qr(torch.randn(k, k).double())[0] for k in (4, 6))
    assert float(information(u @ j @ v, None, n)) == pytest.approx(float(information(j, None, n)), abs=1e-13)
    s = torch.randn(6, 6).double()
    s = s @ s.T
    expected = 0.5 * torch.logdet(n + j @ s @ j.T)
    assert float(information(j, s, n)) == pytest.approx(float(expected), abs=1e-12)


def test_an_input_of_more_variance_has_a_higher_bound() -> None:
    """Of the power budget: `n/2 log(1 + lambda/s^2)` with the largest variance lambda, reached where all have it."""
    torch.manual_seed(3)
    model = nn.Identity()
    x, one = torch.randn(2, 4), torch.eye(4)
    found = channel(model, x, 0.5, covariance=9 * one)
    assert found.nats == pytest.approx(found.bound, abs=1e-12)
    assert found.bound == pytest.approx(2 * math.log1p(9 / 0.25), abs=1e-12)
    favoured = channel(nn.Linear(4, 1), x, 0.5, covariance=torch.diag(torch.tensor([1.0, 1, 1, 50])))
    assert favoured.nats <= favoured.bound


@pytest.mark.parametrize("s_w2", [1.5, 3.0])
def test_the_mean_square_is_chi_to_the_depth(s_w2: float) -> None:
    """A wide ReLU network, whose chi is s_w^2 / 2; the read-out has no ReLU, and twice that."""
    torch.manual_seed(4)
    width, depth = 200, 6
    model = nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(width, width, bias=False), nn.ReLU())))[:-1]
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=(s_w2 / width) ** 0.5)
    found = channel(model, torch.randn(4, width))
    assert found.mean_square == pytest.approx(2 * (s_w2 / 2) ** depth, rel=0.2)


@pytest.mark.parametrize("seed", range(3))
def test_orthogonal_above_gaussian_at_every_gain(seed: int) -> None:
    inputs = torch.randn(6, 32, generator=torch.Generator().manual_seed(9))
    for gain in (0.8, 1.0, 1.2, 1.5, 2.0):
        for where in ("every", "end"):
            one, other = (channel(tanh_network(gain, kind, seed), inputs, where=where).nats for kind in (True, False))
            assert one > other


def test_with_a_budget_information_falls_as_the_condition_grows() -> None:
    inputs = torch.randn(6, 32, generator=torch.Generator().manual_seed(9))
    found = [channel(tanh_network(gain, True, 0), inputs) for gain in (0.5, 0.8, 1.0, 1.2, 1.5, 2.0)]
    assert [row.nats for row in found] == sorted((row.nats for row in found), reverse=True)
    assert [row.log10_condition for row in found] == sorted(row.log10_condition for row in found)


def test_an_isometry() -> None:
    model = models.orthogonal_(nn.Sequential(*(nn.Linear(8, 8) for _ in range(20)))).double()
    models.orthogonal_(model)
    found = channel(model, torch.randn(2, 8))
    assert found.largest == pytest.approx(1, abs=1e-12)
    assert found.smallest == pytest.approx(1, abs=1e-12)
    assert found.nats == pytest.approx(found.bound, abs=1e-10)


def test_a_direction_that_does_not_pass_is_zero_and_no_rounding() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 6))
    found = channel(model, torch.randn(2, 6))
    assert found.smallest == 0
    assert found.log10_condition == math.inf


def test_models_with_skips_norms_and_activations_in_place() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.relu, self.last = (
                nn.Linear(4, 4),
                nn.BatchNorm1d(4),
                nn.ReLU(inplace=True),
                nn.Linear(4, 2),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.relu(self.norm(self.first(x))) + x)

    model = Net()
    x = torch.randn(3, 4)
    whole, _ = jacobians(model, x)
    twin = Net().double().eval()
    twin.load_state_dict(model.state_dict())
    expected = torch.autograd.functional.jacobian(lambda v: twin(v[None])[0], x[1].double())
    assert (whole[1] - expected).abs().max() < 1e-14
    assert model.training
    assert model.first.weight.dtype == torch.float32


def test_bad_input() -> None:
    for arguments in ({"noise": 0.0}, {"where": "start"}):
        with pytest.raises(ConfigError, match="noise above 0"):
            channel(nn.Linear(2, 2), torch.randn(2, 2), **arguments)
    with pytest.raises(ConfigError, match="indices"):
        channel(nn.Embedding(3, 2), torch.tensor([1, 2]))
