"""The contract between a rule and PyTorch: a rule maps a batch to a :class:`Credit`; `credit.backward()` writes `.grad`."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from apical.core.placement import Placement, layer_paths, place, undisturbed
from apical.errors import ConfigError

Loss = Callable[[Tensor, Tensor], Tensor]
"""Maps (output, targets) to a scalar, the mean over the batch, as `torch.nn.functional.cross_entropy` does."""

Phase = Literal["both", "forward", "feedback"]
"""What a call of a rule learns."""


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

    Attributes:
        feed_forward: the network's answer is the model's feed-forward pass; else the rule has a :meth:`answer` of its own.
        two_phase: the rule can learn its feedback weights in passes of their own, when `phase` says so.
        phase: what the next calls learn. With "both" one call gives the gradients of forward and feedback weights; with
            "forward" or "feedback" it gives those alone, and neither `output` nor `loss` of the credit may lead by its graph
            to the others (several processes wait for every gradient that the graph promises). Rules that are not
            `two_phase` ignore it.
    """

    model: nn.Module
    two_phase: bool = False
    feed_forward: bool = True
    phase: Phase
    _placement: Placement | None = None

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self._hooks: list[Any] = []
        self._attached = True
        self.phase = "both"

    @abstractmethod
    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Credit for one batch: `inputs` (batch, ...), `targets` (batch,) class indices or what the loss takes."""

    def answer(self, inputs: Tensor) -> Tensor:
        """The network's answer to inputs (batch, ...), differentiable; the feed-forward pass unless the rule settles."""
        result: Tensor = self.model(inputs)
        return result

    @property
    def remarks(self) -> list[str]:
        """How what is trained differs from the model as its modules say it, in sentences; empty where it does not."""
        return []

    def feedback_weights(self) -> dict[str, Tensor]:
        """Effective feedback weight of each layer, in the shape of that layer's weight; empty where none exists."""
        return {}

    def credit_paths(self, inputs: Tensor) -> dict[str, str]:
        """What the error of each weighted layer passes through, in the words of :class:`apical.core.placement.Row`."""
        return layer_paths(self.model, inputs, "signal of its own")

    def placement(self, inputs: Tensor) -> Placement:
        """A table of every module with parameters and what its error passes through, for inputs (batch, ...).

        The model runs, but weights, buffers, gradients and random generators stay as they are. `repr(rule)` has a summary
        afterwards.
        """
        self.require_attached()
        with undisturbed(self):
            placement = place(self.model, self.credit_paths(inputs))
        self._placement = placement
        return placement

    def extra_repr(self) -> str:
        """A summary of the placement, once it is known."""
        return "" if self._placement is None else f"placement: {self._placement.summary()}"

    def pairs(self, inputs: Tensor, targets: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Populations that the rule compares with each other, (batch, d) both, by layer; empty where there are none."""
        return {}

    def read_outs(self, inputs: Tensor) -> dict[str, Tensor]:
        """Classes (batch,) that can be read out at each depth, by layer; empty where only the output has them."""
        return {}

    def feedback_parameters(self) -> list[nn.Parameter]:
        """Trainable feedback weights that an optimiser may treat apart from the forward weights; empty where none are."""
        return []

    @property
    def learns_apart(self) -> bool:
        """Whether there are feedback weights that can learn in passes of their own."""
        return self.two_phase and any(parameter.requires_grad for parameter in self.feedback_parameters())

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
