"""Activations of equilibrium networks: bounded, and analytic, so that states can be complex."""

import torch
from torch import Tensor, nn

from apical.core.activations import TYPES, Activation


class ShiftedSigmoid(nn.Module):
    """`sigma(4 v - 2)`, an analytic `clip(v, 0, 1)`: its steepest point is v = 1/2, with slope 1.

    >>> ShiftedSigmoid()(torch.tensor([0.0, 0.5, 1.0]))
    tensor([0.1192, 0.5000, 0.8808])
    """

    def forward(self, v: Tensor) -> Tensor:
        """Element-wise; v may be complex."""
        return torch.sigmoid(torch.add(v.new_full((), -2.0), v, alpha=4))


class HalfClip(nn.Module):
    """`clip(v/2, 0, 1)`, of the convolutional networks of arXiv 2006.03824.

    >>> HalfClip()(torch.tensor([-1.0, 1.0, 3.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """

    def forward(self, v: Tensor) -> Tensor:
        """Element-wise."""
        return (v / 2).clamp(0.0, 1.0)


def complex_shifted_sigmoid(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the real and imaginary parts of `sigma(4 z - 2)` at z = a + ib, by real functions, which are faster.

    With T = tanh(2a - 1) and t = tan(2b): `1/2 + (T (1 + t^2) + i t (1 - T^2)) / (2 + 2 T^2 t^2)`.

    >>> re, im = complex_shifted_sigmoid(torch.tensor([-9.0, 1.0]), torch.tensor([1.0, 2.0]))
    >>> expected = ShiftedSigmoid()(torch.tensor([-9.0 + 1.0j, 1.0 + 2.0j]))
    >>> torch.allclose(torch.complex(re, im), expected, atol=1e-6)
    True
    """
    hyperbolic, circular = torch.add(a.new_full((), -1.0), a, alpha=2).tanh_(), (2 * b).tan_()
    squares = hyperbolic * hyperbolic, circular * circular
    scale = torch.addcmul(a.new_ones(()), *squares).reciprocal_().mul_(0.5)
    real = squares[1].add_(1).mul_(hyperbolic).mul_(scale).add_(0.5)
    return real, squares[0].neg_().add_(1).mul_(circular).mul_(scale)


class DoubleSiLU(nn.Module):
    """`v sigma(v) / 2 + (1 - v/2) sigma(v - 2)`, an analytic `clip(v/2, 0, 1)`.

    >>> DoubleSiLU()(torch.tensor([1.0]))
    tensor([0.5000])
    """

    def forward(self, v: Tensor) -> Tensor:
        """Element-wise; v may be complex."""
        half = v / 2
        return half * torch.sigmoid(v) + (1 - half) * torch.sigmoid(v - 2)


TYPES |= {kind: Activation(kind.forward) for kind in (DoubleSiLU, HalfClip)}
TYPES[ShiftedSigmoid] = Activation(
    ShiftedSigmoid.forward,
    derivative=lambda _, v, r: 4 * (r - r * r),
    complex_parts=lambda _, a, b: complex_shifted_sigmoid(a, b),
)
