"""Pooling between a layer and its activation, forwards and backwards, of states whose last rows are imaginary parts."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from apical.core.chain import Stage
from apical.core.pooling import SoftmaxPool2d


def pooled(stage: Stage, v: Tensor, imaginary: int = 0) -> Tensor:
    """`P(v)`, of the state's shape; the last `imaginary` rows are imaginary parts of those before them."""
    if not imaginary or _is_linear(stage):
        for module in stage.after:
            v = module(v)
        return v
    real, z = _split(v, imaginary)
    real, z = pooled(stage, real), _pooled_complex(stage, z)
    return torch.cat((real, z.real, z.imag))


def _is_linear(stage: Stage) -> bool:
    return not any(isinstance(module, SoftmaxPool2d) for module in stage.after)


def _pooled_complex(stage: Stage, z: Tensor) -> Tensor:
    """`P(z)` of complex potentials; averages, which PyTorch has for real numbers only, act on both parts alike."""
    for module in stage.after:
        z = module(z) if isinstance(module, SoftmaxPool2d) else torch.complex(module(z.real), module(z.imag))
    return z


def _split(v: Tensor, imaginary: int) -> tuple[Tensor, Tensor]:
    """Real rows, and complex ones."""
    real = len(v) - 2 * imaginary
    return v[:real], torch.complex(v[real : real + imaginary], v[real + imaginary :])


def unpooled(stage: Stage, signal: Tensor, v: Tensor, imaginary: int = 0, *, conjugate: bool = False) -> Tensor:
    """`signal` through the transposed derivative of P at v; P does not care for a shift of a channel, so v needs no bias.

    Args:
        conjugate: the signal is complex conjugate, and so will the result be.
    """
    if not stage.after:
        return signal
    if not imaginary or _is_linear(stage):  # of a linear P the derivative is real, and the same everywhere
        return _through(partial(pooled, stage), v, signal)
    (real, z), (signal, complex_signal) = _split(v, imaginary), _split(signal, imaginary)
    complex_signal = complex_signal if conjugate else complex_signal.conj()
    pulled = _through(partial(_pooled_complex, stage), z, complex_signal)  # by the conjugate of the derivative
    pulled = pulled if conjugate else pulled.conj()
    return torch.cat((_through(partial(pooled, stage), real, signal), pulled.real, pulled.imag))


def _through(pool: Callable[[Tensor], Tensor], v: Tensor, signal: Tensor) -> Tensor:
    result: Tensor = torch.func.vjp(pool, v)[1](signal)[0]
    return result
