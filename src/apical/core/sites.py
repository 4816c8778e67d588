"""The places where a rule of the feedback-alignment family puts its feedback: one a layer, and how the layer is called."""

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from apical.core.effective import probe
from apical.core.layer_forward import Wrapped
from apical.core.layers import computes_plainly, is_affine, is_packed, through
from apical.core.packed import Part, caller
from apical.core.swap import Swap
from apical.core.transport import geometry
from apical.core.units import Layer
from apical.errors import UnsupportedModelError

if TYPE_CHECKING:
    from apical.core.within import Within


class Site:
    """What a rule knows of one layer.

    Attributes:
        name, layer: as the model has them.
        forward: the layer's own forward method.
        shape: its geometry.
        swap: its swap; None where the rule has no feedback for it (the first layer).
        plain: the layer applies its own weight and bias, and nothing else, as far as is known.
        swaps: autograd keeps the weight itself, as far as is known.
        affine: the layer is affine in its input with the geometry of its weight: known of its type, or verified.
        options: the layer's flags and numbers when that was verified.
        probed: the same, verified at inputs made up for it.
        through: runs a layer that is no affine map with a feedback weight; None for all others.
        varies: it computes with another weight at every call.
        within: runs a layer that is more than an affine map, but applies its weight as it is; None for all others.
        dimensions: of its input, when it was last called.
        call: the layer's forward pass as a function of its input, while it is called.
        weight: its weight when the pass began, or what the rule has put there.
    """

    __slots__ = tuple(
        [
            "affine",
            "call",
            "dimensions",
            "forward",
            "layer",
            "name",
            "options",
            "own",
            "placed",
            "plain",
            "probed",
            "shape",
            "swap",
            "swaps",
            "through",
            "varies",
            "weight",
            "within",
        ]
    )

    def __init__(self, name: str, wrapped: Wrapped, swap: Swap | None) -> None:
        layer = cast(Layer, wrapped.layer)
        self.name, self.layer, self.forward, self.swap = name, layer, wrapped.forward, swap
        self.shape = geometry(layer)
        self.own, self.placed = layer._parameters, layer.__dict__
        self.call: Callable[[Tensor], Any] | None = None
        self.dimensions = 2
        self.weight: Tensor | None = None
        self.options: dict[str, Any] | None = None
        self.within: Within | None
        self.look_again()

    def look_again(self) -> None:
        """Find out how the layer computes, as far as can be told without a batch."""
        self.through = through(self.layer)
        self.plain = self.swaps = self.affine = self.probed = self.through is not None or computes_plainly(self.layer)
        self.varies, self.within = False, None
        if not self.plain and self.swap is not None:
            self.probed, self.varies = probe(self.name, self.layer, self.forward)
            if not self.probed and is_affine(self.layer):
                from apical.core.within import Within, works_around  # few models have such layers

                if works_around(self.layer, self.forward):
                    self.plain, self.within = True, Within(self.name, self.layer, self.forward, self.swap.feedback)

    def follow(self, substitutes: Collection[str]) -> None:
        """Follow a substitute of the weight: a hook may have given it other data, which are the weight's then."""
        own = self.own.get("weight") if substitutes and not torch.compiler.is_compiling() else None
        if own is not None and self.weight is not None and self.weight.data_ptr() != own.data_ptr():
            own.data = self.weight.data


def graph_leaves(loss: Tensor) -> set[int]:
    """Return the identities of the tensors whose gradient the graph of `loss` leads to."""
    leaves, seen, stack = set(), set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        stack.extend(below for below, _ in node.next_functions)
    return leaves


def trains_before(model: nn.Module, layers: Mapping[str, Any]) -> bool:
    """Return whether trainable parameters are registered before the first layer's, or next to it in a user's module."""
    first = next(iter(layers.values()))
    module = caller(first)
    users = {layer.owner for layer in layers.values() if isinstance(layer, Part) and not is_packed(layer.owner)}
    for user in (user for user in users if module in user.modules()):
        if any(q.requires_grad for q in user.parameters() if q is not getattr(first, "weight", None)):
            return True
    own = {id(parameter) for parameter in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) in own:
            return False
        if parameter.requires_grad:
            return True
    return False


def only_tensor(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the input of a layer that was called with keyword arguments alone."""
    tensors = [value for value in kwargs.values() if isinstance(value, Tensor)]
    if args:
        raise UnsupportedModelError(
            f"layer {name!r} was called with {type(args[0]).__name__} in place of its input; pass its input first"
        )
    if len(tensors) != 1:
        raise UnsupportedModelError(f"layer {name!r} was called with several keyword arguments; pass its input by position")
    return tensors[0]


def of_input(
    forward: Callable[..., Any], inputs: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Tensor], Any]:
    """Return the call as a function of the input alone."""
    if args:
        return lambda x: forward(x, *args[1:], **kwargs)
    return lambda x: forward(**{key: x if value is inputs else value for key, value in kwargs.items()})


def options_of(layer: nn.Module) -> dict[str, Any]:
    """Return a layer's attributes that are flags, numbers or words."""
    return {name: value for name, value in layer.__dict__.items() if isinstance(value, bool | int | float | str)}
