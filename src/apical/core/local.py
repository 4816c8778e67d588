"""Local updates as roots of a backward pass: a layer's weight change is the outer product of a signal and its input.

Rules that know every layer's signal need no backward pass through the model. Each layer gets a scalar zero whose backward
makes just that outer product, so that gradients still arrive through autograd: they accumulate, and
`DistributedDataParallel` sees them.
"""

from typing import Any, cast

import torch
from torch import Tensor

from apical.core.chain import Stage
from apical.core.transport import Geometry, geometry, padded_input, weight_gradient


class LocalUpdate(torch.autograd.Function):
    """A scalar zero whose backward pass gives `signal h^T` to a weight and the summed signal to a bias."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, signal: Tensor, given: Tensor, shape: Geometry | None, factor: float
    ) -> Tensor:
        """Zero. `given` is the layer's (padded) input, `signal` of its output's shape."""
        ctx.save_for_backward(signal, given, weight)
        ctx.shape, ctx.factor = shape, factor
        return signal.new_zeros(())

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        """The update, times `scale` and the factor."""
        signal, given, weight = ctx.saved_tensors
        wants_weight, wants_bias = ctx.needs_input_grad[:2]
        signal = signal * (scale * ctx.factor)
        for_weight = weight_gradient(ctx.shape, signal, given, weight) if wants_weight else None
        for_bias = _summed(signal, ctx.shape) if wants_bias else None
        return for_weight, for_bias, None, None, None, None


def _summed(signal: Tensor, shape: Geometry | None) -> Tensor:
    """Over everything but the channels: the last dimension of dense layers, the second of convolutions."""
    if shape is None:
        return signal.flatten(0, -2).sum(0)
    return signal.flatten(2).sum((0, 2))


def outer(stage: Stage, signal: Tensor, rates: Tensor) -> Tensor:
    """`signal h^T` of the weight's shape, h what the stage's layer is given at the input `rates`; summed over the batch."""
    return weight_gradient(geometry(stage.layer), signal, padded_input(stage.layer, stage.seen(rates)), stage.layer.weight)


def local_root(
    stage: Stage, signal: Tensor, rates: Tensor, product: Tensor | None = None, factor: float = 1.0
) -> Tensor | None:
    """Root whose gradient is the outer product of `signal` and what the layer is given at its stage's input `rates`.

    Returns None where the layer has nothing to train, and in inference mode, where nothing learns.

    Args:
        product: the weight's gradient, where it is known already; `signal` then only serves the bias.
        factor: of the gradient.
    """
    layer = stage.layer
    bias = layer.bias
    trains = layer.weight.requires_grad or (bias is not None and bias.requires_grad)
    if not trains or (not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()):
        return None
    if product is not None:
        known = known_root(layer.weight, factor * product)
        return known if bias is None else known + known_root(bias, factor * _summed(signal, geometry(layer)))
    with torch.no_grad():
        given = padded_input(layer, stage.seen(rates))
    root: Tensor = cast(Any, LocalUpdate).apply(layer.weight, bias, signal, given, geometry(layer), factor)
    return root


def known_root(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Root whose gradient with respect to `parameter` is `gradient`."""
    return (parameter * gradient.detach()).sum()
