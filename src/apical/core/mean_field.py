"""Mean field of a wide random network: how the variance of pre-activations and the length of errors change with depth.

    q <- s_w^2 E[phi(sqrt(q) z)^2] + s_b^2,   chi = s_w^2 E[phi'(sqrt(q) z)^2],   z standard normal

At chi = 1 errors keep their length (Poole et al., arXiv 1606.05340; Schoenholz et al., arXiv 1611.01232).
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from apical.errors import ConfigError

NODES = 60
Phi = Callable[[Tensor], Tensor]
_z, _w = np.polynomial.hermite_e.hermegauss(NODES)
_Z, _WEIGHT = torch.from_numpy(_z), torch.from_numpy(_w / math.sqrt(2 * math.pi))


def moments(phi: Phi, q: float) -> tuple[float, float]:
    """Return `E[phi(sqrt(q) z)^2]` and `E[phi'(sqrt(q) z)^2]`, by Gauss-Hermite quadrature.

    >>> [round(value, 6) for value in moments(lambda v: v, 2.0)]
    [2.0, 1.0]
    """
    with torch.enable_grad():
        v = (math.sqrt(q) * _Z).requires_grad_()
        r = phi(v)
        (slope,) = torch.autograd.grad(r.sum(), v)
    return float(_WEIGHT @ r.detach().square()), float(_WEIGHT @ slope.square())


def fixed_point(phi: Phi, s_w2: float, s_b2: float, steps: int = 100_000, tolerance: float = 1e-14) -> float:
    """Return the variance q* at which pre-activations settle, from q = 1.

    Raises:
        ConfigError: they do not settle.
    """
    q = 1.0
    for _ in range(steps):
        following = s_w2 * moments(phi, q)[0] + s_b2
        if not following < 1e12:
            break
        if abs(following - q) <= tolerance * max(q, 1e-300):
            return following
        q = following
    raise ConfigError(f"the variance of pre-activations does not settle at s_w^2 {s_w2:g}, s_b^2 {s_b2:g}")


def critical(phi: Phi, bias_std: float) -> tuple[float, float]:
    """Return the weight scale and bias scale (s_w, s_b) at which chi = 1.

    Where the slope does not depend on the scale (ReLU, LeakyReLU, |x|), there are no biases: with them variances would grow
    with depth without bound.

    Raises:
        ConfigError: no scale of the weights does it with biases of this scale.

    >>> [round(s, 6) for s in critical(torch.relu, 0.05)]
    [1.414214, 0.0]
    """
    slopes = [moments(phi, q)[1] for q in (0.25, 1.0, 4.0)]
    if max(slopes) - min(slopes) <= 1e-12 * max(slopes):
        if not slopes[0]:
            raise ConfigError("the activation is constant: no weight scale preserves the length of errors")
        return 1 / math.sqrt(slopes[0]), 0.0

    def bias_variance(q: float) -> float:  # of biases with which pre-activations settle at q, where chi = 1
        square, slope = moments(phi, q)
        return q - square / slope if slope > 0 else math.inf

    low, high = 1e-12, 1.0
    while bias_variance(high) < bias_std**2:
        low, high = high, 2 * high
        if high > 1e6:
            raise ConfigError(f"no weight scale preserves the length of errors with biases of scale {bias_std:g}")
    for _ in range(200):
        q = math.sqrt(low * high)
        low, high = (q, high) if bias_variance(q) < bias_std**2 else (low, q)
    return 1 / math.sqrt(moments(phi, high)[1]), bias_std
