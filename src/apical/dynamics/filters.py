"""Exponential filters and Ornstein-Uhlenbeck noise in discrete time, with their stationary variances.

Deep Feedback Control (Meulemans et al. 2021, arXiv 2106.07887; 2022, arXiv 2204.07249) uses them, in the authors'
discretisation, in three places. xi ~ N(0, I) is drawn anew at every step.

    apical compartment    v_fb[t + 1] = v_fb[t] + (dt / tau_fb) (Q u - v_fb[t]) + sigma sqrt(dt) / tau_fb xi
    filtered noise        v_fb = Q u + sigma eps,   eps[t + 1] = (1 - dt / tau_eps) eps[t] + sqrt(dt) / tau_eps xi
    high-passed control   u_hp = u - u_lp,   u_lp[t + 1] = u_lp[t] + (dt / tau_f) (u[t + 1] - u_lp[t])

The noise in v_fb is the same process in the first two forms, which differ in whether Q u is filtered with it. With
tau_fb = dt the first one is instantaneous: v_fb = Q u + sigma / sqrt(dt) xi.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from apical.errors import ConfigError


def low_pass(state: Tensor, x: Tensor, rate: float) -> Tensor:
    """`state + rate (x - state)`: one step of an exponential filter.

    Args:
        state: the filter's last output, any shape; start it at the first x or at zero.
        x: its new input, same shape.
        rate: dt / tau, in 0..1.

    Raises:
        ConfigError: the rate lies outside 0..1.
    """
    _check_rate(rate)
    return torch.lerp(state, x, rate)


def high_pass(state: Tensor, x: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """(new low-pass state, x minus that state): what the filter of the same `rate` leaves out.

    Raises:
        ConfigError: the rate lies outside 0..1.
    """
    state = low_pass(state, x, rate)
    return state, x - state


def low_pass_variance(rate: float) -> float:
    """Stationary variance of `low_pass` driven by white noise of variance 1: rate / (2 - rate)."""
    _check_rate(rate)
    return rate / (2 - rate)


def high_pass_variance(rate: float) -> float:
    """Stationary variance of `high_pass` driven by white noise of variance 1: 2 (1 - rate)^2 / (2 - rate).

    x[t + 1] - u_lp[t + 1] = (1 - rate) (x[t + 1] - u_lp[t]), whose two terms are independent.
    """
    _check_rate(rate)
    return 2 * (1 - rate) ** 2 / (2 - rate)


def ornstein_uhlenbeck_step(
    state: Tensor, xi: Tensor, *, dt: float, tau: float, sigma: float, drive: Tensor | None = None
) -> Tensor:
    """One step of the noisy apical compartment, or of the noise alone.

        state + (dt / tau) (drive - state) + sigma sqrt(dt) / tau xi

    Args:
        state: v_fb, or sigma eps where there is no drive; any shape.
        xi: standard normal noise, same shape.
        dt: step.
        tau: time constant, at least dt.
        sigma: strength of the noise.
        drive: Q u, same shape; None means 0.

    Raises:
        ConfigError: tau is smaller than dt, dt is not positive, or sigma is negative.
    """
    _check_noise(dt, tau, sigma)
    rate = dt / tau
    state = (1 - rate) * state if drive is None else torch.lerp(state, drive, rate)
    return torch.add(state, xi, alpha=sigma * math.sqrt(dt) / tau)


def ornstein_uhlenbeck(
    shape: Sequence[int],
    steps: int,
    dt: float,
    tau: float,
    sigma: float,
    generator: torch.Generator,
    *,
    stationary: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Sample paths of the filtered noise sigma eps.

    Args:
        shape: of the noise at one time.
        steps: number of times.
        dt: step.
        tau: correlation time, at least dt.
        sigma: strength; the variance is `ornstein_uhlenbeck_variance`.
        generator: source of the noise; numbers are drawn on its device.
        stationary: start from the stationary distribution; otherwise from 0, as the authors' programs do.
        dtype: of the result; torch's default if None.
        device: of the result; the generator's if None.

    Returns:
        (steps, *shape); row t is the noise after t + 1 steps.

    Raises:
        ConfigError: tau is smaller than dt, dt is not positive, sigma or the number of steps is negative.
    """
    _check_noise(dt, tau, sigma)
    if steps < 0:
        raise ConfigError(f"steps={steps} must not be negative")
    path = torch.randn(steps, *shape, generator=generator, dtype=dtype, device=generator.device)
    path *= sigma * math.sqrt(dt) / tau
    if stationary and steps:
        # the stationary law is a fixed point of the step, so the first row may be drawn from it as well as the start
        path[0] *= math.sqrt(tau * tau / (dt * (2 * tau - dt)))
    for step in range(1, steps):
        path[step].add_(path[step - 1], alpha=1 - dt / tau)
    return path.to(device or generator.device)


def ornstein_uhlenbeck_variance(dt: float, tau: float, sigma: float, steps: int | None = None) -> float:
    """Variance of each entry of `ornstein_uhlenbeck`, exactly in discrete time.

        sigma^2 / (2 tau - dt) (1 - (1 - dt / tau)^(2 steps))

    Args:
        dt: step; its limit 0 has the textbook's sigma^2 / (2 tau), and is allowed here where `steps` is None.
        tau: correlation time, at least dt.
        sigma: strength.
        steps: steps since the start at 0; None for the stationary value. Short simulations do not come near it.

    Raises:
        ConfigError: tau is smaller than dt or not positive, dt or sigma is negative, or dt is 0 with a number of steps.

    >>> ornstein_uhlenbeck_variance(0.0, 0.5, 2.0), ornstein_uhlenbeck_variance(0.5, 0.5, 2.0)
    (4.0, 8.0)
    """
    if dt != 0 or steps is not None:
        _check_noise(dt, tau, sigma)
    elif not (tau > 0 and sigma >= 0):
        raise ConfigError(f"tau={tau} must be positive and sigma={sigma} not negative")
    variance = sigma * sigma / (2 * tau - dt)
    return variance if steps is None else variance * (1 - (1 - dt / tau) ** (2 * steps))


def _check_rate(rate: float) -> None:
    if not 0 <= rate <= 1:
        raise ConfigError(f"rate={rate} (dt / tau of a filter) must lie in 0..1; take tau >= dt")


def _check_noise(dt: float, tau: float, sigma: float) -> None:
    if not 0 < dt <= tau:
        raise ConfigError(f"dt={dt} must be positive and not above the time constant tau={tau}; make dt smaller")
    if not sigma >= 0:
        raise ConfigError(f"sigma={sigma} must not be negative")
