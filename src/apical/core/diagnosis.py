"""Explain what is wrong with a loss or with targets after a rule has failed on them or ignored a part of them."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves

from apical.core.called import FAKE, are_fake
from apical.core.checkpointing import is_checkpointed
from apical.core.credit import Credit, CreditRule
from apical.core.losses import independent
from apical.core.rest import undisturbed
from apical.core.stepping import strided
from apical.core.wrappers import compiled_function
from apical.errors import ApicalError, ConfigError, DivergenceError, UnsupportedModelError

STILL = 3
"""Number of steps without a change after which a rule warns that its own parameters are not trained."""

SLIGHT = 1e-6
"""How far a model's weight may move while rounding leaves one of the rule's own, up to about ten in size, unchanged."""

OFTEN = 16
"""Number of first batches that are all checked for that; afterwards only the 32nd, the 64th and so on."""


def explained(rule: nn.Module, error: Exception, inputs: Any, targets: Any) -> ApicalError | None:
    """Return a clearer error than the rule's on a batch; None if that says all, or if model and loss work as they should."""
    if isinstance(error, torch.OutOfMemoryError):
        return None
    if are_fake() and not isinstance(error, ApicalError):
        return ConfigError(FAKE)
    if isinstance(error, DivergenceError) and not _is_finite(inputs):
        return type(error)(why_not_finite((inputs, targets)))
    name = compiled_function(cast(nn.Module, rule.model))
    if name is not None and (isinstance(error, UnsupportedModelError) or not isinstance(error, ApicalError)):
        return UnsupportedModelError(
            f"{error if isinstance(error, ApicalError) else repr(error)} [the model calls {name}(), which torch.compile "
            "has compiled, so no rule can see the layers it calls: if it calls any, call the rule in the context of "
            'torch.compiler.set_stance("force_eager"), or do not compile the function]'
        )
    if isinstance(error, ApicalError):
        return None
    if isinstance(inputs, Tensor) and (not inputs.dim() or 0 in inputs.shape[1:]):
        what = "hold no numbers" if inputs.dim() else "are a single number"
        return ConfigError(f"inputs of shape {tuple(inputs.shape)} {what}: give a batch of samples (batch, ...)")
    model: Any = rule.model
    loss: Any = rule.loss
    parameter = next(model.parameters(), None)
    if not any(isinstance(part, Tensor) for part in tree_leaves(inputs)):
        return ConfigError(f"inputs are a {type(inputs).__name__} that contains no tensor: pass torch.as_tensor(inputs)")
    if isinstance(inputs, Tensor) and parameter is not None and (parameter.is_meta or inputs.is_meta):
        where = "the model is" if parameter.is_meta else "the inputs are"
        return ConfigError(f"{where} on the meta device, which stores no values: create them on another device")
    if torch.is_grad_enabled() and any(isinstance(part, Tensor) and part.is_inference() for part in tree_leaves(inputs)):
        return ConfigError("inputs made under torch.inference_mode() cannot be used for learning: pass inputs.clone()")
    with undisturbed(rule), torch.no_grad():
        try:
            output = model(inputs)
        except Exception as error:
            if isinstance(error, TypeError) and not _takes_one(model.forward):
                return UnsupportedModelError(
                    "a rule calls the model with the inputs alone, but its forward does not take one argument "
                    f"({error}): wrap it in a module whose forward(inputs) reads what it needs from a tuple or dictionary"
                )
            return _misplaced(inputs, parameter)
        if isinstance(loss, type) or not callable(loss):
            kind = f"the class {loss.__name__}" if isinstance(loss, type) else f"{loss!r:.40}"
            return ConfigError(
                f"the loss is {kind}: give a function of output and targets, or an object, nn.CrossEntropyLoss()"
            )
        try:
            value = loss(output, targets)
        except Exception as error:
            if isinstance(error, ApicalError):
                return error
            if isinstance(output, Tensor):
                given = (
                    f"shape {tuple(targets.shape)}, {targets.dtype}" if isinstance(targets, Tensor) else f"{targets!r:.40}"
                )
                return ConfigError(
                    f"the loss does not take outputs of shape {tuple(output.shape)} with these targets ({given}): "
                    f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                )
            return UnsupportedModelError(
                f"the model's output is a {type(output).__name__}, which the loss does not take ({type(error).__name__}); "
                "pass a loss that reads it, or wrap the model in a module that returns the tensor for the loss"
            )
    if isinstance(inputs, Tensor) and inputs.layout is not torch.strided:
        return ConfigError(f"inputs are {inputs.layout}, and {type(rule).__name__} needs dense ones: inputs.to_dense()")
    if not isinstance(value, Tensor):
        return ConfigError(f"the loss returns a {type(value).__name__}, which has no gradient; return a scalar tensor")
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
            f"{type(rule).__name__} computes with the targets directly and needs them in one tensor, not a "
            f"{type(targets).__name__}"
        )
    if not output.dim() or not targets.dim() or len(output) != len(targets):
        return ConfigError(
            f"{type(rule).__name__} needs a batch of samples: outputs of shape {tuple(output.shape)} came with targets of "
            f"shape {tuple(targets.shape)}; give (1, ...) for a single sample"
        )
    if isinstance(inputs, Tensor) and inputs.dim() < 2:
        return UnsupportedModelError(
            f"{type(rule).__name__} works on samples with features, not on inputs of shape {tuple(inputs.shape)}: give "
            "(batch, features)"
        )
    return None


def _takes_one(forward: Callable[..., Any]) -> bool:
    """Return whether a function can be called with one positional argument."""
    try:
        inspect.signature(forward).bind(None)
    except (TypeError, ValueError):
        return False
    return True


def _misplaced(inputs: Any, parameter: Tensor | None) -> ApicalError | None:
    """Return why a model does not accept its inputs, by device and dtype; None if its own error says more."""
    if parameter is None or not isinstance(inputs, Tensor):
        return None
    if inputs.device != parameter.device:
        return ConfigError(
            f"the inputs are on {inputs.device}, but the model's parameters are on {parameter.device}: use "
            f'inputs.to("{parameter.device}"), or move the rule and with it the model (rule.to(...))'
        )
    if inputs.dtype != parameter.dtype and parameter.is_floating_point():
        return ConfigError(
            f"the inputs are {inputs.dtype}, but the model's parameters are {parameter.dtype}: use "
            f"inputs.to({parameter.dtype}), or convert the rule and with it the model (rule.to(...))"
        )
    return None


def require_rows(loss: Any, output: Tensor, targets: Any) -> None:
    """Refuse outputs without a batch axis for which PyTorch's loss returns a value but fails in the backward pass.

    Args:
        loss: has accepted both.
        output: a tensor of one dimension.
        targets: whatever the loss takes.

    Raises:
        ConfigError: its backward pass fails.
    """
    if not isinstance(targets, Tensor) or targets.dim() == 0 or len(targets) == len(output):
        return
    try:
        with torch.inference_mode(False), torch.enable_grad():
            leaf = output.detach().clone().requires_grad_()
            torch.autograd.grad(loss(leaf, targets.clone()), leaf, allow_unused=True)
    except RuntimeError as error:
        raise ConfigError(
            f"outputs of shape {tuple(output.shape)} came with targets of shape {tuple(targets.shape)} "
            f"({str(error).splitlines()[0]}): give a batch of samples, (1, ...) for one, and do not squeeze that axis"
        ) from error


def require_loss_of_output(rule: CreditRule, inputs: Any, targets: Any) -> None:
    """Refuse a loss that also reads activities of the model, for rules that only use its error at the output.

    Raises:
        ConfigError: given an output without a graph, the loss still depends on the model's activities, or does not depend on
            that output.
    """
    model: Any = rule.model
    loss: Any = rule.loss
    with undisturbed(rule), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of targets (N,) for outputs (N, 1), which rules reshape
        try:
            output = model(inputs)
            leaf = output.detach().requires_grad_()
            value = loss(leaf, targets)
            is_followed = value.dim() > 0 or _leads(value.grad_fn, leaf)
        except Exception:
            return  # the rule calls them differently, or reports the error itself
    if isinstance(value, Tensor) and _nodes(value.grad_fn) & _nodes(output.grad_fn):
        raise ConfigError(
            f"the loss reads activities inside the model, and {type(rule).__name__} learns from its derivative with respect "
            "to the output alone: that term would be left out of the update; remove it, or choose a rule that follows it, "
            "such as DirectFeedbackAlignment or FeedbackAlignment"
        )
    if not is_followed and "weight" not in rule._loss_options:  # rules that learn from labels take no derivative
        raise independent()


def _nodes(root: Node | None) -> set[Node]:
    """Return the nodes of a graph without its leaves."""
    seen: set[Node] = set()
    waiting = [] if root is None else [root]
    while waiting:
        at = waiting.pop()
        if at not in seen and not hasattr(at, "variable"):
            seen.add(at)
            waiting += [child for child, _ in at.next_functions if child is not None]
    return seen


def require_reached(rule: CreditRule, inputs: Tensor, credit: Credit) -> None:
    """Refuse inputs that require an error which this rule does not send to them.

    Raises:
        ConfigError: no root of the credit leads to them.
    """
    if not any(_leads(root.grad_fn, inputs) for root in credit.roots):
        raise ConfigError(
            f"inputs require a gradient, but {type(rule).__name__} sends none to them or to what computed them: pass "
            "inputs.detach(), or choose a rule whose error passes the first layer"
        )


def _leads(root: Node | None, end: Tensor) -> bool:
    """Whether a graph leads to a tensor, which is a leaf or has its own graph."""
    waiting, seen = [root], set[Node]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node is end.grad_fn or getattr(node, "variable", None) is end:
            return True
        seen.add(node)
        waiting += [below for below, _ in node.next_functions]
    return False


def refuse_tangents(rule: nn.Module, args: Sequence[Any]) -> None:
    """Refuse tangents of forward-mode differentiation, which would not pass the rule.

    Raises:
        ConfigError: the batch, or a parameter of the rule, has one.
    """
    tensors = [part for part in tree_leaves((args, list(rule.parameters()))) if isinstance(part, Tensor)]
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise ConfigError(
            f"forward-mode derivatives do not pass through {type(rule).__name__}; compute them for rule.model, or use "
            "Backprop"
        )


def look_before(rule: CreditRule, args: Sequence[Any], first: bool) -> None:
    """Run the checks that precede a batch; `first` is whether its kind of loss and targets is new.

    Raises:
        ConfigError: see :func:`require_loss_of_output`.
    """
    if forward_ad._current_level >= 0 and not type(rule).chains_errors:
        refuse_tangents(rule, args)
    if rule._unmoved >= 0 and torch.is_grad_enabled():
        look_at_optimizer(rule)
    if first:
        require_no_counted_passes(rule)
        require_no_checkpoint(rule)
    if first and rule.output_alone and len(args) == 2:
        require_loss_of_output(rule, *args)


def require_no_checkpoint(rule: CreditRule) -> None:
    """Refuse an activation checkpoint around the rule, whose own forward pass would be repeated without what it notes.

    Raises:
        UnsupportedModelError: a non-reentrant one is recording.
    """
    if rule.sees_layers and is_checkpointed():
        raise UnsupportedModelError(
            f"{type(rule).__name__} was called within torch.utils.checkpoint, which cannot repeat what a rule does: call "
            "the rule outside, and use checkpoints inside the model"
        )


def require_no_counted_passes(rule: CreditRule) -> None:
    """Refuse Opacus, which expects an error for every pass of every layer, if the rule has passes without one.

    Raises:
        UnsupportedModelError: Opacus is to compute per-sample gradients.
    """
    serves = rule.chains_errors and not _own_parameters(rule)
    if not serves and any(hasattr(parameter, "_forward_counter") for parameter in rule.parameters()):
        raise UnsupportedModelError(
            f"Opacus computes per-sample gradients by hooks on layers, which {type(rule).__name__} does not support: use "
            "Backprop, FeedbackAlignment or SignSymmetry, or remove them (GradSampleModule.remove_hooks())"
        )


def look_after(rule: CreditRule, args: Sequence[Any], credit: Credit) -> None:
    """Run the checks of a batch's credit.

    Raises:
        ConfigError: see :func:`require_reached`.
    """
    if not rule.chains_errors and args and getattr(args[0], "requires_grad", False):
        require_reached(rule, args[0], credit)
    if rule._unmoved >= STILL:
        rule._unmoved = -1
        warn_of_rest(rule, credit)


def look_at_optimizer(rule: CreditRule) -> None:
    """Count checks at which the model's parameters had moved since the previous one but the rule's own had not."""
    count, *before = rule._looks
    models = list(rule.model.parameters())
    own = _own_parameters(rule)
    if count < OFTEN or count & (count - 1) == 0:
        now = [[*map(_seen, some)] for some in (models, own)]
        rule._looks = (count + 1, *now)
        if not own or (before and not _same(before[1], now[1])):
            rule._unmoved, rule._looks = -1, (0,)
        elif before and any(map(_is_moved, before[0], now[0])):
            rule._unmoved += 1
    else:
        rule._looks = (count + 1, *before)


def _own_parameters(rule: CreditRule) -> list[Tensor]:
    """Return what learns in addition to the model."""
    known = {id(parameter) for parameter in rule.model.parameters()}
    return [p for p in rule.parameters() if p.requires_grad and p.numel() and id(p) not in known]


def _seen(parameter: Tensor) -> Any:
    """Return some values, which reveal changes through `.data` too; for other layouts, the version."""
    is_plain = type(parameter) is nn.Parameter and parameter.layout is torch.strided and not parameter.is_meta
    return strided(parameter).clone() if is_plain else parameter._version


def _same(before: Sequence[Any], now: Sequence[Any]) -> bool:
    """Return whether nothing moved, if comparable: not if a call lent tensors, nor after `to`."""
    return all(map(_equal, before, now))


def _is_moved(a: Any, b: Any) -> bool:
    """Return whether a parameter moved by more than rounding could hide in the rule's own parameters."""
    slight = isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape
    return not _equal(a, b) and not (slight and torch.allclose(a, b, rtol=0, atol=SLIGHT))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype is not b.dtype or a.device != b.device or torch.equal(a, b)
    return isinstance(a, Tensor) or isinstance(b, Tensor) or a == b


def warn_of_rest(rule: CreditRule, credit: Credit) -> None:
    """Warn if this batch trains the rule's own parameters although only the model's have moved so far."""
    roots = [(root, root.grad_fn) for root in credit.roots]
    if any(root is own or _leads(node, own) for own in _own_parameters(rule) for root, node in roots):
        warnings.warn(
            f"{type(rule).__name__} has its own trainable parameters, but this loop updates only those of the model: "
            "train all of rule.parameters(), not model.parameters()",
            RuntimeWarning,
            stacklevel=6,
        )


def why_not_finite(args: Sequence[Any]) -> str:
    """Return why the loss of a batch, or its gradients, are not finite."""
    batch = zip(("inputs", "targets"), args, strict=False)
    values = [(name, value) for name, value in batch if isinstance(value, Tensor)]
    if any(value.shape[:1] == (0,) for _, value in values):
        return "the loss is not finite because the batch is empty; leave it out"
    odd = [name for name, value in values if not _is_finite(value)]
    if odd:
        return (
            f"loss or gradients are not finite because the {' and '.join(odd)} hold NaN or infinite values; clean the data"
        )
    return "the loss is not finite although the inputs are: training has diverged; lower the learning rate or clip gradients"


def _is_finite(values: Any) -> bool:
    return not isinstance(values, Tensor) or bool(values.isfinite().all())
