"""Pooling between a layer and its activation, forwards and backwards, of states whose last rows are imaginary parts."""

import torch
from torch import Tensor

from apical.core.chain import Stage
from apical.core.pooling import SoftmaxPool2d


def pooled(stage: Stage, v: Tensor, imaginary: int = 0) -> Tensor:
    """`P(v)`, of the state's shape; the last `imaginary` rows are imaginary parts of those before them."""
    if imaginary and any(isinstance(module, SoftmaxPool2d) for module in stage.after):
        real, z = _split(v, imaginary)
        for module in stage.after:
            real, z = module(real), module(z)
        return torch.cat((real, z.real, z.imag))
    for module in stage.after:
        v = module(v)
    return v


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

    def through(v: Tensor, signal: Tensor) -> Tensor:
        result: Tensor = torch.func.vjp(lambda each: pooled(stage, each), v)[1](signal)[0]
        return result

    if not imaginary:
        return through(v, signal)
    (real, z), (signal, complex_signal) = _split(v, imaginary), _split(signal, imaginary)
    pulled = through(z, complex_signal if conjugate else complex_signal.conj())  # by the conjugate of the derivative
    pulled = pulled if conjugate else pulled.conj()
    return torch.cat((through(real, signal), pulled.real, pulled.imag))
