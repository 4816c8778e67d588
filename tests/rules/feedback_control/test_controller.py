"""The controller: the two leaks, their steady states around a plant, and where they coincide."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apical.errors import ConfigError
from apical.rules.feedback_control.controller import Leak, proportional_integral, steady_leak


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float)


LEAKS: list[Leak] = ["code", "paper"]
numbers = st.floats(-10, 10)


@settings(max_examples=60, deadline=None)
@given(numbers, numbers, numbers, st.floats(1e-4, 1), st.floats(0, 4), st.floats(0, 2), st.sampled_from(LEAKS))
def test_one_step(u_int: float, u: float, e: float, dt: float, k_p: float, alpha: float, leak: Leak) -> None:
    # without proportional gain u is u_int, which makes the sections' two forms of the step one
    u = u if k_p else u_int
    new_int = u_int + dt * (e - alpha * (u if leak == "code" else u_int))
    new = u_int + dt * (e - alpha * u) if k_p == 0 else new_int + k_p * e
    got = proportional_integral(
        torch.tensor(u_int), torch.tensor(u), torch.tensor(e), dt=dt, k_p=k_p, alpha=alpha, leak=leak
    )
    assert [float(x) for x in got] == pytest.approx([new_int, new], rel=1e-13, abs=1e-13)


def closed_loop(plant: Tensor, delta: Tensor, steps: int, **options: object) -> tuple[Tensor, Tensor]:
    """Error and control around the instantaneous linear plant `J Q u`, both (batch, n_L)."""
    integral = control = torch.zeros_like(delta)
    lag = torch.zeros_like(delta)
    for _ in range(steps):
        error = delta - lag
        integral, control = proportional_integral(integral, control, error, **options)
        lag = lag + 0.1 * (control @ plant.T - lag)  # first-order, as an instantaneous one is unstable with k_p
    return delta - lag, control


@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("k_p", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("alpha", [0.05, 0.8])
def test_steady_state(leak: Leak, k_p: float, alpha: float) -> None:
    root = torch.randn(4, 4)
    plant, delta = 0.2 * root @ root.T + torch.eye(4) * 0.3, torch.randn(3, 4)
    error, control = closed_loop(plant, delta, 6000, dt=0.05, k_p=k_p, alpha=alpha, leak=leak)
    # at rest e = alpha u with the programs' leak; e = alpha u_int = alpha (u - k_p e) with the paper's
    expected = alpha * control if leak == "code" else alpha * (control - k_p * error)
    assert (error - expected).abs().max() < 1e-10
    assert (error - steady_leak(alpha, k_p, leak) * control).abs().max() < 1e-10
    solved = torch.linalg.solve(plant + steady_leak(alpha, k_p, leak) * torch.eye(4), delta.T).T
    assert (control - solved).abs().max() < 1e-9


def test_leaks_coincide_without_proportional_gain_only() -> None:
    plant, delta = torch.eye(2), torch.randn(3, 2)
    for k_p, equal in ((0.0, True), (1.0, False)):
        code, paper = (closed_loop(plant, delta, 50, dt=0.05, k_p=k_p, alpha=0.3, leak=leak)[1] for leak in LEAKS)
        assert torch.equal(code, paper) is equal
    assert steady_leak(0.3, 0.0, "code") == steady_leak(0.3, 0.0, "paper")


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(0, 4), max_size=3), k_p=st.sampled_from([0.0, 1.5]), leak=st.sampled_from(LEAKS))
def test_any_shape_and_nothing_in_place(shape: list[int], k_p: float, leak: Leak) -> None:
    given_ = [torch.randn(shape) for _ in range(3)]
    kept = [x.clone() for x in given_]
    integral, control = proportional_integral(*given_, dt=0.1, k_p=k_p, alpha=0.2, leak=leak)
    assert integral.shape == control.shape == tuple(shape)
    assert all(torch.equal(a, b) for a, b in zip(given_, kept, strict=True))
    leaking = kept[1] if leak == "code" else kept[0]
    assert torch.allclose(integral, kept[0] + 0.1 * (kept[2] - 0.2 * leaking), atol=1e-14)
    assert torch.allclose(control, integral + k_p * kept[2], atol=1e-14)


def test_errors_name_what_is_wrong() -> None:
    x, good = torch.zeros(2), {"dt": 0.1, "k_p": 1.0, "alpha": 0.1, "leak": "code"}
    for name, value in (("dt", 0.0), ("k_p", -1.0), ("alpha", -0.5), ("alpha", math.nan)):
        with pytest.raises(ConfigError, match=f"{name}={value}"):
            proportional_integral(x, x, x, **{**good, name: value})
    with pytest.raises(ConfigError, match="unknown leak 'codes'; did you mean 'code'"):
        proportional_integral(x, x, x, **{**good, "leak": "codes"})
    with pytest.raises(ConfigError, match="alpha=-1"):
        steady_leak(-1.0, 0.0, "paper")
