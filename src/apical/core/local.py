"""Local updates: a layer's weight change is the outer product of a signal and its input.

Rules that know every layer's signal need no backward pass through the model. They hand each parameter its gradient as a root
of the credit, so that gradients still arrive through autograd: they accumulate, and `DistributedDataParallel` sees them.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from apical.core.chain import Stage
from apical.core.credit import Root
from apical.core.transport import Geometry, geometry, padded_input, weight_gradient


def summed(signal: Tensor, shape: Geometry | None) -> Tensor:
    """A signal summed over everything but the channels: the last dimension of dense layers, the second of convolutions."""
    if shape is None:
        return signal.flatten(0, -2).sum(0)
    return signal.flatten(2).sum((0, 2))


def outer(stage: Stage, signal: Tensor, rates: Tensor) -> Tensor:
    """`signal h^T` of the weight's shape, h what the stage's layer is given at the input `rates`; summed over the batch."""
    return weight_gradient(geometry(stage.layer), signal, padded_input(stage.layer, stage.seen(rates)), stage.layer.weight)


def local_roots(
    stage: Stage, signal: Tensor, rates: Tensor, product: Tensor | None = None, factor: float = 1.0
) -> list[Root]:
    """A layer's weight and bias with the gradients that a signal at the layer's output, (batch, ...), makes of them.

    Empty where the layer has nothing to train, and in inference mode, where nothing learns.

    Args:
        stage: the layer and what stands before it.
        signal: of the shape of the layer's output.
        rates: input of the stage.
        product: the outer product, where it is known already; `signal` then only serves the bias.
        factor: of the gradients.
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

    A rule whose blocks hand no error to each other so holds the activities of one block at a time. A compiled graph keeps
    them all: there the outputs themselves are the roots, and so they are where a hook waits for a parameter's gradient,
    which it would be handed twice.

    Args:
        taught: outputs (batch, ...) with a graph that ends at the block's input, and their signals, of their shapes.
        parameters: all that the graph may lead to.
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
    """A power of two for signals in float16, too small there else: sums of their sizes over the batch become 1 at most.

    Scaling the loss later has no effect on gradients that are computed immediately.
    """
    most = torch.stack([signal.float().abs().flatten(1).sum(0).max() for signal in signals]).max()
    return torch.exp2(-most.clamp_min(2.0**-100).log2().ceil())
