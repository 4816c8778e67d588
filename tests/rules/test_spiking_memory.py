"""Hundreds of steps leave nothing behind, of spiking networks, graphs and flows: no tensor, no memory of another kind."""

import gc
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import apical
from apical import models
from apical.core.credit import CreditRule

STEPS, WARM = 500, 0.3
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
    "csdp-unsupervised": partial(step_by_step, negatives="mixtures"),
    "csdp-memristor": partial(step_by_step, levels=64),
    "first spikes": first_spike,
    "graph": partial(of_model, "graph-8x2"),
    "flow": partial(of_model, "flow-8x3"),
}


@pytest.mark.parametrize("name", MAKERS)
def test_steps_leave_no_memory_behind(name: str) -> None:
    """Were one tensor of (batch, 8) kept at each step, both halves of the steps after the warm ones would leave 4 MB.

    In double precision where that makes it half the batch: sorting spikes takes time with each of them.
    """
    batch, dtype = (384, torch.float64) if name == "first spikes" else (768, torch.float32)
    warm = int(WARM * STEPS)
    half = (STEPS - warm) // 2
    gc.collect()
    gc.freeze()  # what is there already need not be looked through three times
    torch.manual_seed(0)
    rule = MAKERS[name]().to(dtype)
    optimizer = torch.optim.SGD(rule.parameters(), lr=1e-3)
    x, targets = torch.rand(batch, 8, dtype=dtype), torch.arange(batch) % 2
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
