"""Whether the layer that a model registers first needs feedback: layers are registered in another order than they run."""

from collections.abc import Collection

import torch
from torch import nn

from apical.core.packed import caller
from apical.core.rest import undisturbed
from apical.core.units import weighted_layers
from apical.errors import ApicalError


def needs_feedback(model: nn.Module, input_shape: tuple[int, ...], exact: Collection[str] = ()) -> bool:
    """Whether an error has to pass the layer registered first, because trained layers run before it.

    Args:
        model: is called once, on two samples of zeros, real or whole; nothing of it changes.
        exact: see :class:`apical.core.edge.EdgeRule`.
    """
    seen: list[bool] = []

    def look(layer: nn.Module, args: tuple[object, ...]) -> None:
        seen.extend(value.requires_grad for value in args if isinstance(value, torch.Tensor))

    try:
        layer = next(iter(weighted_layers(model, exact, shared=True, packed="parts").values()))
    except ApicalError:  # the rule says better what is wrong with it
        return False
    for kind in (layer.weight.dtype, torch.long):  # whole numbers for a model that embeds them
        try:
            with torch.enable_grad(), undisturbed(model):
                model.eval()
                caller(layer).register_forward_pre_hook(look)
                model(torch.zeros(2, *input_shape, dtype=kind, device=layer.weight.device))
                break
        except (ApicalError, RuntimeError, TypeError, ValueError, IndexError):
            continue
    return any(seen)
