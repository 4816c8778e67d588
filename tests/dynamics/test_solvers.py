"""Solvers: measured orders of convergence, exact solutions, torchdiffeq as an independent oracle, noise."""

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apical.dynamics.solvers import METHODS, euler_maruyama, integrate
from apical.errors import ConfigError


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float)


def swing(t: float, y: Tensor) -> Tensor:
    """y' = y cos t, whose solution is y0 exp(sin t)."""
    return y * math.cos(t)


def recurrent(t: float | Tensor, y: Tensor) -> Tensor:
    """A nonlinear network with an input that changes in time."""
    n = y.shape[-1]
    weight = torch.linspace(-1.3, 1.1, n * n).reshape(n, n).sin() * 1.5
    drive = torch.sin(torch.as_tensor(t) + torch.arange(n))
    return -y + torch.tanh(y) @ weight.T + drive


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_order_of_convergence(method: str, order: int) -> None:
    y0 = torch.tensor([0.5, 1.0, 2.0])
    exact = y0 * math.exp(math.sin(2.0))
    errors = [float((integrate(swing, y0, 2.0 / n, n, method) - exact).abs().max()) for n in (80, 160, 320)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


def textbook_rk4(f: Callable[[float, float], float], y: float, dt: float, steps: int) -> float:
    for step in range(steps):
        t = step * dt
        a = dt * f(t, y)
        b = dt * f(t + dt / 2, y + a / 2)
        c = dt * f(t + dt / 2, y + b / 2)
        d = dt * f(t + dt, y + c)
        y += (a + 2 * b + 2 * c + d) / 6
    return y


def test_rk4_is_the_classical_one() -> None:
    expected = textbook_rk4(lambda t, y: math.sin(y * y - t), 0.3, 0.25, 12)
    got = integrate(lambda t, y: torch.sin(y * y - t), torch.tensor([0.3]), 0.25, 12, "rk4")
    assert float(got) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(("ours", "theirs"), [("euler", "euler"), ("heun", "heun2")])
def test_nonlinear_trajectory_agrees_with_torchdiffeq(ours: str, theirs: str) -> None:
    y0, times = torch.randn(3, 5), torch.arange(41) * 0.05
    expected = torchdiffeq.odeint(lambda t, y: recurrent(t, y), y0, times, method=theirs)
    assert (integrate(recurrent, y0, 0.05, 40, ours, save=True) - expected).abs().max() < 1e-12


def test_rk4_agrees_with_torchdiffeq() -> None:
    # torchdiffeq's "rk4" is the 3/8 rule: the same polynomial of a linear f, another one of order 4 of any other
    matrix, y0, times = torch.randn(5, 5), torch.randn(3, 5), torch.arange(41) * 0.05
    linear = torchdiffeq.odeint(lambda t, y: y @ matrix.T, y0, times, method="rk4")
    assert (integrate(lambda t, y: y @ matrix.T, y0, 0.05, 40, "rk4", save=True) - linear).abs().max() < 1e-12
    times = torch.arange(1001) * 0.002
    other = torchdiffeq.odeint(lambda t, y: recurrent(t, y), y0, times, method="rk4")
    assert (integrate(recurrent, y0, 0.002, 1000, "rk4", save=True) - other).abs().max() < 1e-11


@pytest.mark.parametrize(("method", "steps"), [("rk4", 200), ("heun", 8000)])
def test_agrees_with_an_adaptive_solver(method: str, steps: int) -> None:
    y0 = torch.randn(3, 5)
    ends = torch.tensor([0.0, 4.0])
    expected = torchdiffeq.odeint(lambda t, y: recurrent(t, y), y0, ends, method="dopri5", rtol=1e-10, atol=1e-12)[-1]
    assert (integrate(recurrent, y0, 4.0 / steps, steps, method) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_tuple_states_are_the_tensors_side_by_side(method: str) -> None:
    u, v = torch.randn(3, 2), torch.randn(3, 3)

    def parts(t: float, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        slope = recurrent(t, torch.cat(y, 1))
        return slope[:, :2], slope[:, 2:]

    whole = integrate(recurrent, torch.cat((u, v), 1), 0.1, 7, method, save=True)
    split = integrate(parts, (u, v), 0.1, 7, method, save=True)
    assert [part.shape for part in split] == [(8, 3, 2), (8, 3, 3)]
    assert torch.equal(torch.cat(split, 2), whole)
    assert torch.equal(integrate(recurrent, whole[0], 0.1, 7, method), whole[-1])


def test_map_applies_the_update() -> None:
    y = torch.rand(4)
    path = integrate(lambda t, y: torch.cos(y) * t, y, 0.5, 3, "map", save=True, t0=2.0)
    for step in range(3):
        assert torch.equal(path[step + 1], torch.cos(path[step]) * (2.0 + 0.5 * step))


def test_gradient_flows() -> None:
    rate = torch.tensor(-0.7, requires_grad=True)
    end = integrate(lambda t, y: rate * y, torch.ones(1), 0.1, 6)
    (gradient,) = torch.autograd.grad(end.sum(), rate)
    assert float(gradient) == pytest.approx(6 * 0.1 * (1 - 0.07) ** 5, rel=1e-13)  # d/da (1 + a dt)^6


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), max_size=4), steps=st.integers(0, 5), method=st.sampled_from(["euler", "heun", "rk4"])
)
def test_any_shape(shape: list[int], steps: int, method: str) -> None:
    y0 = torch.full(shape, 2.0)
    path = integrate(lambda t, y: torch.full_like(y, 3.0), y0, 0.5, steps, method, save=True)
    assert path.shape == (steps + 1, *shape)
    ramp = 2.0 + 1.5 * torch.arange(steps + 1.0).reshape(-1, *[1] * len(shape))
    assert torch.allclose(path, ramp.expand_as(path), atol=1e-12)


def test_errors_name_what_is_wrong() -> None:
    y = torch.ones(3, 1)
    with pytest.raises(ConfigError, match="'eular'; did you mean 'euler'"):
        integrate(swing, y, 0.1, 3, "eular")
    for dt in (0.0, -0.1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="dt="):
            integrate(swing, y, dt, 3)
    with pytest.raises(ConfigError, match="steps=-1"):
        integrate(swing, y, 0.1, -1)
    with pytest.raises(ConfigError, match=r"\[\(3,\)\] for a state of shapes \[\(3, 1\)\]"):
        integrate(lambda t, y: y.sum(1), y, 0.1, 3)  # would broadcast to (3, 3)


def test_drawn_noise_adds_up() -> None:
    u, v = torch.randn(2, 3), torch.randn(4)
    xi = (torch.randn(6, 2, 3), torch.randn(6, 4))
    strength = torch.tensor([0.0, 1.0, 2.0])
    still = lambda t, y: tuple(torch.zeros_like(part) for part in y)  # noqa: E731
    walk = euler_maruyama(still, (strength, 0.3), (u, v), 0.04, 6, noise=xi, save=True)
    assert torch.allclose(walk[0][1:], u + strength * 0.2 * xi[0].cumsum(0), atol=1e-13)
    assert torch.allclose(walk[1][1:], v + 0.3 * 0.2 * xi[1].cumsum(0), atol=1e-13)
    assert torch.equal(walk[0][0], u)


def test_without_noise_it_is_euler() -> None:
    y0 = torch.randn(3, 5)
    quiet = euler_maruyama(recurrent, 0.0, y0, 0.05, 20, generator=torch.Generator(), t0=1.0)
    assert torch.equal(quiet, integrate(recurrent, y0, 0.05, 20, t0=1.0))


def test_generator_decides() -> None:
    y0 = torch.zeros(50)
    runs = [
        euler_maruyama(lambda t, y: -y, 1.0, y0, 0.1, 5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_stationary_variance() -> None:
    """dy = -a y dt + s dW becomes y[t+1] = (1 - a dt) y[t] + s sqrt(dt) xi, of variance s^2 dt / (1 - (1 - a dt)^2)."""
    a, s, dt, count = 2.0, 0.7, 0.1, 100_000
    y = euler_maruyama(lambda t, y: -a * y, s, torch.zeros(count), dt, 60, generator=torch.Generator().manual_seed(0))
    expected = s * s * dt / (1 - (1 - a * dt) ** 2)
    assert float(y.var()) == pytest.approx(expected, rel=5 * math.sqrt(2 / count))
    assert abs(float(y.mean())) < 5 * math.sqrt(expected / count)


def test_noise_errors() -> None:
    y, generator = torch.zeros(2, 3), torch.Generator()
    with pytest.raises(ConfigError, match="either a generator or noise"):
        euler_maruyama(swing, 1.0, y, 0.1, 4)
    with pytest.raises(ConfigError, match="not both"):
        euler_maruyama(swing, 1.0, y, 0.1, 4, generator=generator, noise=torch.zeros(4, 2, 3))
    with pytest.raises(ConfigError, match=r"noise of shape \[\(5, 2, 3\)\] does not fit 4 steps"):
        euler_maruyama(swing, 1.0, y, 0.1, 4, noise=torch.zeros(5, 2, 3))
    with pytest.raises(ConfigError, match="sigma has 2 entries"):
        euler_maruyama(swing, (1.0, 2.0), y, 0.1, 4, generator=generator)
