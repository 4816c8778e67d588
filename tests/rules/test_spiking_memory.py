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
HALF = (STEPS - WARM) // 2

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
    "csdp-unsupervised": partial(step_by_step, negatives="mixtures"),
    "csdp-memristor": partial(step_by_step, levels=64),
    "first spikes": first_spike,
    "graph": partial(of_model, "graph-8x2"),
    "flow": partial(of_model, "flow-8x3"),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_steps_leave_no_memory_behind(make: Callable[[], CreditRule]) -> None:
    """Were one tensor of (batch, 8) kept at each step, both halves of the steps after the warm ones would leave 4 MB."""
    torch.manual_seed(0)
    rule = make()
    optimizer = torch.optim.SGD(rule.parameters(), lr=1e-3)
    x, targets = torch.rand(192, 8), torch.arange(192) % 2
    found = []
    for steps in (WARM, HALF, HALF):
        for _ in range(steps):
            optimizer.zero_grad()
            rule(x, targets).backward()
            optimizer.step()
            rule.constrain_()
        found.append(alive())
    tensors, resident = zip(*found, strict=True)
    assert tensors[2] <= tensors[1] <= tensors[0]
    assert min(resident[2] - resident[1], resident[1] - resident[0]) < 2e6  # an allocator takes what it needs once
