"""The registry of layer types: which modules are weighted layers, and whether one computes with its own weight as it is.

A closed form, or a swap of the weight, is right only where a layer runs its type's own forward on its own parameter. A
subclass that masks, standardises, quantises or scales its weight, a parametrisation, pruning or weight norm is a layer all
the same, but takes the general path (:func:`computes_plainly` is false).
"""

from collections.abc import Callable
from typing import Any, TypeAlias, TypeGuard

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

Layer: TypeAlias = nn.Linear | _ConvNd
"""Layers with a weight between two populations: these are what credit-assignment rules differ in."""

LOCAL = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU, nn.Embedding, nn.EmbeddingBag)
"""Layers without such a weight: scales, shifts, slopes, look-ups. They always keep their exact derivative."""


def is_weighted(module: nn.Module) -> TypeGuard[Layer]:
    """Whether the module is a layer with a weight between two populations."""
    return isinstance(module, nn.Linear | _ConvNd)


def is_local(module: nn.Module) -> bool:
    """Whether the module has parameters but no weight between two populations."""
    return isinstance(module, LOCAL)


OWN_FORWARD: dict[type[nn.Module], Callable[..., Any]] = {
    kind: kind.forward
    for kind in (
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
    )
}
"""Each registered layer type, and the forward method that applies `weight` and `bias` and nothing else."""

_PLAIN = set(OWN_FORWARD.values())


def computes_plainly(layer: nn.Module) -> bool:
    """Whether the layer runs its type's own forward on a weight that is its own parameter.

    To be asked at every call: pruning or a parametrisation may come after the rule. A forward that a rule put on the
    instance (it has an attribute `before`, what stood there) does not count.
    """
    if type(layer).forward not in _PLAIN or "weight" not in layer._parameters:
        return False
    bound = layer.__dict__.get("forward")
    while bound is not None:
        if not hasattr(bound, "before"):
            return False
        bound = bound.before
    return True
