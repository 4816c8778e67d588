"""Local updates: a layer's weight change is the outer product of a signal and its input.

Rules that know every layer's signal need no backward pass through the model. They pass each parameter its gradient as a root
of the credit, so that gradients still go through autograd: they accumulate, and `DistributedDataParallel` sees them.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from apical.core.chain import Stage
from apical.core.credit import Root
from apical.core.transport import Geometry, geometry, padded_input, weight_gradient


def summed(signal: Tensor, shape: Geometry | None) -> Tensor:
    """Sum a signal over everything but the channels: the last dimension of dense layers, the second of convolutions."""
    if shape is None:
        return signal.flatten(0, -2).sum(0)
    return signal.flatten(2).sum((0, 2))


def outer(stage: Stage, signal: Tensor, rates: Tensor) -> Tensor:
    """Return `signal h^T` in the weight's shape, summed over the batch; h is the layer's input for the input `rates`."""
    return weight_gradient(geometry(stage.layer), signal, padded_input(stage.layer, stage.seen(rates)), stage.layer.weight)


def local_roots(
    stage: Stage, signal: Tensor, rates: Tensor, product: Tensor | None = None, factor: float = 1.0
) -> list[Root]:
    """Return a layer's weight and bias with their gradients for a signal at the layer's output, (batch, ...).

    Empty if the layer has nothing to train, and in inference mode, where nothing learns.

    Args:
        stage: the layer and what precedes it.
        signal: the signal, in the shape of the layer's output.
        rates: input of the stage.
        product: the outer product, if it is already known; `signal` is then only used for the bias.
        factor: factor of the gradients.
    """
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        return []
    layer = stage.layer
    roots: list[Root] = []
    with torch.enable_grad():  # a parametrised weight is computed here
        weight, bias = layer.weight, layer.bias
    with torch.no_grad():
        if product is None:
            signal = signal * factor
        if weight.requires_grad:
            roots.append((weight, outer(stage, signal, rates) if product is None else factor * product))
        if bias is not None and bias.requires_grad:
            total = summed(signal, geometry(layer))
            roots.append((bias, total if product is None else factor * total))
    return roots


def block_roots(taught: Sequence[tuple[Tensor, Tensor]], parameters: Iterable[torch.nn.Parameter]) -> list[Root]:
    """What one block learns from signals at its outputs, as gradients of its parameters; its graph is freed immediately.

    A rule whose blocks send no error to each other thus keeps the activities of one block at a time. A compiled graph keeps
    them all: there the outputs themselves are the roots. They are also the roots if a hook waits for a parameter's gradient,
    because the hook would otherwise be called twice.

    Args:
        taught: outputs (batch, ...) with a graph that ends at the block's input, and their signals, of the same shapes.
        parameters: all parameters that the graph may reach.
    """
    taught = [(made, signal) for made, signal in taught if made.requires_grad]
    learned = [parameter for parameter in parameters if parameter.requires_grad]
    if torch.compiler.is_compiling() or any(parameter._backward_hooks for parameter in learned) or not taught:
        return [(made, signal.to(made.dtype)) for made, signal in taught]
    is_half = any(made.dtype == torch.float16 for made, _ in taught)
    scale = _half_scale([signal for _, signal in taught]) if is_half else None
    with torch.autocast(taught[0][0].device.type, enabled=False):
        signals = [(signal if scale is None else signal * scale).to(made.dtype) for made, signal in taught]
        gradients = torch.autograd.grad([made for made, _ in taught], learned, signals, allow_unused=True)
    pairs = [(p, gradient) for p, gradient in zip(learned, gradients, strict=True) if gradient is not None]
    return [(p, gradient if scale is None else gradient / scale) for p, gradient in pairs]


def _half_scale(signals: Sequence[Tensor]) -> Tensor:
    """Return a power of two for signals that would be too small in float16: their summed sizes over the batch become <= 1.

    Scaling the loss later has no effect on gradients that are computed immediately.
    """
    most = torch.stack([signal.float().abs().flatten(1).sum(0).max() for signal in signals]).max()
    return torch.exp2(-most.clamp_min(2.0**-100).log2().ceil())
