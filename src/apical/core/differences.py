"""`phi(v + d) - phi(v)` of specific activations, without cancellation: (activation, v, r, d) -> v's shape, `r = phi(v)`.

Control signals are small compared to potentials they act on. Taken as a difference of two rates, their effect loses four
digits in float32 and more; the identities here keep them all.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.activations import plain
from apical.core.sigmoids import DoubleSiLU, HalfClip, ShiftedSigmoid

Difference: TypeAlias = Callable[[Any, Tensor, Tensor, Tensor], Tensor]

SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946

GAUSS = tuple(
    (0.5 + sign * 0.5 * node, 0.5 * weight)
    for node, weight in (
        (0.0, 128 / 225),
        (0.5384693101056831, 0.47862867049936647),
        (0.906179845938664, 0.23692688505618908),
    )
    for sign in ((1, -1) if node else (1,))
)
"""Nodes and weights of five-point Gauss-Legendre quadrature on [0, 1]."""


DIFFERENCES: dict[type[nn.Module], Difference] = {
    nn.Identity: lambda a, v, r, d: d,
    nn.Tanh: lambda a, v, r, d: _tanh_difference(v, r, d),
    nn.Sigmoid: lambda a, v, r, d: _tanh_difference(v / 2, 2 * r - 1, d / 2) / 2,
    ShiftedSigmoid: lambda a, v, r, d: _tanh_difference(2 * v - 1, 2 * r - 1, 2 * d) / 2,
    nn.ReLU: lambda a, v, r, d: _relu_difference(v, d),
    nn.Hardtanh: lambda a, v, r, d: _clip_difference(v, d, a.min_val, a.max_val),
    nn.ReLU6: lambda a, v, r, d: _clip_difference(v, d, a.min_val, a.max_val),
    nn.Hardsigmoid: lambda a, v, r, d: _clip_difference(v, d, -3.0, 3.0) / 6,
    HalfClip: lambda a, v, r, d: _clip_difference(v, d, 0.0, 2.0) / 2,
    nn.Softshrink: lambda a, v, r, d: d - _clip_difference(v, d, -a.lambd, a.lambd),
    nn.Hardswish: lambda a, v, r, d: d * F.hardsigmoid(v + d) + v * _clip_difference(v, d, -3.0, 3.0) / 6,
    nn.ELU: lambda a, v, r, d: _elu_difference(v, d, a.alpha),
    nn.CELU: lambda a, v, r, d: a.alpha * _elu_difference(v / a.alpha, d / a.alpha, 1.0),
    nn.SELU: lambda a, v, r, d: SELU_SCALE * _elu_difference(v, d, SELU_ALPHA),
    nn.LogSigmoid: lambda a, v, r, d: -_softplus_difference(-v, -d),
    nn.SiLU: lambda a, v, r, d: _silu_difference(v, d),
    DoubleSiLU: lambda a, v, r, d: (_silu_difference(v, d) - _silu_difference(v - 2, d)) / 2,
}
"""By type of activation; longer ones are below."""


def _of(*kinds: type[nn.Module]) -> Callable[[Difference], Difference]:
    def note(formula: Difference) -> Difference:
        DIFFERENCES.update(dict.fromkeys(kinds, formula))
        return formula

    return note


@_of(nn.LeakyReLU)
def _(activation: nn.LeakyReLU, v: Tensor, r: Tensor, d: Tensor) -> Tensor:
    slope = activation.negative_slope
    return slope * d + (1 - slope) * _relu_difference(v, d)


@_of(nn.Hardshrink)
def _(activation: nn.Hardshrink, v: Tensor, r: Tensor, d: Tensor) -> Tensor:
    moved = plain(activation)(v + d)
    return torch.where((r != 0) & (moved != 0), d, moved - r)


@_of(nn.Threshold)
def _(activation: nn.Threshold, v: Tensor, r: Tensor, d: Tensor) -> Tensor:
    both = (v > activation.threshold) & (v + d > activation.threshold)
    return torch.where(both, d, plain(activation)(v + d) - r)


@_of(nn.Softplus)
def _(activation: nn.Softplus, v: Tensor, r: Tensor, d: Tensor) -> Tensor:
    beta, moved = activation.beta, v + d
    curved = (beta * v <= activation.threshold) & (beta * moved <= activation.threshold)
    linear = (beta * v > activation.threshold) & (beta * moved > activation.threshold)
    change = _softplus_difference(beta * v, beta * d) / beta
    return torch.where(curved, change, torch.where(linear, d, activation(moved) - r))


@_of(nn.Softsign)
def _(activation: nn.Softsign, v: Tensor, r: Tensor, d: Tensor) -> Tensor:
    moved = v + d
    crossing = torch.where(v * moved < 0, 2 * v.abs() * moved, 0.0)
    return (d + crossing) / ((1 + v.abs()) * (1 + moved.abs()))


@_of(nn.Tanhshrink)
def _(activation: nn.Tanhshrink, v: Tensor, r: Tensor, d: Tensor) -> Tensor:
    s, t, square = torch.tanh(d), torch.tanh(v), d * d
    series = d * square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835 - square * 1382 / 155925))))
    rest = torch.where(d.abs() < 0.1, series, d - s)  # d - tanh d
    change = (rest + t * s * (d + t)) / (1 + t * s)
    return torch.where(d.abs() < 1, change, activation(v + d) - r)


@_of(nn.Mish)
def _(activation: nn.Mish, v: Tensor, r: Tensor, d: Tensor) -> Tensor:
    soft, rise = F.softplus(v), _softplus_difference(v, d)
    gate = torch.tanh(soft)
    change = _tanh_difference(soft, gate, rise)
    return d * (gate + change) + v * change


@_of(nn.GELU)
def _(activation: nn.GELU, v: Tensor, r: Tensor, d: Tensor) -> Tensor:
    moved = v + d
    if activation.approximate == "tanh":  # v sigma(2 g(v)) with a cubic g
        scale = 2 * math.sqrt(2 / math.pi)
        inner = scale * (v + 0.044715 * v**3)
        rise = scale * d * (1 + 0.044715 * (3 * v * moved + d * d))
        gate = torch.sigmoid(inner)
        change = _tanh_difference(inner / 2, 2 * gate - 1, rise / 2) / 2
        return d * torch.sigmoid(inner + rise) + v * change
    rise = torch.zeros_like(v)  # increase of the normal distribution function, from its density
    for node, weight in GAUSS:
        rise = rise + weight * torch.exp(-((v + node * d) ** 2) / 2)
    small = d * rise / math.sqrt(2 * math.pi)
    below = torch.special.ndtr(v)
    small = d * torch.special.ndtr(moved) + v * small
    return torch.where(d.abs() < 0.5, small, moved * torch.special.ndtr(moved) - v * below)


def _clip_difference(v: Tensor, d: Tensor, low: float, high: float) -> Tensor:
    """Of `c = clip(v, low, high)`: how much of d, after the distance of v from the interval, falls inside."""
    c = v.clamp(low, high)
    return (v - c).add_(d).clamp_(low - c, high - c)


def _elu_difference(v: Tensor, d: Tensor, alpha: float) -> Tensor:
    """`relu` rises by its own difference, and `alpha (e^w - 1)`, w = min(v, 0), by `alpha e^w (e^dw - 1)`."""
    rise = _relu_difference(v, d)
    return rise + alpha * v.clamp_max(0).exp() * torch.expm1(torch.where((v > 0) & (v + d > 0), 0.0, d - rise))


def _softplus_difference(v: Tensor, d: Tensor) -> Tensor:
    """`log(1 + e^(v+d)) - log(1 + e^v) = log1p(sigma(v) (e^d - 1))`; the plain difference if e^d is too large."""
    change = torch.log1p(torch.sigmoid(v) * torch.expm1(d.clamp_max(20)))
    return torch.where(d > 20, F.softplus(v + d) - F.softplus(v), change)


def _silu_difference(v: Tensor, d: Tensor) -> Tensor:
    """For `v sigma(v)`, by the product rule: `d sigma(v+d) + v (sigma(v+d) - sigma(v))`."""
    change = _tanh_difference(v / 2, 2 * torch.sigmoid(v) - 1, d / 2) / 2
    return d * torch.sigmoid(v + d) + v * change


def _tanh_difference(v: Tensor, r: Tensor, d: Tensor) -> Tensor:
    """`tanh(v + d) - tanh(v) = tanh(d) (1 - r tanh(v + d)) = s (1 - r^2) / (1 + r s)` with `s = tanh(d)`, `r = tanh(v)`.

    The last form saves one of two hyperbolic tangents if d does not cancel v, and in float32 both if d is so small that
    `s = d - d^3/3` (the next term is `2 d^5/15`). On a GPU and in compiled graphs, they cost less than the check would.
    """
    if d.is_cpu and d.numel() and not torch.compiler.is_compiling():
        low, high = torch.aminmax(d)
        largest = max(-low.item(), high.item())
        if largest < 0.5:
            small = largest < 0.02 and d.dtype == torch.float32
            s = torch.addcmul(d, d * d, d, value=-1 / 3) if small else torch.tanh(d)
            one = d.new_ones(())
            # (1 - r^2) s / (1 + r s)
            return torch.addcmul(one, r, r, value=-1).mul_(s).div_(torch.addcmul(one, r, s))
    return torch.addcmul(d.new_ones(()), r, torch.tanh(v + d), value=-1).mul_(torch.tanh(d))  # (1 - r tanh(v + d)) tanh(d)


def _relu_difference(v: Tensor, d: Tensor) -> Tensor:
    """`max(d + min(v, 0), -max(v, 0))`: avoids an elementwise choice, which on a CPU costs more than all the rest."""
    return torch.maximum(v.clamp_max(0).add_(d), v.clamp_min(0).neg_())
