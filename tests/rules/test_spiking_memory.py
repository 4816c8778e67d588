"""Thousands of steps leave nothing behind, of spiking networks, graphs and flows: no tensor, no memory of another kind."""

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

STEPS, WARM = 2000, 0.3
"""Steps of a test, and the share of them after which memory is first looked at."""

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
    "csdp-unsupervised": (partial(step_by_step, negatives="mixtures"), STEPS),
    "csdp-memristor": (partial(step_by_step, levels=64), STEPS // 4),
    "first spikes": (first_spike, STEPS // 4),
    "graph": (partial(of_model, "graph-8x2"), STEPS // 4),
    "flow": (partial(of_model, "flow-8x3"), STEPS // 4),
}
"""The second does the same at every step as the first; the last three have no time steps."""


@pytest.mark.parametrize(("make", "steps"), MAKERS.values(), ids=MAKERS)
def test_steps_leave_no_memory_behind(make: Callable[[], CreditRule], steps: int) -> None:
    """Were one tensor of (batch, 8) kept at each step, both halves of the steps after the warm ones would leave 4 MB."""
    batch, warm = 192 * STEPS // steps, int(WARM * steps)
    half = (steps - warm) // 2
    torch.manual_seed(0)
    rule = make()
    optimizer = torch.optim.SGD(rule.parameters(), lr=1e-3)
    x, targets = torch.rand(batch, 8), torch.arange(batch) % 2
    found = []
    for count in (warm, half, half):
        for _ in range(count):
            optimizer.zero_grad()
            rule(x, targets).backward()
            optimizer.step()
            rule.constrain_()
        found.append(alive())
    tensors, resident = zip(*found, strict=True)
    assert tensors[2] <= tensors[1] <= tensors[0]
    assert min(resident[2] - resident[1], resident[1] - resident[0]) < 2e6  # an allocator takes what it needs once
