"""Settling: the same fixed points as a long integration, each sample on its own, and what happens if there is none."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apical.dynamics.solvers import integrate, settle
from apical.errors import ConfigError, InstabilityError


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float)


WEIGHT = torch.linspace(-1.0, 1.0, 36, dtype=torch.double).reshape(6, 6).mul(9).sin() * 0.2


def network(t: float, v: Tensor, drive: Tensor, rate: Tensor) -> Tensor:
    """rate (-v + W tanh(v) + drive): the norm of W is below 1, so a sample has one fixed point, reached in time 1/rate."""
    return rate[:, None] * (-v + torch.tanh(v) @ WEIGHT.T + drive)


def problem(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """State, drive and rate: samples that differ in speed by a factor of 20, in no order."""
    rate = torch.logspace(-1, math.log10(2.0), batch)
    return torch.randn(batch, 6), torch.randn(batch, 6), torch.cat((rate[::2], rate[1::2].flip(0)))


def test_the_network_has_one_fixed_point() -> None:
    assert torch.linalg.matrix_norm(WEIGHT, 2) < 1


@pytest.mark.parametrize(("method", "dt"), [("euler", 0.4), ("heun", 0.5), ("rk4", 0.8)])
def test_is_a_long_integration(method: str, dt: float) -> None:
    v0, drive, rate = problem(7)
    settled = settle(network, v0, dt, 1e-13, 4000, method, per_sample=(drive, rate))
    assert settled.converged.all()
    expected = integrate(lambda t, v: network(t, v, drive, rate), v0, dt, 2000, method)
    assert (settled.state - expected).abs().max() < 1e-11


def test_linear_fixed_point() -> None:
    matrix, drive = torch.eye(5) + 0.2 * torch.randn(5, 5), torch.randn(4, 5)
    settled = settle(lambda t, y, b: b - y @ matrix.T, torch.zeros(4, 5), 0.3, 1e-13, 2000, per_sample=(drive,))
    assert (settled.state - torch.linalg.solve(matrix, drive.T).T).abs().max() < 1e-11


@pytest.mark.parametrize("method", ["euler", "heun", "rk4", "map"])
def test_each_sample_stops_by_itself(method: str) -> None:
    v0, drive, rate = problem(9)

    def f(t: float, v: Tensor, drive: Tensor, rate: Tensor) -> Tensor:
        slope = network(t, v, drive, rate)
        return v + 0.3 * slope if method == "map" else slope

    together = settle(f, v0, 0.3, 1e-6, 3000, method, per_sample=(drive, rate))
    assert len(together.steps.unique()) > 4  # the speeds differ, so must the times
    for b in range(9):
        rows = slice(b, b + 1)
        alone = settle(f, v0[rows], 0.3, 1e-6, 3000, method, per_sample=(drive[rows], rate[rows]))
        assert int(alone.steps) == int(together.steps[b])
        assert (alone.state - together.state[rows]).abs().max() < 1e-13
        length = int(together.steps[b])
        assert length % 10 == 0
        path = integrate(lambda t, v, rows=rows: f(t, v, drive[rows], rate[rows]), v0[rows], 0.3, length, method)
        assert (path - together.state[rows]).abs().max() < 1e-13


@pytest.mark.parametrize("every", [1, 7])
def test_steps_and_residuals_are_those_of_the_closed_form(every: int) -> None:
    """y' = k (c - y) from 0 in Euler steps: y_n = c (1 - q^n), q = 1 - k dt; so the residual is k q^n / (1 - q^n)."""
    dt, tolerance = 0.1, 1e-4
    k, c = torch.tensor([3.0, 0.5, 6.0, 1.0]), torch.tensor([-1e-3, 2.0, 70.0, 1.0])
    settled = settle(lambda t, y, k, c: k * (c - y), torch.zeros(4), dt, tolerance, 10_000, per_sample=(k, c), every=every)
    for b in range(4):
        q = 1 - float(k[b]) * dt
        n = every
        while float(k[b]) * q**n / (1 - q**n) > tolerance:
            n += every
        assert int(settled.steps[b]) == n
        assert float(settled.residual[b]) == pytest.approx(float(k[b]) * q**n / (1 - q**n), rel=1e-9)
        assert float(settled.state[b]) == pytest.approx(float(c[b]) * (1 - q**n), rel=1e-12)


def test_a_map_counts_its_change_per_time() -> None:
    """The Euler step written as an update stops when and where the Euler method does, with the same residual."""
    v0, drive, rate = problem(5)
    euler = settle(network, v0, 0.3, 1e-6, 3000, per_sample=(drive, rate))
    step = settle(lambda t, v, *data: v + 0.3 * network(t, v, *data), v0, 0.3, 1e-6, 3000, "map", per_sample=(drive, rate))
    assert torch.equal(step.steps, euler.steps)
    assert torch.allclose(step.state, euler.state, atol=1e-13)
    assert torch.allclose(step.residual, euler.residual, rtol=1e-6)


def test_finished_samples_leave_the_computation() -> None:
    v0, drive, rate = problem(12)
    rows = []

    def counted(t: float, v: Tensor, drive: Tensor, rate: Tensor, number: Tensor) -> Tensor:
        rows.append(len(v))
        assert torch.equal(rate, problem(12)[2][number])  # torch.arange(batch) tells f whom it serves
        return network(t, v, drive, rate)

    settled = settle(counted, v0, 0.3, 1e-6, 3000, per_sample=(drive, rate, torch.arange(12)))
    # a sample is evaluated once before each of its steps and once when it is found at rest
    assert sum(rows) == int(settled.steps.sum()) + 12
    assert min(rows) < 12


def test_tuple_state_has_a_scale_for_each_tensor() -> None:
    """The slow tensor is tiny; a common scale would call it settled long before it is."""

    def f(t: float, y: tuple[Tensor, ...], k: Tensor) -> tuple[Tensor, ...]:
        return 1000 - y[0], k[:, None] * (1e-6 - y[1])

    start = (torch.zeros(3, 2, 2), torch.zeros(3, 1))
    settled = settle(f, start, 0.5, 1e-9, 5000, per_sample=(torch.tensor([0.1, 0.2, 0.4]),))
    assert settled.converged.all()
    assert settled.state[0].shape == (3, 2, 2)
    assert ((settled.state[1] - 1e-6).abs() < 1e-14).all()
    assert settled.steps[0] > settled.steps[1] > settled.steps[2]


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
def test_units_do_not_matter(scale: float) -> None:
    y0, drive = torch.randn(5, 4), torch.randn(5, 4)
    one = settle(lambda t, y, b: b - y, y0, 0.25, 1e-8, 1000, per_sample=(drive,))
    other = settle(lambda t, y, b: b - y, scale * y0, 0.25, 1e-8, 1000, per_sample=(scale * drive,))
    assert torch.equal(one.steps, other.steps)
    assert torch.equal(one.state * scale, other.state)


def test_settles_at_zero_and_at_the_start() -> None:
    decay = settle(lambda t, y: -y, torch.ones(2, 3), 0.5, 1e-6, 1000)
    assert decay.converged.all()
    assert decay.state.abs().max() <= 1e-6
    rest = settle(lambda t, y: -y, torch.zeros(2, 3), 0.5, 0.0, 1000)
    assert rest.converged.all()
    assert rest.steps.tolist() == [0, 0]
    assert rest.residual.tolist() == [0.0, 0.0]


def test_map_finds_the_fixed_point_of_the_cosine() -> None:
    settled = settle(lambda t, y: torch.cos(y), torch.tensor([0.0, 3.0]), 1.0, 1e-14, 1000, "map")
    assert settled.state.tolist() == pytest.approx([0.7390851332151607] * 2, abs=1e-13)


@pytest.mark.parametrize("max_steps", [0, 1, 25])
def test_unfinished_samples_are_returned_as_they_are(max_steps: int) -> None:
    v0, drive, rate = problem(4)
    settled = settle(network, v0, 0.1, 1e-12, max_steps, per_sample=(drive, rate))
    assert not settled.converged.any()
    assert settled.steps.tolist() == [max_steps] * 4
    path = integrate(lambda t, v: network(t, v, drive, rate), v0, 0.1, max_steps, save=True)
    assert torch.equal(settled.state, path[-1])
    looks = [*range(0, max_steps, 10), max_steps]  # the scale is the largest state among those looked at
    scale = path[looks].abs().amax((0, 2))
    expected = network(0.0, path[-1], drive, rate).abs().amax(1) / scale
    assert torch.allclose(settled.residual, expected, rtol=1e-12)


def test_divergence_names_dt_and_the_sample() -> None:
    rate = torch.tensor([1.0, 1.0, 300.0])
    with pytest.raises(InstabilityError, match=r"1 sample\(s\), the first is number 2, .* dt=0.1; make dt smaller"):
        settle(lambda t, y, k: -k * y, torch.ones(3), 0.1, 1e-6, 100_000, per_sample=(rate,))
    assert settle(lambda t, y, k: -k * y, torch.ones(3), 0.001, 1e-6, 100_000, per_sample=(rate,)).converged.all()
    with pytest.raises(InstabilityError, match="number 0"):
        settle(lambda t, y: y / 0, torch.zeros(2, 2), 0.1, 1e-6, 100)


def test_divergence_after_others_have_left() -> None:
    """Numbers are those of the caller, not of the samples that are left."""
    rate = torch.tensor([3.0, 3.0, -1.0])
    with pytest.raises(InstabilityError, match="number 2"):
        settle(lambda t, y, k: -k * y, torch.ones(3), 0.1, 1e-6, 100_000, per_sample=(rate,))


def test_arguments_stay_and_no_graph_is_kept() -> None:
    v0, drive, rate = problem(5)
    before = v0.clone()
    drive.requires_grad_()
    settled = settle(network, v0, 0.3, 1e-6, 1000, per_sample=(drive, rate))
    assert torch.equal(v0, before)
    assert not settled.state.requires_grad


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(0, 5),
    shape=st.lists(st.integers(0, 3), max_size=3),
    dtype=st.sampled_from([torch.float, torch.double]),
    method=st.sampled_from(["euler", "heun", "rk4"]),
)
def test_any_shape(batch: int, shape: list[int], dtype: torch.dtype, method: str) -> None:
    goal = torch.arange(1, batch * math.prod(shape) + 1, dtype=dtype).reshape(batch, *shape) / 7
    settled = settle(lambda t, y, g: g - y, torch.zeros_like(goal), 0.5, 1e-5, 500, method, per_sample=(goal,))
    assert settled.converged.shape == settled.steps.shape == settled.residual.shape == (batch,)
    assert settled.converged.all()
    assert settled.state.dtype == dtype
    assert torch.allclose(settled.state, goal, rtol=1e-4)


def test_errors_name_what_is_wrong() -> None:
    y, f = torch.ones(3, 2), lambda t, y: -y
    for wrong in (
        {"tolerance": -1.0},
        {"tolerance": math.nan},
        {"every": 0},
        {"floor": 0.0},
        {"max_steps": -1},
        {"dt": 0.0},
    ):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
            settle(f, y, **{"dt": 0.1, "tolerance": 1e-3, "max_steps": 10, **wrong})
    with pytest.raises(ConfigError, match="'newton'"):
        settle(f, y, 0.1, 1e-3, 10, "newton")
    with pytest.raises(ConfigError, match=r"same batch: state \[\(3, 2\)\], per_sample \[\(4,\)\]"):
        settle(lambda t, y, x: -y, y, 0.1, 1e-3, 10, per_sample=(torch.ones(4),))
    with pytest.raises(ConfigError, match="f returned shapes"):
        settle(lambda t, y: y.sum(), y, 0.1, 1e-3, 10)
