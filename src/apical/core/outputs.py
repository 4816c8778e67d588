"""Models with several outputs: dictionaries, tuples and lists of tensors, some of which the loss reads.

The output error of such a model is that of all outputs that the loss reads, side by side: each output learns from its own
error, and hidden units hear all.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from apical.core.credit import Loss
from apical.core.losses import loss_and_errors, usable
from apical.core.positions import ordered
from apical.errors import UnsupportedModelError


def tensors(output: Any) -> list[Tensor]:
    """Return the tensors of real numbers in an output, in order."""
    if type(output) is Tensor:
        return [output] if output.is_floating_point() else []
    return [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def parts(name: str, output: Any) -> list[tuple[str, Tensor]]:
    """Return the real tensors that a layer returns, with their names: the first has the layer's name."""
    return [(f"{name}:{number}" if number else name, part) for number, part in enumerate(tensors(output))]


def detached(output: Any) -> Any:
    """Return the values without a graph; a compiled graph copies them, as it does not return two views of one tensor."""
    copies = torch.compiler.is_compiling()

    def values(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().clone() if copies else leaf.detach()

    return tree_map(values, output)


def output_errors(loss: Loss, output: Any, targets: Any, *, traced: bool = False) -> tuple[Tensor, list[Tensor | None]]:
    """Return the loss and the error at each tensor of :func:`tensors`, see :func:`apical.core.losses.output_error`.

    The error is None where the loss does not read the tensor.
    """
    leaves, structure = tree_flatten(output)
    real = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    targets = usable(targets)

    def value(parts: list[Tensor]) -> Tensor:
        parts_at = dict(zip(real, parts, strict=True))
        return loss(tree_unflatten([parts_at.get(i, leaf) for i, leaf in enumerate(leaves)], structure), targets)

    return loss_and_errors(value, [leaves[i] for i in real], traced)


def side_by_side(errors: list[Tensor], axes: list[int]) -> Tensor:
    """Return (batch, *places, all outputs) from errors whose outputs are on `axes`; where places differ, their sums.

    Raises:
        UnsupportedModelError: the numbers of rows differ.
    """
    parts = [ordered(error, axis) for error, axis in zip(errors, axes, strict=True)]
    if len({part.shape[0] for part in parts}) > 1:
        shapes = ", ".join(str(tuple(error.shape)) for error in errors)
        raise UnsupportedModelError(
            f"the loss reads outputs of shapes {shapes}, whose rows cannot be matched; return (batch, ...) from the model"
        )
    if len({part.shape[:-1] for part in parts}) > 1:
        parts = [part.flatten(1, -2).sum(1) if part.dim() > 2 else part for part in parts]
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]
