"""Activations of equilibrium networks: bounded, and analytic, so that states can be complex."""

import torch
from torch import Tensor, nn


class ShiftedSigmoid(nn.Module):
    """`sigma(4 v - 2)`, an analytic `clip(v, 0, 1)`: its steepest point is v = 1/2, with slope 1.

    >>> ShiftedSigmoid()(torch.tensor([0.0, 0.5, 1.0]))
    tensor([0.1192, 0.5000, 0.8808])
    """

    def forward(self, v: Tensor) -> Tensor:
        """Element-wise; v may be complex."""
        return torch.sigmoid(torch.add(v.new_full((), -2.0), v, alpha=4))


class DoubleSiLU(nn.Module):
    """`v sigma(v) / 2 + (1 - v/2) sigma(v - 2)`, an analytic `clip(v/2, 0, 1)`.

    >>> DoubleSiLU()(torch.tensor([1.0]))
    tensor([0.5000])
    """

    def forward(self, v: Tensor) -> Tensor:
        """Element-wise; v may be complex."""
        half = v / 2
        return half * torch.sigmoid(v) + (1 - half) * torch.sigmoid(v - 2)
