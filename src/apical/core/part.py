"""Parts of a row of blocks, for rules without backward locking: each part learns a batch from what its neighbours hand it.

Activities go up as soon as a part has computed them. What comes down (codes, the output's error) is not an error that passed
a layer above, so a part need not wait until the layers above have learned.
"""

import itertools
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from apical.core.blocks import Block, through
from apical.core.credit import Credit, Root
from apical.errors import ConfigError, UnsupportedModelError


class Link(Protocol):
    """To the part below or above; tensors arrive in the order in which they are sent."""

    def send(self, tensor: Tensor) -> None:
        """Hand a tensor to the neighbour, without waiting for it to be read."""

    def receive(self) -> Tensor:
        """The neighbour's next tensor, for this part to keep."""


@dataclass(frozen=True)
class Part:
    """Neighbouring blocks of a row.

    Attributes:
        levels: their indices.
        below: to the part whose output this one is given; None for the first, which is given the inputs.
        above: None for the last part, which makes the model's output.
    """

    levels: range
    below: Link | None = None
    above: Link | None = None


@runtime_checkable
class Separable(Protocol):
    """A rule whose parts can learn at the same time."""

    def chain(self, input_shape: Sequence[int]) -> tuple[list[nn.Module], list[Block]]:
        """Return what precedes the first block, and the blocks, for inputs (batch, *input_shape)."""

    def learn_part(self, part: Part, inputs: Tensor, targets: Tensor) -> tuple[list[Root], Tensor | None]:
        """Return what the blocks of a part learn from a batch, and the loss where it is the last part.

        Args:
            part: which blocks.
            inputs: of the batch (batch, ...); read by the first part alone.
            targets: of the batch.
        """


def learn(rule: Separable, part: Part, inputs: Tensor, targets: Tensor) -> Tensor | None:
    """Write `.grad` of a part's parameters; returns the loss, if it is the last part."""
    roots, loss = rule.learn_part(part, inputs, targets)
    if roots:
        Credit.of(roots, targets, targets if loss is None else loss).backward()
    return loss


class Thread(NamedTuple):
    """A link to a neighbour in another thread, which notes what it sends; None ends a part whose neighbour has failed."""

    there: "queue.Queue[Tensor | None]"
    back: "queue.Queue[Tensor | None]"
    sent: list[Tensor]

    def send(self, tensor: Tensor) -> None:
        """See :class:`Link`."""
        self.sent.append(tensor.detach().contiguous().clone())
        self.there.put(self.sent[-1])

    def receive(self) -> Tensor:
        """See :class:`Link`."""
        tensor = self.back.get()
        if tensor is None:
            raise EOFError
        return tensor


def learn_in_threads(rule: Separable, rows: Sequence[range], inputs: Tensor, targets: Tensor) -> list[list[list[Tensor]]]:
    """Write `.grad` by parts; returns what was sent between neighbours, from the first part on: up and down.

    Raises:
        Exception: the first of any part.
    """
    queues = [(queue.Queue[Tensor | None](), queue.Queue[Tensor | None]()) for _ in rows[1:]]
    sent: list[list[list[Tensor]]] = [[[], []] for _ in queues]
    ups = [Thread(up, down, notes[0]) for (up, down), notes in zip(queues, sent, strict=True)]
    downs = [Thread(down, up, notes[1]) for (up, down), notes in zip(queues, sent, strict=True)]
    failures: list[Exception] = []

    def run(part: Part) -> None:
        try:
            learn(rule, part, inputs, targets)
        except Exception as error:
            failures.append(error)
            for either in (each for pair in queues for each in pair):
                either.put(None)

    parts = [Part(*each) for each in zip(rows, [None, *downs], [*ups, None], strict=True)]
    threads = [threading.Thread(target=run, args=(part,), daemon=True) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return sent


ELEMENTWISE = 100
"""Multiplications of a matrix product that take as long as the other work on one number of an activity."""


def work(head: Sequence[nn.Module], row: Sequence[Block], inputs: Tensor) -> list[int]:
    """Return about how long each block takes, in multiplications."""
    found, h = [], through(head, inputs)
    for block in row:
        behind = block.modules.index(block.layer) + 1
        h = through(block.modules[:behind], h)
        found.append(h.numel() * (block.layer.weight[0].numel() + ELEMENTWISE))
        h = through(block.modules[behind:], h)
    return found


def divided(costs: Sequence[int], workers: int, split: Sequence[int] | None = None) -> list[range]:
    """Return the indices of neighbours for each worker, of whom the busiest has as little work as can be; or `split`.

    >>> divided([200, 65, 65, 65, 2], 2), divided([200, 65, 65, 65, 2], 2, [3, 2])
    ([range(0, 1), range(1, 5)], [range(0, 3), range(3, 5)])
    """
    ends = itertools.combinations(range(1, len(costs)), workers - 1)
    rows = [[range(*pair) for pair in itertools.pairwise((0, *inner, len(costs)))] for inner in ends]
    if split is not None:
        rows = [row for row in rows if [len(part) for part in row] == list(split)]
    if not rows:
        raise ConfigError(f"{len(costs)} blocks cannot be divided among {workers} workers" + f" as {split}" * bool(split))
    return min(rows, key=lambda row: max(sum(costs[i] for i in part) for part in row))


def tried(rule: Any, parts: Sequence[range], inputs: Tensor, targets: Tensor) -> list[list[list[Tensor]]]:
    """Return what the parts pass on for a batch, see :func:`learn_in_threads`.

    Raises:
        UnsupportedModelError: a parameter's gradient is not that of the whole rule.
    """
    rule.zero_grad()
    rule(inputs, targets).backward()
    whole = [parameter.grad for parameter in rule.parameters()]
    rule.zero_grad()
    sent = learn_in_threads(rule, parts, inputs, targets)
    for (name, parameter), wanted in zip(rule.named_parameters(), whole, strict=True):
        found = parameter.grad
        if (found is None) != (wanted is None) or not (found is None or wanted is None or torch.equal(found, wanted)):
            raise UnsupportedModelError(
                f"parameter {name!r} would learn differently in a pipeline than under {type(rule).__name__} on the whole "
                "model; train it without a pipeline"
            )
    return sent
