"""What is wrong with a loss or with targets, in words, found when a rule has failed on them or has ignored a part."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from apical.core.rest import undisturbed
from apical.errors import ApicalError, ConfigError, UnsupportedModelError


def explained(rule: nn.Module, inputs: Any, targets: Any) -> ApicalError | None:
    """Why a rule's loss cannot be used on a batch, or None where model and loss by themselves do as they should."""
    model: Any = rule.model
    loss: Any = rule.loss
    with undisturbed(rule), torch.no_grad():
        try:
            output = model(inputs)
        except Exception:
            return None  # the model's own error says more
        try:
            value = loss(output, targets)
        except Exception as error:
            if isinstance(output, Tensor):
                return None
            return UnsupportedModelError(
                f"the model's output is a {type(output).__name__}, which the loss does not take ({type(error).__name__}); "
                "pass a loss that reads it, or wrap the model in a module that returns the tensor for the loss"
            )
    if not isinstance(value, Tensor):
        return ConfigError(
            f"the loss returns a {type(value).__name__}, from which no gradient can be taken; return a scalar tensor"
        )
    if value.dim():
        return ConfigError(
            f"the loss returns a tensor of shape {tuple(value.shape)}; return the mean over the batch, a scalar"
        )
    if not isinstance(output, Tensor):
        return UnsupportedModelError(
            f"the model's output is a {type(output).__name__}, and {type(rule).__name__} needs one tensor; wrap the model "
            "in a module that returns that tensor"
        )
    if not isinstance(targets, Tensor):
        return ConfigError(
            f"{type(rule).__name__} computes with the targets itself and needs them in one tensor, not a "
            f"{type(targets).__name__}"
        )
    return None


def require_loss_of_output(rule: nn.Module, inputs: Any, targets: Any) -> None:
    """Refuse a loss that also reads activities of the model, for rules that ask it for the error at the output alone.

    Raises:
        ConfigError: the loss, of an output without a graph, still depends on the model's activities.
    """
    model: Any = rule.model
    loss: Any = rule.loss
    with undisturbed(rule), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of targets (N,) for outputs (N, 1), which rules fit to each other
        try:
            output = model(inputs)
            value = loss(output.detach().requires_grad_(), targets) if isinstance(output, Tensor) else None
        except Exception:
            return  # the rule calls them in another way, or says what is wrong
    if isinstance(value, Tensor) and _nodes(value.grad_fn) & _nodes(output.grad_fn):
        raise ConfigError(
            f"the loss reads activities inside the model, and {type(rule).__name__} learns from its derivative with respect "
            "to the output alone: that term would be left out of the update; remove it, or choose a rule that follows it, "
            "such as DirectFeedbackAlignment or FeedbackAlignment"
        )


def _nodes(root: Node | None) -> set[Node]:
    """Nodes of a graph without its leaves."""
    seen: set[Node] = set()
    waiting = [] if root is None else [root]
    while waiting:
        at = waiting.pop()
        if at not in seen and not hasattr(at, "variable"):
            seen.add(at)
            waiting += [child for child, _ in at.next_functions if child is not None]
    return seen
