"""Eigenvalues of the whole loop of Deep Feedback Control, network and controller, around the feed-forward state.

Meulemans et al., arXiv 2106.07887, linearised [our derivation]. With D_i = diag(phi_i'(v_i)), S the matrix of all neurons
with the blocks W_i D_{i-1} below its diagonal, C = [0 ... 0 D_L] and time in units of tau_u, the deviations (v, u_int) obey

    d/dt [v; u_int] = A [v; u_int],   A = [ -(I - S + k_p Q C) / tau    Q / tau  ]
                                          [ -(1 - alpha k_p) C          -alpha I ]      (leak on u; on u_int: -C)

and J = C (I - S)^-1. Matrices of N + n_L rows per sample: take a few samples of a small network.
:mod:`apical.rules.feedback_control.stability` has the same loop in the space of the outputs, its limit for tau -> 0 and
the advice drawn from them.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from apical.core.activations import derivative
from apical.core.chain import Chain, States
from apical.rules.feedback_control.stability import (
    advice,
    largest_stable_dt,
    loop_matrix,
    loop_step,
    reduced_eigenvalues,
    require_leak,
    scalar_modes,
)
from apical.rules.feedback_control.trajectory import Leak

__all__ = [
    "advice",
    "largest_real_part",
    "largest_stable_dt",
    "loop_matrix",
    "loop_step",
    "reduced_eigenvalues",
    "scalar_modes",
    "spectral_radius",
    "step_matrix",
    "system_matrix",
]


@torch.no_grad()
def system_matrix(
    chain: Chain, states: States, feedback: Iterable[Tensor], *, alpha: float, k_p: float, tau: float, leak: Leak = "code"
) -> Tensor:
    """Return the matrix A of the linearised loop, state (v_1, ..., v_L, u_int).

    Args:
        chain: the network.
        states: a pass through it, of batch size B.
        feedback: Q_i, each (n_i, n_L).
        alpha: leak of the integrator.
        k_p: proportional gain.
        tau: time constant of the network over that of the controller.
        leak: what leaks, u ("code") or u_int ("paper").

    Returns:
        (B, N + n_L, N + n_L), in units of 1/tau_u.

    Raises:
        ConfigError: unknown `leak`.
    """
    require_leak(leak)
    below, readout, q = _blocks(chain, states, feedback)
    eye = torch.eye(len(q), dtype=q.dtype, device=q.device)
    pull = -(1 - alpha * k_p if leak == "code" else 1) * readout
    decay = -alpha * torch.eye(q.shape[1], dtype=q.dtype, device=q.device)
    upper = torch.cat([-(eye - below + k_p * q @ readout), q.expand(len(below), -1, -1)], 2) / tau
    return torch.cat([upper, torch.cat([pull, decay.expand(len(below), -1, -1)], 2)], 1)


@torch.no_grad()
def step_matrix(
    chain: Chain,
    states: States,
    feedback: Iterable[Tensor],
    *,
    alpha: float,
    k_p: float,
    dt: float,
    tau: float,
    leak: Leak = "code",
    proactive: bool = True,
    instant_transmission: bool = True,
) -> Tensor:
    """Return one Euler step of the simulated loop, linearised: state (v_1, ..., v_L, u_int, u), all deviations.

    Controller first, e = -C v; then the layers in ascending order:

        u_int' = u_int + dt (e - alpha u)   (leak on u; on u_int: - alpha u_int),      u' = u_int' + k_p e
        v_i' = v_i + (dt/tau) (W_i D_{i-1} v_{i-1}' + Q_i u' - v_i)

    Args:
        chain: the network.
        states: a pass through it, of batch size B.
        feedback: Q_i, each (n_i, n_L).
        alpha: leak of the integrator.
        k_p: proportional gain.
        dt: step, in units of tau_u.
        tau: time constant of the network over that of the controller.
        leak: what leaks.
        proactive: the layers see u', as above, and not the u before it.
        instant_transmission: a layer sees the layer below it already stepped, as above, and not as it was.

    Returns:
        (B, N + 2 n_L, N + 2 n_L); the simulation is stable where its :func:`spectral_radius` is below 1.

    Raises:
        ConfigError: unknown `leak`.
    """
    require_leak(leak)
    below, readout, q = _blocks(chain, states, feedback)
    batch, (neurons, outputs) = len(below), q.shape
    rate = dt / tau
    integral = below.new_zeros(batch, outputs, neurons + 2 * outputs)
    integral[:, :, :neurons] = -dt * readout
    eye = torch.eye(outputs, dtype=q.dtype, device=q.device)
    integral[:, :, neurons : neurons + outputs] = eye
    leaking = slice(neurons + outputs, None) if leak == "code" else slice(neurons, neurons + outputs)
    integral[:, :, leaking] -= dt * alpha * eye
    control = integral.clone()
    control[:, :, :neurons] -= k_p * readout
    seen = control
    if not proactive:
        seen = torch.zeros_like(control)
        seen[:, :, neurons + outputs :] = eye
    network = rate * q @ seen
    diagonal = torch.eye(neurons, dtype=q.dtype, device=q.device)
    network[:, :, :neurons] += (1 - rate) * diagonal
    if instant_transmission:
        network = torch.linalg.solve_triangular(diagonal - rate * below, network, upper=False, unitriangular=True)
    else:
        network[:, :, :neurons] += rate * below
    return torch.cat([network, integral, control], 1)


def largest_real_part(matrix: Tensor) -> Tensor:
    """Return `max Re eig` of each matrix: (..., n, n) -> (...); negative where the continuous loop is stable."""
    largest: Tensor = torch.linalg.eigvals(matrix).real.amax(-1)
    return largest


def spectral_radius(matrix: Tensor) -> Tensor:
    """Return `max |eig|` of each matrix: (..., n, n) -> (...); below 1 where the discrete loop is stable."""
    radius: Tensor = torch.linalg.eigvals(matrix).abs().amax(-1)
    return radius


def _blocks(chain: Chain, states: States, feedback: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """S (B, N, N), C (B, n_L, N) and Q (N, n_L), in float64: the slow eigenvalues lie close to zero."""
    q = torch.cat([weight.detach() for weight in feedback]).double()
    slopes = [
        derivative(stage.activation, v, r).flatten(1).double()
        for stage, v, r in zip(chain.stages, states.v, states.r[1:], strict=True)
    ]
    below = q.new_zeros(len(slopes[0]), len(q), len(q))
    start = 0
    for i, stage in enumerate(chain.stages[1:]):
        size = chain.stages[i].size
        identity = torch.eye(stage.size, dtype=stage.layer.weight.dtype, device=q.device)
        end = start + size
        below[:, end : end + stage.size, start:end] = stage.transposed(identity).double() * slopes[i][:, None]
        start = end
    readout = q.new_zeros(len(below), q.shape[1], len(q))
    readout[:, :, start:] = torch.diag_embed(slopes[-1])
    return below, readout, q
