"""The registry of module types: what rules know about a layer, in place of lists of types in each of them.

Weighted layers carry a weight between two populations. Of their types two things are known: how an error goes back through
any matrix in the weight's place (:func:`apical.core.transport.geometry`), and which weight their forward applies. A closed
form, or a swap of the weight, is right only where a layer runs its type's own forward on its own parameter. A subclass that
masks, standardises, quantises or scales its weight, a parametrisation, pruning or weight norm is a layer all the same, but
takes the general path (:func:`computes_plainly` is false): through its effective weight, or through autograd.

Activations have a registry of the same kind in :mod:`apical.core.activations`.
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
"""Layers with a weight between two populations: these are what credit-assignment rules differ in."""

LOCAL = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU, nn.Embedding, nn.EmbeddingBag)
"""Layers without such a weight: scales, shifts, slopes, look-ups. They always keep their exact derivative."""

_local: list[type[nn.Module]] = [*LOCAL]

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
AVERAGES = (pooling._AvgPoolNd, pooling._AdaptiveAvgPoolNd)
PACKED = (nn.MultiheadAttention, nn.RNN, nn.GRU, nn.LSTM, nn.RNNCell, nn.GRUCell, nn.LSTMCell)
"""Modules that hold several weights between populations and apply them within one call (:mod:`apical.core.packed`)."""

LINEAR: list[type[nn.Module]] = [nn.Flatten, nn.Unflatten, nn.Identity, *AVERAGES]
MAXIMA = (pooling._MaxPoolNd, pooling._AdaptiveMaxPoolNd)
POOLS: list[type[nn.Module]] = [pooling._MaxPoolNd, *AVERAGES]
SHAPES = (nn.Flatten, nn.Unflatten, nn.Upsample, nn.Identity)


@dataclass(frozen=True)
class LayerType:
    """What is known of a type of weighted layers.

    Attributes:
        forward: the method that applies the effective weight and the bias, and nothing else.
        weight: the effective weight, as a function of the layer.
        through: runs a layer that is no affine map with a feedback weight; None where the forward is `weight h + bias`.
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
    """Make a type of modules known as weighted layers, in every rule.

    Its forward must map an input h to `weight(layer) h + layer.bias`, unless it is not affine. The module has an attribute
    `weight` of the layout of nn.Linear's or a convolution's, which may be a property; `bias` may be None or missing.

    Args:
        kind: the type; a subclass that overrides `forward` again is not covered.
        geometry: geometry of the backward map, as a function of the layer; that of the type it inherits from by default, or
            else None, which is dense. For convolutions see :class:`apical.core.transport.Geometry`.
        weight: the effective weight, computed from the parameters so that autograd can follow; `layer.weight` by default.
        through: for a layer that is no affine map of its input, a function of (layer, input, feedback): its forward, with a
            feedback weight in the weight's place where a backward pass hands the error to the input. Rules with feedback
            weights train it so; those whose equations are about affine maps refuse it.

    Raises:
        ConfigError: `kind` is no type of modules.

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
    """Make a type of modules known as local, in every rule: its parameters get their exact derivative.

    Only for modules without a weight between two populations, such as a scale of each connection; a matrix in one would be
    transported. Linear and convolution layers inside of one are layers all the same.

    Raises:
        ConfigError: `kind` is no type of modules, or a weighted layer.

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
    """Whether the module is a layer with a weight between two populations."""
    return geometry_of_type(type(module)) is not None


def is_registered(module: nn.Module) -> bool:
    """Whether the module's type is one that :func:`register_layer` has made known."""
    return any(kind in _LAYERS and kind not in OWN_FORWARD for kind in type(module).__mro__)


def is_packed(module: nn.Module) -> bool:
    """Whether the module holds several weights between populations and applies them in PyTorch's own way."""
    kind = next((kind for kind in type(module).__mro__ if kind in PACKED), None)
    return kind is not None and runs_own_forward(module, kind.forward)


def is_affine(module: nn.Module) -> bool:
    """Whether the layer is an affine map of its input, as far as its type says."""
    kind = _registered(module)
    return kind is None or kind.through is None


def through(module: nn.Module) -> Callable[[Any, Tensor, Tensor], Tensor] | None:
    """What runs a layer that is no affine map with a feedback weight; None of others, and of layers with another forward."""
    kind = _registered(module)
    own = kind is not None and "weight" in module._parameters and runs_own_forward(module, kind.forward)
    return kind.through if own and kind is not None else None


def _registered(module: nn.Module) -> LayerType | None:
    for base in type(module).__mro__:  # a loop, which the compiler of PyTorch 2.6 can follow
        if base in _LAYERS:
            return _LAYERS[base]
    return None


def _diagonal_kind(module: nn.Module) -> str:
    """What a module of a user's is, where each number of its parameters acts on its own unit alone; else ""."""
    if type(module).__module__.startswith("torch.nn."):
        return ""
    from apical.core.diagonal import diagonal_kind

    return diagonal_kind(module)


def is_local(module: nn.Module) -> bool:
    """Whether the module may have parameters, but no weight between two populations."""
    return isinstance(module, tuple(_local)) or _diagonal_kind(module) != ""


def is_norm(module: nn.Module) -> bool:
    """Whether the module normalises by statistics over batch, channels, groups or features."""
    return isinstance(module, NORMS) or _diagonal_kind(module) == "norm"


def is_random(module: nn.Module) -> bool:
    """Whether the module makes the forward pass random."""
    return isinstance(module, (_DropoutNd, nn.RReLU))


def is_maximum(module: nn.Module) -> bool:
    """Whether the module pools by maxima."""
    return isinstance(module, MAXIMA)


def is_linear(module: nn.Module) -> bool:
    """Whether the module is linear, without parameters, and so may count as a part of the layer that follows it."""
    return isinstance(module, tuple(LINEAR)) and runs_own_forward(module)


def is_pool(module: nn.Module) -> bool:
    """Whether the module pools windows by maxima, averages or softmax, and so may stand between layer and activation."""
    return isinstance(module, tuple(POOLS)) and runs_own_forward(module)


def shapes_input(module: nn.Module) -> bool:
    """Whether the module, right before a layer, shapes that layer's input; elsewhere it shapes the output before it."""
    return isinstance(module, SHAPES)


def is_known_in_row(module: nn.Module) -> bool:
    """Whether the module may stand anywhere behind a layer, given that autograd takes its derivative."""
    return isinstance(module, (*NORMS, *LINEAR, *MAXIMA, *SHAPES, _DropoutNd))


def is_own(module: nn.Module) -> bool:
    """Whether the module's type is PyTorch's."""
    return type(module).__module__.startswith("torch.nn")


def runs_own_forward(module: nn.Module, forward: Callable[..., Any] | None = None) -> bool:
    """Whether a module runs `forward`, by default that of its nearest class in PyTorch or here, not overridden.

    A forward that a rule put on the instance (it has an attribute `before`, what stood there) does not count.
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
    """Whether calling the module does more than run its forward method: hooks may change what it is given or makes.

    Those of every module that PyTorch's tools have put there, such as its counter of operations, look on.
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
        UnsupportedModelError: names it.
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
    """Whether the layer runs its type's own forward on a weight that is its own parameter; of PyTorch's types alone.

    To be asked at every call: pruning or a parametrisation may come after the rule. A forward that a rule put on the
    instance (it has an attribute `before`, what stood there) does not count.
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
    """The weight that the layer's forward applies, with its graph to the parameters; None where that is not known.

    It is known of PyTorch's types, also parametrised, pruned, or with weight or spectral norm, and of registered types.
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
    """Whether a forward pre-hook is PyTorch's own that computes a layer's weight."""
    return isinstance(hook, BasePruningMethod | WeightNorm | SpectralNorm)
