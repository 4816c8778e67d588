"""The networks of the notebooks: the activation stands before each layer, so states stand before activations."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class PreActivated(nn.Module):
    """`W f(s) + b`."""

    def __init__(self, inputs: int, outputs: int, activation: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.activation = activation

    def forward(self, s: Tensor) -> Tensor:
        """The next state."""
        result: Tensor = self.linear(self.activation(s))
        return result


def pre_activated(input_shape: tuple[int, ...], num_classes: int, depth: int = 10, width: int = 128) -> nn.Sequential:
    """Perceptron of `depth` layers with PyTorch's own initial weights: (N, *input_shape) -> (N, num_classes)."""
    widths = [width] * (depth - 1) + [num_classes]
    return _row(nn.Linear(math.prod(input_shape), width), widths, torch.relu)


def wide(input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """The same with three layers, the hidden ones of 300."""
    return pre_activated(input_shape, num_classes, depth=3, width=300)


def tanh(input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """PRECO's network of 32 and 16 units: tanh of the pixels, too; initial weights N(0, 0.05^2), no biases at first."""
    model = _row(PreActivated(math.prod(input_shape), 32, torch.tanh), [32, 16, num_classes], torch.tanh)
    for name, p in model.named_parameters():
        nn.init.normal_(p, std=0.05) if name.endswith("weight") else nn.init.zeros_(p)
    return model


def _row(first: nn.Module, widths: Sequence[int], activation: Callable[[Tensor], Tensor]) -> nn.Sequential:
    """The first layer, and one for each further width."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten(), layer1=first)
    for k, (inputs, outputs) in enumerate(pairwise(widths), start=2):
        layers[f"layer{k}"] = PreActivated(inputs, outputs, activation)
    return nn.Sequential(layers)
