"""Random feedback within units: the edges of feedback alignment at every layer, for rules that cut a model into units."""

from collections.abc import Collection

import torch
from torch import nn

from apical.core.credit import Loss
from apical.core.edge import EdgeRule, Feedback, stored
from apical.core.units import key


class InnerEdges(EdgeRule):
    """Fixed random matrices that replace the weights an error passes before it is cut.

    Args:
        model, loss, exact: see :class:`apical.core.edge.EdgeRule`.
        seed: seed of the matrices.
    """

    def __init__(self, model: nn.Module, loss: Loss, exact: Collection[str], seed: int) -> None:
        super().__init__(model, loss, exact, first_layer=True)
        self.feedback = self.random_feedback(torch.Generator().manual_seed(seed))

    def feedback_of(self, name: str) -> Feedback:
        """Return the fixed matrix of this layer."""
        return stored, (self.feedback.get_buffer(key(name)),)
