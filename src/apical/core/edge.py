"""Feedback in place of the transposed weight: rewire the backward map of single layers, and nothing else.

A rule of this family is one pure function per layer, the feedback weight, evaluated when the backward pass needs it. Two
ways lead the error through it; both leave the layer's weight gradient and every other module to autograd.

    swap   while the layer runs, autograd keeps a note in place of the weight; when it asks for the weight to make the error
           at the input, it is given the feedback weight. Costs next to nothing, and knows no layer types.
    edge   the layer's input is detached, and an identity on its output carries the error to the old input by
           :func:`apical.core.transport.transport`. For what a swap cannot do: autocast, `torch.compile`, and pathways that
           are not one matrix.
"""

from abc import abstractmethod
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from apical.core.credit import Credit, CreditRule, Loss
from apical.core.transport import Geometry, geometry, padded_input, transport
from apical.core.units import Layer, weighted_layers
from apical.errors import UnsupportedModelError

Feedback: TypeAlias = tuple[Callable[..., Tensor], tuple[Tensor, ...]]
"""`(compute, tensors)`: `compute(geometry, *tensors)` is the feedback weight, in the layout of the layer's weight."""

Pathway: TypeAlias = tuple[Callable[..., tuple[Tensor | None, ...]], tuple[Tensor, ...]]
"""`(pathway, tensors)`: `pathway(geometry, delta, template, *tensors)` is the error at the input, and the gradient of each
tensor or None. `template` has the shape of the input; it is None when nobody needs the error there (the first layer)."""


def stored(shape: Geometry | None, feedback: Tensor) -> Tensor:
    """The plainest feedback weight: a stored one."""
    return feedback


class Swap(saved_tensors_hooks):
    """While one layer runs, autograd keeps a note in place of the layer's weight, and other tensors as they are.

    Args:
        layer: the layer.
        feedback: makes the feedback weight, when the backward pass asks for the weight.
    """

    def __init__(self, layer: Layer, feedback: Callable[[], Tensor]) -> None:
        super().__init__(self.pack, self.unpack)
        self.layer, self.feedback = layer, feedback
        self._own = layer._parameters

    def _weight(self) -> Tensor:
        """The layer's weight; attributes of modules take a microsecond, which shows beside small layers."""
        weight = self._own.get("weight")
        return self.layer.weight if weight is None else weight

    def pack(self, saved: Tensor) -> Any:
        """(the tensor or None for the weight, is it transposed, version)."""
        weight = self._weight()
        if saved.untyped_storage()._cdata != weight.untyped_storage()._cdata:
            return saved, False, saved._version
        if saved.shape == weight.shape and saved.stride() == weight.stride():
            return None, False, weight._version
        if saved.shape == weight.shape[::-1] and saved.stride() == weight.stride()[::-1]:
            return None, True, weight._version
        raise UnsupportedModelError(
            f"a {type(self.layer).__name__} keeps its weight {tuple(weight.shape)} in the form {tuple(saved.shape)}, "
            "for which no feedback is known"
        )

    def unpack(self, packed: tuple[Tensor | None, bool, int]) -> Tensor:
        """The feedback weight, or the tensor that was kept, unless it was changed since."""
        saved, transposed, version = packed
        if (self._weight() if saved is None else saved)._version != version:
            raise RuntimeError("a tensor that the backward pass needs was modified in place after the forward pass")
        if saved is not None:
            return saved
        feedback = self.feedback()
        return feedback.T if transposed else feedback


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
        if not ctx.needs_input_grad[1]:
            template = None
        below: Tensor | None = None
        grads: tuple[Tensor | None, ...] = tuple(None for _ in tensors)
        if ctx.pathway is not None:
            below, *grads = ctx.pathway(ctx.geometry, delta, template, *tensors)
        elif template is not None:
            below = transport(ctx.geometry, delta, ctx.feedback(ctx.geometry, *tensors), template)
        if below is not None:
            below = below.to(ctx.input_dtype)
        return (delta, below, None, None, None, *grads)


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
    """Base of the rules that send the error through feedback of their own, layer by layer (FA, sign symmetry, KP, WM, PFA).

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
        self._may_swap = False
        self._swaps = {name: Swap(layer, partial(self.feedback_weight, name)) for name, layer in self.layers.items()}
        self._one_matrix = type(self).pathway is EdgeRule.pathway  # no layer has another way for the error
        self._unseen = set(layers)
        self._hooks = [
            WrappedForward(layer, partial(self._call, name, layer, layer.forward)) for name, layer in layers.items()
        ]

    @abstractmethod
    def feedback_of(self, name: str) -> Feedback:
        """The feedback weight of one layer: a pure function of tensors, in the layout of the layer's weight."""

    def pathway(self, name: str, inputs: Tensor) -> Pathway | None:
        """Another way for the error than one feedback weight, where a rule has one; None by default.

        Args:
            name: the layer.
            inputs: the layer's (padded) input in this forward pass.
        """
        return None

    def feedback_weight(self, name: str) -> Tensor:
        """Effective feedback weight of one layer, in the shape of the layer's weight."""
        compute, tensors = self.feedback_of(name)
        if not torch.is_grad_enabled():  # as in a backward pass
            return compute(self.geometries[name], *tensors)
        with torch.no_grad():
            return compute(self.geometries[name], *tensors)

    def feedback_weights(self) -> dict[str, Tensor]:
        """Effective feedback weight of each layer."""
        return {name: self.feedback_weight(name) for name in self.layers}

    def substitutes(self) -> dict[str, Tensor]:
        """Tensors that stand in for model parameters in the forward pass (:class:`WeightTap`); none by default."""
        return {}

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Credit whose root is the loss: its graph carries the feedback edges."""
        self.require_attached()
        substitutes = self.substitutes()
        self._may_swap = not (torch.compiler.is_compiling() or torch.is_autocast_enabled(inputs.device.type))
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
        if self._one_matrix and self._may_swap and inputs.requires_grad:
            with self._swaps[name]:
                return forward(inputs, *args, **kwargs)
        shape = self.geometries[name]
        below = padded_input(layer, inputs) if shape is not None else inputs
        pathway = self.pathway(name, below)
        if pathway is None and not inputs.requires_grad:
            return forward(inputs, *args, **kwargs)
        if pathway is None and self._may_swap:
            with self._swaps[name]:
                return forward(inputs, *args, **kwargs)
        output = forward(inputs.detach(), *args, **kwargs)
        if not (output.requires_grad or below.requires_grad):  # a frozen layer still hands the error down
            return output
        feedback, tensors = (None, pathway[1]) if pathway is not None else self.feedback_of(name)
        path = pathway[0] if pathway is not None else None
        result: Tensor = cast(Any, FeedbackEdge).apply(output, below, feedback, path, shape, *tensors)
        return result


class WrappedForward:
    """A layer whose calls go through `wrapper`, until :meth:`remove`: a third of the cost of a pair of forward hooks."""

    def __init__(self, layer: nn.Module, wrapper: Callable[..., Tensor]) -> None:
        self.layer, self.wrapper, self.before = layer, wrapper, layer.__dict__.get("forward")
        wrapper.before = self.before  # type: ignore[attr-defined]
        layer.__dict__["forward"] = wrapper

    def remove(self) -> None:
        """Give the layer its own forward method back."""
        if self.layer.__dict__.get("forward") is self.wrapper:
            del self.layer.__dict__["forward"]
            if self.before is not None:
                self.layer.__dict__["forward"] = self.before
