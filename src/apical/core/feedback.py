"""Set feedback matrices from outside, by layer and by the paper's symbols."""

from collections.abc import Mapping

import torch
from torch import Tensor

from apical.errors import ConfigError


def put(rule: str, layer: str, known: Mapping[str, Mapping[str, Tensor]], given: Mapping[str, Tensor]) -> None:
    """Copy matrices into those that a rule holds at a layer.

    Args:
        rule: name of the rule, for errors.
        layer: module name.
        known: the matrices of every layer, by symbol.
        given: the new matrices, by symbol.

    Raises:
        ConfigError: unknown layer or symbol, wrong shape, or no matrix given; nothing is changed in that case.
    """
    if layer not in known:
        raise ConfigError(f"{rule} has no feedback at a layer {layer!r}; it has at: {', '.join(map(repr, known)) or 'none'}")
    own = known[layer]
    symbols = ", ".join(own) or "none that can be set"
    if not given:
        raise ConfigError(f"no matrix was given for layer {layer!r}; {rule} has there: {symbols}")
    for symbol, matrix in given.items():
        if symbol not in own:
            raise ConfigError(f"{rule} has no matrix {symbol!r} at layer {layer!r}; it has there: {symbols}")
        if tuple(matrix.shape) != tuple(own[symbol].shape):
            raise ConfigError(
                f"{symbol} of layer {layer!r} has shape {tuple(own[symbol].shape)}, but {tuple(matrix.shape)} was given"
            )
    with torch.no_grad():
        for symbol, matrix in given.items():
            own[symbol].copy_(matrix)
