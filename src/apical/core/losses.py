"""Losses: what PyTorch does not have in this form, their error at the output, and their other terms.

A loss may contain more than a distance between output and targets: a weight penalty, a learned temperature. Rules that
only differentiate the loss at the output use such terms as a further root of the credit, so that the parameters in them get
the exact gradient of the term, in addition to what the rule gives them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves, tree_map

from apical.core.credit import CreditRule, Loss, Root
from apical.errors import ConfigError

PLAIN = {"weight": None, "pos_weight": None, "ignore_index": -100, "label_smoothing": 0.0, "reduction": "mean"}
"""Options of PyTorch's losses that change what a label requires, or how much, with the values at which they do nothing."""

NUMBERS = "numbers"
"""Not an option: numeric targets are what the outputs are driven to, so the loss must have its minimum there."""


def output_error(loss: Loss, output: Tensor, targets: Tensor, *, traced: bool = False) -> tuple[Tensor, Tensor]:
    """Return the loss and `e = dL/d output` (of the output's shape), without using the model's graph.

    The loss requires a gradient if and only if it contains terms with parameters; :func:`terms` turns them into roots.

    Args:
        loss: maps (output, targets) to a scalar.
        output: (batch, ...).
        targets: targets in the form that the loss takes.
        traced: whether this runs within a function transform.

    Raises:
        ConfigError: the loss does not depend on the output.
    """
    targets = usable(targets)
    value, (error,) = loss_and_errors(lambda parts: loss(parts[0], targets), [output], traced)
    if error is None:
        raise independent()
    return value, error


def loss_and_errors(loss: Callable[[list[Tensor]], Tensor], parts: list[Tensor], traced: bool) -> tuple[Tensor, list[Any]]:
    """Return the loss of several outputs, and its derivative with respect to each: None for outputs that it ignores.

    Raises:
        ConfigError: it depends on none of them.
    """
    if traced or torch.compiler.is_compiling():  # the one way that compiler and transforms can trace; the other is faster
        with torch.enable_grad():  # for additional terms
            errors, value = torch.func.grad_and_value(loss)([part.detach() for part in parts])
        return value, [error.detach() for error in errors]
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):  # tensors of inference mode have no gradients
            return loss_and_errors(loss, [part.clone() for part in parts], traced)
    leaves = [part.detach().requires_grad_() for part in parts]
    try:
        with torch.enable_grad():
            value = loss(leaves)
    except RuntimeError as error:
        if "leaf Variable that requires grad is being used in an in-place" in str(error):
            raise _in_place() from error
        raise
    if not value.requires_grad:
        raise independent()
    learned = value.grad_fn is not None and _reaches_others(value.grad_fn, leaves)
    errors = torch.autograd.grad(value, leaves, retain_graph=learned, allow_unused=True)
    if all(error is None for error in errors):
        raise independent()
    return value if learned else value.detach(), list(errors)


def usable(targets: Any) -> Any:
    """Return targets that allow differentiation: copies within `torch.inference_mode()`, whose own tensors do not."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return targets
    with torch.inference_mode(False):
        return tree_map(lambda part: part.clone() if isinstance(part, Tensor) else part, targets)


def _in_place() -> ConfigError:
    return ConfigError("the loss changes the output in place, which the rule still needs; let it work on output.clone()")


def independent() -> ConfigError:
    """Return the error for a loss that detaches the output."""
    return ConfigError("the loss does not depend on the output in a way that autograd can follow; do not detach it there")


def value_at(loss: Loss, output: Any, targets: Tensor) -> Tensor:
    """Return the loss of an output without its graph; it requires a gradient if and only if it has terms with parameters.

    Raises:
        ConfigError: the loss changes the output in place.
    """
    looks = not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled())
    parts = [part for part in tree_leaves(output) if isinstance(part, Tensor) and not part.is_inference()] if looks else []
    versions = [part._version for part in parts]
    with torch.enable_grad():
        value = loss(tree_map(lambda part: part.detach() if isinstance(part, Tensor) else part, output), targets)
    if [part._version for part in parts] != versions:
        raise _in_place()
    return value


def terms(value: Tensor) -> list[Root]:
    """Return the loss as a root for the parameters in it; nothing if it has none. `value`: see :func:`output_error`."""
    return [(value, None)] if value.requires_grad else []


def _reaches_others(root: Node, leaves: list[Tensor]) -> bool:
    """Return whether a graph ends at leaves that require a gradient other than these."""
    own = {id(leaf) for leaf in leaves}
    waiting, seen = [root], {root}
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in seen:
                leaf = getattr(node, "variable", None)
                if leaf is not None and id(leaf) not in own:
                    return True
                seen.add(node)
                waiting.append(node)
    return False


def refuse_options(rule: CreditRule, name: str, options: tuple[str, ...] = tuple(PLAIN)) -> None:
    """Refuse options of a rule's loss that it would omit from the update: now, or for a user's function at the first
    batch.

    Args:
        rule: the rule with its loss.
        name: name of the rule, for the message.
        options: keys of :data:`PLAIN`, or :data:`NUMBERS`.

    Raises:
        ConfigError: the loss is one of PyTorch's modules, or a `functools.partial`, with such an option.
    """
    loss = rule.loss
    for option in options:
        plain = PLAIN.get(option)
        value = loss.keywords.get(option, plain) if isinstance(loss, partial) else plain
        value = getattr(loss, option, value) if isinstance(loss, nn.modules.loss._Loss) else value
        if value is not plain and (isinstance(value, Tensor) or value != plain):
            raise left_out(name, option, f"{value!r}")
    rule._loss_options = {**rule._loss_options, **dict.fromkeys(options, name)}


def left_out(name: str, option: str, value: str) -> ConfigError:
    """Return the error for a loss with an option that the rule of this name would omit from the update."""
    if option == "reduction":
        return ConfigError(
            f"{name} takes means over the batch itself, so a loss with reduction={value} would not scale the whole update; "
            "use reduction='mean', and scale credit.loss or the learning rate"
        )
    if option == NUMBERS:
        return ConfigError(
            f"{name} drives the outputs to numerical targets, but this loss has its minimum elsewhere (are the targets "
            "class probabilities?); pass class labels, use a distance such as mse_loss, or choose a rule that uses the "
            "loss"
        )
    return ConfigError(
        f"{name} learns from the labels and not from the loss, so the option {option} of the loss would have no effect "
        "on the update; remove it, or choose a rule that uses the loss"
    )


def require_dependence(loss: Tensor, output: Tensor) -> None:
    """Refuse a loss that does not depend on the output, which is not a leaf.

    Raises:
        ConfigError: it does not.
    """
    waiting, seen = [loss.grad_fn], set[Node]()
    while waiting:
        below = waiting.pop()
        if below is output.grad_fn:
            return
        if below is not None and below not in seen:
            seen.add(below)
            waiting += [node for node, _ in below.next_functions]
    raise independent()


def token_cross_entropy(output: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Return the cross-entropy in nats, the mean over all positions with a target; classes are the output's last axis.

    With targets (batch,) this equals PyTorch's cross-entropy.

    Args:
        output: logits (batch, ..., classes).
        targets: integer classes (batch, ...).
        ignore_index: target of positions to ignore.

    Raises:
        ConfigError: targets of another shape; `torch.nn.functional.cross_entropy` takes (batch, classes, ...).

    >>> token_cross_entropy(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long))
    tensor(1.3863)
    """
    if output.shape[:-1] != targets.shape:
        raise ConfigError(
            f"token_cross_entropy takes logits (batch, ..., classes) and classes (batch, ...); "
            f"got {tuple(output.shape)} and {tuple(targets.shape)}"
        )
    return F.cross_entropy(output.flatten(0, -2), targets.flatten(), ignore_index=ignore_index)


def squared_error(output: Tensor, targets: Tensor) -> Tensor:
    """Return `1/2 |output - target|^2` per sample, averaged over the batch; class labels are used as one-hot targets.

    Args:
        output: (batch, outputs).
        targets: (batch,) class labels, or numbers of the output's shape.

    Raises:
        ConfigError: numbers of another shape, which would be broadcast silently; or a label that is not a class.

    >>> import torch
    >>> squared_error(torch.tensor([[1.0, 2.0]]), torch.tensor([0]))
    tensor(2.)
    """
    return (output - wanted(output, targets)).square().sum() / (2 * len(output))


def wanted(output: Tensor, targets: Tensor) -> Tensor:
    """Return targets as numbers of the output's shape (batch, outputs): one-hot rows for class labels.

    Integers of the output's own shape are treated as values.
    """
    if targets.is_floating_point() or targets.shape == output.shape:
        if targets.shape != output.shape:
            raise ConfigError(f"targets of shape {tuple(targets.shape)} do not fit outputs of shape {tuple(output.shape)}")
        return targets.to(output.dtype)
    try:
        return F.one_hot(targets.long(), output.shape[-1]).to(output.dtype)
    except RuntimeError as error:
        raise ConfigError(
            f"a label lies outside the {output.shape[-1]} classes of the output; remove samples that the loss ignores "
            "from the batch"
        ) from error
