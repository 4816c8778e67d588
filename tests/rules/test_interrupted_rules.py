"""Rules whose construction or whose batch is interrupted (Ctrl-C, no memory): what follows is as if it had not been."""

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


INPUTS, TARGETS = torch.linspace(-1, 1, 24).view(6, 4), torch.arange(6) % 3


def train(rule: CreditRule, optimizer: torch.optim.Optimizer | None = None, steps: int = 2) -> torch.Tensor:
    optimizer = optimizer or torch.optim.SGD(rule.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        rule(INPUTS, TARGETS).backward()
        optimizer.step()
    return torch.nn.utils.parameters_to_vector(rule.model.parameters()).detach().clone()


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
            interruptions.append(interruption)
        if calls > 25 or calls % 5 == 0:  # where a rule has begun to hold on to its model
            assert torch.equal(train(apical.Backprop(network())), other)  # though its traceback holds the unfinished rule
            torch.manual_seed(1)
            assert torch.equal(train(rule(model)), same)
    assert len(interruptions) > 20


@pytest.mark.parametrize("rule", [r for r in RULES if r is not apical.WeightMirror], ids=lambda rule: str(rule.__name__))
def test_the_next_batch_is_computed_as_if_one_had_not_been_interrupted(rule: type[CreditRule]) -> None:
    undisturbed, calls = rule(network()), 0
    expected = train(undisturbed, steps=3)
    while True:
        calls += 1
        learner = rule(network())
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
        train(learner, optimizer)
        plain = network()
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(learner.model.parameters()), plain.parameters()
        )
        try:
            with Interrupt(calls):
                learner(INPUTS, TARGETS)
            break
        except KeyboardInterrupt:
            assert torch.equal(learner.model(INPUTS), plain(INPUTS))
            assert torch.equal(train(learner, optimizer, steps=1), expected)
    assert calls > 5
