"""Two thousand steps leave nothing behind, of spiking networks, graphs and flows: no tensor, no memory of another kind."""

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import apical
from apical import models
from apical.core.credit import CreditRule

STEPS, WARM = 2000, 600

STATM = Path("/proc/self/statm")
PAGE = 4096


def step_by_step(**options: Any) -> CreditRule:
    """Plastic at every step of one stimulus, which is as long as the test; its weights also decay."""
    return apical.ContrastiveSignalPlasticity(models.spiking(8, [8], 2), steps=STEPS, learn="step", decay=1e-5, **options)


def first_spike() -> CreditRule:
    """Neurons that fire once."""
    return apical.Backprop(models.first_spike(8, [8], 2))


def alive() -> tuple[int, int]:
    """Tensors, and resident bytes (0 where the system does not say)."""
    gc.collect()
    resident = int(STATM.read_text().split()[1]) * PAGE if STATM.exists() else 0
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects()), resident


def of_model(name: str) -> CreditRule:
    """A model by name, with random feedback."""
    return apical.FeedbackAlignment(models.build(name, (8,), 2))


MAKERS = {
    "csdp": step_by_step,
    "csdp-unsupervised": partial(step_by_step, negatives="mixtures"),
    "csdp-memristor": partial(step_by_step, levels=64),
    "first spikes": first_spike,
    "graph": partial(of_model, "graph-8x2"),
    "flow": partial(of_model, "flow-8x3"),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_steps_leave_no_memory_behind(make: Callable[[], CreditRule]) -> None:
    """Were one tensor of (batch, 8) kept at each step, the steps after the warm ones would leave 4 MB."""
    torch.manual_seed(0)
    rule = make()
    optimizer = torch.optim.SGD(rule.parameters(), lr=1e-3)
    x, targets = torch.rand(96, 8), torch.arange(96) % 2
    found = []
    for steps in (WARM, STEPS - WARM):
        for _ in range(steps):
            optimizer.zero_grad()
            rule(x, targets).backward()
            optimizer.step()
            rule.constrain_()
        found.append(alive())
    assert found[1][0] <= found[0][0]
    assert found[1][1] - found[0][1] < 2e6
