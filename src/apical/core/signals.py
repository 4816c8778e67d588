"""Teaching signals that are made when the backward pass asks for them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Teacher:
    """Makes the teaching signals of one pass, each not before the backward pass reaches its unit.

    Signals made in advance would all exist at once, beside every activation that backward still needs.

    Attributes:
        signal: `signal(index of the unit, scale) -> teaching signal` of the unit output's shape, times the scalar scale;
            set after the forward pass, when the output error is known.
    """

    signal: Callable[[int, Tensor], Tensor]


class TeachingSignal(torch.autograd.Function):
    """A scalar zero whose backward pass hands `teacher.signal(index, scale)` to `hidden`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, teacher: Teacher, index: int) -> Tensor:
        """Zero; the unit's output is not kept."""
        ctx.teacher, ctx.index = teacher, index
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        """The signal, made now."""
        return ctx.teacher.signal(ctx.index, scale), None, None
