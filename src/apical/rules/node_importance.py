"""Node importance as the gain of a unit's error (GRAPES), and a control that separates it from a larger step.

    I_i = sum_j |W_ij|,   M_i = clip(2 I_i / max_k I_k, 1, 2)          one for each unit of a hidden layer, at every batch

Local: a unit sums its own incoming weights; the maximum over its layer is shared.
Source: Dellaferrera, Wozniak, Indiveri, Pantazi & Eleftheriou, arXiv 2104.11604, Nature Communications 13 (2022), and the
NumPy code of IBM/GRAPES.
Rights: the method is covered by US patent 12,020,162 B2 (IBM). Nothing else in the library imports this module. You must
check whether you may use it.
Departures: biases do not count for the importance, and get the gain of their unit. Convolutions have one importance per
output channel. Dropout masks do not affect the importance. Outgoing weights are used like incoming ones, as a gain on the
error only; the published code of direct feedback alignment applies them on both sides of a weight.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor


def importance(rows: Tensor, clip: bool = True) -> Tensor:
    """M (n,) of the weights (n, fan_in); ones where all weights are zero.

    >>> importance(torch.tensor([[1.0, -3.0], [1.0, 0.0], [-1.0, 2.0]]))
    tensor([2.0000, 1.0000, 1.5000])
    """
    sums = rows.abs().sum(1)  # I : (n,)
    largest = sums.amax()
    gains = torch.where(largest > 0, 2 * sums / largest, torch.ones_like(sums))
    return gains.clamp(1, 2) if clip else gains


@dataclass(frozen=True)
class NodeImportance:
    """A modulator for :class:`apical.rules.modulated.Modulated`: large incoming (or outgoing) weights, large errors.

    Covered by US patent 12,020,162 B2.

    Args:
        mode: "propagating" passes the gain on to the layers below, "local" does not.
        clip: keep gains within [1, 2], as the paper's code does for backpropagation; it does not for feedback alignment.
        weights: "incoming", or "outgoing" for those of the layer that reads the unit, c_j = sum_i |W_ij|.
    """

    mode: Literal["propagating", "local"] = "propagating"
    clip: bool = True
    weights: Literal["incoming", "outgoing"] = "incoming"
    remarks: ClassVar[tuple[str, ...]] = ("node importance (GRAPES) is covered by US patent 12,020,162; check your rights",)

    def __call__(self, rows: Tensor) -> Tensor:
        """Gains (n,)."""
        return importance(rows, self.clip)


@dataclass(frozen=True)
class Matched:
    """Control for node importance: every unit of a layer gets the layer's mean gain, so the mean step is the same.

    The advantage of :class:`NodeImportance` over this control is due to which units are important; the rest is step size.
    """

    of: NodeImportance = field(default_factory=NodeImportance)

    @property
    def mode(self) -> Literal["propagating", "local"]:
        """That of the controlled modulator."""
        return self.of.mode

    @property
    def weights(self) -> Literal["incoming", "outgoing"]:
        """That of the controlled modulator."""
        return self.of.weights

    def __call__(self, rows: Tensor) -> Tensor:
        """Gains (n,), all the same."""
        return self.of(rows).mean().expand(len(rows))
