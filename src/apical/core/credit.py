"""The contract between a rule and PyTorch: a rule maps a batch to a :class:`Credit`; `credit.backward()` writes `.grad`."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from apical.errors import ConfigError

Loss = Callable[[Tensor, Tensor], Tensor]
"""Maps (output, targets) to a scalar, the mean over the batch, as `torch.nn.functional.cross_entropy` does."""


@dataclass
class Credit:
    """What a rule found out about one batch.

    Attributes:
        roots: scalars (losses, energies) or unit outputs from which `backward` starts.
        signals: the teaching signal of each root, of the root's shape; None means 1 (scalar roots only).
        output: the model's output on the batch, detached from nothing the rule needs.
        loss: scalar loss of that output.
        logs: scalars worth plotting, named by the rule.
    """

    roots: Sequence[Tensor]
    signals: Sequence[Tensor | None]
    output: Tensor
    loss: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)

    def backward(self) -> None:
        """Accumulate into `.grad` minus the weight change the rule asks for (one call per `Credit`)."""
        torch.autograd.backward(list(self.roots), list(self.signals))


class CreditRule(nn.Module):
    """A credit-assignment rule: holds the model and the rule's own feedback parameters.

    Calling a rule on a batch yields a :class:`Credit`. Everything a rule installs on the model acts only during that
    call, so `rule.model(x)` is always the plain model, and :meth:`detach` leaves the model as it was found.

    Args:
        model: any `nn.Module` the rule supports; it is trained in place.
        loss: maps (output, targets) to a scalar batch mean.
    """

    model: nn.Module

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self._hooks: list[Any] = []
        self._attached = True

    @abstractmethod
    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Credit for one batch: `inputs` (batch, ...), `targets` (batch,) class indices or what the loss takes."""

    def feedback_weights(self) -> dict[str, Tensor]:
        """Effective feedback weight of each layer, in the shape of that layer's weight; empty where none exists."""
        return {}

    def require_attached(self) -> None:
        """Refuse to work on a model that the rule was detached from.

        Raises:
            ConfigError: :meth:`detach` was called.
        """
        if not self._attached:
            raise ConfigError(f"this {type(self).__name__} was detached from its model; make a new rule")

    def detach(self) -> nn.Module:
        """Remove everything from the model and return it: same class, state-dict keys and outputs as before."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._attached = False
        return self.model
