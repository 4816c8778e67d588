"""The registry of module types: what rules know about layers, instead of a list of types in each rule.

Weighted layers have a weight between two populations. Two properties of their types are known: how an error goes back
through any matrix in its place (:func:`apical.core.transport.geometry`), and which weight their forward applies. A closed
form, or a swap of the weight, is correct only if a layer runs its type's own forward on its own parameter. A subclass that
masks, standardises, quantises or scales its weight, a parametrisation, pruning or weight norm is still a layer, but
takes the general path (:func:`computes_plainly` is false): through its effective weight, or through autograd.

Activations have a similar registry in :mod:`apical.core.activations`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every
from torch.nn.modules import pooling
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from apical.core.transport import GEOMETRIES, Geometry, dense, geometry_of_type
from apical.errors import ConfigError, UnsupportedModelError

Layer: TypeAlias = nn.Linear | _ConvNd
"""Layers with a weight between two populations, for which credit-assignment rules differ."""

LOCAL = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU, nn.Embedding, nn.EmbeddingBag)
"""Layers without such a weight: scales, shifts, slopes, look-ups. They always keep their exact derivative."""

_local: list[type[nn.Module]] = [*LOCAL]

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
AVERAGES = (pooling._AvgPoolNd, pooling._AdaptiveAvgPoolNd)
PACKED = (nn.MultiheadAttention, nn.RNN, nn.GRU, nn.LSTM, nn.RNNCell, nn.GRUCell, nn.LSTMCell)
"""Modules that contain several weights between populations and apply them in one call (:mod:`apical.core.packed`)."""

LINEAR: list[type[nn.Module]] = [nn.Flatten, nn.Unflatten, nn.Identity, *AVERAGES]
MAXIMA = (pooling._MaxPoolNd, pooling._AdaptiveMaxPoolNd)
POOLS: list[type[nn.Module]] = [pooling._MaxPoolNd, *AVERAGES]
SHAPES = (nn.Flatten, nn.Unflatten, nn.Upsample, nn.Identity)


@dataclass(frozen=True)
class LayerType:
    """Properties of a type of weighted layers.

    Attributes:
        forward: the method that applies the effective weight and the bias, and nothing else.
        weight: the effective weight, as a function of the layer.
        through: runs a layer that is not an affine map with a feedback weight; None if the forward is `weight h + bias`.
    """

    forward: Callable[..., Any]
    weight: Callable[[Any], Tensor]
    through: Callable[[Any, Tensor, Tensor], Tensor] | None = None


def _own_weight(layer: Any) -> Tensor:
    weight: Tensor = layer.weight
    return weight


PLAIN = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
OWN_FORWARD: dict[type[nn.Module], Callable[..., Any]] = {kind: kind.forward for kind in PLAIN}
"""PyTorch's layer types, and the forward method that applies `weight` and `bias` and nothing else."""

_PLAIN = set(OWN_FORWARD.values())
_APPLIED = {getattr(kind, "_conv_forward") for kind in PLAIN if hasattr(kind, "_conv_forward")}  # noqa: B009
_overrides: dict[type[nn.Module], bool] = {}  # what the forward method of a type with PyTorch's own relies on
_LAYERS: dict[type[nn.Module], LayerType] = {kind: LayerType(kind.forward, _own_weight) for kind in PLAIN}


def register_layer(
    kind: type[nn.Module],
    *,
    geometry: Callable[[Any], Geometry | None] | None = None,
    weight: Callable[[Any], Tensor] = _own_weight,
    through: Callable[[Any, Tensor, Tensor], Tensor] | None = None,
) -> None:
    """Register a type of module as a weighted layer for every rule.

    Its forward must map an input h to `weight(layer) h + layer.bias`, unless it is not affine. The module needs an attribute
    `weight` in the layout of nn.Linear or of a convolution, which may be a property; `bias` may be None or missing.

    Args:
        kind: the type; subclasses that override `forward` are not covered.
        geometry: geometry of the backward map, as a function of the layer; by default that of the type it inherits from, or
            else None, which means dense. For convolutions see :class:`apical.core.transport.Geometry`.
        weight: the effective weight, computed from the parameters so that autograd can follow it; by default `layer.weight`.
        through: for a layer that is not an affine map, a function of (layer, input, feedback): the layer's forward, with a
            feedback weight instead of the weight where the backward pass sends the error to the input. Rules with feedback
            weights train the layer this way; rules whose equations require affine maps refuse it.

    Raises:
        ConfigError: `kind` is not a subclass of nn.Module.

    >>> class Masked(nn.Linear):
    ...     def forward(self, h):
    ...         return nn.functional.linear(h, self.weight.tril(), self.bias)
    >>> register_layer(Masked, weight=lambda layer: layer.weight.tril())
    >>> effective_weight(Masked(2, 2))[0, 1].item()
    0.0
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ConfigError(f"register_layer takes a subclass of nn.Module, not {kind!r}")
    GEOMETRIES[kind] = geometry or geometry_of_type(kind) or dense
    _LAYERS[kind] = LayerType(kind.forward, weight, through)


def register_local(kind: type[nn.Module]) -> None:
    """Register a type of module as local for every rule: its parameters get their exact derivative.

    Only for modules without a weight between two populations, such as a scale for each connection; a matrix in one would be
    transported. Linear and convolution layers inside such a module still count as layers.

    Raises:
        ConfigError: `kind` is not a subclass of nn.Module, or is a weighted layer.

    >>> class Gain(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.gain = nn.Parameter(torch.ones(()))
    >>> register_local(Gain)
    >>> is_local(Gain())
    True
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ConfigError(f"register_local takes a subclass of nn.Module, not {kind!r}")
    if geometry_of_type(kind) is not None:
        raise ConfigError(f"register_local: {kind.__name__} has a weight between two populations; use register_layer")
    if kind not in _local:
        _local.append(kind)


def is_weighted(module: nn.Module) -> TypeGuard[Layer]:
    """Return whether the module is a layer with a weight between two populations."""
    return geometry_of_type(type(module)) is not None


def is_registered(module: nn.Module) -> bool:
    """Return whether the module's type was registered with :func:`register_layer`."""
    return any(kind in _LAYERS and kind not in OWN_FORWARD for kind in type(module).__mro__)


def is_packed(module: nn.Module) -> bool:
    """Return whether the module contains several weights between populations and applies them in PyTorch's own way."""
    kind = next((kind for kind in type(module).__mro__ if kind in PACKED), None)
    return kind is not None and runs_own_forward(module, kind.forward)


def is_affine(module: nn.Module) -> bool:
    """Return whether the layer is an affine map of its input, as far as its type shows."""
    kind = _registered(module)
    return kind is None or kind.through is None


def through(module: nn.Module) -> Callable[[Any, Tensor, Tensor], Tensor] | None:
    """Return what runs a non-affine layer with a feedback weight; None for other layers, or with another forward."""
    kind = _registered(module)
    own = kind is not None and "weight" in module._parameters and runs_own_forward(module, kind.forward)
    return kind.through if own and kind is not None else None


def _registered(module: nn.Module) -> LayerType | None:
    for base in type(module).__mro__:  # a loop, because PyTorch 2.6's compiler can follow it
        if base in _LAYERS:
            return _LAYERS[base]
    return None


def _diagonal_kind(module: nn.Module) -> str:
    """Return the kind of a user's module in which each entry of a parameter acts only on its own unit; else ""."""
    if type(module).__module__.startswith("torch.nn."):
        return ""
    from apical.core.diagonal import diagonal_kind

    return diagonal_kind(module)


def is_local(module: nn.Module) -> bool:
    """Return whether the module may have parameters, but no weight between two populations."""
    return isinstance(module, tuple(_local)) or _diagonal_kind(module) != ""


def is_norm(module: nn.Module) -> bool:
    """Return whether the module normalises by statistics over batch, channels, groups or features."""
    return isinstance(module, NORMS) or _diagonal_kind(module) == "norm"


def is_random(module: nn.Module) -> bool:
    """Return whether the module makes the forward pass random."""
    return isinstance(module, (_DropoutNd, nn.RReLU))


def is_maximum(module: nn.Module) -> bool:
    """Return whether the module is max pooling."""
    return isinstance(module, MAXIMA)


def is_linear(module: nn.Module) -> bool:
    """Return whether the module is linear and has no parameters, so that it may be part of the layer that follows it."""
    return isinstance(module, tuple(LINEAR)) and runs_own_forward(module)


def is_pool(module: nn.Module) -> bool:
    """Return whether the module pools windows by max, average or softmax, so that it may precede a layer's activation."""
    return isinstance(module, tuple(POOLS)) and runs_own_forward(module)


def shapes_input(module: nn.Module) -> bool:
    """Return whether the module, directly before a layer, shapes its input; elsewhere it shapes the output before it."""
    return isinstance(module, SHAPES)


def is_known_in_row(module: nn.Module) -> bool:
    """Return whether the module may be anywhere after a layer, given that autograd computes its derivative."""
    return isinstance(module, (*NORMS, *LINEAR, *MAXIMA, *SHAPES, _DropoutNd))


def is_own(module: nn.Module) -> bool:
    """Return whether the module's type is PyTorch's."""
    return type(module).__module__.startswith("torch.nn")


def runs_own_forward(module: nn.Module, forward: Callable[..., Any] | None = None) -> bool:
    """Whether a module runs `forward`, by default that of its nearest class in PyTorch or here, not overridden.

    A forward that a rule put on the instance (recognised by its attribute `before`, the previous one) does not count.
    """
    if forward is None:
        ours = (k for k in type(module).__mro__ if k.__module__.startswith(("torch.nn.modules", "apical.core")))
        forward = next(iter(ours), nn.Module).forward  # type: ignore[attr-defined]
    return type(module).forward is forward and _keeps_forward(module)


def _keeps_forward(module: nn.Module) -> bool:
    bound = module.__dict__.get("forward")
    while bound is not None and getattr(bound, "__func__", None) is not type(module).forward:  # a copy's own forward
        if not hasattr(bound, "before"):
            return False
        bound = bound.before
    return True


def is_hooked(module: nn.Module) -> bool:
    """Return whether calling the module does more than run its forward: hooks may change its input or output.

    Global hooks of PyTorch's tools, such as its operation counter, only observe and do not count.
    """
    if module._forward_hooks or module._forward_pre_hooks or _hears_errors(module):
        return True
    if not (every._global_forward_hooks or every._global_forward_pre_hooks):
        return False
    hooks = (*every._global_forward_hooks.values(), *every._global_forward_pre_hooks.values())
    return not all((getattr(hook, "__module__", None) or "").startswith("torch.utils.") for hook in hooks)


def refuse_backward_hooks(name: str, module: nn.Module) -> None:
    """Refuse hooks on a module's backward pass, for rules that send no error through the module's output.

    Raises:
        UnsupportedModelError: names the module.
    """
    if _hears_errors(module):
        raise UnsupportedModelError(
            f"module {name} has a backward hook, which would never run, because this rule sends no error through the "
            "module's output; remove the hook, or use another rule"
        )


def _hears_errors(module: nn.Module) -> bool:
    own = module._backward_hooks or module._backward_pre_hooks
    return bool(own or every._global_backward_hooks or every._global_backward_pre_hooks)


def has_global_hook() -> bool:
    """Whether global module hooks exist; PyTorch 2.6 has no function for that."""
    forward = every._global_forward_hooks or every._global_forward_pre_hooks
    return bool(forward or every._global_backward_hooks or every._global_backward_pre_hooks)


def computes_plainly(layer: nn.Module) -> bool:
    """Return whether the layer, of a type of PyTorch's, runs that type's forward on a weight that is its own parameter.

    To be called at every call: pruning or a parametrisation may come after the rule. A forward that a rule put
    on the instance (recognised by its attribute `before`, the previous one) does not count.
    """
    kind = type(layer)
    if kind.forward not in _PLAIN or "weight" not in layer._parameters:
        return False
    if kind not in _overrides:
        applied = getattr(kind, "_conv_forward", None)
        own = hasattr(kind, "weight") or hasattr(kind, "bias")  # properties
        _overrides[kind] = own or not (applied is None or applied in _APPLIED)
    return not _overrides[kind] and _keeps_forward(layer)


def effective_weight(layer: nn.Module) -> Tensor | None:
    """Return the weight that the layer's forward applies, with its graph to the parameters; None if it is unknown.

    It is known for PyTorch's types, also if parametrised, pruned, or with weight or spectral norm, and for registered types.
    """
    kind = next((base for base in type(layer).__mro__ if base in _LAYERS), None)
    applied = getattr(type(layer), "_conv_forward", None)
    if kind is None or not runs_own_forward(layer, _LAYERS[kind].forward):
        return None
    if kind in OWN_FORWARD and not (applied is None or applied in _APPLIED):
        return None
    with torch.enable_grad():
        for hook in layer._forward_pre_hooks.values():
            if computes_weight(hook):
                cast(Any, hook)(layer, ())
        return _LAYERS[kind].weight(layer)


def computes_weight(hook: object) -> bool:
    """Return whether a forward pre-hook is one of PyTorch's that computes a layer's weight."""
    return isinstance(hook, BasePruningMethod | WeightNorm | SpectralNorm)
