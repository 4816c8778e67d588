"""What a loss does with labels that a rule which learns from the labels themselves would omit from the update.

PyTorch's losses declare it by options, which are read when the rule is made. A user's function declares nothing: at the
first batch, its derivative is evaluated at made-up outputs.

    at zero outputs     every sample of a class k has a gradient of one length; else classes have weights, or are ignored
    at the labels       the gradient vanishes, for one of the outputs that stand for "exactly this class": e_k, 2 e_k - 1,
                        the same so large that a softmax says k, its logarithm; else the labels are smoothed or shifted
    the batch twice     the loss is the same; else it is a sum
"""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.credit import CreditRule, Loss
from apical.core.losses import NUMBERS, left_out
from apical.core.positions import class_axis
from apical.core.rest import undisturbed
from apical.errors import ConfigError

LARGE = 1e3
"""Logit at which a softmax is 0 or 1."""
SMALL = 1e-3
"""Relative size below which a gradient counts as zero, and by which two gradients may differ."""
MANY = 256
"""Maximum number of classes for which every class is tested."""

FOUND = {
    "weight": "weighs classes differently",
    "ignore_index": "ignores a class",
    "label_smoothing": "has its minimum at outputs other than the labels (smooth labels, a penalty on outputs)",
}
"""What a user's function does when it has the effect of an option."""


def require_plain(rule: CreditRule, output: Any, targets: Any) -> None:
    """Refuse, at the first batch, a loss that does what the rule would omit from the update.

    Args:
        rule: the rule.
        output: output for the batch.
        targets: targets of the batch.

    Raises:
        ConfigError: it does; the message says what.
    """
    if not (isinstance(output, Tensor) and isinstance(targets, Tensor) and output.is_floating_point()):
        return
    with undisturbed(rule), torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of targets (N,) for outputs (N, 1), which rules reshape
        for option in _departures(rule, output.detach().clone(), targets.detach().clone()):
            if option in rule._loss_options:
                name = rule._loss_options[option]
                if option not in FOUND:
                    raise left_out(name, option, "'sum'")
                raise ConfigError(
                    f"{name} learns from the labels and not from the loss, which {FOUND[option]}: that would have no "
                    "effect on the update; remove it, or choose a rule that uses the loss"
                )


def require_known(loss: Loss) -> None:
    """Refuse, while a graph is being compiled, a loss whose behaviour only a batch can show.

    Raises:
        ConfigError: it is not one of PyTorch's or apical's, which depend on outputs and targets alone.
    """
    function: Any = getattr(loss, "func", loss)
    places = getattr(function, "__module__", None), type(function).__module__
    if not {*places} & {F.__name__, nn.modules.loss.__name__, "apical.core.losses"}:
        raise ConfigError("call the rule once on a batch before torch.compile, so that it sees what this loss does")


def _departures(rule: CreditRule, output: Tensor, targets: Tensor) -> Iterator[str]:
    """Yield the options that the loss has, judged from made-up outputs; nothing for a loss that takes none of these."""
    try:
        once = float(rule.loss(output, targets))
        twice = float(rule.loss(torch.cat([output, output]), torch.cat([targets, targets])))
        if abs(twice - 2 * once) < SMALL * abs(twice):
            yield "reduction"
        if targets.is_floating_point():
            if targets.shape == output.shape and not _vanishes(rule, [targets], targets):
                yield NUMBERS
            return
        axis = class_axis(output, targets, False) % output.dim()
        classes = output.shape[axis]
        if classes < 2 or targets.shape != output.shape[:axis] + output.shape[axis + 1 :]:
            return
        shape = (max(len(targets), min(classes, MANY)),) if targets.dim() == 1 else targets.shape
        labels = torch.arange(shape.numel() if isinstance(shape, torch.Size) else shape[0], device=targets.device) % classes
        labels = labels.view(shape).to(targets.dtype)
        code = F.one_hot(labels.long(), classes).to(output.dtype).movedim(-1, axis)
        lengths = _gradient(rule, torch.zeros_like(code), labels).norm(dim=axis).flatten()
        if float(lengths.min()) == 0 < float(lengths.max()):
            yield "ignore_index"
        if float(lengths.max() - lengths.min()) > SMALL * float(lengths.max()):
            yield "weight"
        signs = 2 * code - 1
        if not _vanishes(rule, [code, signs, LARGE * signs, torch.log_softmax(LARGE * code, axis)], labels, axis):
            yield "label_smoothing"
    except (TypeError, ValueError, RuntimeError, IndexError, AssertionError):
        return  # a loss of another kind


def _vanishes(rule: CreditRule, places: list[Tensor], targets: Tensor, axis: int | None = None) -> bool:
    """Return whether the loss's gradient vanishes at one of some outputs; for log-probabilities, after the softmax."""
    usual = float(_gradient(rule, torch.zeros_like(places[0]) + 0.5, targets).norm())
    for number, place in enumerate(places):
        error = _gradient(rule, place, targets)
        if number == 3 and axis is not None:
            error = error - place.exp() * error.sum(axis, keepdim=True)
        if float(error.norm()) <= SMALL * usual:
            return True
    return usual == 0


def _gradient(rule: CreditRule, output: Tensor, targets: Tensor) -> Tensor:
    leaf = output.clone().requires_grad_()
    return torch.autograd.grad(rule.loss(leaf, targets), leaf)[0]
