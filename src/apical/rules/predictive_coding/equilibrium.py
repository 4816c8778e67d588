"""The equilibrium of linear networks in closed form.

    P_l = d f_L / d s_l,   S = sum_{l<L} P_l P_l^T,   ell = c/2 |f_L - y|^2

    (I + lambda c S) e_L = -lambda c (f_L(x) - y),   e_l = P_l^T e_L

The matrices P_l are the same for every sample: one backward pass with a row for each output finds them all.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.blocks import Block
from apical.core.credit import Loss
from apical.core.layers import is_linear, is_weighted, runs_own_forward
from apical.core.losses import squared_error
from apical.errors import ConfigError, UnsupportedModelError
from apical.rules.predictive_coding.inference import Energy, Relaxed


def curvature(loss: Loss, outputs: int) -> float:
    """c of one sample's loss.

    Raises:
        ConfigError: the loss is not a squared error.
    """
    if loss is squared_error:
        return 1.0
    if loss is F.mse_loss or isinstance(loss, nn.MSELoss):
        return 2.0 / outputs
    raise ConfigError("inference='exact' solves squared errors: use loss=squared_error or F.mse_loss, or another inference")


def require_linear(row: Sequence[Block]) -> None:
    """Refuse blocks that are not known to be linear.

    Raises:
        UnsupportedModelError: names the module's block.
    """
    for block in row:
        for module in block.modules:
            plain = is_weighted(module) or is_linear(module) or isinstance(module, nn.Identity)
            if not plain or not runs_own_forward(module):
                raise UnsupportedModelError(
                    f"{type(module).__name__} in the block of layer {block.name!r} is not known to be linear, which "
                    "inference='exact' needs; use another inference with a tolerance"
                )


def linear_equilibrium(energy: Energy, error: Tensor, c: float) -> Relaxed:
    """States and errors at the minimum of the energy.

    Args:
        energy: of the batch.
        error: e_L of the feed-forward pass (batch, ...).
        c: lambda times the curvature of the loss.
    """
    outputs, zero = error[0].numel(), error.new_zeros(())
    if not energy.s:
        return Relaxed([], [], zero, 0)
    with torch.enable_grad():
        s = [energy.s[0].new_zeros(outputs, *energy.s[0].shape[1:]).requires_grad_()]
        for block in energy.row[1:-1]:
            s.append(block(s[-1]))
        output = energy.row[-1](s[-1])
    rows = torch.eye(outputs, dtype=error.dtype, device=error.device)
    p = [p_l.flatten(1) for p_l in torch.autograd.grad(output, s, rows.view_as(output))]  # P_l: (outputs, n_l)
    system = rows + c * sum((p_l @ p_l.T for p_l in p), torch.zeros_like(rows))  # I + lambda c S
    top = torch.linalg.solve(system, error.flatten(1).T).T  # e_L at equilibrium: (batch, outputs)
    e = [(top @ p_l).view_as(state) for p_l, state in zip(p, energy.s, strict=True)]
    states, learned = energy.learned_in_errors(e)
    return Relaxed(states, e, zero, 1, learned)
