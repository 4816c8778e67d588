"""Answers at many places: which errors reach a unit with places (pixels, tokens, moments), or without.

The error is brought into the order (batch, places, outputs), what a unit receives is (batch, places, channels), and

    same places            each place receives its own error
    places within places   each of n pixels of a moment receives 1/n of the moment's error
    one answer per sample  each of n places receives 1/n of it, as below mean pooling
    other places           each of n places receives 1/n of the sum over the answer's places
    other axes, same rows  (time * batch, ...) and (time, batch, ...): row for row
"""

import torch
from torch import Tensor

from apical.core.rows import Labels
from apical.core.signals import Cut
from apical.errors import UnsupportedModelError


def class_axis(output: Tensor, targets: object, convolution: bool) -> int:
    """Return the axis of the output that holds classes or numbers, 1 or -1; the others are batch and places.

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
    """Return (batch, *places, outputs) from values whose outputs are on `axis`."""
    return values.movedim(axis, -1) if values.dim() > 1 else values.unsqueeze(-1)


def matched(errors: Tensor, cut: Cut) -> Tensor:
    """Return the unit's part of errors (batch, *places, outputs): rows of its own batch and places, or one row per sample.

    Returns:
        (batch, *places, outputs) with the unit's batch and places, or (batch, outputs), to be divided among its places.

    Raises:
        UnsupportedModelError: neither its batch nor its rows are those of the output.
    """
    shape, rows = _places(cut), list(errors.shape[:-1])
    if cut.rows is not None and cut.rows[0] == 1 and _are_turned(shape, rows):
        return errors.transpose(0, 1)  # moments first
    if shape == rows or (shape[: len(rows)] == rows and len(rows) <= cut.before):
        return errors
    if shape[0] == rows[0]:
        return errors.flatten(1, -2).sum(1) if len(rows) > 1 else errors
    if leading := _leading(cut, shape, rows):
        return errors.reshape(*shape[:leading], errors.shape[-1])
    if len(rows) > 1 and shape[0] == rows[1]:  # moments first: (time, batch, outputs)
        return matched(errors.transpose(0, 1), cut)
    raise _astray(cut, rows[0])


def _astray(cut: Cut, rows: int) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the unit at {cut.name!r} has outputs of shape {tuple(cut.shape)}, and the model's output has {rows} rows, so "
        "errors cannot be matched to samples; return (batch, ...) from the model, as the unit does, or, if the unit is "
        "not computed from the batch, list its layers in exact"
    )


def is_routed(errors: Tensor, cut: Cut) -> bool:
    """Return whether samples must be looked up by the unit's rows, because rows or places of the answer do not tell them."""
    if cut.rows is None and cut.answers is None:
        return False
    shape, rows = _places(cut), list(errors.shape[:-1])
    answer = _samples(cut.answers, rows, errors)
    if _are_turned(shape, rows) and torch.equal(_samples(cut.rows, rows[1::-1] + rows[2:], errors), answer.transpose(0, 1)):
        return False  # moments first
    leading, axis = _leading(cut, shape, rows), 0 if cut.rows is None else cut.rows[0]
    if axis >= min(leading, cut.before or 1):
        return True
    return not torch.equal(_samples(cut.rows, shape[:leading], errors).flatten(), answer.flatten())


def neurons(errors: Tensor, cut: Cut) -> int:
    """Return how many of the unit's neurons receive one row of errors, if each is separate."""
    if cut.before < 2:
        return cut.shape[1:].numel()
    axis = (0 if cut.rows is None else cut.rows[0]) if is_routed(errors, cut) else matched(errors, cut).dim() - 2
    return cut.shape[axis + 1 :].numel()


def _places(cut: Cut) -> list[int]:
    """Return the sizes of a unit's axes but for its channels'."""
    return [size for axis, size in enumerate(cut.shape) if axis != cut.before or len(cut.shape) == 1]


def _are_turned(shape: list[int], rows: list[int]) -> bool:
    """Return whether the unit has the answer's places, but for its first two axes, which are the other way round."""
    return len(rows) > 1 and shape[: len(rows)] == [rows[1], rows[0], *rows[2:]]


def _leading(cut: Cut, shape: list[int], rows: list[int]) -> int:
    """Return how many of the unit's axes (all, or some before its channels) have the answer's number of places, or 0."""
    numbers = {axes: torch.Size(shape[:axes]).numel() for axes in (len(shape), *range(min(cut.before, len(shape)), 0, -1))}
    return next((axes for axes, number in numbers.items() if number == torch.Size(rows).numel()), 0)


def _samples(labels: Labels | None, shape: list[int], like: Tensor) -> Tensor:
    """Return the sample of each row and place, in their shape."""
    axis, owners = labels if labels is not None else (0, torch.arange(shape[0], dtype=torch.int32, device=like.device))
    return owners.view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)


def routed(values: Tensor, cut: Cut) -> Tensor:
    """Return the signal of the unit's shape from values (batch, *places, channels or neurons) by the samples of its rows.

    Each of the n places and rows that a sample has in the unit receives 1/n of the sum over the sample's answers.
    """
    axis, owners = cut.rows or (0, torch.arange(cut.shape[0], device=values.device))
    owners = owners.long()
    answers = _samples(cut.answers, list(values.shape[:-1]), values).flatten().long()
    count = int(answers.max()) + 1
    if len(owners) and int(owners.max()) >= count:
        raise _astray(cut, count)
    samples = values.new_zeros(count, values.shape[-1]).index_add_(0, answers, values.flatten(0, -2))
    share = torch.bincount(owners, minlength=count)[owners].to(values.dtype)
    part = samples[owners] / share.unsqueeze(1)
    below = cut.shape[axis + 1 :]
    if axis <= cut.before and part.shape[1] == below.numel():
        return (part / cut.shape[:axis].numel()).view(-1, *below).expand(cut.shape).to(cut.dtype)
    shape = [1 for _ in cut.shape]
    channels = cut.axis % len(shape)
    shape[axis], shape[channels] = len(owners), part.shape[1]
    part = part * len(owners) * cut.width / max(cut.shape.numel(), 1)
    return (part if axis < channels else part.T).reshape(shape).expand(cut.shape).to(cut.dtype)


def delivered(values: Tensor, cut: Cut, divided: bool = True) -> Tensor:
    """Return the unit-shaped signal from values (batch, *places, channels), divided among further places of the unit.

    In place of a number for each channel there may be one for each of the unit's neurons.
    """
    if values.dim() <= max(2, cut.before + 1) and values.shape[-1] == cut.shape[values.dim() - 1 :].numel():
        return values.reshape(cut.shape).to(cut.dtype)
    others = _places(cut)[values.dim() - 1 :]  # places that share what comes
    part = values / torch.Size(others).numel() if divided else values
    shape = [*values.shape[:-1], *(1 for _ in others), values.shape[-1]]
    return part.reshape(shape).movedim(-1, cut.axis).expand(cut.shape).to(cut.dtype)
