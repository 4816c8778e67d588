"""Send tensors between processes through shared slots.

What is sent lies in shared memory and is announced through a pipe, whose end reveals immediately that a process has died.
"""

import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apical.errors import ConfigError

SLOTS = 2
"""Maximum number of tensors in transit."""

SPIN = 1e-4
"""Seconds for which a receiver polls before it sleeps: waking it up costs about as much."""


class Channel:
    """One end of a connection for tensors: the sender copies into the next free slot, the receiver copies out of it."""

    def __init__(self, pipe: Connection, slots: Sequence[Tensor]) -> None:
        self.pipe, self.slots, self.turn, self.ahead = pipe, slots, 0, 0

    def send(self, tensor: Tensor, note: object = None) -> None:
        """Send a tensor with a note as soon as a slot is free."""
        if tensor.numel() > self.slots[0].numel() or tensor.dtype != self.slots[0].dtype:
            raise ConfigError("a batch is larger than the first one, or of another dtype; start with a batch of full size")
        if self.ahead == len(self.slots):
            self._next()
            self.ahead -= 1
        self._slot(tensor.shape).copy_(tensor)
        self.ahead += 1
        self.pipe.send((tuple(tensor.shape), note))

    def receive_noted(self) -> tuple[Tensor, Any]:
        """Return the next tensor and its note."""
        shape, note = self._next()
        tensor = self._slot(shape).clone()
        self.pipe.send(None)  # the slot is free
        return tensor, note

    def _slot(self, shape: Sequence[int]) -> Tensor:
        self.turn += 1
        return self.slots[self.turn % len(self.slots)][: torch.Size(shape).numel()].view(*shape)

    def _next(self) -> Any:
        until = time.perf_counter() + SPIN
        while not self.pipe.poll() and time.perf_counter() < until:
            pass
        return self.pipe.recv()


class Way(NamedTuple):
    """Link to a neighbour in another process."""

    there: Channel
    back: Channel

    def send(self, tensor: Tensor) -> None:
        """See :class:`apical.core.part.Link`."""
        self.there.send(tensor.detach())

    def receive(self) -> Tensor:
        """See :class:`apical.core.part.Link`."""
        return self.back.receive_noted()[0]


def channel(context: Any, sent: Sequence[Tensor]) -> tuple[Channel, Channel]:
    """Return the sender's and the receiver's end, with slots as large as the largest tensor in `sent`.

    Args:
        context: a context of :mod:`multiprocessing`.
        sent: example tensors, all of one dtype; empty if nothing will be sent.
    """
    size = max((tensor.numel() for tensor in sent), default=0)
    dtype = sent[0].dtype if sent else torch.float32
    slots = [torch.empty(size, dtype=dtype).share_memory_() for _ in range(SLOTS)]
    ours, theirs = context.Pipe()
    return Channel(ours, slots), Channel(theirs, slots)
