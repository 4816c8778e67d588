"""Filters and noise: impulse responses and variances from the difference equations, checked exactly and by sampling."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apical.dynamics.filters import (
    high_pass,
    high_pass_variance,
    low_pass,
    low_pass_variance,
    ornstein_uhlenbeck,
    ornstein_uhlenbeck_step,
    ornstein_uhlenbeck_variance,
)
from apical.errors import ConfigError

COUNT = 100_000
FIVE_SIGMA = 5 * math.sqrt(2 / COUNT)
"""Relative error of a variance from COUNT normal numbers that one run in two million exceeds."""


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("rate", [0.02, 0.3, 1.0])
def test_impulse_response(rate: float) -> None:
    state, low, high = torch.zeros(()), [], []
    for t in range(30):
        x = torch.tensor(float(t == 0))
        state, rest = high_pass(state, x, rate)
        low.append(float(state))
        high.append(float(rest))
    assert low == pytest.approx([rate * (1 - rate) ** t for t in range(30)], abs=1e-15)
    assert high == pytest.approx([float(t == 0) - rate * (1 - rate) ** t for t in range(30)], abs=1e-15)


@pytest.mark.parametrize("rate", [0.05, 0.5, 1.0])
def test_variances_of_filtered_white_noise_are_sums_of_squared_responses(rate: float) -> None:
    low = [rate * (1 - rate) ** t for t in range(2000)]
    high = [float(t == 0) - g for t, g in enumerate(low)]
    assert low_pass_variance(rate) == pytest.approx(math.fsum(g * g for g in low), rel=1e-12)
    assert high_pass_variance(rate) == pytest.approx(math.fsum(g * g for g in high), rel=1e-12, abs=1e-15)


def test_variances_by_sampling() -> None:
    rate, generator = 0.2, seeded()
    state = torch.zeros(COUNT)
    for _ in range(60):
        state, rest = high_pass(state, torch.randn(COUNT, generator=generator), rate)
    assert float(state.var()) == pytest.approx(low_pass_variance(rate), rel=FIVE_SIGMA)
    assert float(rest.var()) == pytest.approx(high_pass_variance(rate), rel=FIVE_SIGMA)


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(0, 4), max_size=3), rate=st.floats(0, 1))
def test_filters_of_any_shape(shape: list[int], rate: float) -> None:
    state, x = torch.randn(shape), torch.randn(shape)
    kept = state.clone()
    low, high = high_pass(state, x, rate)
    assert torch.equal(state, kept)
    assert torch.equal(low, low_pass(state, x, rate))
    assert torch.allclose(low, (1 - rate) * state + rate * x, atol=1e-14)
    assert torch.allclose(low + high, x, atol=1e-14)


TIMES = [(0.001, 0.01), (0.02, 0.05), (0.1, 0.1)]


def response(dt: float, tau: float, sigma: float, steps: int) -> list[float]:
    """What one xi leaves 0, 1, 2... steps later, by the difference equation of the filtered noise."""
    eps, path = math.sqrt(dt) / tau, []
    for _ in range(steps):
        path.append(sigma * eps)
        eps = (1 - dt / tau) * eps
    return path


@pytest.mark.parametrize(("dt", "tau"), TIMES)
@pytest.mark.parametrize("steps", [1, 4, None])
def test_noise_variance_is_the_sum_of_squared_responses(dt: float, tau: float, steps: int | None) -> None:
    expected = math.fsum(g * g for g in response(dt, tau, 0.4, steps or 5000))
    assert ornstein_uhlenbeck_variance(dt, tau, 0.4, steps) == pytest.approx(expected, rel=1e-12)


def test_noise_variance_has_the_continuous_limit() -> None:
    assert ornstein_uhlenbeck_variance(0.0, 0.3, 0.2) == pytest.approx(0.2**2 / (2 * 0.3), rel=1e-14)
    assert ornstein_uhlenbeck_variance(1e-7, 0.3, 0.2) == pytest.approx(0.2**2 / (2 * 0.3), rel=1e-6)


@pytest.mark.parametrize(("dt", "tau"), TIMES)
@pytest.mark.parametrize("stationary", [False, True])
def test_noise_variance_by_sampling(dt: float, tau: float, stationary: bool) -> None:
    path = ornstein_uhlenbeck((COUNT,), 6, dt, tau, 0.4, seeded(), stationary=stationary)
    for t in range(6):
        expected = ornstein_uhlenbeck_variance(dt, tau, 0.4, None if stationary else t + 1)
        assert float(path[t].var()) == pytest.approx(expected, rel=FIVE_SIGMA)
    # one correlation for all lags: (1 - dt / tau)^lag, estimated with a standard error of at most 1 / sqrt(COUNT)
    if stationary:
        for lag in (1, 3):
            got = float(torch.corrcoef(torch.stack((path[0], path[lag])))[0, 1])
            assert got == pytest.approx((1 - dt / tau) ** lag, abs=5 / math.sqrt(COUNT))


def test_a_long_path_from_zero_becomes_stationary() -> None:
    path = ornstein_uhlenbeck((COUNT // 10,), 200, 0.02, 0.2, 0.7, seeded())
    assert float(path[-1].var()) == pytest.approx(
        ornstein_uhlenbeck_variance(0.02, 0.2, 0.7), rel=math.sqrt(10) * FIVE_SIGMA
    )


def compartment(fed: Tensor, xi: Tensor, dt: float, tau: float, sigma: float) -> list[Tensor]:
    """v_fb[t+1] = v_fb[t] + (dt/tau)(-v_fb[t] + Q u[t]) + sigma sqrt(dt)/tau xi, entry by entry."""
    v, path = torch.zeros_like(fed[0]), []
    for t in range(len(fed)):
        v = v.clone()
        for i in range(len(v)):
            v[i] += (dt / tau) * (-v[i] + fed[t][i]) + sigma * dt**0.5 / tau * xi[t][i]
        path.append(v)
    return path


@pytest.mark.parametrize(("dt", "tau"), TIMES)
def test_apical_compartment(dt: float, tau: float) -> None:
    fed, xi = torch.randn(8, 3), torch.randn(8, 3)
    v, noise = torch.zeros(3), torch.zeros(3)
    for t, expected in enumerate(compartment(fed, xi, dt, tau, 0.3)):
        v = ornstein_uhlenbeck_step(v, xi[t], dt=dt, tau=tau, sigma=0.3, drive=fed[t])
        assert torch.allclose(v, expected, atol=1e-13)
    for t, expected in enumerate(compartment(torch.zeros(8, 3), xi, dt, tau, 0.3)):
        noise = ornstein_uhlenbeck_step(noise, xi[t], dt=dt, tau=tau, sigma=0.3)
        assert torch.allclose(noise, expected, atol=1e-13)


def test_with_tau_of_one_step_the_compartment_is_instantaneous() -> None:
    v, fed, xi = torch.randn(5), torch.randn(5), torch.randn(5)
    got = ornstein_uhlenbeck_step(v, xi, dt=0.04, tau=0.04, sigma=0.3, drive=fed)
    assert torch.allclose(got, fed + 0.3 / 0.2 * xi, atol=1e-14)


@settings(max_examples=20, deadline=None)
@given(shape=st.lists(st.integers(0, 4), max_size=3), steps=st.integers(0, 6), stationary=st.booleans())
def test_paths_are_repeated_steps(shape: list[int], steps: int, stationary: bool) -> None:
    dt, tau, sigma = 0.03, 0.1, 0.6
    path = ornstein_uhlenbeck(shape, steps, dt, tau, sigma, seeded(3), stationary=stationary)
    assert path.shape == (steps, *shape)
    if steps:
        xi = torch.randn(steps, *shape, generator=seeded(3))
        start = sigma / math.sqrt(2 * tau - dt) * xi[0]
        state = start if stationary else ornstein_uhlenbeck_step(0 * xi[0], xi[0], dt=dt, tau=tau, sigma=sigma)
        assert torch.allclose(path[0], state, atol=1e-14)
        for t in range(1, steps):
            state = ornstein_uhlenbeck_step(state, xi[t], dt=dt, tau=tau, sigma=sigma)
            assert torch.allclose(path[t], state, atol=1e-13)


def test_generator_and_type() -> None:
    runs = [ornstein_uhlenbeck((20,), 3, 0.1, 0.5, 1.0, seeded(seed), dtype=torch.float) for seed in (1, 1, 2)]
    assert runs[0].dtype == torch.float
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_errors_name_what_is_wrong() -> None:
    x = torch.zeros(2)
    for rate in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="rate="):
            low_pass(x, x, rate)
    with pytest.raises(ConfigError, match=r"dt=0.2 .* tau=0.1; make dt smaller"):
        ornstein_uhlenbeck_step(x, x, dt=0.2, tau=0.1, sigma=1.0)
    with pytest.raises(ConfigError, match="dt=0"):
        ornstein_uhlenbeck((2,), 3, 0.0, 0.1, 1.0, seeded())
    with pytest.raises(ConfigError, match="sigma=-1"):
        ornstein_uhlenbeck((2,), 3, 0.1, 0.1, -1.0, seeded())
    with pytest.raises(ConfigError, match="steps=-1"):
        ornstein_uhlenbeck((2,), -1, 0.1, 0.1, 1.0, seeded())
    with pytest.raises(ConfigError, match="tau=0"):
        ornstein_uhlenbeck_variance(0.0, 0.0, 1.0)
    with pytest.raises(ConfigError, match="dt=0"):
        ornstein_uhlenbeck_variance(0.0, 0.1, 1.0, steps=4)
