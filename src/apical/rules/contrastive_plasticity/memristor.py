"""Weights as pairs of memristors: each the difference of two conductances, which are bounded and have few levels.

    W = G+ - G-,   G in {0, 1/(N-1), ..., 1};   a change of W is shared, half of it to G+ and minus half to G-

A conductance between two levels is rounded to one of them at random, so its mean is the requested value: steps much smaller
than a level still add up. Only the pair is stored.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from apical.core.processes import parted, whole


def key(kind: str, k: int) -> str:
    """Return the name of a matrix among the buffers.

    >>> key("up bias", 0)
    'up_bias0'
    """
    return f"{kind.replace(' ', '_')}{k}"


def levelled(g: Tensor, levels: int, u: Tensor) -> Tensor:
    """Round conductances to levels, up or down at random; u are uniform numbers in [0, 1) of g's shape."""
    return (g.clamp(0.0, 1.0) * (levels - 1) + u).floor_().div_(levels - 1)


class Pairs(nn.Module):
    """The conductances behind weights.

    Args:
        weights: between -1 and 1, by kind and layer; not modified.
        levels: N.
    """

    programmed: Tensor

    def __init__(self, weights: Mapping[tuple[str, int], Tensor], levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.plus, self.minus = nn.Module(), nn.Module()
        for place, weight in weights.items():
            half = weight.detach().clamp(-1.0, 1.0) / 2
            self.plus.register_buffer(key(*place), 0.5 + half)
            self.minus.register_buffer(key(*place), 0.5 - half)
        self.register_buffer("programmed", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def program_(self, weights: Mapping[tuple[str, int], Tensor]) -> None:
        """Move conductances by the weights' change, then set the weights to the differences of the pairs.

        The random numbers depend on the step's number only, so they are the same in all processes and after a restart.
        """
        chance = torch.Generator().manual_seed(int(self.programmed))
        self.programmed += 1
        for place, weight in weights.items():
            plus, minus = self.plus.get_buffer(key(*place)), self.minus.get_buffer(key(*place))
            half = (whole(weight) - (plus - minus)) / 2
            u = torch.rand((2, *weight.shape), generator=chance, dtype=torch.float64, device="cpu").to(half)
            plus.copy_(levelled(plus + half, self.levels, u[0]))
            minus.copy_(levelled(minus - half, self.levels, u[1]))
            if place[0] == "lateral":  # not negative, no self-connections
                minus.copy_(torch.minimum(minus, plus))
                minus.diagonal().copy_(plus.diagonal())
            weight.copy_(parted(plus - minus, weight))
