"""Damped Newton's method for steady states of feedback control that a few chord steps do not reach.

    F(u) = rho_L(u) + a u - delta = 0,   F'(u) = M(u) + a I,   M = J Q at the controlled state

Every step takes the slope where it stands, and of the step so much, 1, 1/2, 1/4, ..., that `|F|` of its sample falls.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from apical.core.chain import Chain, States
from apical.rules.feedback_control.states import Controlled, Resolvent, apical, controlled_pass, controlled_states

STEPS = 40
"""Newton steps at most."""

HALVINGS = 12
"""Times that a step is halved before its sample is given up."""


def settle(
    chain: Chain,
    states: States,
    feedback: Sequence[Tensor],
    delta: Tensor,
    u: Tensor,
    slope: Callable[[States], Resolvent],
    a: float,
    tolerance: float,
) -> Tensor:
    """Control (batch, n_L) at the steady state, as near as the method comes to it; nothing is raised.

    Args:
        states: the feed-forward states.
        delta: how far the target lies from the output (batch, n_L).
        u: where from; a sample that is farther from its target than without control starts without.
        slope: `(M + a I)^-1` at given states.
        a: steady error per control.
        tolerance: of `|F|`, relative to `|delta|`.
    """

    def at(u: Tensor) -> tuple[Controlled, Tensor, Tensor]:
        state = controlled_pass(chain, states, apical(chain, feedback, u))
        miss = state.rho[-1].flatten(1) + a * u - delta  # F(u): (batch, n_L)
        return state, miss, miss.norm(dim=1)

    start = delta.norm(dim=1)
    # |F(0)| = |delta|: who is farther than that starts without control
    u = torch.where((at(u)[2] < start).unsqueeze(1), u, 0.0)
    state, miss, size = at(u)
    for _ in range(STEPS):
        done = size <= tolerance * start
        if bool(done.all()):
            break
        step = slope(controlled_states(states, state)).solve(-miss)  # (M(u) + a I) step = -F(u)
        step = step.where(step.isfinite().all(1, keepdim=True), 0.0)
        stride, taken = torch.where(done, 0.0, 1.0).to(u), done  # (batch,)
        for _ in range(HALVINGS):
            # Armijo: enough of the fall that the slope promises
            taken = taken | (at(u + stride.unsqueeze(1) * step)[2] < (1 - 1e-4 * stride) * size)
            if bool(taken.all()):
                break
            stride = torch.where(taken, stride, stride / 2)
        stride = torch.where(taken, stride, 0.0)
        if not bool(stride.any()):
            break
        u = u + stride.unsqueeze(1) * step
        state, miss, size = at(u)
    return u
