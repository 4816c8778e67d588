"""The path of a training through weight space: snapshots of the model's weights in trajectory.pt of its run folder.

The whole file is rewritten before every checkpoint, and a resumed run uses only the snapshots that its checkpoint counts. So
a run that was killed at any moment ends with the same file as an uninterrupted one.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from apical.bench.checkpoint import REMEDY, read_sealed, write_sealed
from apical.diagnostics.landscape import flat
from apical.errors import CheckpointError

FORMAT = 1


class Trajectory(NamedTuple):
    """Snapshots of one run.

    Attributes:
        names: names of the model's parameters, in order.
        shapes: shapes of the parameters.
        steps: forward steps before each snapshot, ascending from 0.
        weights: all parameters of each snapshot, concatenated: (snapshots, P).
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    steps: tuple[int, ...]
    weights: Tensor


class Recorder:
    """Records a model's weights at the start, at regular intervals and at the end.

    Args:
        model: its parameters are recorded, including those that do not learn; buffers are not.
        every: steps between snapshots; 0 records none and never touches the file.
        last: the step at the end of the training.
    """

    def __init__(self, path: Path, model: nn.Module, every: int, last: int) -> None:
        self.path, self.model, self.every, self.last = path, model, every, last
        self.steps: list[int] = []
        self._weights: list[Tensor] = []
        self._saved = 0

    def see(self, step: int) -> None:
        """Record the weights if they are due after `step` steps in which the forward weights learned."""
        if self.every and (step % self.every == 0 or step == self.last):
            self.steps.append(step)
            self._weights.append(flat(self.model).cpu())

    def save(self) -> None:
        """Write the file atomically if there are new snapshots.

        Raises:
            OSError: it cannot be written; the older file stays.
        """
        if len(self.steps) == self._saved:
            return
        named = dict(self.model.named_parameters())
        shapes = [list(parameter.shape) for parameter in named.values()]
        content = {"format": FORMAT, "names": [*named], "shapes": shapes, "steps": self.steps, "weights": self._weights}
        write_sealed(self.path, content)
        self._saved = len(self.steps)

    def restore(self, count: int) -> None:
        """Go back to the first `count` snapshots of the file, those counted by a checkpoint.

        Raises:
            CheckpointError: the file is missing or damaged, or contains fewer.
        """
        if not self.every:
            return
        saved = load(self.path)
        if len(saved.steps) < count:
            raise CheckpointError(f"{self.path} has {len(saved.steps)} snapshots, but its checkpoint {count}; {REMEDY}")
        self.steps, self._weights = list(saved.steps[:count]), [row.clone() for row in saved.weights[:count]]
        if self.steps and self.steps[-1] % self.every:  # the end of a shorter training; a longer one has no snapshot there
            self.steps.pop()
            self._weights.pop()
        self._saved = len(self.steps)


def load(path: Path) -> Trajectory:
    """Read a trajectory to the CPU.

    Raises:
        CheckpointError: the file is missing or damaged.
        OSError: it cannot be read.
    """
    try:
        content = read_sealed(path, str(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {REMEDY}") from None
    try:
        if content["format"] != FORMAT:
            raise ValueError
        shapes = tuple(tuple(int(side) for side in shape) for shape in content["shapes"])
        names, steps = tuple(map(str, content["names"])), tuple(map(int, content["steps"]))
        weights = torch.stack(content["weights"])
        if weights.shape != (len(steps), sum(map(math.prod, shapes))) or len(names) != len(shapes):
            raise ValueError
        if not weights.is_floating_point() or list(steps) != sorted({*steps}) or min(steps, default=0) < 0:
            raise ValueError
    except (ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged; {REMEDY}") from error
    return Trajectory(names, shapes, steps, weights)
