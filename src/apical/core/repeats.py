"""How many rows a dense layer sees for each sample: the tokens of a sequence, the patches of an image."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from apical.core.packed import Part
from apical.core.rest import undisturbed


class Repeats:
    """Rows for each sample, by layer; one until a batch was looked at."""

    def __init__(self) -> None:
        self._found: dict[str, float] | None = None

    def of(self, name: str) -> float:
        """Rows for each sample of one layer."""
        return 1.0 if self._found is None else self._found.get(name, 1.0)

    def look(self, model: nn.Module, layers: Mapping[str, nn.Module], inputs: Any) -> None:
        """Find them out, once: by a pass of the first batch, unless that is samples of one row each.

        Args:
            model: is left as it was.
            layers: dense layers, by name.
            inputs: a batch (samples, ...).
        """
        if self._found is not None or not isinstance(inputs, Tensor) or not len(inputs):
            return
        self._found = {}
        if inputs.is_floating_point() and inputs.dim() == 2:
            return
        modules = {name: layer for name, layer in layers.items() if not isinstance(layer, Part)}
        note = partial(_note, self._found, len(inputs))
        hooks = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in modules.items()]
        try:
            with undisturbed(model), torch.no_grad():
                model(inputs)
        finally:
            for hook in hooks:
                hook.remove()


def _note(found: dict[str, float], samples: int, name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
    if args and isinstance(args[0], Tensor):
        found[name] = args[0].numel() / max(args[0].shape[-1], 1) / samples
