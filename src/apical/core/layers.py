"""The registry of layer types: which modules are weighted layers, and whether one computes with its own weight as it is.

A closed form, or a swap of the weight, is right only where a layer runs its type's own forward on its own parameter. A
subclass that masks, standardises, quantises or scales its weight, a parametrisation, pruning or weight norm is a layer all
the same, but takes the general path (:func:`computes_plainly` is false).
"""

from collections.abc import Callable
from typing import Any

from torch import nn

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
