"""Spiking networks on two ranks: gradients are the mean of what each rank's half of the batch teaches by itself."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))  # in the processes, which know no conftest

import apical
from apical import models
from apical.core.credit import CreditRule
from apical.rules.contrastive_plasticity.neurons import Constants
from apical.testing.two_ranks import on_two_ranks

pytestmark = pytest.mark.xdist_group("two ranks")  # all on one worker: the processes are started once
OPTIONS: dict[str, dict[str, object]] = {
    "context": {},
    "answer": {"readout": "answer"},
    "mixtures": {"negatives": "mixtures"},
    "memristors": {"levels": 64},
}


def make(name: str) -> CreditRule:
    """Of 7 inputs and 3 classes."""
    torch.manual_seed(0)
    if name == "first spikes":
        return apical.FeedbackAlignment(models.first_spike(7, [6], 3).double())
    constants = Constants(dt=50.0, trace=200.0)
    model = models.spiking(7, [6, 5], 3).double()
    return apical.ContrastiveSignalPlasticity(model, steps=12, theta=1.5, constants=constants, **OPTIONS[name])  # type: ignore[arg-type]


def taught(rank: int, name: str, parallel: bool = True) -> dict[str, Tensor]:
    """Gradients of a rank's half, and weights after a step, each rank with chance of its own."""
    rule = make(name)
    x, targets = torch.rand(8, 7, generator=torch.Generator().manual_seed(1)).double(), torch.arange(8) % 3
    module = DistributedDataParallel(rule) if parallel else rule
    torch.manual_seed(7 + rank)
    module(x[rank::2], targets[rank::2]).backward()
    found = {key: p.grad.clone() for key, p in rule.named_parameters() if p.grad is not None}
    torch.optim.SGD(rule.parameters(), 0.1).step()
    rule.constrain_()
    return found | {f"{key} after": p.detach().clone() for key, p in rule.named_parameters()}


@pytest.mark.parametrize("name", [*OPTIONS, "first spikes"])
def test_gradients_are_the_mean_over_ranks(name: str) -> None:
    first, second = on_two_ranks(taught, name)
    alone = [taught(rank, name, parallel=False) for rank in range(2)]
    differs = False
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
        if not key.endswith(" after"):
            assert torch.allclose(value, (alone[0][key] + alone[1][key]) / 2, rtol=1e-12, atol=1e-15), key
            differs |= not torch.allclose(alone[0][key], alone[1][key])
    assert differs
