"""Sending an error backwards through a layer with any matrix in place of its weight.

For an affine layer `a = W h + b` backpropagation hands `W^T delta` to the layer below. A credit-assignment rule hands
down `K^T delta` for a feedback weight `K` of the same shape. Only this linear map depends on the layer's type, so it is
the one function written per type: :func:`geometry` reads what the map needs from the layer, once, and
:func:`transport` applies it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from apical.errors import UnsupportedModelError, refuse_second_derivatives


class Geometry(NamedTuple):
    """What the backward map of a convolution needs besides its weight; all zeros-padded and symmetric."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


def geometry(layer: nn.Module) -> Geometry | None:
    """Return the geometry of the layer's backward map; None for dense layers, which need none.

    Raises:
        UnsupportedModelError: no map is known for this type; :func:`apical.register_layer` makes others known.
    """
    make = geometry_of_type(type(layer))
    if make is None:
        raise UnsupportedModelError(f"no feedback transport is known for {type(layer).__name__}")
    return make(layer)


def geometry_of_type(kind: type) -> Callable[[Any], Geometry | None] | None:
    """Return the function for the geometry of a type of layers: that of its nearest known base; None if none is known."""
    return next((GEOMETRIES[parent] for parent in kind.__mro__ if parent in GEOMETRIES), None)


def dense(layer: nn.Module) -> Geometry | None:
    """Return None: a dense layer needs no geometry."""
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
    """Return whether the layer pads by something other than symmetric zeros."""
    if not isinstance(layer, _ConvNd):
        return False
    if layer.padding_mode != "zeros":
        return True
    uneven = any(d * (k - 1) % 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    return layer.padding == "same" and uneven


def padded_input(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Return the tensor the layer's linear map really acts on: padded here when the padding is uneven or not zeros.

    The padding is part of autograd's graph, so what :func:`transport` delivers flows through it to the true input.
    """
    if isinstance(layer, _ConvNd) and pads_itself(layer):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        return F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    return inputs


def transport(shape: Geometry | None, delta: Tensor, weight: Tensor, template: Tensor) -> Tensor:
    """Return `K^T delta`: error at the layer's (padded) input, of the shape of `template`, from `delta` at its output.

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
    """Return the weight as a matrix (n_out, fan_in): one row per output channel, whatever the layer's own layout."""
    if shape is None:
        return weight
    if not shape.transposed:
        return weight.flatten(1)
    groups, c_in, c_out = shape.groups, weight.shape[0], weight.shape[1] * shape.groups
    per_group = weight.reshape(groups, c_in // groups, c_out // groups, -1)
    return per_group.transpose(1, 2).reshape(c_out, -1)


def from_matrix(shape: Geometry | None, matrix: Tensor, weight: Tensor) -> Tensor:
    """Return the inverse of :func:`as_matrix` for the layout of `weight` (the number of output channels may differ)."""
    if shape is None:
        return matrix
    if not shape.transposed:
        return matrix.view(-1, *weight.shape[1:])
    c_in, kernel = weight.shape[0], weight.shape[2:]
    per_group = matrix.view(shape.groups, matrix.shape[0] // shape.groups, c_in // shape.groups, -1)
    return per_group.transpose(1, 2).reshape(c_in, -1, *kernel)


Feedback: TypeAlias = tuple[Callable[..., Tensor], tuple[Tensor, ...]]
"""`(compute, tensors)`: `compute(geometry, *tensors)` is the feedback weight, in the layout of the layer's weight."""

Pathway: TypeAlias = tuple[Callable[..., tuple[Tensor | None, ...]], tuple[Tensor, ...]]
"""`(pathway, tensors)`: `pathway(geometry, delta, template, *tensors)` is the error at the input, and the gradient of each
tensor or None. `template` has the shape of the input; it is None when the error is not needed there (the first layer)."""


def stored(shape: Geometry | None, feedback: Tensor) -> Tensor:
    """Return the plainest feedback weight: a stored one."""
    return feedback


def sent(feedback: Feedback, delta: Tensor, error: Tensor) -> Tensor:
    """Return `delta` (batch, n_out) times a dense layer's feedback weight."""
    compute, tensors = feedback
    weight = compute(None, *tensors)
    if weight.dtype is not delta.dtype or weight.device != delta.device:  # the model was moved without the rule
        weight = weight.to(delta)
    return delta.mm(weight)


class FeedbackEdge(torch.autograd.Function):
    """Identity on `output`; its backward sends the error to `inputs` through the feedback as well as into the layer."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        inputs: Tensor,
        feedback: Callable[..., Tensor] | None,
        pathway: Callable[..., tuple[Tensor | None, ...]] | None,
        shape: Geometry | None,
        *tensors: Tensor,
    ) -> Tensor:
        """Return `output` itself; keep the input, as the layer does too, only where a CPU kernel wants a real one."""
        ctx.feedback, ctx.pathway, ctx.geometry = feedback, pathway, shape
        ctx.input_dtype = inputs.dtype
        ctx.real = shape is not None and inputs.device.type == "cpu" and inputs.dtype == output.dtype
        ctx.keeps = ctx.real or torch.compiler.is_compiling()  # a symbolic shape next to a dirty output shifts gradients
        if not ctx.keeps:
            ctx.input_shape = inputs.shape
        ctx.save_for_backward(*([inputs] if ctx.keeps else []), *tensors)
        ctx.mark_dirty(output)  # not a view: the next module may work in place
        return output

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        """Split the error: to the layer's own derivative, and by feedback to the layer below."""
        refuse_second_derivatives()
        tensors, template = ctx.saved_tensors, None
        if ctx.keeps:
            template, *tensors = tensors
        if not ctx.needs_input_grad[1]:
            template = None
        elif not ctx.real:
            shape = ctx.input_shape if template is None else template.shape
            template = delta if ctx.geometry is None else delta.new_empty(1).expand(shape)
        below: Tensor | None = None
        grads: tuple[Tensor | None, ...] = tuple(None for _ in tensors)
        if ctx.pathway is not None:
            below, *grads = ctx.pathway(ctx.geometry, delta, template, *tensors)
        elif template is not None:
            below = transport(ctx.geometry, delta, ctx.feedback(ctx.geometry, *tensors), template)
        return (delta, None if below is None else below.to(ctx.input_dtype), None, None, None, *grads)
