"""Multilayer perceptron: Flatten, then Linear and ReLU per hidden layer, then a Linear read-out."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from apical.errors import ConfigError
from apical.models.initialisation import xavier_


def mlp(in_features: int, widths: Sequence[int], out_features: int) -> nn.Sequential:
    """Perceptron with hidden layers of the given widths: (N, ...) with `in_features` entries -> (N, out_features).

    Its modules are named flatten, linear1, relu1, linear2, ... An empty `widths` gives a linear classifier.

    Raises:
        ConfigError: a size is not positive.

    >>> [name for name, _ in mlp(4, [3], 2).named_children()]
    ['flatten', 'linear1', 'relu1', 'linear2']
    """
    sizes = [in_features, *widths, out_features]
    if min(sizes) < 1:
        raise ConfigError(f"every layer of an mlp needs at least one unit; got {'-'.join(map(str, sizes))}")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for depth, (fan_in, fan_out) in enumerate(pairwise(sizes), start=1):
        layers[f"linear{depth}"] = nn.Linear(fan_in, fan_out)
        if depth <= len(widths):
            layers[f"relu{depth}"] = nn.ReLU()
    model = nn.Sequential(layers)
    xavier_(model)
    return model
