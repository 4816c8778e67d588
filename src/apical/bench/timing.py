"""Time of a training step, and peak memory of a run on a GPU."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from apical.core.credit import CreditRule
from apical.diagnostics.alignment import unchanged
from apical.diagnostics.cost import multiply_adds
from apical.diagnostics.memory import step_bytes


class StepTimer:
    """Times of training steps in milliseconds: the clock on a CPU, CUDA events on a GPU (no synchronisation per step)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._times: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._began = 0.0

    def start(self) -> None:
        """Mark the start of a step."""
        if self._device.type == "cuda":
            events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self._events.append(events)
            events[0].record()
        else:
            self._began = time.perf_counter()

    def stop(self) -> None:
        """Mark the end of the step."""
        if self._device.type == "cuda":
            self._events[-1][1].record()
        else:
            self._times.append((time.perf_counter() - self._began) * 1e3)

    def times(self) -> list[float]:
        """Return the times so far; waits for the GPU."""
        if self._events:
            torch.cuda.synchronize(self._device)
            self._times += [began.elapsed_time(ended) for began, ended in self._events]
            self._events.clear()
        return list(self._times)

    def restore(self, times: list[float]) -> None:
        """Continue from earlier times."""
        self._events.clear()
        self._times = [float(value) for value in times]

    def median(self) -> float | None:
        """Return the median of the times so far; None before the first step."""
        times = self.times()
        return statistics.median(times) if times else None

    def clear(self) -> None:
        """Clear all times."""
        self._times.clear()
        self._events.clear()


@dataclass
class Peak:
    """Peak memory of one run, in MiB; None where it is not measured (CPU)."""

    megabytes: float | None = None


@contextmanager
def peak_memory(device: torch.device, rule: CreditRule, optimizer: torch.optim.Optimizer) -> Iterator[Peak]:
    """Measure peak GPU memory within the block: the run's own tensors plus everything allocated in it, without the data.

    Other content of the GPU at the start (data, other runs of a comparison) is not counted. None on a CPU, where `step_cost`
    is used instead.
    """
    peak = Peak()
    if device.type != "cuda":
        yield peak
        return
    own = _own_bytes(rule, optimizer)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield peak
    torch.cuda.synchronize(device)
    peak.megabytes = (torch.cuda.max_memory_allocated(device) - before + own) / 2**20


class StepCost(NamedTuple):
    """Cost of one training pass.

    Attributes:
        megabytes: MiB of the run's own tensors plus the peak of the pass, counted tensor by tensor.
        multiply_adds: those of the pass, forward and backward.
    """

    megabytes: float
    multiply_adds: int


def step_cost(rule: CreditRule, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor) -> StepCost:
    """Measure one training pass, without side effects."""
    own = _own_bytes(rule, optimizer)
    with unchanged(rule):
        rule(inputs, targets)  # tensors created at the first batch count as the rule's own
        peak = 0

        def step() -> None:
            nonlocal peak
            peak = step_bytes(rule, inputs, targets)

        counted = multiply_adds(step)
    return StepCost((own + peak) / 2**20, counted)


def _own_bytes(rule: CreditRule, optimizer: torch.optim.Optimizer) -> int:
    tensors: list[Tensor] = [*rule.parameters(), *rule.buffers()]
    if any(parameter.is_cuda for parameter in rule.parameters()):  # on a CPU the pass itself allocates the gradients
        tensors += [parameter.grad for parameter in rule.parameters() if parameter.grad is not None]
    tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
