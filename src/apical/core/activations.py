"""Element-wise activations: derivative, and the difference `phi(v + d) - phi(v)` without cancellation.

Control signals are small beside the potentials they act on. Taken as a difference of two rates, their effect loses four
digits in float32; the identities here keep them all. Activations without one of their own fall back to the plain
difference.
"""

from copy import copy
from functools import singledispatch

import torch
from torch import Tensor, nn

from apical.core.sigmoids import ShiftedSigmoid
from apical.core.units import ACTIVATIONS

ELEMENTWISE = tuple(kind for kind in ACTIVATIONS if kind not in (nn.Softmax, nn.PReLU, nn.RReLU))
"""Activations that act on each neuron alone, with neither parameters nor randomness."""


@singledispatch
def derivative(activation: nn.Module, v: Tensor, r: Tensor) -> Tensor:
    """`phi'(v)`, of v's shape, given also `r = phi(v)`; at a kink the one-sided value that autograd takes."""
    slope: Tensor = torch.func.jvp(plain(activation), (v,), (torch.ones_like(v),))[1]
    return slope


@singledispatch
def pulled_back(activation: nn.Module, v: Tensor, r: Tensor, signal: Tensor) -> Tensor:
    """`phi'(v) * signal`, given also `r = phi(v)`; in one sweep over memory where PyTorch has one."""
    return signal * derivative(activation, v, r)


@singledispatch
def difference(activation: nn.Module, v: Tensor, r: Tensor, d: Tensor) -> Tensor:
    """`phi(v + d) - phi(v)`, of v's shape, given also `r = phi(v)`."""
    moved: Tensor = plain(activation)(v + d)
    return moved - r


def plain(activation: nn.Module) -> nn.Module:
    """The activation, not in place."""
    if not getattr(activation, "inplace", False):
        return activation
    twin = copy(activation)
    twin.inplace = False  # type: ignore[assignment]
    return twin


@derivative.register
def _(activation: nn.Identity, v: Tensor, r: Tensor) -> Tensor:
    return torch.ones_like(v)


@derivative.register
def _(activation: nn.Tanh, v: Tensor, r: Tensor) -> Tensor:
    return 1 - r * r


@derivative.register
def _(activation: nn.Sigmoid, v: Tensor, r: Tensor) -> Tensor:
    return r - r * r


@derivative.register
def _(activation: ShiftedSigmoid, v: Tensor, r: Tensor) -> Tensor:
    return 4 * (r - r * r)


@derivative.register
def _(activation: nn.ReLU, v: Tensor, r: Tensor) -> Tensor:
    return (v > 0).to(v.dtype)


@derivative.register
def _(activation: nn.LeakyReLU, v: Tensor, r: Tensor) -> Tensor:
    return torch.where(v > 0, torch.ones_like(v), activation.negative_slope)


@derivative.register
def _(activation: nn.ELU, v: Tensor, r: Tensor) -> Tensor:
    return torch.where(v > 0, 1.0, r + activation.alpha).to(v.dtype)


@pulled_back.register
def _(activation: nn.Identity, v: Tensor, r: Tensor, signal: Tensor) -> Tensor:
    return signal


@pulled_back.register
def _(activation: nn.Tanh, v: Tensor, r: Tensor, signal: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten.tanh_backward(signal, r)
    return result


@pulled_back.register
def _(activation: nn.Sigmoid, v: Tensor, r: Tensor, signal: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten.sigmoid_backward(signal, r)
    return result


@pulled_back.register
def _(activation: nn.ReLU, v: Tensor, r: Tensor, signal: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten.threshold_backward(signal, r, 0)
    return result


@pulled_back.register
def _(activation: nn.ELU, v: Tensor, r: Tensor, signal: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten.elu_backward(signal, activation.alpha, 1.0, 1.0, True, r)
    return result


@difference.register
def _(activation: nn.Identity, v: Tensor, r: Tensor, d: Tensor) -> Tensor:
    return d


@difference.register
def _(activation: nn.Tanh, v: Tensor, r: Tensor, d: Tensor) -> Tensor:
    return _tanh_difference(v, r, d)


@difference.register
def _(activation: nn.Sigmoid, v: Tensor, r: Tensor, d: Tensor) -> Tensor:
    return _tanh_difference(v / 2, 2 * r - 1, d / 2) / 2


@difference.register
def _(activation: ShiftedSigmoid, v: Tensor, r: Tensor, d: Tensor) -> Tensor:
    return _tanh_difference(2 * v - 1, 2 * r - 1, 2 * d) / 2


@difference.register
def _(activation: nn.ReLU, v: Tensor, r: Tensor, d: Tensor) -> Tensor:
    return _relu_difference(v, d)


@difference.register
def _(activation: nn.LeakyReLU, v: Tensor, r: Tensor, d: Tensor) -> Tensor:
    slope = activation.negative_slope
    return slope * d + (1 - slope) * _relu_difference(v, d)


def _tanh_difference(v: Tensor, r: Tensor, d: Tensor) -> Tensor:
    """`tanh(v + d) - tanh(v) = tanh(d) (1 - r tanh(v + d)) = s (1 - r^2) / (1 + r s)` with `s = tanh(d)`, `r = tanh(v)`.

    The last form spares one hyperbolic tangent of two where d does not undo v, and in float32 both where d is so small that
    `s = d - d^3/3` (the next term is `2 d^5/15`). On a GPU, and in compiled graphs, they cost less than looking would.
    """
    if d.is_cpu and d.numel() and not torch.compiler.is_compiling():
        low, high = torch.aminmax(d)
        largest = max(-low.item(), high.item())
        if largest < 0.5:
            small = largest < 0.02 and d.dtype == torch.float32
            s = torch.addcmul(d, d * d, d, value=-1 / 3) if small else torch.tanh(d)
            one = d.new_ones(())
            return torch.addcmul(one, r, r, value=-1).mul_(s).div_(torch.addcmul(one, r, s))
    return torch.addcmul(d.new_ones(()), r, torch.tanh(v + d), value=-1).mul_(torch.tanh(d))


def _relu_difference(v: Tensor, d: Tensor) -> Tensor:
    return torch.where(v > 0, torch.maximum(d, -v), (v + d).clamp_min(0))
