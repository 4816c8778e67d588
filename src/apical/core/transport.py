"""Sending an error backwards through a layer with any matrix in place of its weight.

For an affine layer `a = W h + b` backpropagation hands `W^T delta` to the layer below. A credit-assignment rule hands
down `K^T delta` for a feedback weight `K` of the same shape. Only this linear map depends on the layer's type, so it is
the one function written per type: :func:`geometry` reads what the map needs from the layer, once, and
:func:`transport` applies it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from apical.errors import UnsupportedModelError


class Geometry(NamedTuple):
    """What the backward map of a convolution needs besides its weight; all zeros-padded and symmetric."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


def geometry(layer: nn.Module) -> Geometry | None:
    """Geometry of the layer's backward map; None for dense layers, which need none.

    Raises:
        UnsupportedModelError: no map is known for this type; :func:`apical.register_layer` makes others known.
    """
    make = geometry_of_type(type(layer))
    if make is None:
        raise UnsupportedModelError(f"no feedback transport is known for {type(layer).__name__}")
    return make(layer)


def geometry_of_type(kind: type) -> Callable[[Any], Geometry | None] | None:
    """What makes the geometry of layers of a type: that of the nearest type it derives from; None where none is known."""
    return next((GEOMETRIES[parent] for parent in kind.__mro__ if parent in GEOMETRIES), None)


def dense(layer: nn.Module) -> Geometry | None:
    """Of a dense layer: none."""
    return None


def _convolution(layer: _ConvNd) -> Geometry | None:
    transposed = isinstance(layer, _ConvTransposeNd)
    padding = (0,) * len(layer.stride) if pads_itself(layer) else _symmetric_padding(layer)
    return Geometry(layer.stride, padding, layer.dilation, transposed, layer.output_padding, layer.groups)


GEOMETRIES: dict[type, Callable[[Any], Geometry | None]] = {nn.Linear: dense, _ConvNd: _convolution}
"""By type of layer; a plain dictionary: `torch.compile` watches the weak references of `functools.singledispatch`."""


def _symmetric_padding(layer: _ConvNd) -> tuple[int, ...]:
    if isinstance(layer.padding, str):
        if layer.padding == "valid":
            return (0,) * len(layer.stride)
        return tuple(d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    return tuple(layer.padding)


def pads_itself(layer: nn.Module) -> bool:
    """Whether the layer pads by something other than symmetric zeros."""
    if not isinstance(layer, _ConvNd):
        return False
    if layer.padding_mode != "zeros":
        return True
    uneven = any(d * (k - 1) % 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    return layer.padding == "same" and uneven


def padded_input(layer: nn.Module, inputs: Tensor) -> Tensor:
    """The tensor the layer's linear map really acts on: padded here when the padding is uneven or not zeros.

    The padding is part of autograd's graph, so what :func:`transport` delivers flows through it to the true input.
    """
    if isinstance(layer, _ConvNd) and pads_itself(layer):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        return F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    return inputs


def transport(shape: Geometry | None, delta: Tensor, weight: Tensor, template: Tensor) -> Tensor:
    """`K^T delta`: error at the layer's (padded) input, of the shape of `template`, from `delta` at its output.

    `weight` is K, laid out as the layer's own weight; dense layers take any number of leading dimensions. `weight` is
    cast to the dtype of `delta` (which differs under autocast). `template` is only read for its shape, but CPU kernels copy
    one whose memory is not real, so the layer's own input serves best.
    """
    weight = weight.to(delta.dtype)
    if shape is None:
        return delta @ weight
    return _convolution_backward(shape, delta, template, weight, (True, False, False))


def weight_gradient(shape: Geometry | None, delta: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
    """Gradient `delta h^T` for a weight of `weight`'s shape, given the (padded) input h of the layer."""
    if shape is None:
        return delta.reshape(-1, delta.shape[-1]).T @ inputs.reshape(-1, inputs.shape[-1]).to(delta.dtype)
    return _convolution_backward(shape, delta, inputs.to(delta.dtype), weight.to(delta.dtype), (False, True, False))


def _convolution_backward(
    shape: Geometry, delta: Tensor, inputs: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]
) -> Tensor:
    batched = delta.dim() == len(shape.stride) + 2  # convolutions also take one unbatched sample
    if not batched:
        delta, inputs = delta.unsqueeze(0), inputs.unsqueeze(0)
    stride, padding, dilation, transposed, output_padding, groups = shape
    if transposed:  # the call may have asked for another output size than the layer's own
        sizes = zip(delta.shape[2:], inputs.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
        output_padding = tuple(out - (size - 1) * s + 2 * p - d * (k - 1) - 1 for out, size, k, s, p, d in sizes)
    grads = torch.ops.aten.convolution_backward(
        delta, inputs, weight, None, stride, padding, dilation, transposed, output_padding, groups, mask
    )
    result: Tensor = grads[0] if mask[0] else grads[1]
    return result if batched or mask[1] else result.squeeze(0)


def as_matrix(shape: Geometry | None, weight: Tensor) -> Tensor:
    """The weight as a matrix (n_out, fan_in): one row per output channel, whatever the layer's own layout."""
    if shape is None:
        return weight
    if not shape.transposed:
        return weight.flatten(1)
    groups, c_in, c_out = shape.groups, weight.shape[0], weight.shape[1] * shape.groups
    per_group = weight.reshape(groups, c_in // groups, c_out // groups, -1)
    return per_group.transpose(1, 2).reshape(c_out, -1)


def from_matrix(shape: Geometry | None, matrix: Tensor, weight: Tensor) -> Tensor:
    """Inverse of :func:`as_matrix` for the layout of `weight` (the number of output channels may differ)."""
    if shape is None:
        return matrix
    if not shape.transposed:
        return matrix.view(-1, *weight.shape[1:])
    c_in, kernel = weight.shape[0], weight.shape[2:]
    per_group = matrix.view(shape.groups, matrix.shape[0] // shape.groups, c_in // shape.groups, -1)
    return per_group.transpose(1, 2).reshape(c_in, -1, *kernel)
