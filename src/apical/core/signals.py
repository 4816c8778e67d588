"""Hidden units of a pass, and teaching signals that are made when the backward pass asks for them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from apical.core.rows import Labels
from apical.errors import refuse_second_derivatives


class Teacher:
    """Makes the teaching signals of one pass, each not before the backward pass reaches its unit.

    Signals computed in advance would all exist at the same time, with every activation that backward still needs.

    Attributes:
        signal: `signal(index of the unit, scale) -> teaching signal` of the unit output's shape, times the scalar scale;
            set after the forward pass, when the output error is known.
    """

    signal: Callable[[int, Tensor], Tensor]


class TeachingSignal(torch.autograd.Function):
    """A scalar zero whose backward pass hands `teacher.signal(index, scale)` to `hidden`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, teacher: Teacher, index: int) -> Tensor:
        """Return zero; the unit's output is not kept."""
        ctx.teacher, ctx.index = teacher, index
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        """Return the signal, made now."""
        refuse_second_derivatives()
        return ctx.teacher.signal(ctx.index, scale), None, None


class HandedOn(torch.autograd.Function):
    """A model's output: its error is recorded first, then passed on, and the units' roots are asked for their signals."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, hear: Callable[[Tensor], None], *roots: Tensor) -> Tensor:
        """Return the output; `roots` are scalars of :class:`TeachingSignal`."""
        ctx.hear = hear
        return output.detach()

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor | None, ...]:
        """Return the error itself, and 1 for every root."""
        ctx.hear(error)
        one = error.new_ones(())
        return (error, None, *(one if needed else None for needed in ctx.needs_input_grad[2:]))


class Cut(NamedTuple):
    """One hidden unit in one pass.

    Attributes:
        root: where backward starts: a scalar that carries the teacher's signal; under `torch.compile`, which plans memory
            itself, the unit's output.
        shape: of the unit's output (batch, ...).
        dtype: of the unit's output.
        name: of the module, or function call, whose output this is, with "#k" when it is used again.
        axis: the channels' axis: behind a convolution that before the map's axes, else the last.
        reader: the weighted layer that reads it as it is, if one does next.
        rows, answers: the samples of its rows, and of the output's, where rows move; see :mod:`apical.core.rows`.
    """

    root: Tensor
    shape: torch.Size
    dtype: torch.dtype
    name: str = ""
    axis: int = -1
    rows: Labels | None = None
    answers: Labels | None = None
    reader: str = ""

    def bare(self) -> "Cut":
        """Return the same without the graph, for what the graph itself keeps."""
        return Cut(self.root.detach(), *self[1:])

    @property
    def before(self) -> int:
        """How many axes there are before the channels'."""
        return self.axis % len(self.shape)

    @property
    def width(self) -> int:
        """Channels of the unit; one where its outputs are one number per sample, (batch,)."""
        return self.shape[self.axis] if len(self.shape) > 1 else 1

    @property
    def places(self) -> int:
        """Places of each sample that the unit has channels at: pixels, tokens; 1 for a dense unit."""
        return self.shape[1:].numel() // max(self.width, 1)


def channels_axis(shape: torch.Size, layer: nn.Module | None, at_inputs: bool, rows: Labels | None) -> int:
    """Return the channels' axis of a unit: that of the last layer's outputs, if it can be told by their number.

    Args:
        shape: of the unit.
        layer: the last one before it, or, `at_inputs`, the one that reads it.
        rows: the samples of its rows, if they move; their axis is not a channel axis.
    """
    if len(shape) < 3 or not isinstance(layer, _ConvNd):
        return -1
    channels = layer.in_channels if at_inputs else layer.out_channels
    usual = max(1, len(shape) - 1 - len(layer.kernel_size))  # moments may stand before
    fits = (axis for axis in (usual, 1, -1) if shape[axis] == channels and (rows is None or rows[0] != axis))
    return next(fits, usual if len(shape) > len(layer.kernel_size) + 1 else -1)
