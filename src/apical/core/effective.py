"""The weight that a layer actually applies, if it is a function of its parameter: masked, quantised, scaled.

An edge replaces the backward map of such a layer at the layer's output. That is correct only if the layer is affine in its
input, with the geometry of its `weight`; both are determined from the layer's own derivative.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import product
from math import ceil
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from apical.core.layers import computes_plainly, effective_weight, is_registered
from apical.core.transport import Geometry, geometry, padded_input, pads_itself, transport, weight_gradient
from apical.errors import UnsupportedModelError

Call = Callable[[Tensor], Any]


def measured_weight(layer: nn.Module, call: Call | None = None) -> Tensor:
    """Return W of `a = W h + b` as the layer computes it now, in the shape of its `weight`; without gradient.

    Random numbers and buffers are restored, so that the layer's next call uses this same weight. For types
    registered with a function for their weight (:func:`apical.core.layers.register_layer`), that function is called.

    Args:
        layer: a layer of a type with known :func:`geometry`.
        call: the layer's forward pass; by default the layer itself.
    """
    if call is None and computes_plainly(layer):
        return cast(Tensor, layer.weight).detach()
    weight = weight_now(layer)
    if is_registered(layer):
        with unchanged(layer, weight.device):
            known = effective_weight(layer)
        if known is not None:
            return known.detach()
    weight = weight.to(next(layer.parameters()))  # an old weight norm or pruning keeps the dtype of its last call
    call = call or (layer.forward if layer._forward_hooks else layer)
    shape = geometry(layer)
    inputs, errors_for = _probe(shape, layer, weight)
    if torch.compiler.is_compiling():
        output, pull = cast(Any, torch.func.vjp(call, inputs))
        errors = errors_for(output.detach())
        below = pull(errors)[0]
    else:
        with unchanged(layer, weight.device), torch.enable_grad():
            output = call(inputs.requires_grad_())
            errors = errors_for(output.detach())
            below = torch.autograd.grad(output, inputs, errors)[0]
    if pads_itself(layer):
        below = F.pad(below, cast(_ConvNd, layer)._reversed_padding_repeated_twice)
    return weight_gradient(shape, errors, below, weight).to(weight.dtype)


def weight_now(layer: nn.Module) -> Tensor:
    """Return the layer's attribute `weight`, detached; buffers that reading it changes (spectral norm) are restored."""
    if "weight" in layer._parameters or torch.compiler.is_compiling():
        return cast(Tensor, layer.weight).detach()
    with unchanged(layer, next(layer.parameters()).device):
        return cast(Tensor, layer.weight).detach()


def is_drawn(layer: nn.Module) -> bool:
    """Return whether the weight that the layer applies depends on random numbers."""
    first = measured_weight(layer)
    with torch.random.fork_rng([first.device] if first.device.type == "cuda" else []):
        torch.rand(1, device=first.device)
        return not torch.equal(first, measured_weight(layer))


def _probe(shape: Geometry | None, layer: nn.Module, weight: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return inputs (zero), and output errors that read each entry of the weight exactly once.

    An error of one at a single output neuron reaches the inputs that this neuron sees, through the weights to them. A
    neuron of a transposed convolution sees one in `stride` taps, so as many neighbours as the stride are needed.
    """
    if shape is None:
        n_out, n_in = weight.shape
        return weight.new_zeros(n_out, n_in), lambda output: torch.eye(n_out, dtype=output.dtype, device=output.device)
    padding = shape.padding
    if pads_itself(layer):
        padding = tuple(cast(_ConvNd, layer)._reversed_padding_repeated_twice[-2::-2])  # the padding before each dimension
    reach = [d * (k - 1) for d, k in zip(shape.dilation, weight.shape[2:], strict=True)]
    sizes = list(zip(padding, shape.stride, reach, strict=True))
    if shape.transposed:
        rows, channels = weight.shape[1], weight.shape[0]
        first, steps = [max(0, r - p) for p, _, r in sizes], [range(s) for s in shape.stride]
        extent = [(max(0, r - p) + p) // s + 1 + p + s for p, s, r in sizes]
    else:
        rows, channels = weight.shape[0] // shape.groups, weight.shape[1] * shape.groups
        first, steps = [ceil(p / s) for p, s, _ in sizes], [range(1) for _ in sizes]
        extent = [p + s + r + 1 for p, s, r in sizes]
    offsets = list(product(*steps))

    def errors(output: Tensor) -> Tensor:
        """Return (rows * offsets, groups * rows, ...): one at one neuron of each group."""
        result = output.new_zeros(rows, len(offsets), shape.groups, rows, *output.shape[2:])
        neurons = torch.arange(rows, device=output.device)
        for i, offset in enumerate(offsets):
            at: tuple[Any, ...] = (neurons, i, slice(None), neurons, *(f + o for f, o in zip(first, offset, strict=True)))
            result[at] = 1.0
        return result.view(rows * len(offsets), shape.groups * rows, *output.shape[2:])

    return weight.new_zeros(rows * len(offsets), channels, *extent), errors


def require_affine(name: str, layer: nn.Module, call: Call, inputs: Tensor, alike: Sequence[str] = ()) -> None:
    """Check that the layer is affine in its input with the geometry of its weight, forwards and backwards, near `inputs`.

    Args:
        name: name of the layer, for the message.
        layer: the layer; random numbers and buffers are restored.
        call: its forward pass.
        inputs: what it was called with, not empty.
        alike: names of layers of its type that are expected to behave in the same way.

    Raises:
        UnsupportedModelError: it is not.
    """
    shape, seen, generator = geometry(layer), Precision(), torch.Generator().manual_seed(0)
    leaf = (inputs.detach() + torch.randn(inputs.shape, generator=generator, device="cpu").to(inputs)).requires_grad_()
    delta, exact = cast(Any, None), cast(Any, None)
    with unchanged(layer, inputs.device), torch.enable_grad():
        with seen:
            output = call(leaf)  # an error of the model itself is not handled here
        with suppress(RuntimeError, ValueError, TypeError, AttributeError):  # with the weight that the call has left
            delta = torch.randn(output.shape, generator=generator, device="cpu").to(output).requires_grad_()
            exact = torch.autograd.grad(output, leaf, delta)[0]
    try:
        with unchanged(layer, inputs.device), torch.no_grad():
            offset = call(torch.zeros_like(leaf))
        weight = measured_weight(layer, of_rows(call, shape, inputs.dim()))
        with torch.enable_grad():
            below = padded_input(layer, leaf)
            carried = transport(shape, delta, weight, below.detach())
        forward = torch.autograd.grad(carried, delta, below.detach().to(carried.dtype), retain_graph=True)[0]
        backward = carried if below is leaf else torch.autograd.grad(below, leaf, carried.to(below.dtype))[0]
        affine = seen.close(output - offset, forward) and seen.close(exact, backward)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
        affine = False
    if not affine:
        pads = ", including padding and slices," if isinstance(layer, _ConvNd) else ""
        raise UnsupportedModelError(
            f"layer {name!r} ({type(layer).__name__}) computes more than an affine map of its input with the shape of "
            f"its weight, so no feedback can stand in for it; move what is not affine{pads} into a separate module, or "
            f"pass exact={tuple(dict.fromkeys((name, *alike)))!r}"
        )


def require_layout(name: str, layer: nn.Module, feedback: Callable[[str], Tensor], inputs: Tensor) -> None:
    """Refuse a dense layer that stores `weight` in another layout than it applies, if that changes the feedback's shape.

    Raises:
        UnsupportedModelError: names the layer and the remedies.
    """
    stored = weight_now(layer).shape
    if geometry(layer) is None and stored[-1] != inputs.shape[-1] and feedback(name).shape[-1] != inputs.shape[-1]:
        raise UnsupportedModelError(
            f"layer {name!r} ({type(layer).__name__}) stores a weight {tuple(stored)} and takes {inputs.shape[-1]} "
            "inputs: its attribute `weight` must have the layout (n_out, n_in); make it a property, or use nn.Linear "
            "instead"
        )


def of_rows(call: Call, shape: Geometry | None, dimensions: int) -> Call:
    """Return the call for inputs (rows, n_in), given to a dense layer with the number of dimensions that it takes."""
    between = dimensions - 2
    if shape is not None or between < 1:
        return call
    return lambda rows: call(rows.reshape(len(rows), *[1] * between, rows.shape[-1])).reshape(len(rows), -1)


def inputs_for(layer: nn.Module) -> Tensor:
    """Return inputs (zero) of a shape that the layer accepts."""
    return _probe(geometry(layer), layer, weight_now(layer))[0]


def probe(name: str, layer: nn.Module, call: Call) -> tuple[bool, bool]:
    """Return whether the layer is affine at made-up inputs, and whether its weight differs at every call."""
    weight = weight_now(layer)
    try:
        inputs = torch.ones_like(inputs_for(layer)[:2])
        require_affine(name, layer, call, inputs)
        with unchanged(layer, weight.device), torch.no_grad():
            return True, not torch.equal(call(inputs), call(inputs))
    except Exception:  # it cannot be called like this: its first batch will tell
        return False, True


class Precision(TorchFunctionMode):
    """Record the coarsest floating-point type used, and compare tensors with its precision."""

    eps = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in (*args, result):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.eps = max(self.eps, torch.finfo(tensor.dtype).eps)
        return result

    def close(self, a: Tensor, b: Tensor) -> bool:
        """Return whether two tensors are equal up to rounding."""
        bound = 1e-8 if self.eps < 1e-12 else 1e-3 if self.eps < 1e-6 else 0.05
        a, b = a.detach().double(), b.detach().double()
        return a.shape == b.shape and bool((a - b).norm() <= bound * b.norm())


@contextmanager
def unchanged(layer: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore the random numbers, parameters, buffers and attributes of a layer after it has been called."""
    from apical.core.rest import kept_states  # layers that compute plainly do not need it

    modules = list(layer.modules())
    attributes = [module.__dict__.copy() for module in modules]
    buffers = [module._buffers.copy() for module in modules]
    for module in modules:
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.clone()
    own = [
        p for module in modules for p in module._parameters.values() if p is not None and type(p) in (nn.Parameter, Tensor)
    ]
    values = [(parameter, parameter.data, parameter.detach().clone()) for parameter in own]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), kept_states(modules):
            yield
    finally:
        for parameter, data, value in values:
            if parameter.data_ptr() != data.data_ptr():
                cast(Tensor, parameter).data = data
            if not (data.is_meta or torch.equal(data, value)):
                data.copy_(value)
        for module, saved, before in zip(modules, attributes, buffers, strict=True):
            module.__dict__.update(saved)
            module._buffers.update(before)
