"""Angles and norm ratios between what a rule uses and what backpropagation would use, per layer, in degrees."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from apical.core.credit import CreditRule
from apical.core.effective import measured_weight
from apical.core.layers import is_packed, is_weighted
from apical.core.packed import Part, full_name, parts_of
from apical.core.placement import require_whole
from apical.core.processes import alone
from apical.core.rest import kept_attributes
from apical.core.within import reads_own_weight
from apical.core.wrapped import innermost


def angle(a: Tensor, b: Tensor) -> float:
    """Return the angle in degrees between two tensors of equal shape, seen as vectors; NaN if either is zero.

    >>> round(angle(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])), 4)
    45.0
    """
    a, b = a.detach().double().flatten(), b.detach().double().flatten()
    a, b = a / a.norm(), b / b.norm()
    # atan2 of the half-angle form: exact also near 0 and 180 degrees, where the arc cosine is not
    return float(torch.rad2deg(2 * torch.atan2((a - b).norm(), (a + b).norm())))


def norm_ratio(a: Tensor, b: Tensor) -> float:
    """Return `|a| / |b|` (Frobenius); NaN if b is zero."""
    size = b.detach().double().norm()
    return float(a.detach().double().norm() / size) if size > 0 else float("nan")


def layer_alignment(rule: CreditRule) -> dict[str, dict[str, float]]:
    """Return angle and norm ratio of each layer's effective feedback weight to the weight it computes with.

    For product feedback alignment this is the path alignment of arXiv 2405.20594, for the others the weight alignment.
    """
    require_whole(rule.model)
    modules: dict[str, Any] = dict(rule.model.named_modules())
    parts = {name: layer for name, layer in getattr(innermost(rule), "layers", {}).items() if isinstance(layer, Part)}
    with unchanged(rule), torch.no_grad():
        return {
            name: {
                "weight_alignment": angle(feedback, _weight(name, parts.get(name) or modules[name])),
                "norm_ratio": norm_ratio(feedback, _weight(name, parts.get(name) or modules[name])),
            }
            for name, feedback in rule.feedback_weights().items()
        }


def _weight(name: str, module: Any) -> Tensor:
    """Return the weight that the module computes with."""
    is_layer = isinstance(module, nn.Module) and is_weighted(module)
    weight = measured_weight(module) if is_layer and not reads_own_weight(name, module) else module.weight
    assert isinstance(weight, Tensor)
    return weight


def gradient_alignment(rule: CreditRule, inputs: Tensor, targets: Tensor) -> dict[str, dict[str, float]]:
    """Return angle and norm ratio of the rule's weight gradients to backpropagation's, at the same weights and batch.

    Args:
        rule: any rule; both gradients are taken in training mode.
        inputs: probe batch (batch, ...).
        targets: its targets.

    Returns:
        Layer name -> {"gradient_alignment": degrees, "gradient_norm_ratio": ...} for each weighted layer, and for parameters
        that are sites of the rule.
    """
    rule_gradients, exact = gradients(rule, inputs, targets)
    return {
        name: {
            "gradient_alignment": angle(rule_gradients[name], exact[name]),
            "gradient_norm_ratio": norm_ratio(rule_gradients[name], exact[name]),
        }
        for name in rule_gradients
    }


def gradients(
    rule: CreditRule, inputs: Tensor, targets: Tensor, weights: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the rule's and backpropagation's weight gradients on one batch, by name: of all layers or of given weights.

    Of a layer whose weight is computed (weight norm, other parametrisations) they are those of what it is computed from.
    Where the rule's answer is not the feed-forward pass but that of a network that settles, backpropagation goes through
    time. Where it has no derivative, as spikes have none, there is nothing to compare: both are empty.
    """
    require_whole(rule.model)
    sources = _sources(rule) if weights is None else {name: [weight] for name, weight in weights.items()}
    learned = {id(p): p for layer in sources.values() for p in layer if p.is_leaf and p.requires_grad}
    with unchanged(rule), torch.enable_grad(), _same_masks(rule.model):
        rule.accumulate(inputs, targets)
        own = {key: p.grad.clone() for key, p in learned.items() if p.grad is not None}
    if not own:
        return {}, {}
    with unchanged(rule), torch.enable_grad(), _same_masks(rule.model):
        loss = rule.loss(rule.answer(inputs), targets)
        if not loss.requires_grad:
            return {}, {}
        exact = torch.autograd.grad(loss, [learned[key] for key in own], allow_unused=True, materialize_grads=True)
    return _by_layer(sources, own), _by_layer(sources, dict(zip(own, exact, strict=True)))


def _sources(rule: CreditRule) -> dict[str, list[Tensor]]:
    """Return each layer's weight by name, or the parameters that it is computed from; and the rule's other sites."""
    sources: dict[str, list[Tensor]] = {}
    for name, module in rule.model.named_modules():
        if is_weighted(module):
            weight = module.weight
            bias = getattr(module, "bias", None)
            sources[name] = [weight] if weight.is_leaf else [p for p in module.parameters() if p is not bias]
        elif is_packed(module):
            sources |= {full_name(name, part): [its.weight] for part, its in parts_of(module).items()}
    sites = getattr(innermost(rule), "layers", {})
    return sources | {name: [p] for name, p in rule.model.named_parameters() if name in sites}


def _by_layer(sources: Mapping[str, list[Tensor]], gradients: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Return the gradient of each layer that has one; a vector where its weight is computed from several parameters."""
    layers = {name: [gradients[id(p)] for p in layer if id(p) in gradients] for name, layer in sources.items()}
    return {
        name: parts[0] if len(parts) == 1 else torch.cat([part.flatten() for part in parts])
        for name, parts in layers.items()
        if parts
    }


@contextmanager
def _same_masks(model: nn.Module) -> Iterator[None]:
    """Within, every forward pass of the model draws the same dropout masks, whatever the rule drew before it."""
    hook = model.register_forward_pre_hook(lambda *_: torch.manual_seed(0) and None)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def unchanged(rule: CreditRule) -> Iterator[None]:
    """Restore weights, gradients, buffers, attributes, modes, random states and what is held of a batch; inside, it trains.

    One process may measure while others do not: inside it waits for none.
    """
    modes = [(module, module.training) for module in rule.modules()]
    grads = [(parameter, parameter.grad) for parameter in rule.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in rule.buffers()]
    with torch._C.DisableTorchFunctionSubclass():  # feedback in closed form holds nothing, and is not to be asked
        weights = [
            (p, p.detach().clone()) for p in rule.parameters()
        ]  # which a forward may clamp, and a user's measure write
    inner = innermost(rule)
    calls = getattr(inner, "calls", None)
    own = [value for module in rule.modules() for value in vars(module).values() if isinstance(value, torch.Generator)]
    states = [(generator, generator.get_state()) for generator in own]
    held = [(module, module._held) for module in rule.modules() if isinstance(module, CreditRule)]
    devices = sorted({p.device.index for p in rule.parameters() if p.is_cuda})
    try:
        with torch.random.fork_rng(devices), alone(), kept_attributes(rule.model, loss=rule.loss, tensors=False):
            rule.train()
            for parameter, _ in grads:
                parameter.grad = None
            rule.restart()
            yield
    finally:
        for parameter, grad in grads:
            parameter.grad = grad
        with torch._C.DisableTorchFunctionSubclass():
            for parameter, value in weights:
                if not (parameter.is_meta or torch.equal(parameter, value)):
                    parameter.data = parameter.data.copy_(value) if parameter.shape == value.shape else value
        with torch.no_grad():
            for buffer, saved in buffers:
                if not torch.equal(buffer, saved):  # a buffer may be part of a graph that waits for its backward pass
                    buffer.copy_(saved)
        for module, training in modes:
            module.training = training
        for owner, kept in held:
            owner._held = kept
        for generator, state in states:
            generator.set_state(state)
        if calls is not None:
            inner.calls = calls
