"""Odd modules, such as people write: each is what some rule once took for something else.

Every builder makes a module from (batch, 8) to (batch, 8) with at least one weighted layer in it. A rule trains a network
of them as it says (:func:`apical.testing.check_model`), or refuses it by an error that quotes the name of a module.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

D = 8
"""Neurons of every population."""


class Masked(nn.Linear):
    """Half of the weights are held at zero by a mask, as in a masked autoencoder."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__(D, D)
        self.register_buffer("mask", torch.ones(D, D).tril())

    def forward(self, x: Tensor) -> Tensor:
        """`(W * mask) x`."""
        return F.linear(x, self.weight * self.mask, self.bias)


class Standardised(nn.Linear):
    """Each neuron's weights have mean zero and variance one."""

    def forward(self, x: Tensor) -> Tensor:
        """`(W - mean) / deviation x`."""
        centred = self.weight - self.weight.mean(1, keepdim=True)
        return F.linear(x, centred / (centred.std(1, keepdim=True) + 1e-5), self.bias)


class Scaled(nn.Linear):
    """Twice what a Linear does."""

    def forward(self, x: Tensor) -> Tensor:
        """`2 (W x + b)`."""
        return super().forward(x) * 2


class Quantised(nn.Linear):
    """Weights rounded in the forward pass, with the gradient of those that are not."""

    def forward(self, x: Tensor) -> Tensor:
        """`round(W) x`."""
        rounded = (self.weight * 16).round() / 16
        return F.linear(x, self.weight + (rounded - self.weight).detach(), self.bias)


class LowRank(nn.Linear):
    """A frozen weight and a trained product of two thin matrices."""

    def __init__(self) -> None:
        super().__init__(D, D)
        self.weight.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, D) / 3), nn.Parameter(torch.randn(D, 2) / 3)

    def forward(self, x: Tensor) -> Tensor:
        """`(W + U D) x`."""
        return F.linear(x, self.weight + self.up @ self.down, self.bias)


class Single(nn.Linear):
    """Keeps its weight in single precision and computes in that of its input."""

    def __init__(self) -> None:
        super().__init__(D, D)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Single":
        super()._apply(lambda t: fn(t).float() if t.is_floating_point() else fn(t), recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, x: Tensor) -> Tensor:
        """`W x`."""
        assert self.bias is not None
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class StandardisedConv(nn.Conv1d):
    """A convolution whose kernels have mean zero."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolution with the centred kernel."""
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2), keepdim=True), self.bias)  # type: ignore[no-any-return]


class Wrapped(nn.Module):
    """Calls its layer in an unusual way.

    Args:
        way: `way(layer, x)`.
    """

    def __init__(self, layer: nn.Module, way: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.way = layer, way

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 8) -> (batch, 8)."""
        return self.way(self.layer, x)


class TwoNames(nn.Module):
    """One layer under two names, called by both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(D, D)
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 8) -> (batch, 8)."""
        return self.second(self.act(self.first(x)))  # type: ignore[no-any-return]


class Tied(TwoNames):
    """Two layers with one weight tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(D, D)
        self.second.weight = self.first.weight


class Stream(nn.Module):
    """A pre-activation residual block: the sum stays without an activation.

    Args:
        keep: probability with which the branch is kept in training; the draw is one for the batch.
    """

    def __init__(self, keep: float = 1.0) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = nn.LayerNorm(D), nn.Linear(D, D), nn.GELU(), nn.Linear(D, D)
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        """`x + f(x)`."""
        if self.training and self.keep < 1 and float(torch.rand(())) > self.keep:
            return x
        return x + self.down(self.act(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Experts(nn.Module):
    """Two experts and a gate between them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """A mixture by the gate's softmax."""
        share = self.gate(x).softmax(-1)
        first, second = (share[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
        return first + second  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """A hand-written recurrent network over the features, four steps of two."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.again, self.act = nn.Linear(2, D), nn.Linear(D, D), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 8) -> (batch, 8)."""
        hidden = x.new_zeros(len(x), D)
        for part in x.chunk(4, 1):
            hidden = self.act(self.read(part) + self.again(hidden))
        return hidden


class Attention(nn.Module):
    """Hand-written attention over four tokens of two features."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(2, 6), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 8) -> (batch, 8)."""
        q, k, v = self.qkv(x.view(-1, 4, 2)).chunk(3, -1)
        return x + self.out((q @ k.transpose(1, 2)).softmax(-1) @ v).flatten(1)  # type: ignore[no-any-return]


class Gated(nn.Module):
    """One layer's output times another's."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        """`V x * sigmoid(G x)`."""
        return self.value(x) * self.gate(x).sigmoid()  # type: ignore[no-any-return]


class Orphan(nn.Module):
    """A weight that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.layer = nn.Parameter(torch.randn(D, D) / 3), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 8) -> (batch, 8)."""
        return self.layer(torch.tanh(x @ self.matrix))  # type: ignore[no-any-return]


def _pruned() -> nn.Module:
    layer = nn.Linear(D, D).double()
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


def _hooked(pre: bool) -> nn.Module:
    layer = nn.Linear(D, D)
    if pre:
        layer.register_forward_pre_hook(lambda layer, args: (args[0] / 2,))
    else:
        layer.register_forward_hook(lambda layer, args, output: 2 * output)
    return layer


def _frozen(layer: nn.Linear, weight_only: bool = False) -> nn.Module:
    layer.weight.requires_grad_(False)
    if not weight_only:
        layer.bias.requires_grad_(False)
    return layer


def _tokens(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.view(-1, 2, 4)).flatten(1)  # type: ignore[no-any-return]


def _dense(way: Callable[[Any, Tensor], Tensor], *behind: nn.Module) -> nn.Module:
    """A dense layer and what follows it, called in an unusual way."""
    layer = nn.Linear(D, D)
    return Wrapped(nn.Sequential(layer, *behind) if behind else layer, way)


ODD: dict[str, Callable[[], nn.Module]] = {
    "masked": Masked,
    "standardised": lambda: Standardised(D, D),
    "scaled": lambda: Scaled(D, D),
    "quantised": lambda: Quantised(D, D),
    "low rank": LowRank,
    "single precision": Single,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(D, D)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(D, D)),
    "pruned": _pruned,
    "centred convolution": lambda: Wrapped(StandardisedConv(2, 2, 3, padding=1), _tokens),
    "depthwise convolution": lambda: Wrapped(nn.Conv1d(2, 2, 3, padding=1, groups=2), _tokens),
    "two names": TwoNames,
    "tied": Tied,
    "frozen": lambda: _frozen(nn.Linear(D, D)),
    "frozen weight": lambda: _frozen(nn.Linear(D, D), weight_only=True),
    "functional call": lambda: _dense(lambda layer, x: F.linear(x, layer.weight, layer.bias)),
    "keyword call": lambda: _dense(lambda layer, x: layer(input=x)),
    "forward hook": lambda: _hooked(pre=False),
    "forward pre-hook": lambda: _hooked(pre=True),
    "checkpoint": lambda: _dense(partial(checkpoint, use_reentrant=False), nn.ReLU()),
    "in-place activation": lambda: nn.Sequential(nn.Linear(D, D), nn.ReLU(inplace=True)),
    "functional activation": lambda: _dense(lambda layer, x: F.relu(layer(x))),
    "activation method": lambda: _dense(lambda layer, x: layer(x).tanh()),
    "skip": lambda: _dense(lambda layer, x: x + layer(x), nn.ReLU()),
    "pre-activation stream": Stream,
    "stochastic depth": lambda: Stream(0.5),
    "experts": Experts,
    "recurrent": Recurrent,
    "attention": Attention,
    "gated": Gated,
    "orphan": Orphan,
}
"""Builders by what is odd about them."""


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "relu in place": partial(nn.ReLU, inplace=True),
    "gelu": nn.GELU,
}
"""What stands between the modules of a network."""


def odd_network(kinds: Sequence[str], activation: str = "tanh") -> nn.Sequential:
    """A float64 chain with odd modules in it, for inputs (batch, 6) and 4 classes; kinds are names from :data:`ODD`."""
    act = ACTIVATIONS[activation]
    body = [module for kind in kinds for module in (ODD[kind](), act())]
    return nn.Sequential(nn.Linear(6, D), act(), *body, nn.Linear(D, 4)).double()
