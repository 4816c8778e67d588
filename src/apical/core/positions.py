"""Answers at many places: which errors a unit hears that has places itself (pixels, tokens, moments), or has none.

The error is brought into the order (batch, places, outputs), what a unit hears is (batch, places, channels), and

    same places            each place hears its own error
    one answer per sample  each of n places hears 1/n of it, as behind mean pooling
    other places           each of n places hears 1/n of the sum over the answer's places
    other axes, same rows  (time * batch, ...) beside (time, batch, ...): row for row
"""

import torch
from torch import Tensor

from apical.core.rows import Labels
from apical.core.signals import Cut
from apical.errors import UnsupportedModelError


def class_axis(output: Tensor, targets: object, convolution: bool) -> int:
    """Axis of the output that holds classes or numbers, 1 or -1; the others are batch and places.

    Class indices leave one axis of the output over, the second as PyTorch's losses have it or the last. Numbers: the second
    behind a convolution, else the last.
    """
    shape = output.shape
    if isinstance(targets, Tensor) and not targets.is_floating_point() and targets.dim() == output.dim() - 1:
        if targets.shape == (*shape[:1], *shape[2:]):
            return 1 if output.dim() > 2 else -1
        if targets.shape == shape[:-1]:
            return -1
    return 1 if convolution and output.dim() > 2 else -1


def ordered(values: Tensor, axis: int) -> Tensor:
    """(batch, *places, outputs) from values whose outputs are on `axis`."""
    return values.movedim(axis, -1) if values.dim() > 1 else values.unsqueeze(-1)


def matched(errors: Tensor, cut: Cut) -> Tensor:
    """What the unit hears of errors (batch, *places, outputs): rows of its own batch and places, or one row per sample.

    Returns:
        (batch, *places, outputs) with the unit's batch and places, or (batch, outputs), to be divided among its places.

    Raises:
        UnsupportedModelError: neither its batch nor its rows are those of the output.
    """
    shape = list(cut.shape)
    del shape[cut.axis if len(shape) > 1 else len(shape) :]
    rows = list(errors.shape[:-1])
    if cut.rows is not None and cut.rows[0] == 1 and len(rows) > 1 and shape == [rows[1], rows[0]]:
        return errors.transpose(0, 1)  # moments first
    if shape == rows:
        return errors
    if shape[0] == rows[0]:
        return errors.flatten(1, -2).sum(1) if len(rows) > 1 else errors
    if torch.Size(shape).numel() == torch.Size(rows).numel():
        return errors.reshape(*shape, errors.shape[-1])
    if len(rows) > 1 and shape[0] == rows[1]:  # moments first: (time, batch, outputs)
        return matched(errors.transpose(0, 1), cut)
    raise UnsupportedModelError(
        f"the unit at {cut.name!r} has outputs of shape {tuple(cut.shape)}, and the model's output has {rows[0]} rows, so "
        "it cannot be told which errors belong to which samples; return (batch, ...) from the model, as the unit does"
    )


def is_routed(errors: Tensor, cut: Cut) -> bool:
    """Whether samples must be looked up by the unit's rows, because rows or places of the answer do not tell them."""
    if cut.rows is None and cut.answers is None:
        return False
    shape = list(cut.shape)
    del shape[cut.axis if len(shape) > 1 else len(shape) :]
    rows = list(errors.shape[:-1])
    unit, answer = _samples(cut.rows, shape, errors), _samples(cut.answers, rows, errors)
    if len(rows) > 1 and len(shape) > 1 and shape[:2] == [rows[1], rows[0]] and torch.equal(unit, answer.transpose(0, 1)):
        return False  # moments first
    return not (unit.numel() == answer.numel() and torch.equal(unit.flatten(), answer.flatten()))


def _samples(labels: Labels | None, shape: list[int], like: Tensor) -> Tensor:
    """The sample of each row and place, in their shape."""
    axis, owners = labels if labels is not None else (0, torch.arange(shape[0], dtype=torch.int32, device=like.device))
    return owners.view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)


def routed(values: Tensor, cut: Cut) -> Tensor:
    """The signal of the unit's shape from values (batch, *places, channels or neurons) by the samples of its rows.

    Each of the n places and rows that a sample has in the unit hears 1/n of the sum over the sample's answers.
    """
    axis, owners = cut.rows or (0, torch.arange(cut.shape[0], device=values.device))
    owners = owners.long()
    answers = _samples(cut.answers, list(values.shape[:-1]), values).flatten().long()
    count = int(answers.max()) + 1
    if len(owners) and int(owners.max()) >= count:
        raise UnsupportedModelError(
            f"the unit at {cut.name!r} has outputs of shape {tuple(cut.shape)}, and the model's output has {count} rows, so "
            "it cannot be told which errors belong to which samples; return (batch, ...) from the model, as the unit does"
        )
    samples = values.new_zeros(count, values.shape[-1]).index_add_(0, answers, values.flatten(0, -2))
    share = torch.bincount(owners, minlength=count)[owners].to(values.dtype)
    part = samples[owners] / share.unsqueeze(1)
    if axis == 0 and part.shape[1] == cut.shape[1:].numel():
        return part.view(cut.shape).to(cut.dtype)
    shape = [1 for _ in cut.shape]
    channels = cut.axis % len(shape)
    shape[axis], shape[channels] = len(owners), part.shape[1]
    part = part * len(owners) * cut.width / max(cut.shape.numel(), 1)
    return (part if axis < channels else part.T).reshape(shape).expand(cut.shape).to(cut.dtype)


def delivered(values: Tensor, cut: Cut, divided: bool = True) -> Tensor:
    """The signal of the unit's shape from values (batch, *places, channels), or (batch, channels), divided among places."""
    if len(cut.shape) == 1:
        return values.view(cut.shape).to(cut.dtype)
    if values.dim() == len(cut.shape):
        return values.movedim(-1, cut.axis).to(cut.dtype)
    shape = [values.shape[0], *(1 for _ in cut.shape[2:])]
    shape.insert(cut.axis % len(cut.shape), values.shape[1])
    part = values / cut.places if divided else values
    return part.view(shape).expand(cut.shape).to(cut.dtype)
