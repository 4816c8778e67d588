"""Layers whose weight is a function of parameters, presented as plain layers with their effective weight.

Rules for whole chains write out products with each layer's weight. For a layer that masks, normalises or reparametrises its
weight, they get a plain PyTorch layer whose `weight` is the effective one. It is computed once per batch and keeps its
graph, so that a gradient assigned to it reaches the parameters it was computed from.
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
    """Mixin of the plain layers: weight and bias are computed by another layer.

    Attributes:
        stands_for: the other layer; not a submodule.
        name: name of the other layer.
    """

    stands_for: nn.Module
    name: str
    _computed: Computed | None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to copy, without the graph of the last batch."""
        return self.__dict__ | {"_computed": None}

    def forget(self) -> None:
        """Start a batch: recompute the weight when it is next needed."""
        self.__dict__["_computed"] = None

    def _now(self) -> Computed:
        current = self._computed
        if current is None:  # a new batch: updates buffers (spectral norm) as the layer's own forward does
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
    """Compute the same between batches, leaving buffers and random numbers unchanged."""
    with undisturbed(layer):
        now = _computed(name, layer)
    return now._replace(state=_state(layer))


def looked_at(layer: Layer) -> Tensor:
    """Return the layer's attribute `weight`, to read its shape and dtype, without changing the buffers of spectral norm."""
    with undisturbed(layer):
        return layer.weight


def _state(source: nn.Module) -> list[tuple[int, int]]:
    if torch.compiler.is_compiling():  # one graph is one batch, and the weight is recomputed at its start
        return []
    return [(id(tensor), tensor._version) for tensor in (*source.parameters(), *source.buffers())]


def affine(name: str, layer: nn.Module) -> Layer:
    """Return the layer itself if it computes with its own weight as is; else a plain layer with its effective weight.

    Raises:
        UnsupportedModelError: the effective weight is not known, or is not applied by a plain convolution.
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
    """Return a layer of PyTorch's type with the given layer's options (attributes), but without its parameters or hooks."""
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
    """Check, at each batch, that the layer still computes what :func:`affine` assumed.

    Raises:
        UnsupportedModelError: it has since been parametrised, pruned or given another forward.
    """
    if isinstance(layer, Effective):
        layer.forget()
    elif not computes_plainly(layer):
        raise UnsupportedModelError(
            f"layer {name!r} ({type(layer).__name__}) no longer computes with its plain weight: it was parametrised, "
            "pruned, or given another forward method after the rule was made; make the rule afterwards"
        )


def unknown_weight(name: str, layer: nn.Module) -> UnsupportedModelError:
    """Return the error for a layer whose effective weight is not known."""
    kind = type(layer).__name__
    if "forward" in layer.__dict__:
        what, remedy = "has its forward method replaced on the instance", "make it a module class and register that class"
    else:
        what, remedy = "has its own forward method, whose effective weight is not known", "register it"
    return UnsupportedModelError(f"layer {name!r} ({kind}) {what}; {remedy}: apical.register_layer({kind}, weight=...)")


def require_unhooked(name: str, module: nn.Module, inputs: Tensor) -> None:
    """Refuse hooks that change a module's output or its error; hooks that only read activities are allowed.

    Raises:
        UnsupportedModelError: names the module.
    """
    module = original(module)
    refuse_backward_hooks(name, module)
    if not is_hooked(module) or all(computes_weight(hook) for hook in _hooks(module)):
        return
    with torch.no_grad():
        output: Tensor = module(inputs.clone())  # run this first: a hook may compute the weight
        own: Tensor = module.forward(inputs.clone())
    if not (own.shape == output.shape and torch.allclose(own, output, 0.0, 0.0, equal_nan=True)):
        raise UnsupportedModelError(
            f"a hook on module {name} changes what it computes, which a chain's equations do not include; move the "
            "change into a separate module"
        )


def _hooks(module: nn.Module) -> list[Any]:
    hooks = module._forward_hooks, module._forward_pre_hooks, every._global_forward_hooks, every._global_forward_pre_hooks
    return [hook for some in hooks for hook in some.values()]
