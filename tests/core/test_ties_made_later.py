"""Weights that come to be shared after a rule was made, whose feedback and units it has drawn for each layer alone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apical
from apical.errors import UnsupportedModelError

RULES = [
    *(apical.FeedbackAlignment, apical.SignSymmetry, apical.KolenPollack, apical.ProductFeedbackAlignment),
    *(apical.DirectFeedbackAlignment, apical.DifferenceTargetPropagation, apical.DeepFeedbackControl),
    *(apical.CounterCurrentLearning, apical.EquilibriumPropagation, apical.PredictiveCoding, apical.LocalClassifiers),
]


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(8, 6), torch.arange(8) % 3


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("late", [False, True])
def test_layers_that_are_tied_later_are_refused(rule: Any, late: bool) -> None:
    torch.manual_seed(0)
    made = rule(
        nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
    )
    optimizer = torch.optim.SGD(made.parameters(), lr=0.01)
    for _ in range(6 if late else 0):
        optimizer.zero_grad()
        made(*batch()).backward()
        optimizer.step()
    made.model[4].weight = made.model[2].weight
    with pytest.raises(UnsupportedModelError, match=r"layers '2' and '4' share a weight that they did not share"):
        made(*batch())


@pytest.mark.parametrize("rule", [apical.FeedbackAlignment, apical.KolenPollack, apical.DirectFeedbackAlignment])
def test_layers_that_were_tied_may_stay_so_or_come_apart(rule: Any) -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    model[4].weight = model[2].weight
    made = rule(model)
    inputs, targets = torch.rand(8, 5), torch.arange(8) % 5
    made(inputs, targets).backward()
    model[4].weight = nn.Parameter(model[4].weight.detach().clone())
    made(inputs, targets).backward()
