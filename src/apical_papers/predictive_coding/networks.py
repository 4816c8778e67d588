"""The plain deep network of JPC's notebook: the activation stands before each layer, and states before it."""

import math
from collections import OrderedDict

from torch import Tensor, nn


class PreActivated(nn.Module):
    """`W relu(s) + b`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, s: Tensor) -> Tensor:
        """The next state."""
        result: Tensor = self.linear(s.relu())
        return result


def pre_activated(input_shape: tuple[int, ...], num_classes: int, depth: int = 10, width: int = 128) -> nn.Sequential:
    """Perceptron of `depth` layers with PyTorch's own initial weights: (N, *input_shape) -> (N, num_classes)."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    layers["layer1"] = nn.Linear(math.prod(input_shape), width)
    for k in range(2, depth + 1):
        layers[f"layer{k}"] = PreActivated(width, width if k < depth else num_classes)
    return nn.Sequential(layers)
