"""Codes: what is known of their entropies and dimensions, and what of a model counts as a code."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from apical.diagnostics.coding import (
    activities,
    code_of,
    coding,
    covariance_spectrum,
    effective_rank,
    gaussian_entropy,
    marginal_entropy,
    participation_ratio,
)
from apical.errors import ConfigError


def rotation(n: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]


def test_gaussian_entropy_of_the_formula_and_rotations() -> None:
    torch.manual_seed(0)
    a = torch.randn(200, 6).double() @ torch.diag(torch.arange(1, 7).double())
    c = torch.from_numpy(np.cov(a.numpy().T, bias=True))
    c = c * 6 / c.trace()
    expected = 0.5 * torch.logdet(2 * math.pi * math.e * (c + 0.01 * torch.eye(6).double()))
    assert gaussian_entropy(covariance_spectrum(a)) == pytest.approx(float(expected), abs=1e-12)
    turned = a @ rotation(6)
    assert gaussian_entropy(covariance_spectrum(turned)) == pytest.approx(float(expected), abs=1e-12)
    assert gaussian_entropy(covariance_spectrum(3 * a)) == pytest.approx(float(expected), abs=1e-12)
    white = gaussian_entropy(torch.ones(6).double())
    assert white > gaussian_entropy(covariance_spectrum(a))
    for pair in itertools.combinations(range(6), 2):  # strictly the most at a fixed total variance
        spectrum = torch.ones(6).double()
        spectrum[list(pair)] += torch.tensor([1e-3, -1e-3]).double()
        assert gaussian_entropy(spectrum) < white - 1e-7


def test_dimensions_of_any_code_by_numpy() -> None:
    """lambda from the covariance, sigma from the centred activities themselves."""
    a = np.random.default_rng(3).standard_normal((50, 6)) * np.arange(1, 7) + 2
    lambdas = np.linalg.eigvals(np.cov(a.T, bias=True)).real
    sigmas = np.linalg.svd(a - a.mean(0), compute_uv=False)
    shares = sigmas / sigmas.sum()
    code = code_of(torch.from_numpy(a))
    assert np.sort(lambdas)[::-1] == pytest.approx(covariance_spectrum(torch.from_numpy(a)).numpy(), rel=0, abs=1e-12)
    assert code.participation_ratio == pytest.approx(sum(lambdas) ** 2 / sum(v * v for v in lambdas), abs=1e-12)
    assert code.effective_rank == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), abs=1e-12)
    assert code.participation_ratio < code.effective_rank < 6


@pytest.mark.parametrize("n", [1, 4])
def test_white_and_rank_one(n: int) -> None:
    torch.manual_seed(1)
    white = torch.linalg.qr(torch.randn(60, 4).double() - 0)[0]
    white = torch.linalg.qr(white - white.mean(0))[0]
    a = white[:, :1] @ torch.randn(1, 5).double() if n == 1 else white
    spectrum = covariance_spectrum(a)
    assert participation_ratio(spectrum) == pytest.approx(n, abs=1e-10)
    assert effective_rank(spectrum) == pytest.approx(n, abs=1e-5)  # sigma of a lambda that rounds to 1e-16 is 1e-8


def test_marginal_entropy_by_numpy() -> None:
    torch.manual_seed(2)
    a = torch.randn(300, 3).double()
    expected = 0.0
    for unit in a.T.numpy():
        shares = np.histogram(unit, 32)[0] / 300
        expected -= (shares[shares > 0] * np.log(shares[shares > 0])).sum()
    assert marginal_entropy(a) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("bins", [2, 32])
def test_marginals_bound_the_joint_entropy(bins: int) -> None:
    """Of the code in that quantisation; they are equal for one unit, and not where units say the same."""
    torch.manual_seed(4)
    a = torch.randn(300, 1).double() + 0.3 * torch.randn(300, 3).double()
    places = [np.digitize(unit, np.histogram_bin_edges(unit, bins)[1:-1]) for unit in a.T.numpy()]

    def joint(units: list[np.ndarray]) -> float:
        shares = np.unique(np.stack(units), axis=1, return_counts=True)[1] / 300
        return float(-(shares * np.log(shares)).sum())

    assert marginal_entropy(a, bins) > joint(places) + 0.1
    assert marginal_entropy(a[:, :1], bins) == pytest.approx(joint(places[:1]), abs=1e-12)
    assert marginal_entropy(a[:, [0, 0]], bins) == pytest.approx(2 * joint([places[0]] * 2), abs=1e-12)


def test_silent_units() -> None:
    assert code_of(torch.tensor([[0.0, 1, 5, 2], [0, 1, 6, 2]])).dead == 0.75
    code = code_of(torch.zeros(10, 3))
    assert (code.dead, code.participation_ratio, code.effective_rank, code.marginal_nats) == (1.0, 0.0, 0.0, 0.0)
    with pytest.raises(ConfigError, match="finite"):
        code_of(torch.full((4, 2), float("nan")))
    with pytest.raises(ConfigError, match="two samples"):
        code_of(torch.ones(1, 2))


def test_shared_activations_maps_and_modes() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), relu, nn.Flatten(), nn.Dropout(), nn.Linear(36, 5), relu)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = coding(model, torch.randn(6, 1, 5, 5))
    assert {name: code.units for name, code in found.items()} == {"2": 4, "2#2": 5, "output": 5}
    assert set(vars(found["2"])) >= {"gaussian_nats", "marginal_nats", "participation_ratio", "dead"}
    assert model.training
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert not any(module._forward_hooks for module in model.modules())


def test_hidden_states_of_recurrent_modules_and_attention() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.attend = nn.LSTM(3, 5, batch_first=True), nn.MultiheadAttention(5, 1, batch_first=True)
            self.relu, self.head = nn.ReLU(), nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h, _ = self.rnn(x)
            h, _ = self.attend(h, h, h)
            result: torch.Tensor = self.head(self.relu(h[:, -1]))
            return result

    model, x = Reader(), torch.randn(6, 4, 3)
    rows = activities(model, x)
    assert {name: tuple(each.shape) for name, each in rows.items()} == {
        "rnn": (24, 5),
        "attend": (24, 5),
        "relu": (6, 5),
        "output": (6, 2),
    }
    assert (rows["rnn"] - model.rnn(x)[0].reshape(-1, 5)).abs().max() < 1e-6
