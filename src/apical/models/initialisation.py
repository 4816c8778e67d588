"""Xavier initialisation, the one the feedback-alignment papers use for every layer.

Weights have variance 2 / (fan_in + fan_out) (Glorot and Bengio 2010), uniform or normal; biases are zero. BatchNorm keeps
PyTorch's default (scale 1, shift 0).
"""

from collections.abc import Callable

from torch import Tensor, nn


def xavier_(model: nn.Module) -> nn.Module:
    """Redraw every Linear and Conv2d of `model` in place, uniformly, from the global torch RNG; returns `model`."""
    return _redrawn(model, nn.init.xavier_uniform_)


def xavier_normal_(model: nn.Module, gain: float = 1.0) -> nn.Module:
    """The same with normal weights, `gain` times as large; the initialisation of the feedback-control papers."""
    return _redrawn(model, lambda weight: nn.init.xavier_normal_(weight, gain))


def _redrawn(model: nn.Module, draw: Callable[[Tensor], Tensor]) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            draw(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
