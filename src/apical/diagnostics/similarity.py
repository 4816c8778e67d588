"""How alike two populations represent the same samples."""

import torch
from torch import Tensor

from apical.core.similarity import linear_cka

__all__ = ["cka_matrix", "linear_cka"]


def cka_matrix(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    """:func:`linear_cka` of every population of `xs` with every one of `ys`: (len(xs), len(ys)), on the CPU."""
    return torch.tensor([[linear_cka(x, y) for y in ys] for x in xs], dtype=torch.float64)
