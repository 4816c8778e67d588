"""Initialisers: Xavier, and three that preserve signals and errors through many layers.

Xavier weights have variance 2 / (fan_in + fan_out) (Glorot and Bengio 2010), uniform or normal, with zero biases; the
feedback-alignment papers use them. Orthogonal weights, weights at the edge of chaos, and weights that make a ReLU network
linear at initialisation preserve the norm of errors, exactly or on average; the information carried by a network is largest
there (Weng et al., arXiv 2212.01744; Tanner & Ughi, arXiv 2102.04374). BatchNorm keeps PyTorch's default (scale 1, shift 0).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from apical.core.activations import is_activation, known
from apical.core.layers import Layer, is_weighted
from apical.core.mean_field import critical
from apical.errors import UnsupportedModelError


def xavier_(model: nn.Module) -> nn.Module:
    """Redraw every Linear and Conv2d of `model` in place, uniformly, from the global torch RNG; return `model`."""
    return _redrawn(model, nn.init.xavier_uniform_)


def xavier_normal_(model: nn.Module, gain: float = 1.0) -> nn.Module:
    """Do the same with normal weights, scaled by `gain`; the initialisation of the feedback-control papers."""
    return _redrawn(model, lambda weight: nn.init.xavier_normal_(weight, gain))


def orthogonal_(model: nn.Module, gain: float = 1.0) -> nn.Module:
    """Redraw every weight as `gain` times a matrix with orthonormal rows or columns, zero the biases and return `model`.

    All singular values of a linear network of equal widths are then `gain^depth` (Saxe et al., arXiv 1312.6120).

    >>> weight = orthogonal_(nn.Linear(3, 3)).weight
    >>> torch.allclose(weight @ weight.T, torch.eye(3), atol=1e-6)
    True
    """
    return _redrawn(model, lambda weight: nn.init.orthogonal_(weight, gain))


def critical_(model: nn.Module, bias_std: float = 0.05) -> nn.Module:
    """Redraw weights and biases at the activation's edge of chaos, where errors keep their norm; return `model`.

    Weights are normal with variance `s_w^2 / fan_in` such that chi = 1 (:func:`apical.core.mean_field.critical`). Biases are
    normal with `bias_std`, or zero if the activation is piecewise linear through zero.

    Raises:
        UnsupportedModelError: the model has no activation module, or several kinds, or one that is not element-wise.
        ConfigError: no scale of the weights gives chi = 1.

    >>> _ = critical_(nn.Sequential(nn.Linear(2, 500), nn.ReLU(), nn.Linear(500, 500)))
    """
    s_w, s_b = critical(_activation(model), bias_std)

    def draw(weight: Tensor) -> Tensor:
        return nn.init.normal_(weight, std=s_w / math.sqrt(weight[0].numel()))

    return _redrawn(model, draw, s_b)


def looks_linear_(model: nn.Module, gain: float = 1.0) -> nn.Module:
    """Redraw the weights of a ReLU network so that it starts linear, with orthogonal layers; return `model`.

    Units come in pairs of opposite sign: the weights are `[[H, -H], [-H, H]]`, in the first layer `[[H], [-H]]` and in the
    last `[H, -H]`, with H orthogonal, so that the network computes `H_L ... H_1` (Balduzzi et al., arXiv 1702.08591).

    Raises:
        UnsupportedModelError: a hidden layer has an odd number of units, or an activation is not ReLU.

    >>> model = looks_linear_(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)))
    >>> x = torch.randn(2)
    >>> torch.allclose(model(-x), -model(x), atol=1e-6)
    True
    """
    layers, kind = _layers(model), _activation(model)
    if not isinstance(kind, nn.ReLU):
        raise UnsupportedModelError(f"looks_linear_ is for ReLU networks; this one has {type(kind).__name__}")
    for name, layer in list(layers.items())[:-1]:
        if layer.weight.shape[0] % 2:
            raise UnsupportedModelError(
                f"looks_linear_ pairs units, but layer {name!r} has {layer.weight.shape[0]}; give it an even number"
            )
    last = len(layers) - 1
    for place, (name, layer) in enumerate(layers.items()):
        with torch.no_grad():
            weight = layer.weight
            rows = weight.shape[0] // (2 if place < last else 1)
            if place and weight.shape[1] % 2:
                raise UnsupportedModelError(
                    f"looks_linear_ pairs units, but layer {name!r} has {weight.shape[1]} inputs, an odd number"
                )
            columns = weight.shape[1] // (2 if place else 1)
            h = nn.init.orthogonal_(weight.new_empty(rows, columns, *weight.shape[2:]), gain)
            h = torch.cat([h, -h], 1) if place else h
            weight.copy_(torch.cat([h, -h]) if place < last else h)
            if layer.bias is not None:
                layer.bias.zero_()
    return model


def _redrawn(model: nn.Module, draw: Callable[[Tensor], Tensor], bias_std: float = 0.0) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            draw(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=bias_std) if bias_std else nn.init.zeros_(module.bias)
    return model


def _layers(model: nn.Module) -> dict[str, Layer]:
    layers = {name: module for name, module in model.named_modules() if is_weighted(module)}
    if not layers:
        raise UnsupportedModelError(f"{type(model).__name__} has no Linear or convolution layer to initialise")
    return layers


def _activation(model: nn.Module) -> nn.Module:
    """Return the model's activation, of which there must be exactly one kind.

    Raises:
        UnsupportedModelError: the model has no activation module, several kinds, or one that mixes units; names them.
    """
    kinds: dict[str, tuple[str, nn.Module]] = {
        repr(module): (name, module) for name, module in model.named_modules() if is_activation(module)
    }
    if len(kinds) != 1:
        what = ", ".join(f"{name!r} ({text})" for text, (name, _) in kinds.items()) or "none that is a module"
        raise UnsupportedModelError(f"this initialisation needs a model with one kind of activation; it has {what}")
    name, module = next(iter(kinds.values()))
    entry = known(module)
    if entry is None or not entry.elementwise:
        raise UnsupportedModelError(f"this initialisation needs an element-wise activation; {name!r} is {module!r}")
    return module


INITIALISERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "xavier": xavier_,
    "xavier-normal": xavier_normal_,
    "orthogonal": orthogonal_,
    "critical": critical_,
    "looks-linear": looks_linear_,
}
"""Initialisers by the name used in recipes."""
