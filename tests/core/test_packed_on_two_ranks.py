"""Attention, recurrent modules and tied weights on two processes are what they are on one."""

from functools import partial
from typing import Any

import pytest
import torch
from benchmarks.specimens import ZOO
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import apical
from apical.testing.two_ranks import on_two_ranks

RULES = {
    "fa": apical.FeedbackAlignment,
    "usf": apical.SignSymmetry,
    "kp": apical.KolenPollack,
    "pfa": partial(apical.ProductFeedbackAlignment, form="explicit"),
}


def trained(model: str, name: str, rank: int = 0, ranks: int = 1) -> dict[str, Tensor]:
    specimen = ZOO[model]
    torch.manual_seed(0)
    rule = RULES[name](specimen.make().double(), specimen.loss)
    learner: Any = rule if ranks == 1 else DistributedDataParallel(rule)
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        inputs, targets = specimen.inputs(generator), specimen.targets(generator)
        optimizer.zero_grad()
        learner(inputs[rank::ranks], targets[rank::ranks]).backward()
        optimizer.step()
    learned = {**rule.model.state_dict(), **{f"B {k}": v.detach() for k, v in rule.feedback_weights().items()}}
    return {key: value.clone() for key, value in learned.items()}


def on_rank(rank: int, model: str, name: str) -> dict[str, Tensor]:
    return trained(model, name, rank, 2)


@pytest.mark.parametrize("model", ["attention", "encoder", "lstm", "tied"])
@pytest.mark.parametrize("name", RULES)
def test_two_ranks_are_one_process(model: str, name: str) -> None:
    first, second = on_two_ranks(on_rank, model, name)
    alone = trained(model, name)
    for key, value in alone.items():
        assert torch.equal(first[key], second[key]), key
        assert (first[key] - value).abs().max() <= 1e-10, key
