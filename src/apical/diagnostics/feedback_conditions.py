"""Do the feedback weights of Deep Feedback Control do what its theory asks: Conditions 1 to 3, and the angles of Q.

Meulemans et al., "Credit Assignment in Neural Networks through Deep Feedback Control", arXiv 2106.07887. With
J = d r_L / d v and the feedback weights Q stacked over the layers:

    Condition 1:  |r_0| = |r_1| = ... = |r_{L-1}|            (with it the update is Gauss-Newton, not only minimum-norm)
    Condition 2:  the columns of Q span the rows of J        (with it the steady-state update uses the pseudoinverse of J)
    Condition 3:  Re eig(J Q) > -alpha                       (the control loop is stable)

Everything is per sample and reduces to n_L x n_L matrices; the projectors on all N neurons are never built.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from apical.core.chain import States
from apical.errors import require_choice
from apical.rules.feedback_control.states import condition_two, control_matrix, gram_matrix

__all__ = ["condition_one", "condition_three", "condition_two", "control_matrix", "feedback_angles"]


def condition_one(states: States, form: Literal["paper", "code"] = "paper") -> Tensor:
    """Return the spread of the norms |r_0|..|r_{L-1}| around their mean: (batch,), 0 where Condition 1 holds.

    Args:
        states: a pass through a chain.
        form: "paper": standard deviation over the layers (division by L) over the mean; "code": the released code's
            `sqrt(variance / mean)`, which depends on the scale of the rates.

    Raises:
        ConfigError: unknown `form`.
    """
    require_choice("form", form, ("paper", "code"))
    norms = torch.stack([r.detach().flatten(1).norm(dim=1) for r in states.r[:-1]])
    mean = norms.mean(0)
    variance = norms.var(0, correction=0)
    return variance.sqrt() / mean if form == "paper" else (variance / mean).sqrt()


def condition_three(jacobian: Sequence[Tensor], feedback: Iterable[Tensor], alpha: float) -> Tensor:
    """Return the margin `min Re eig(J Q) + alpha`: (batch,), positive where Condition 3 holds.

    Args:
        jacobian: J_i, each (batch, n_L, n_i), at the controlled steady state (feed-forward for a weak nudge).
        feedback: Q_i, each (n_i, n_L).
        alpha: leak of the controller.
    """
    smallest: Tensor = torch.linalg.eigvals(control_matrix(jacobian, feedback)).real.amin(-1)
    return smallest + alpha


@torch.no_grad()
def feedback_angles(
    jacobian: Sequence[Tensor], feedback: Iterable[Tensor], damping: float = 1.0, *, average: bool = False
) -> dict[str, Tensor]:
    """Return the angles in degrees of Q to what it may converge to, all layers together.

    Args:
        jacobian: J_i, each (batch, n_L, n_i).
        feedback: Q_i, each (n_i, n_L).
        damping: gamma of the damped pseudoinverse (Theorem 6; 1 in the paper's figures on images).
        average: compare with the batch mean of each candidate, as the feedback rule learns it for a nonlinear network.

    Returns:
        "transpose" (J^T), "pseudoinverse" (J^+) and "damped" (J^T (J J^T + gamma I)^-1) -> (batch,), or (1,) if averaged.
    """
    stacked = torch.cat([weight.detach() for weight in feedback])
    transpose = torch.cat([block.mT for block in jacobian], 1)
    gram = gram_matrix(jacobian)
    damped = gram + damping * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    candidates = {
        "transpose": transpose,
        "pseudoinverse": transpose @ torch.linalg.pinv(gram, hermitian=True),
        "damped": torch.linalg.solve(damped, transpose, left=False),
    }
    if average:
        candidates = {name: candidate.mean(0, keepdim=True) for name, candidate in candidates.items()}
    return {name: _angle_each(stacked, candidate) for name, candidate in candidates.items()}


def _angle_each(one: Tensor, many: Tensor) -> Tensor:
    """Angles between one matrix and each of (batch, ...), in degrees, exact also near 0 (half-angle form)."""
    a, b = one.flatten()[None], many.flatten(1)
    a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
    return torch.rad2deg(2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1)))
