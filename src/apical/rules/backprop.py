"""Backpropagation (Rumelhart, Hinton & Williams 1986): the yardstick.

    delta_l = (W_{l+1}^T delta_{l+1}) * f'(a_l),   dW_l = delta_l h_{l-1}^T

Not local: the error travels through the transpose of the forward weights.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.credit import Attention, Credit, CreditRule, Loss
from apical.core.placement import layer_paths


class Backprop(CreditRule):
    """Exact gradient of the loss by automatic differentiation, for any module.

    Args:
        model: any network.
        loss: maps (output, targets) to a scalar batch mean.
        attention: which parts of attention's backward pass are kept: "exact", "fixed" or "present"; see
            :mod:`apical.core.attention`.

    >>> import torch
    >>> rule = Backprop(torch.nn.Linear(4, 3))
    >>> rule(torch.randn(8, 4), torch.arange(8) % 3).backward()
    >>> rule.model.weight.grad.shape
    torch.Size([3, 4])
    """

    chains_errors, sees_layers = True, False

    def __init__(self, model: nn.Module, loss: Loss = F.cross_entropy, attention: Attention = "exact") -> None:
        super().__init__(model, loss)
        self.attention = attention

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Credit whose root is the loss."""
        output = self.model(inputs)
        loss = self.loss(output, targets)
        return Credit([loss], [None], output, loss)

    def credit_paths(self, inputs: Tensor) -> dict[str, str]:
        """Exact for every layer that is trained."""
        return layer_paths(self.model, inputs, "exact")

    def feedback_weights(self) -> dict[str, Tensor]:
        """Always None: backpropagation has no separate feedback weights."""
        return {}
