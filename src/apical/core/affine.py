"""Layers whose weight is a function of parameters, as plain layers of their effective weight.

Rules of whole chains write down products with each layer's weight. A layer that masks, normalises or reparametrises its
weight is given to them as a plain layer of PyTorch's whose `weight` is the effective one, computed once a batch and with its
graph, so that a gradient written for it reaches the parameters behind it.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every

from apical.core.layers import (
    Layer,
    computes_plainly,
    computes_weight,
    effective_weight,
    is_hooked,
    is_weighted,
    refuse_backward_hooks,
)
from apical.core.rest import undisturbed
from apical.core.transport import geometry
from apical.errors import UnsupportedModelError


class Computed(NamedTuple):
    """An effective weight and bias, and the state of the parameters and buffers that they were computed from."""

    weight: Tensor
    bias: Tensor | None
    state: list[tuple[int, int]]


class Effective(nn.Module):
    """Mixin of the plain layers: weight and bias are those that another layer computes.

    Attributes:
        stands_for: the other layer; no submodule.
        name: its name.
    """

    stands_for: nn.Module
    name: str
    _computed: Computed | None

    def __getstate__(self) -> dict[str, Any]:
        """What copies take along: not the graph of the last batch."""
        return self.__dict__ | {"_computed": None}

    def forget(self) -> None:
        """Start a batch: recompute the weight when it is next needed."""
        self.__dict__["_computed"] = None

    def _now(self) -> Computed:
        current = self._computed
        if current is None:  # a batch, which moves buffers (spectral norm) as the layer's own pass does
            current = self.__dict__["_computed"] = _computed(self.name, self.stands_for)
        elif current.state != _state(self.stands_for):
            current = self.__dict__["_computed"] = _looked_up(self.name, self.stands_for)
        return current

    @property
    def weight(self) -> Tensor:
        """The effective weight, with its graph."""
        return self._now().weight

    @property
    def bias(self) -> Tensor | None:
        """The effective bias, with its graph."""
        return self._now().bias


class EffectiveLinear(Effective, nn.Linear):  # type: ignore[misc, override]
    """A dense layer."""


class EffectiveConv1d(Effective, nn.Conv1d):  # type: ignore[override]
    """A convolution over sequences."""


class EffectiveConv2d(Effective, nn.Conv2d):  # type: ignore[override]
    """A convolution over images."""


class EffectiveConv3d(Effective, nn.Conv3d):  # type: ignore[override]
    """A convolution over volumes."""


def _computed(name: str, layer: nn.Module) -> Computed:
    weight = effective_weight(layer)
    if weight is None:
        raise unknown_weight(name, layer)
    with torch.enable_grad():
        bias = getattr(layer, "bias", None)
    return Computed(weight, bias, _state(layer))


def _looked_up(name: str, layer: nn.Module) -> Computed:
    """The same between batches: buffers and random numbers stay as they are."""
    with undisturbed(layer):
        now = _computed(name, layer)
    return now._replace(state=_state(layer))


def looked_at(layer: Layer) -> Tensor:
    """The layer's attribute `weight`, whose shape and type are asked for; spectral norm's buffers stay as they are."""
    with undisturbed(layer):
        return layer.weight


def _state(source: nn.Module) -> list[tuple[int, int]]:
    if torch.compiler.is_compiling():  # one graph is one batch, at whose beginning the weight is forgotten
        return []
    return [(id(tensor), tensor._version) for tensor in (*source.parameters(), *source.buffers())]


def affine(name: str, layer: nn.Module) -> Layer:
    """The layer itself, if it computes with its own weight as it is; else a plain one of its effective weight.

    Raises:
        UnsupportedModelError: the effective weight is not known, or no plain convolution applies it.
    """
    if computes_plainly(layer):
        assert is_weighted(layer)
        return layer
    now = _looked_up(name, layer)
    weight, shape = now.weight, geometry(layer)
    plain: nn.Module
    if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        plain = _like(layer)
    elif shape is None:
        plain = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        plain.__class__ = EffectiveLinear
    else:
        rank = len(shape.stride)
        plain = getattr(nn, f"Conv{rank}d")(
            *(weight.shape[1] * shape.groups, weight.shape[0], weight.shape[2:]),
            stride=shape.stride,
            padding=shape.padding,
            dilation=shape.dilation,
            groups=shape.groups,
            device="meta",
        )
        plain.__class__ = (EffectiveConv1d, EffectiveConv2d, EffectiveConv3d)[rank - 1]
    plain._parameters.clear()
    plain.__dict__.update(stands_for=layer, name=name, _computed=now)
    return cast(Layer, plain)


def _like(layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) -> nn.Module:
    """A layer of PyTorch's type with the other's options, which are its attributes, and without its parameters or hooks."""
    kinds = {nn.Conv1d: EffectiveConv1d, nn.Conv2d: EffectiveConv2d, nn.Conv3d: EffectiveConv3d}
    kind: Any = next((twin for base, twin in kinds.items() if isinstance(layer, base)), EffectiveLinear)
    plain: nn.Module = kind.__new__(kind)
    nn.Module.__init__(plain)
    fresh = set(plain.__dict__)
    plain.__dict__.update(
        (key, value) for key, value in layer.__dict__.items() if key not in {*fresh, "forward", "weight", "bias"}
    )
    return plain


def original(module: nn.Module) -> nn.Module:
    """Return the model's module that this one replaces: an effective layer, or an activation that is not in place."""
    while "stands_for" in module.__dict__:
        module = module.__dict__["stands_for"]
    return module


def require_affine(name: str, layer: nn.Module) -> None:
    """At each batch: the layer still computes what :func:`affine` took it for.

    Raises:
        UnsupportedModelError: it was parametrised, pruned or given another forward since.
    """
    if isinstance(layer, Effective):
        layer.forget()
    elif not computes_plainly(layer):
        raise UnsupportedModelError(
            f"layer {name!r} ({type(layer).__name__}) no longer computes with its plain weight: it was parametrised, "
            "pruned, or given another forward method after the rule was made; make the rule afterwards"
        )


def unknown_weight(name: str, layer: nn.Module) -> UnsupportedModelError:
    """Refusal of a layer whose effective weight is not known."""
    kind = type(layer).__name__
    if "forward" in layer.__dict__:
        what, remedy = "has its forward method replaced on the instance", "make it a module class and register that class"
    else:
        what, remedy = "has its own forward method, whose effective weight is not known", "register it"
    return UnsupportedModelError(f"layer {name!r} ({kind}) {what}; {remedy}: apical.register_layer({kind}, weight=...)")


def require_unhooked(name: str, module: nn.Module, inputs: Tensor) -> None:
    """Refuse hooks that change what a module makes of an input, or an error; those that only look at activities may stay.

    Raises:
        UnsupportedModelError: names it.
    """
    module = original(module)
    refuse_backward_hooks(name, module)
    if not is_hooked(module) or all(computes_weight(hook) for hook in _hooks(module)):
        return
    with torch.no_grad():
        output: Tensor = module(inputs.clone())  # first: a hook may compute the weight
        own: Tensor = module.forward(inputs.clone())
    if not (own.shape == output.shape and torch.allclose(own, output, 0.0, 0.0, equal_nan=True)):
        raise UnsupportedModelError(
            f"a hook on module {name} changes what it computes, which a chain's equations do not include; move the "
            "change into a separate module"
        )


def _hooks(module: nn.Module) -> list[Any]:
    hooks = module._forward_hooks, module._forward_pre_hooks, every._global_forward_hooks, every._global_forward_pre_hooks
    return [hook for some in hooks for hook in some.values()]
