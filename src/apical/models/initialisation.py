"""Xavier initialisation, the one the feedback-alignment papers use for every layer.

Weights are uniform with variance 2 / (fan_in + fan_out) (Glorot and Bengio 2010), biases are zero. BatchNorm keeps
PyTorch's default (scale 1, shift 0).
"""

from torch import nn


def xavier_(model: nn.Module) -> nn.Module:
    """Redraw every Linear and Conv2d of `model` in place from the global torch RNG; returns `model`."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
