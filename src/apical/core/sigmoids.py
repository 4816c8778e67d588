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


def complex_sigmoid(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of `sigma(a + ib)`, without overflow; several times faster than with complex numbers.

    >>> re, im = complex_sigmoid(torch.tensor([-200.0, 1.0]), torch.tensor([1.0, 2.0]))
    >>> torch.allclose(torch.complex(re, im)[1], torch.sigmoid(torch.tensor(1 + 2j))), float(re[0])
    (True, 0.0)
    """
    t = torch.exp(-a.abs())
    turned = t * torch.cos(b)
    square = t * t
    scale = (1 + square + 2 * turned).reciprocal_()
    return torch.where(a >= 0, torch.ones_like(a), square).add_(turned).mul_(scale), t.mul_(torch.sin(b)).mul_(scale)


class DoubleSiLU(nn.Module):
    """`v sigma(v) / 2 + (1 - v/2) sigma(v - 2)`, an analytic `clip(v/2, 0, 1)`.

    >>> DoubleSiLU()(torch.tensor([1.0]))
    tensor([0.5000])
    """

    def forward(self, v: Tensor) -> Tensor:
        """Element-wise; v may be complex."""
        half = v / 2
        return half * torch.sigmoid(v) + (1 - half) * torch.sigmoid(v - 2)
