"""Top-down networks as flat vectors: tanh perceptrons with a linear last layer, evaluated for a whole population.

    T(s) = V_n tanh(... tanh(V_1 s + b_1) ...) + b_n

Each layer is one batched product for all individuals. For layers of a dozen units on a CPU, NumPy's products and tanh take a
quarter of PyTorch's time, so they are used here; nothing is differentiated.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from apical.errors import ConfigError


class Perceptron:
    """A perceptron with layers of the given sizes, from input to output; weights are passed as vectors (P, D).

    Raises:
        ConfigError: there are fewer than two sizes, or one is not positive.

    >>> Perceptron([3, 12, 12, 2]).parameters
    230
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        if len(sizes) < 2 or min(sizes) < 1:
            raise ConfigError(f"a perceptron needs at least two positive sizes; got {list(sizes)}")
        self.sizes = tuple(sizes)
        self._parts = [size for i, o in pairwise(self.sizes) for size in (o * i, o)]

    @property
    def parameters(self) -> int:
        """Number of weights and biases, D."""
        return sum(self._parts)

    def start(self, seed: int) -> Tensor:
        """Draw Xavier-uniform weights and zero biases, (D,) in float32."""
        generator = torch.Generator().manual_seed(seed)
        pieces = []
        for i, o in pairwise(self.sizes):
            limit = (6 / (i + o)) ** 0.5
            pieces += [(2 * torch.rand(o * i, generator=generator) - 1) * limit, torch.zeros(o)]
        return torch.cat(pieces)

    def layers(self, individuals: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return weights (P, out, in) and biases (P, out, 1) of each layer as views of individuals (P, D)."""
        pieces = individuals.split(self._parts, dim=1)
        return [
            (weight.view(-1, o, i), bias[..., None])
            for weight, bias, (i, o) in zip(pieces[::2], pieces[1::2], pairwise(self.sizes), strict=True)
        ]


def evaluate(layers: Sequence[tuple[Tensor, Tensor]], inputs: Tensor) -> Tensor:
    """Return outputs (P, out, batch) of :meth:`Perceptron.layers` for inputs (P, in, batch).

    Examples come last, because products of many small matrices are several times faster in this order.
    """
    x = inputs.numpy()
    for number, (weight, bias) in enumerate(layers, start=1):
        x = np.matmul(weight.numpy(), x)
        x += bias.numpy()
        if number < len(layers):
            np.tanh(x, out=x)
    return torch.from_numpy(x)


def recur(layers: Sequence[tuple[Tensor, Tensor]], inputs: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs (P, out, batch) and new memory (P, hidden, batch) of an Elman network.

        memory <- tanh(V [s ; memory] + b),   T = U memory + c

    Args:
        layers: the two layers of a perceptron whose inputs include its hidden units.
        inputs: s, (P, in, batch).
        memory: hidden units after the last step, (P, hidden, batch).
    """
    first, last = layers
    memory = tanh(evaluate([first], torch.cat([inputs, memory], 1)))
    return evaluate([last], memory), memory


def tanh(x: Tensor) -> Tensor:
    """Compute `torch.tanh` in NumPy."""
    return torch.from_numpy(np.tanh(x.numpy()))
