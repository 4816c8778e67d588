"""A few thousand digits of MNIST for studies, and plain training on them."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from apical.bench.names import find_rule
from apical.core.credit import CreditRule
from apical.data import load

TRAIN, TEST = 4000, 1000


class Digits:
    """Training and test digits (n, 784) in [0, 1], and labels."""

    def __init__(self, name: str = "mnist") -> None:
        data = load(name)
        self.x, self.y = data.train.inputs.flatten(1)[:TRAIN], data.train.targets[:TRAIN]
        low, high = self.x.min(), self.x.max()
        self.x = (self.x - low) / (high - low)
        self.test = ((data.test.inputs.flatten(1)[:TEST] - low) / (high - low), data.test.targets[:TEST])

    def accuracy(self, model: nn.Module) -> float:
        """Return the accuracy (0 to 1) of a network, or of a rule's answers, on the test digits."""
        return accuracy(model, *self.test)


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Return the accuracy (0 to 1) of a network, or of a rule's answers."""
    answer = model.answer if isinstance(model, CreditRule) else model
    return float((answer(inputs).argmax(1) == targets).double().mean())


def passes(
    rule: str,
    model: nn.Module,
    digits: Digits,
    lr: float,
    batch: int,
    epochs: int,
    options: dict[str, Any] | None = None,
    after: Callable[[], None] = lambda: None,
) -> Iterator[CreditRule]:
    """Yield the rule after every pass of plain SGD.

    Args:
        options: options of the rule, replacing those of its name.
        after: called after every step.
    """
    entry = find_rule(rule)
    learner = entry.build(model, **{**entry.options, **(options or {})})
    optimizer = torch.optim.SGD(learner.parameters(), lr)
    for _ in range(epochs):
        for samples in torch.randperm(len(digits.x)).split(batch):
            optimizer.zero_grad()
            learner(digits.x[samples], digits.y[samples]).backward()
            if entry.clip:
                for parameter in learner.parameters():
                    nn.utils.clip_grad_norm_([parameter], entry.clip)
            optimizer.step()
            learner.constrain_()
            after()
        yield learner
