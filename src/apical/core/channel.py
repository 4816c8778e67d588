"""Tensors from one process to another, through shared slots.

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
"""Tensors that may be on the way."""

SPIN = 1e-4
"""Seconds for which a receiver looks before it sleeps: to be woken costs as much."""


class Channel:
    """One end of a way for tensors: the sender copies into the next free slot, the receiver out of it."""

    def __init__(self, pipe: Connection, slots: Sequence[Tensor]) -> None:
        self.pipe, self.slots, self.turn, self.ahead = pipe, slots, 0, 0

    def send(self, tensor: Tensor, note: object = None) -> None:
        """Hand on a tensor, with a note, as soon as a slot is free."""
        if tensor.numel() > self.slots[0].numel() or tensor.dtype != self.slots[0].dtype:
            raise ConfigError("a batch is larger than the first one, or of another dtype; start with a batch of full size")
        if self.ahead == len(self.slots):
            self._next()
            self.ahead -= 1
        self._slot(tensor.shape).copy_(tensor)
        self.ahead += 1
        self.pipe.send((tuple(tensor.shape), note))

    def receive_noted(self) -> tuple[Tensor, Any]:
        """The next tensor and its note."""
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
    """A link to a neighbour in another process."""

    there: Channel
    back: Channel

    def send(self, tensor: Tensor) -> None:
        """See :class:`apical.core.part.Link`."""
        self.there.send(tensor.detach())

    def receive(self) -> Tensor:
        """See :class:`apical.core.part.Link`."""
        return self.back.receive_noted()[0]


def channel(context: Any, sent: Sequence[Tensor]) -> tuple[Channel, Channel]:
    """Both ends, of the sender and the receiver, with slots as large as the largest of what is `sent`.

    Args:
        context: of :mod:`multiprocessing`.
        sent: examples, of one dtype; none, where nothing will be sent.
    """
    size = max((tensor.numel() for tensor in sent), default=0)
    dtype = sent[0].dtype if sent else torch.float32
    slots = [torch.empty(size, dtype=dtype).share_memory_() for _ in range(SLOTS)]
    ours, theirs = context.Pipe()
    return Channel(ours, slots), Channel(theirs, slots)
