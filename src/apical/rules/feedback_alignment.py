"""Feedback alignment (Lillicrap, Cownden, Tweed & Akerman, arXiv 1411.0247).

    delta_l = (U_{l+1}^T delta_{l+1}) * f'(a_l),   dW_l = delta_l h_{l-1}^T,   U fixed and random

Local except for U: no synapse needs the value of another. U is drawn from the Xavier uniform law of the forward weight,
independently of it (the initialisation of the comparisons in arXiv 2405.20594 and arXiv 2108.13446).
"""

from collections.abc import Collection
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.credit import Attention, Loss
from apical.core.edge import EdgeRule, Feedback, stored
from apical.core.units import key


class FeedbackAlignment(EdgeRule):
    """The error travels back through fixed random matrices.

    Args:
        model: network of Linear, convolution, attention and recurrent layers; other modules keep their exact derivative.
        loss: maps (output, targets) to a scalar batch mean.
        exact: names of modules or parameters without known transport that keep their exact derivative.
        first_layer: also draw feedback for the first layer (read-outs only, no effect on training).
        sites, through_time: see :class:`apical.core.edge.EdgeRule`.
        attention: which parts of attention's backward pass are kept: "exact", "fixed" or "present"; see
            :mod:`apical.core.attention`.

    Layers that share a weight share its feedback.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    >>> rule = FeedbackAlignment(model)
    >>> optimizer = torch.optim.SGD(rule.parameters(), lr=0.1)
    >>> credit = rule(torch.randn(8, 4), torch.arange(8) % 3)
    >>> credit.backward(); optimizer.step()
    >>> {name: tuple(u.shape) for name, u in rule.feedback_weights().items()}
    {'2': (3, 5)}
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = F.cross_entropy,
        exact: Collection[str] = (),
        first_layer: bool = False,
        sites: Collection[str] = (),
        through_time: bool = True,
        attention: Attention = "exact",
    ) -> None:
        super().__init__(model, loss, exact, first_layer, sites, through_time)
        self.attention = attention
        self.feedback = self.random_feedback()

    def set_feedback(self, name: str, B: Tensor) -> None:
        """Replace the matrix U of a layer and of all layers that share its weight.

        Args:
            name: the layer.
            B: in the shape of the layer's weight.

        Raises:
            ConfigError: unknown layer, or a wrong shape.
        """
        self.copy_feedback(self.feedback, name, B)

    def feedback_of(self, name: str) -> Feedback:
        """The fixed matrix U of this layer."""
        return stored, (cast(Tensor, self.feedback._buffers[key(name)]),)
