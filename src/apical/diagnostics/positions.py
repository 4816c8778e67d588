"""What an update consists of, position by position: the layer's own inputs, and at which positions credit arrives.

Positions are those of the answer (tokens, moments). A dense layer's update for one sample is `sum_t delta_t x_t^T` if it is
local: its rows lie in the span of the sample's inputs, and what the error at position t adds is a multiple of `x_t`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from apical.core.losses import output_error
from apical.core.positions import class_axis
from apical.diagnostics.interventions import Probe

FULL = 1e-10
"""Singular values below this share of the largest one do not count towards a rank."""

STAYS = 1e-9
"""Relative change of errors at other positions below which they stay."""


def not_presynaptic(probe: Probe) -> dict[str, float]:
    """Share of a dense layer's update, for one sample, that is no combination of its inputs at all positions, by layer.

    NaN where that cannot be told: the inputs span everything, or the layer's inputs change in the course of the step.
    """
    heard, shares = probe.listening(), {}  # in the step: a rule's own network may pass on other activities than the model
    for name, update in probe.rows(probe.updates(mode=heard, batch=probe.sample)).items():
        if name in heard.calls and float(update.norm()):
            share = outside(update, torch.cat(heard.calls[name]))
            shares[name] = share if probe.responses[name] == 1 else float("nan")
    return shares


def outside(update: Tensor, rows: Tensor) -> float:
    """Share of an update (n_out, n_in) outside the span of rows (positions, n_in); NaN where they span everything.

    >>> outside(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]]))
    0.800000011920929
    >>> outside(torch.tensor([[3.0, 4.0]]), torch.eye(2))
    nan
    """
    _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    span = directions[sizes > FULL * sizes.max()] if len(sizes) else directions
    if len(span) == rows.shape[1] > 1:
        return float("nan")
    return float((update - (update @ span.T) @ span).norm() / update.norm())


def across_positions(probe: Probe) -> tuple[dict[str, float], str]:
    """Share of what the error at one position adds to a dense layer's update that is no multiple of its input there.

    The target at one position of one sample is changed; the forward pass and the errors at the other positions stay.

    Returns:
        The shares by layer, and the reason if there are none, else an empty text.
    """
    inputs, targets = probe.sample
    with torch.no_grad():
        output = probe.answer(inputs)
    rows, count = targets_at(targets, output)
    if count < 2:
        return {}, "each sample has one answer: there are no positions between which credit could go"
    given = {name: at for name, calls in probe.given().items() if (at := inputs_at(calls, count)) is not None}
    if not given:
        return {}, "no dense layer has the positions of the answer"
    before = probe.rows(probe.updates(batch=probe.sample))
    axis = class_axis(output, targets, convolution=False)
    for place, other in (change for last in (axis, -axis) for change in _changes(probe, output, targets, rows, last)):
        after = probe.rows(probe.updates(batch=(inputs, other)))
        shares = {}
        for name, at in given.items():
            if name in before and float((after[name] - before[name]).norm()):
                shares[name] = outside(after[name] - before[name], at[place])
        if shares:
            return shares, ""
        return {}, "no dense layer with the positions of the answer learns from its error"
    return {}, "the loss joins the errors of positions: that at one position cannot be changed alone"


def targets_at(targets: Tensor, output: Tensor) -> tuple[Tensor, int]:
    """Targets of one sample with positions first, a view (positions, ...), and how many positions there are.

    Class labels are one a position. Of numbers, the last axis belongs to the position if there are several axes.
    """
    if not targets.is_floating_point():
        rows = targets.reshape(-1, 1) if targets.dim() < output.dim() else targets.reshape(-1, targets.shape[-1])
    else:
        rows = targets.reshape(-1, targets.shape[-1]) if targets.dim() > 2 else targets.reshape(1, -1)
    return rows, len(rows)


def inputs_at(calls: list[Tensor], positions: int) -> list[Tensor] | None:
    """A layer's inputs (uses, n_in) at each position, from rows of each of its calls; None if they have other positions.

    >>> rows = torch.arange(6.0).view(3, 2)
    >>> [at.tolist() for at in inputs_at([rows], 3)] == [at.tolist() for at in inputs_at(list(rows.split(1)), 3)]
    True
    >>> inputs_at([rows], 2)
    """
    if all(len(call) == positions for call in calls):
        return [torch.stack([call[t] for call in calls]) for t in range(positions)]
    if all(len(call) == 1 for call in calls) and len(calls) % positions == 0:  # one call a moment
        return list(torch.cat(calls).split(len(calls) // positions))
    return None


def _changes(probe: Probe, output: Tensor, targets: Tensor, rows: Tensor, axis: int) -> Iterator[tuple[int, Tensor]]:
    """Positions, and targets that differ there so that the errors differ there alone; the middle of the sample first.

    Args:
        probe: rule and sample.
        output: its output.
        targets: its targets.
        rows: the same, positions first.
        axis: of the output, of classes or numbers.
    """
    if output.dim() <= axis or output.numel() != len(rows) * output.shape[axis]:
        return
    classes = output.shape[axis]

    def errors(wanted: Tensor) -> Tensor:
        return output_error(probe.rule.loss, output, wanted)[1].movedim(axis, -1).reshape(len(rows), -1)

    before = errors(targets)
    places = sorted(range(len(rows)), key=lambda t: abs(t - len(rows) // 2))
    for place in (t for t in places if float(before[t].norm())):
        for step in range(1, 4):
            other = rows.clone()
            other[place] = (other[place] + step) % classes if not targets.is_floating_point() else other[place] + step
            wanted = other.view(targets.shape)
            change = errors(wanted) - before
            there = float(change[place].norm())
            change[place] = 0
            if there and float(change.norm()) <= STAYS * float(before.norm()):
                yield place, wanted
