"""Requirements of complex states on a network: analytic losses, pooling and activations."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.activations import complex_parts
from apical.core.chain import Stage
from apical.core.losses import squared_error
from apical.core.pooling import SoftmaxPool2d
from apical.errors import ConfigError, UnsupportedModelError


def _softmax_error(parts: Tensor, label: Tensor, q: int) -> Tensor:
    p = len(parts) - q
    real = parts[: p - q].softmax(-1) - label
    if q == 0:
        return real
    shifted = parts[p - q : p] - parts[p - q : p].amax(-1, keepdim=True)
    power = torch.polar(shifted.exp(), parts[p:])  # exp(o) of the complex phases, up to a real factor: (Q, batch, outputs)
    share = power / power.sum(-1, keepdim=True)  # the softmax
    return torch.cat((real, share.real - label, share.imag))


def _distance(parts: Tensor, label: Tensor, q: int) -> Tensor:
    p = len(parts) - q
    return torch.cat((parts[:p] - label, parts[p:])) if q else parts - label


def _mean_distance(parts: Tensor, label: Tensor, q: int) -> Tensor:
    """Error of `F.mse_loss`, which is a mean over outputs too."""
    return _distance(parts, label, q) * (2 / label.shape[-1])


HOLOMORPHIC: dict[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor, int], Tensor]] = {
    F.cross_entropy: _softmax_error,
    squared_error: _distance,
    F.mse_loss: _mean_distance,
}
"""Losses whose error at the output is known for complex outputs too: (parts, one-hot labels, Q) -> parts."""


def is_holomorphic(activation: nn.Module) -> bool:
    """Whether an activation takes complex states and has the same derivative in every direction (Cauchy-Riemann)."""
    x = torch.tensor([-2.1, -0.7, 0.3, 0.9, 1.6, 2.8], dtype=torch.float64, device="cpu")
    z, h = torch.complex(x, 0.1 * x.flip(0)), 1e-6  # points off the real axis, and the step of central differences

    def phi(z: Tensor) -> Tensor:
        return torch.complex(*complex_parts(activation, z.real, z.imag))

    try:
        along, across = ((phi(z + step) - phi(z - step)) / (2 * step) for step in (h, 1j * h))
        same = (phi(torch.complex(x, torch.zeros_like(x))) - activation(x)).abs().amax()
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return bool((along - across).abs().amax() < 1e-6) and bool(same < 1e-12)


def require_complex(stages: Sequence[Stage], loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Refuse modules and losses that do not support complex states.

    Raises:
        ConfigError: the loss.
        UnsupportedModelError: pooling or an activation; the layer is named.
    """
    if loss not in HOLOMORPHIC:
        known = ", ".join(getattr(loss, "__name__", "?") for loss in HOLOMORPHIC)
        raise ConfigError(f"complex nudges need a loss whose error is known for complex outputs: {known}; or points=2")
    for stage in stages:
        bent = [module for module in stage.before if bends(module)] + list(filter(is_max, stage.after))
        if bent:
            raise UnsupportedModelError(
                f"layer {stage.name!r} is next to {type(bent[0]).__name__}, which does not support complex states: use "
                "average pooling, or SoftmaxPool2d between layer and activation, or points=2"
            )
        if not is_holomorphic(stage.activation):
            raise UnsupportedModelError(
                f"the activation after layer {stage.name!r} ({type(stage.activation).__name__}) is not analytic on "
                "complex states: use ShiftedSigmoid, DoubleSiLU or tanh, or points=2"
            )


def is_max(module: nn.Module) -> bool:
    """Whether a module takes maxima."""
    return isinstance(module, nn.modules.pooling._MaxPoolNd)


def bends(module: nn.Module) -> bool:
    """Whether a module next to a layer is not linear."""
    return is_max(module) or isinstance(module, SoftmaxPool2d)


def pooled(stage: Stage, v: Tensor, imaginary: int = 0) -> Tensor:
    """`P(v)`, of the state's shape; the last `imaginary` rows are imaginary parts of the rows before them."""
    if not imaginary or _is_linear(stage):
        return stage.pooled(v)
    real, z = _split(v, imaginary)
    real, z = pooled(stage, real), _pooled_complex(stage, z)
    return torch.cat((real, z.real, z.imag))


def _is_linear(stage: Stage) -> bool:
    return not any(isinstance(module, SoftmaxPool2d) for module in stage.after)


def _pooled_complex(stage: Stage, z: Tensor) -> Tensor:
    """`P(z)` of complex potentials; averages, which PyTorch has only for real numbers, act on both parts separately."""
    for module in stage.after:
        z = module(z) if isinstance(module, SoftmaxPool2d) else torch.complex(module(z.real), module(z.imag))
    return z


def _split(v: Tensor, imaginary: int) -> tuple[Tensor, Tensor]:
    """Real rows, and complex ones."""
    real = len(v) - 2 * imaginary
    return v[:real], torch.complex(v[real : real + imaginary], v[real + imaginary :])


def unpooled(stage: Stage, signal: Tensor, v: Tensor, imaginary: int = 0, *, conjugate: bool = False) -> Tensor:
    """`signal` through the transposed derivative of P at v; a channel's shift does not change it, so v needs no bias.

    Args:
        conjugate: the signal is complex conjugate, and so is the result.
    """
    if not stage.after:
        return signal
    if not imaginary or _is_linear(stage):  # the derivative of a linear P is real and constant
        return _through(partial(pooled, stage), v, signal)
    (real, z), (signal, complex_signal) = _split(v, imaginary), _split(signal, imaginary)
    complex_signal = complex_signal if conjugate else complex_signal.conj()
    pulled = _through(partial(_pooled_complex, stage), z, complex_signal)  # by the conjugate of the derivative
    pulled = pulled if conjugate else pulled.conj()
    return torch.cat((_through(partial(pooled, stage), real, signal), pulled.real, pulled.imag))


def _through(pool: Callable[[Tensor], Tensor], v: Tensor, signal: Tensor) -> Tensor:
    result: Tensor = torch.func.vjp(pool, v)[1](signal)[0]
    return result
