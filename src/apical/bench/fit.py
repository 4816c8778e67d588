"""Plain loops for studies: an epoch of training, and the accuracy of answers. Nothing is kept or resumed."""

import torch
from torch.optim import Optimizer

from apical.core.credit import CreditRule
from apical.data import Split


def fit(
    rule: CreditRule,
    optimizer: Optimizer,
    train: Split,
    batch: int,
    generator: torch.Generator | None = None,
    *,
    drop_last: bool = False,
) -> None:
    """One pass over the samples in an order drawn anew, a step for each batch."""
    order = torch.randperm(len(train), generator=generator)
    for chosen in order[: len(order) // batch * batch if drop_last else None].split(batch):
        optimizer.zero_grad()
        rule(train.inputs[chosen], train.targets[chosen]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(rule: CreditRule, test: Split) -> float:
    """Share of the samples whose class the rule's network answers."""
    return float((rule.answer(test.inputs).argmax(1) == test.targets).double().mean())
