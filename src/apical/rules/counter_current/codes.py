"""Feedback networks of counter-current learning: codes that are parameters themselves, and orthogonal starts."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from apical.core.blocks import Block
from apical.core.layers import is_weighted


class FreeCodes(nn.Module):
    """A control that replaces a block of G by free parameters: codes with one row per class.

    Args:
        classes: K.
        shape: of one row.
        like: gives dtype and device.
    """

    def __init__(self, classes: int, shape: tuple[int, ...], like: Tensor) -> None:
        super().__init__()
        bound = math.prod(shape) ** -0.5
        self.rows = nn.Parameter(torch.empty(classes, *shape, dtype=like.dtype, device=like.device).uniform_(-bound, bound))

    def forward(self, above: Tensor) -> Tensor:
        """Return the rows (K, *shape), whatever the input."""
        return self.rows


def held(module: nn.Module) -> dict[str, Tensor]:
    """Return a block of G's parameters by symbol: codes `B`, or its only weight `G`; empty if it has several."""
    if isinstance(module, FreeCodes):
        return {"B": module.rows}
    layers = [part for part in module.modules() if is_weighted(part)]
    return {"G": layers[0].weight} if len(layers) == 1 else {}


@torch.no_grad()
def draw_orthogonal(row: Sequence[Block], feedback: Iterable[nn.Module]) -> None:
    """Draw G as the authors' autoencoder does: orthogonal, a thousandth as large in enlarging blocks, zero at the input.

    Args:
        row: the blocks of F.
        feedback: G's modules, from the top.
    """
    for block, module in zip(reversed(row), feedback, strict=False):
        for layer in module.modules():
            if is_weighted(layer):
                kind = torch.promote_types(layer.weight.dtype, torch.float32)  # no QR in half precision
                layer.weight.copy_(nn.init.orthogonal_(layer.weight.detach().to(kind)))
                enlarges = math.prod(block.seen[1:]) > math.prod(block.image[1:])
                layer.weight.mul_(0.0 if block is row[0] else 1e-3 if enlarges else 1.0)
