"""Networks whose hidden units are firing rates in [0, 1], as of spiking neurons, and whose weights are in [-1, 1]."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from apical.models.mlp import mlp_box


def spiking(in_features: int, widths: Sequence[int], out_features: int) -> nn.Sequential:
    """Build a perceptron with `clip(v, 0, 1)`, no biases and weights uniform in [-1, 1], as contrastive plasticity needs.

    Raises:
        ConfigError: a size is not positive.

    >>> [name for name, _ in spiking(4, [3], 2).named_children()]
    ['flatten', 'linear1', 'clip1', 'linear2']
    """
    *children, _ = mlp_box(in_features, widths, out_features).named_children()  # the readout is not clipped
    model = nn.Sequential(OrderedDict(children))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.uniform_(module.weight, -1.0, 1.0)
    return model
