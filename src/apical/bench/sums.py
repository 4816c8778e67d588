"""Sums over an epoch, accumulated on the device without waiting for it: loss, hits and the scalars that rules log."""

import math
from typing import Any

import torch
from torch import Tensor

from apical.bench.distributed import World
from apical.bench.measure import finite
from apical.core.credit import Credit


class Sums:
    """Sums over the steps of an epoch so far; loss and hits are those of this process until :meth:`state` combines them.

    Args:
        world: this process's rank under torchrun.
        classes: whether targets are class labels, so that hits can be counted.
    """

    def __init__(self, world: World, *, classes: bool, answers: int = 1) -> None:
        self._world, self._classes, self._answers = world, classes, answers
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        device = self._world.device
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.hits = torch.zeros((), dtype=torch.int64, device=device)
        self.examples = 0
        self._logs: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, credit: Credit, targets: Tensor) -> None:
        """Add a step in which the forward weights learned."""
        with torch.no_grad():
            self.loss += credit.loss.double() * len(targets)
            if self._classes:
                self.hits += (credit.output.argmax(-1) == targets).sum()
        self.examples += self._world.size * len(targets)

    def log(self, logs: dict[str, Tensor]) -> None:
        """Add the scalars of any step."""
        for name, value in logs.items():
            value = value.detach().double()
            self._logs[name] = self._logs[name] + value if name in self._logs else value
            self._counts[name] = self._counts.get(name, 0) + self._world.size

    def total_loss(self) -> float:
        """Return the sum of the loss over all processes; waits for the device."""
        return self._world.sum(self.loss.clone()).item()

    def means(self) -> tuple[float | None, float | None, dict[str, float | None]]:
        """Return loss, accuracy (0 to 1) and logs per step, over all processes; None if nothing was counted or is finite."""
        state = self.state()
        logs = {name: finite(value.item() / state["counts"][name]) for name, value in state["logs"].items()}
        if not self.examples:
            return None, None, logs
        hits = state["hits"].item() / (self.examples * self._answers) if self._classes else None
        return state["loss"].item() / self.examples, hits, logs

    def state(self) -> dict[str, Any]:
        """Return the sums over all processes, for a checkpoint."""
        logs = {name: self._world.sum(self._logs[name].clone()) for name in sorted(self._logs)}
        loss, hits = self._world.sum(self.loss.clone()), self._world.sum(self.hits.clone())
        return {"loss": loss, "hits": hits, "examples": self.examples, "logs": logs, "counts": dict(self._counts)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; the main process gets the sums, because they are totals over all processes.

        Raises:
            KeyError, AttributeError, TypeError, ValueError: the state is damaged.
        """
        logs, counts = state.get("logs", {}), state.get("counts", {})
        if any(value.numel() != 1 for value in (state["loss"], state["hits"], *logs.values())):
            raise ValueError("sums that are not single numbers")
        if not (math.isfinite(state["loss"]) and math.isfinite(state["hits"])):
            raise ValueError("sums that are not finite")
        if logs.keys() != counts.keys() or not all(type(count) is int for count in (state["examples"], *counts.values())):
            raise ValueError("counts that are not whole numbers")
        device, share = self._world.device, int(self._world.is_main)
        self.loss, self.hits = state["loss"].to(device) * share, state["hits"].to(device) * share
        self.examples = state["examples"]
        self._logs = {name: value.to(device) * share for name, value in logs.items()}
        self._counts = dict(counts)
