"""Codes of classes that are parameters themselves, in place of a feedback network."""

import math

import torch
from torch import Tensor, nn


class FreeCodes(nn.Module):
    """A control: in place of a block of G, codes that are parameters of their own, one row per class.

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
        """The rows (K, *shape), whatever is above."""
        return self.rows
