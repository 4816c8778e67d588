"""A rule whose construction is interrupted (Ctrl-C, no memory) disturbs nothing, though a notebook keeps it alive."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import apical
from apical import CreditRule

RULES = [
    apical.FeedbackAlignment,
    apical.SignSymmetry,
    apical.WeightMirror,
    apical.KolenPollack,
    apical.ProductFeedbackAlignment,
    apical.DirectFeedbackAlignment,
    apical.TopDownCreditAssignment,
]


class Interrupt(TorchFunctionMode):
    """Ctrl-C at a certain call of PyTorch; not where it switches gradients back on."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "grad_enabled" not in getattr(function, "__name__", ""):
            self.calls -= 1
            if self.calls == 0:
                raise KeyboardInterrupt
        return function(*args, **(kwargs or {}))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    torch.manual_seed(1)  # of the feedback
    return model


def train(rule: CreditRule) -> torch.Tensor:
    inputs, targets = torch.linspace(-1, 1, 24).view(6, 4), torch.arange(6) % 3
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        rule(inputs, targets).backward()
        optimizer.step()
    return torch.nn.utils.parameters_to_vector(rule.detach().parameters()).detach()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule.__name__))
def test_other_rules_train_as_if_it_had_not_been(rule: type[CreditRule]) -> None:
    other, same = train(apical.Backprop(network())), train(rule(network()))
    interruptions, calls = [], 0
    while True:
        calls += 1 if calls < 100 else 1000  # the weight mirror draws much noise
        model = network()
        try:
            with Interrupt(calls):
                rule(model)
            break
        except KeyboardInterrupt as interruption:
            interruptions.append(interruption)  # its traceback holds the unfinished rule
        if calls > 25 or calls % 5 == 0:  # where a rule has begun to hold on to its model
            assert torch.equal(train(apical.Backprop(network())), other)
            torch.manual_seed(1)
            assert torch.equal(train(rule(model)), same)
    assert len(interruptions) > 20
