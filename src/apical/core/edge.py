"""Feedback edges: rewire the backward map of single layers, and nothing else.

A layer's input is detached, and an identity on its output carries the error to the old input through the rule's own
feedback. The layer's weight gradient stays autograd's, computed once; every other module keeps its exact derivative.
A rule of this family is then one pure function, the `pathway`, from the error at a layer's output to the error at its
input.
"""

from abc import abstractmethod
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from apical.core.credit import Credit, CreditRule, Loss
from apical.core.transport import Geometry, geometry, padded_input, transport
from apical.core.units import Layer, weighted_layers
from apical.errors import UnsupportedModelError

Pathway = Callable[..., tuple[Tensor | None, ...]]
"""`pathway(geometry, delta, template, *tensors) -> (error at the input, gradient of each tensor or None)`.
`template` has the shape of the input; it is None when nobody needs the error there (the first layer)."""


class FeedbackEdge(torch.autograd.Function):
    """Identity on `output`; its backward sends the error to `inputs` through `pathway` as well as into the layer."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, inputs: Tensor, pathway: Pathway, shape: Geometry | None, *tensors: Tensor
    ) -> Tensor:
        """Return `output` itself; keep the input, as the layer does too, only where a CPU kernel wants a real one."""
        ctx.pathway, ctx.geometry = pathway, shape
        ctx.input_shape, ctx.input_dtype = inputs.shape, inputs.dtype
        ctx.real = shape is not None and inputs.device.type == "cpu" and inputs.dtype == output.dtype
        ctx.save_for_backward(*([inputs] if ctx.real else []), *tensors)
        ctx.mark_dirty(output)  # not a view: the next module may work in place
        return output

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        """Split the error: to the layer's own derivative, and by feedback to the layer below."""
        tensors, template = ctx.saved_tensors, None
        if ctx.real:
            template, *tensors = tensors
        elif ctx.needs_input_grad[1]:
            template = delta if ctx.geometry is None else delta.new_empty(1).expand(ctx.input_shape)
        below, *grads = ctx.pathway(ctx.geometry, delta, template if ctx.needs_input_grad[1] else None, *tensors)
        if below is not None:
            below = below.to(ctx.input_dtype)
        return (delta, below, None, None, *grads)


def stored_feedback(
    shape: Geometry | None, delta: Tensor, template: Tensor | None, feedback: Tensor
) -> tuple[Tensor | None, None]:
    """The plainest pathway: `B^T delta` with a stored matrix B."""
    return (None if template is None else transport(shape, delta, feedback, template)), None


class WeightTap(torch.autograd.Function):
    """The weight itself; its backward also hands `share(gradient, ...)` to a second parameter, the plastic feedback."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, plastic: Tensor, share: Callable[..., Tensor], shape: Geometry | None, *tensors: Tensor
    ) -> Tensor:
        """Return `weight`."""
        ctx.share, ctx.geometry = share, shape
        ctx.save_for_backward(*tensors)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the weight, and of the plastic feedback."""
        shared = ctx.share(grad, ctx.geometry, *ctx.saved_tensors)
        return (grad, shared, None, None, *(None for _ in ctx.saved_tensors))


def weight_tap(
    weight: Tensor, plastic: Tensor, share: Callable[..., Tensor], shape: Geometry | None, *tensors: Tensor
) -> Tensor:
    """`weight`, whose gradient will also make that of `plastic`: `share(gradient, shape, *tensors)`."""
    result: Tensor = cast(Any, WeightTap).apply(weight, plastic, share, shape, *tensors)
    return result


class EdgeRule(CreditRule):
    """Base of the rules that put a feedback edge around every weighted layer (FA, sign symmetry, KP, WM, PFA).

    Args:
        model: network of Linear and convolution layers of any kind; other modules keep their exact derivative.
        loss: maps (output, targets) to a scalar batch mean.
        exact: names of modules or parameters without known transport that keep their exact derivative.
        first_layer: also hold feedback for the first layer. Nothing reads it in training; it is there to be looked at.

    Raises:
        UnsupportedModelError: see :func:`apical.core.units.weighted_layers`.
    """

    def __init__(self, model: nn.Module, loss: Loss, exact: Collection[str] = (), first_layer: bool = False) -> None:
        super().__init__(model, loss)
        layers = weighted_layers(model, exact)
        self._first = None if first_layer else next(iter(layers))
        self.layers = {name: layer for name, layer in layers.items() if name != self._first}
        self.geometries = {name: geometry(layer) for name, layer in self.layers.items()}
        self._active = False
        self._unseen = set(layers)
        self._hooks = [
            WrappedForward(layer, partial(self._call, name, layer, layer.forward)) for name, layer in layers.items()
        ]

    @abstractmethod
    def pathway(self, name: str, inputs: Tensor) -> tuple[Pathway, tuple[Tensor, ...]]:
        """The backward map of one layer: a pure function and the tensors it acts with.

        Args:
            name: the layer.
            inputs: the layer's (padded) input in this forward pass.
        """

    def substitutes(self) -> dict[str, Tensor]:
        """Tensors that stand in for model parameters in the forward pass (:class:`WeightTap`); none by default."""
        return {}

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Credit whose root is the loss: its graph carries the feedback edges."""
        self.require_attached()
        substitutes = self.substitutes()
        self._active = True
        try:
            if substitutes:
                output = torch.func.functional_call(self.model, substitutes, (inputs,))
            else:
                output = self.model(inputs)
        finally:
            self._active = False
        if self._unseen and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise UnsupportedModelError(
                f"layer {min(self._unseen)!r} was not called as a module in the forward pass, so no feedback can be "
                f"attached to it; call it, or remove it, or pass exact=({min(self._unseen)!r},)"
            )
        loss = self.loss(output, targets)
        return Credit([loss], [None], output, loss)

    def _call(
        self,
        name: str,
        layer: Layer,
        forward: Callable[..., Tensor],
        inputs: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """The layer's forward pass, with its feedback edge while the rule is at work."""
        if not self._active or not torch.is_grad_enabled():
            return forward(*(() if inputs is None else (inputs,)), *args, **kwargs)
        if inputs is None:
            raise UnsupportedModelError(f"layer {name!r} was called with keyword arguments; pass its input by position")
        if self._unseen:
            self._unseen.discard(name)
        if name == self._first:
            if inputs.requires_grad:
                raise UnsupportedModelError(
                    f"layer {name!r} was taken for the first layer, but its input needs an error; pass first_layer=True"
                )
            return forward(inputs, *args, **kwargs)
        output = forward(inputs.detach(), *args, **kwargs)
        below = padded_input(layer, inputs)
        if not (output.requires_grad or below.requires_grad):  # a frozen layer still hands the error down
            return output
        pathway, tensors = self.pathway(name, below)
        result: Tensor = cast(Any, FeedbackEdge).apply(output, below, pathway, self.geometries[name], *tensors)
        return result


class WrappedForward:
    """A layer whose calls go through `wrapper`, until :meth:`remove`: a third of the cost of a pair of forward hooks."""

    def __init__(self, layer: nn.Module, wrapper: Callable[..., Tensor]) -> None:
        self.layer, self.wrapper, self.before = layer, wrapper, layer.__dict__.get("forward")
        layer.__dict__["forward"] = wrapper

    def remove(self) -> None:
        """Give the layer its own forward method back."""
        if self.layer.__dict__.get("forward") is self.wrapper:
            del self.layer.__dict__["forward"]
            if self.before is not None:
                self.layer.__dict__["forward"] = self.before
