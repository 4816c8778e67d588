"""Stability of the control loop of Deep Feedback Control, and which parameter to change if it is unstable.

Meulemans et al., "Credit Assignment in Neural Networks through Deep Feedback Control", arXiv 2106.07887: the network

    tau dv_i/dt = -v_i + W_i phi(v_{i-1}) + b_i + Q_i u                     (eq. 1; time in units of tau_u)

under the controller u = u_int + k_p e, du_int/dt = e - alpha u_int (eq. 4, `leak="paper"`) or e - alpha u (the released
code, `leak="code"`). Condition 3: Re eig(J Q) > -alpha, J = d r_L / d v; for k_p = 0 and tau -> 0 it is the necessary and
sufficient condition of local stability (Proposition 5). With k_p > 0 an eigenvalue mu of J Q gives, for tau -> 0 (derived),

    -(mu + alpha) / (1 + k_p mu)   (code),      -(mu / (1 + k_p mu) + alpha)   (paper).

For finite tau and dt: all neurons filter alike, so the control reaches the output through L - i + 1 equal filters from
layer i, and seen from the controller the network is a chain of L filters of n_L outputs each, in which layer i feeds
M_i u, M_i = J_i Q_i (derived). That loop of (L + 1) n_L states has every eigenvalue of the whole one that the controller
can move; the others are those of the network alone, -1/tau. Where only the sum J Q is known, each eigenvalue is followed as
a scalar mode of which every layer feeds the share 1 / L.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from apical.errors import ConfigError, require_choice
from apical.rules.feedback_control.trajectory import Leak

EXACT = 300
"""Up to this many states, the loop's eigenvalues are computed; above, those of scalar modes."""


def require_leak(leak: str) -> None:
    """Refuse an unknown form of the leak.

    Raises:
        ConfigError: `leak` is neither "code" nor "paper".
    """
    require_choice("leak", leak, ("code", "paper"))


def reduced_eigenvalues(mu: Tensor, alpha: float, k_p: float, leak: Leak = "code") -> Tensor:
    """Eigenvalues of the controller's slow dynamics when the network follows instantly (tau -> 0), in units of 1/tau_u.

    Args:
        mu: eigenvalues of J Q, any shape, real or complex.
        alpha: leak of the integrator.
        k_p: proportional gain.
        leak: which quantity leaks, "code" or "paper".

    Returns:
        Of mu's shape; the loop is stable when all real parts are negative *and* Re(1 + k_p mu) > 0 (the network itself).

    Raises:
        ConfigError: unknown `leak`.

    >>> reduced_eigenvalues(torch.tensor([2.0]), alpha=0.5, k_p=1.0), reduced_eigenvalues(torch.tensor([2.0]), 0.5, 0.0)
    (tensor([-0.8333]), tensor([-2.5000]))
    """
    require_leak(leak)
    return -(mu + alpha) / (1 + k_p * mu) if leak == "code" else -(mu / (1 + k_p * mu) + alpha)


def scalar_modes(mu: Tensor, depth: int) -> Tensor:
    """Gains of one scalar mode per eigenvalue of J Q, spread evenly: (modes,) -> (modes, depth, 1, 1), complex."""
    return (mu.to(torch.complex128) / depth)[..., None, None, None].expand(*mu.shape, depth, 1, 1)


def loop_matrix(gains: Tensor, *, alpha: float, k_p: float, tau: float, leak: Leak = "code") -> Tensor:
    """Continuous-time system matrix of the loop seen from the controller; state (x_1, ..., x_L, u_int), n_L each.

    tau dx_i/dt = -x_i + x_{i-1} + M_i u with x_0 = 0, output x_L, e = -x_L.

    Args:
        gains: M_i = J_i Q_i, (..., L, n_L, n_L), real or complex.
        alpha: leak of the integrator.
        k_p: proportional gain.
        tau: time constant of the network over that of the controller.
        leak: which quantity leaks, "code" or "paper".

    Returns:
        (..., (L + 1) n_L, (L + 1) n_L), in units of 1/tau_u.

    Raises:
        ConfigError: unknown `leak`.
    """
    require_leak(leak)
    depth, outputs = gains.shape[-3], gains.shape[-1]
    stacked = gains.flatten(-3, -2)
    last, control = slice((depth - 1) * outputs, depth * outputs), slice(depth * outputs, None)
    matrix = gains.new_zeros(*gains.shape[:-3], (depth + 1) * outputs, (depth + 1) * outputs)
    network = matrix[..., : depth * outputs, :]
    network[..., : depth * outputs].diagonal(dim1=-2, dim2=-1).fill_(-1)
    network[..., : depth * outputs].diagonal(-outputs, dim1=-2, dim2=-1).fill_(1)
    network[..., last] -= k_p * stacked
    network[..., control] = stacked
    network /= tau
    matrix[..., control, last].diagonal(dim1=-2, dim2=-1).fill_(-(1 - alpha * k_p) if leak == "code" else -1)
    matrix[..., control, control].diagonal(dim1=-2, dim2=-1).fill_(-alpha)
    return matrix


def loop_step(gains: Tensor, *, alpha: float, k_p: float, dt: float, tau: float, leak: Leak = "code") -> Tensor:
    """One Euler step of the same loop, as in the simulation; state (x_1, ..., x_L, u_int, u), n_L each.

    The controller steps first, then the layers in ascending order, each with the new u and the new state below
    ("proactive", "instant transmission").

    Args:
        gains: M_i = J_i Q_i, (..., L, n_L, n_L), real or complex.
        alpha: leak of the integrator.
        k_p: proportional gain.
        dt: step, in units of tau_u.
        tau: time constant of the network over that of the controller.
        leak: which quantity leaks, "code" or "paper".

    Returns:
        (..., (L + 2) n_L, (L + 2) n_L).

    Raises:
        ConfigError: unknown `leak`.
    """
    require_leak(leak)
    depth, outputs = gains.shape[-3], gains.shape[-1]
    rate = dt / tau
    rows = gains.new_zeros(*gains.shape[:-3], depth + 2, outputs, depth + 2, outputs)
    integral, control, output = depth, depth + 1, depth - 1

    def add(row: Tensor, column: int, value: float) -> None:
        row[..., column, :].diagonal(dim1=-2, dim2=-1).add_(value)

    step = rows[..., integral, :, :, :]
    add(step, integral, 1)
    add(step, control if leak == "code" else integral, -dt * alpha)
    add(step, output, -dt)
    rows[..., control, :, :, :] = step
    add(rows[..., control, :, :, :], output, -k_p)
    new_control = rows[..., control, :, :, :].flatten(-2)
    below = torch.zeros_like(step)
    for layer in range(depth):
        below = rate * (below + (gains[..., layer, :, :] @ new_control).view_as(below))
        add(below, layer, 1 - rate)
        rows[..., layer, :, :, :] = below
    return rows.flatten(-2).flatten(-3, -2)


def largest_stable_dt(gains: Tensor, *, alpha: float, k_p: float, tau: float, leak: Leak = "code") -> float:
    """Return the largest step up to tau for which all loops decay, by bisection to 0.1 %; 0 if no step is stable.

    Args:
        gains: M_i = J_i Q_i, (..., L, n_L, n_L), real or complex; see :func:`scalar_modes` where only J Q is known.
        alpha: leak of the integrator.
        k_p: proportional gain.
        tau: time constant of the network over that of the controller.
        leak: which quantity leaks, "code" or "paper".

    Raises:
        ConfigError: unknown `leak`.
    """
    if not _settles(gains, alpha, k_p, tau, leak):
        return 0.0
    return _largest(lambda dt: _steps_settle(gains, alpha, k_p, dt, tau, leak), tau)


def advice(
    jq: Tensor,
    *,
    depth: int,
    alpha: float,
    k_p: float,
    dt: float,
    tau: float,
    leak: Leak = "code",
    by_layer: Sequence[Tensor] | None = None,
) -> str | None:
    """Return one sentence on which parameter keeps the loop from settling, or None if it is stable.

    Args:
        jq: (batch, n_L, n_L), J Q of each sample at the feed-forward (or the controlled) state; a few samples are enough.
        depth: number L of layers.
        alpha: leak of the integrator.
        k_p: proportional gain.
        dt: step of the simulation, in units of tau_u.
        tau: time constant of the network over that of the controller.
        leak: which quantity leaks, "code" or "paper".
        by_layer: M_i = J_i Q_i, L of (batch, n_L, n_L), whose sum is `jq`; None: spread evenly, as a guess.

    Raises:
        ConfigError: unknown `leak`, or a `depth`, `dt` or `tau` that is not positive.
    """
    require_leak(leak)
    if min(depth, dt, tau) <= 0:
        raise ConfigError(f"depth, dt and tau must be positive; got depth {depth}, dt {dt:g}, tau {tau:g}")
    if not jq.isfinite().all():
        return "J Q is not finite: the network or the feedback weights have diverged; lower the learning rates."
    if tau < dt:
        return f"dt = {dt:g} is larger than the network's time constant tau = {tau:g}: choose dt <= tau."
    mu = torch.linalg.eigvals(jq.detach().to("cpu", torch.float64))
    if complaint := violation(mu, alpha, k_p, leak):
        return complaint
    gains = scalar_modes(mu.flatten(), depth)
    if by_layer is not None and (depth + 2) * jq.shape[-1] <= EXACT:
        gains = torch.stack(list(by_layer), 1).detach().to("cpu", torch.float64)
    if _steps_settle(gains, alpha, k_p, dt, tau, leak):
        return None
    limit = largest_stable_dt(gains, alpha=alpha, k_p=k_p, tau=tau, leak=leak)
    if limit == 0:
        return _never_settles(gains, alpha, k_p, tau, leak)
    return f"dt = {dt:g} is too large for k_p = {k_p:g} and tau = {tau:g}: the largest stable dt is about {limit:.3g}."


def violation(mu: Tensor, alpha: float, k_p: float, leak: Leak) -> str | None:
    """Advice for eigenvalues mu (batch, n_L) of J Q whose slow mode, or the network under k_p alone, does not decay.

    None if both decay (Condition 3).
    """
    smallest = float(mu.real.min())
    network = 1 + k_p * mu.real
    if (network <= 0).any():
        return (
            f"the proportional gain alone makes the network unstable (smallest Re eig(J Q) = {smallest:.3g}): "
            f"retrain the feedback weights Q, or lower k_p = {k_p:g} below {-1 / smallest:.3g}."
        )
    wrong = (reduced_eigenvalues(mu, alpha, k_p, leak).real >= 0).any(-1)
    if not wrong.any():
        return None
    if leak == "code":
        needed = -(mu.real + k_p * mu.abs().square()) / network  # Re((mu + alpha)(1 + k_p mu*)) > 0, solved for alpha
    else:
        needed = -(mu / (1 + k_p * mu)).real
    return (
        f"Condition 3 is violated in {int(wrong.sum())} of {len(wrong)} samples (smallest Re eig(J Q) = {smallest:.3g}, "
        f"alpha = {alpha:g}): retrain the feedback weights Q, or raise alpha above {float(needed.max()):.3g} until they are "
        "trained."
    )


def _never_settles(gains: Tensor, alpha: float, k_p: float, tau: float, leak: Leak) -> str:
    """Advice for a loop that oscillates and diverges at any step: the network lags too far behind its controller."""
    with_gain = partial(_settles, gains, alpha, tau=tau, leak=leak)
    with_tau = partial(_settles, gains, alpha, k_p, leak=leak)
    remedies = []
    if k_p > 0 and with_gain(1e-6 * k_p):
        remedies.append(f"lower k_p = {k_p:g} below about {_largest(with_gain, k_p):.3g}")
    scale = float(torch.linalg.eigvals(gains.sum(-3)).abs().max())
    higher = [10 ** (exponent / 20) / scale for exponent in range(-40, 41)]  # proportional control leads the integral
    if enough := next((gain for gain in higher if gain > k_p and with_gain(gain)), None):
        remedies.append(f"raise k_p = {k_p:g} to about {enough:.3g}")
    if with_tau(1e-6 * tau):
        remedies.append(f"lower tau = {tau:g} below about {_largest(with_tau, tau):.3g}")
    remedy = ", or ".join(remedies) or "scale the feedback weights Q down, or retrain them"
    layers = gains.shape[-3]
    return f"the control loop oscillates and diverges for every dt: {layers} layers lag behind the controller; {remedy}."


def _settles(gains: Tensor, alpha: float, k_p: float, tau: float, leak: Leak) -> bool:
    matrix = loop_matrix(gains, alpha=alpha, k_p=k_p, tau=tau, leak=leak)
    return bool((torch.linalg.eigvals(matrix).real < 0).all())


def _steps_settle(gains: Tensor, alpha: float, k_p: float, dt: float, tau: float, leak: Leak) -> bool:
    step = loop_step(gains, alpha=alpha, k_p=k_p, dt=dt, tau=tau, leak=leak)
    return bool((torch.linalg.eigvals(step).abs() < 1).all())


def _largest(holds: Callable[[float], bool], upper: float) -> float:
    """Largest value up to `upper` for which `holds`, by geometric bisection; it must hold for small values."""
    if holds(upper):
        return upper
    lower = upper / 2
    while not holds(lower):
        lower, upper = lower / 2, lower
        if lower < 1e-12:
            return 0.0
    while upper > 1.001 * lower:
        middle = (lower * upper) ** 0.5
        lower, upper = (middle, upper) if holds(middle) else (lower, middle)
    return lower
