"""The leaky proportional-integral controller of Deep Feedback Control, in discrete time with tau_u = 1.

    u = u_int + k_p e,   e = r_L* - r_L
    du_int/dt = e - alpha u_int        leak "paper": Meulemans et al. 2021 (arXiv 2106.07887), section 3
    du_int/dt = e - alpha u            leak "code": the authors' programs, to which their hyperparameters belong

Only the ratio of the network's and the controller's time constants matters, hence tau_u = 1. Without proportional gain
the two leaks coincide.
"""

from typing import Literal

import torch
from torch import Tensor

from apical.errors import ConfigError, unknown_name

Leak = Literal["code", "paper"]


def proportional_integral(
    integral: Tensor, control: Tensor, error: Tensor, *, dt: float, k_p: float, alpha: float, leak: Leak
) -> tuple[Tensor, Tensor]:
    """One Euler step: (u_int[t], u[t], e[t]) -> (u_int[t + 1], u[t + 1]).

        u_int[t + 1] = u_int[t] + dt (e[t] - alpha u[t])        leak "code"; u_int[t] instead of u[t] for "paper"
        u[t + 1] = u_int[t + 1] + k_p e[t]

    Args:
        integral: u_int, any shape; both start at zero.
        control: u, same shape.
        error: e, same shape.
        dt: step in units of tau_u.
        k_p: proportional gain, the integral gain being 1.
        alpha: leak rate per tau_u.
        leak: what leaks.

    Returns:
        New integral and control; they are one tensor where k_p is 0. The arguments are left as they are.

    Raises:
        ConfigError: unknown leak, a negative gain or leak, or dt not positive.

    >>> proportional_integral(torch.zeros(1), torch.zeros(1), torch.ones(1), dt=0.1, k_p=2.0, alpha=0.5, leak="code")
    (tensor([0.1000]), tensor([2.1000]))
    """
    _check_gains(alpha, k_p, leak)
    if not dt > 0:
        raise ConfigError(f"dt={dt} of the controller must be positive")
    leaking = control if leak == "code" else integral
    integral = torch.add(integral, torch.sub(error, leaking, alpha=alpha), alpha=dt)
    return integral, torch.add(integral, error, alpha=k_p) if k_p else integral


def steady_leak(alpha: float, k_p: float, leak: Leak) -> float:
    """Effective leak a~ at the steady state, where e = a~ u and so u = (JQ + a~ I)^-1 delta in a linear network.

    With leak "code" du_int/dt = 0 says e = alpha u. With leak "paper" it says e = alpha u_int = alpha (u - k_p e), so
    a~ = alpha / (1 + alpha k_p).

    Raises:
        ConfigError: unknown leak, or a negative gain or leak.

    >>> steady_leak(0.5, 2.0, "code"), steady_leak(0.5, 2.0, "paper")
    (0.5, 0.25)
    """
    _check_gains(alpha, k_p, leak)
    return alpha if leak == "code" else alpha / (1 + alpha * k_p)


def _check_gains(alpha: float, k_p: float, leak: str) -> None:
    if leak not in ("code", "paper"):
        raise unknown_name("leak", leak, ("code", "paper"))
    for name, value in (("alpha", alpha), ("k_p", k_p)):
        if not value >= 0:  # so written, it refuses NaN too
            raise ConfigError(f"{name}={value} of the controller must not be negative")
