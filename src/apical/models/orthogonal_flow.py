"""Deep networks whose weights follow a flow on the orthogonal group: a depth test in which no gradient decays.

    W_{k+1} = W_k exp(h Omega(W_k)),   Omega skew-symmetric, so that W_k stays orthogonal
    isospectral: H = W^T Q W, Omega = [H, N]: the eigenvalues of H are constant;   gated: Omega = f(W) - f(W)^T

ODEtoODE (Choromanski et al., arXiv 2006.11421) couples `dx/dt = sigma(W_t x)` to such a flow and learns its parameters. Here
the flow is a fixed schedule that is copied into the layers of a chain, with |x| = LeakyReLU(-1) after each. The Jacobian of
the whole network is exactly orthogonal at any depth, and every rule can train it, so any loss with depth is due to the rule.
The Cayley map replaces the exponential.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from apical.errors import ConfigError
from apical.models.mlp import one_width

Flow = Literal["isospectral", "gated", "tied"]


def commutator(h: Tensor, n: Tensor) -> Tensor:
    """Return `[H, N] = H N - N H`; skew-symmetric for symmetric H and N."""
    return h @ n - n @ h


def isospectral(w: Tensor, q: Tensor, n: Tensor) -> Tensor:
    """Return `Omega = [W^T Q W, N]`, all (d, d), Q and N symmetric; under `dW/dt = W Omega` H follows Brockett's flow."""
    return commutator(w.mT @ q @ w, n)


def gated(w: Tensor, a: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return `Omega = sum_i a_i (f_i(W) - f_i(W)^T)` with `f_i(W) = A_i tanh(W B_i)`.

    Args:
        w: (d, d).
        a: (gates,).
        first, second: A and B, (gates, d, d).
    """
    f: Tensor = torch.einsum("i,ijk->jk", a, first @ torch.tanh(w @ second))
    return f - f.mT


def cayley(omega: Tensor, h: float) -> Tensor:
    """Return `(1 - h/2 Omega)^-1 (1 + h/2 Omega)`: orthogonal for skew-symmetric Omega, and exp(h Omega) up to h^3."""
    one = torch.eye(len(omega), dtype=omega.dtype, device=omega.device)
    result: Tensor = torch.linalg.solve(one - h / 2 * omega, one + h / 2 * omega)
    return result


def schedule(w: Tensor, steps: int, velocity: Callable[[Tensor], Tensor], time: float = 1.0) -> list[Tensor]:
    """Return W_0, ..., W_{steps-1} along the flow from w (d, d), in Cayley steps of `time / steps`."""
    weights = [w]
    for _ in range(steps - 1):
        weights.append(weights[-1] @ cayley(velocity(weights[-1]), time / steps))
    return weights


def orthogonal_schedule(width: int, depth: int, kind: Flow = "isospectral") -> list[Tensor]:
    """Return float64 weights of a chain: a random orthogonal start and a flow, both drawn from the global torch RNG.

    Raises:
        ConfigError: the kind is unknown.
    """
    draw = partial(torch.randn, dtype=torch.float64)
    w = nn.init.orthogonal_(torch.empty(width, width, dtype=torch.float64))
    if kind == "tied":
        return schedule(w, depth, torch.zeros_like)
    if kind == "isospectral":
        q, n = (_symmetric(draw(width, width)) for _ in range(2))
        return schedule(w, depth, lambda w: isospectral(w, q, n))
    if kind == "gated":
        a, first, second = draw(2), draw(2, width, width) / width**0.5, draw(2, width, width) / width**0.5
        return schedule(w, depth, lambda w: gated(w, a, first, second))
    raise ConfigError(f'flow must be "isospectral", "gated" or "tied", not {kind!r}')


def _symmetric(matrix: Tensor) -> Tensor:
    """Return `M + M^T`, scaled to a spectrum of order one."""
    return (matrix + matrix.mT) / math.sqrt(2 * len(matrix))


class EulerStep(nn.Module):
    """`x + h |W x|`: (N, width) -> (N, width)."""

    def __init__(self, width: int, h: float) -> None:
        super().__init__()
        self.linear, self.abs, self.h = nn.Linear(width, width, bias=False), nn.LeakyReLU(-1.0), h

    def forward(self, x: Tensor) -> Tensor:
        """The next state."""
        result: Tensor = x + self.h * self.abs(self.linear(x))
        return result


def flow(width: int = 32, depth: int = 50, flow: Flow = "isospectral", residual: bool = False) -> nn.Sequential:
    """Build a chain of `depth` layers of equal width along an orthogonal flow.

    Args:
        width, depth: units per layer and number of layers.
        flow: "isospectral", "gated", or "tied" (the same weight at every depth).
        residual: use Euler steps `x + |W x| / depth` in place of `|W x|`. The singular values of the Jacobian then lie in
            `[(1 - 1/depth)^depth, (1 + 1/depth)^depth]`; otherwise they are all one.

    Raises:
        ConfigError: a size is not positive, or the flow unknown.

    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(4)
    >>> abs(flow(4, 50)(x).norm().item() / x.norm().item() - 1) < 1e-4
    True
    """
    if min(width, depth) < 1:
        raise ConfigError(f"a flow needs a width and a depth of at least 1; got {width} and {depth}")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for k, weight in enumerate(orthogonal_schedule(width, depth, flow), start=1):
        if residual:
            step = EulerStep(width, 1 / depth)
            _set(step.linear, weight)
            layers[f"step{k}"] = step
        else:
            layers[f"linear{k}"], layers[f"abs{k}"] = nn.Linear(width, width), nn.LeakyReLU(-1.0)
            _set(layers[f"linear{k}"], weight)
    return nn.Sequential(layers)


def flow_classifier(in_features: int, widths: Sequence[int], out_features: int) -> nn.Sequential:
    """Build a :func:`flow` of layers of `widths`, which must be equal, between an orthogonal first layer and a readout.

    Its modules are named flatten, linear0, abs0, linear1, abs1, ..., read_out.

    Raises:
        ConfigError: a size is not positive, or the widths differ.

    >>> [name for name, _ in flow_classifier(4, [3], 2).named_children()]
    ['flatten', 'linear0', 'abs0', 'linear1', 'abs1', 'read_out']
    """
    width = one_width("a flow needs layers", in_features, widths, out_features)
    first, last = nn.Linear(in_features, width), nn.Linear(width, out_features)
    for layer in (first, last):
        nn.init.orthogonal_(layer.weight)
        nn.init.zeros_(layer.bias)
    chain = flow(width, len(widths))
    begin = [("flatten", nn.Flatten()), ("linear0", first), ("abs0", nn.LeakyReLU(-1.0))]
    return nn.Sequential(OrderedDict([*begin, *chain.named_children(), ("read_out", last)]))


def _set(layer: nn.Module, weight: Tensor) -> None:
    with torch.no_grad():
        layer.get_parameter("weight").copy_(weight)
        for name, bias in layer.named_parameters():
            if name == "bias":
                bias.zero_()
