"""What is measured after each epoch: loss and accuracy of the answers, alignment of each layer."""

import math
from contextlib import AbstractContextManager, suppress

import torch
from torch import Tensor

from apical.bench.distributed import World
from apical.bench.schedule import generator
from apical.core.chain import Chain
from apical.core.credit import CreditRule
from apical.core.rest import evaluating
from apical.data import Split
from apical.diagnostics.alignment import gradient_alignment, layer_alignment, unchanged
from apical.diagnostics.feedback_conditions import condition_two
from apical.diagnostics.gauss_newton import minimum_norm_alignment
from apical.diagnostics.similarity import linear_cka
from apical.errors import InstabilityError, UnsupportedModelError
from apical.rules.feedback_control.control_rule import ControlRule
from apical.rules.feedback_control.states import output_jacobian

EVALUATION_BATCH = 1000
EXAMPLES = 8
FIELDS = ("weight_alignment", "norm_ratio", "gradient_alignment", "gradient_norm_ratio")


def autocast(device: torch.device, amp: str) -> AbstractContextManager[object]:
    """The forward pass's precision: bfloat16 where `amp` is "bf16"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16")


def evaluate(rule: CreditRule, split: Split, amp: str, world: World) -> tuple[float, float | None]:
    """Mean loss and accuracy (0 to 1) of the rule's answers, the model in evaluation mode; processes share the batches.

    There is no accuracy where the targets are numbers.
    """
    classes = not split.targets.is_floating_point()
    model = rule.model
    modes = {module: module.training for module in model.modules()}
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    with torch.inference_mode():
        for first in range(0, len(split), EVALUATION_BATCH)[world.rank :: world.size]:
            targets = split.targets[first : first + EVALUATION_BATCH]
            with autocast(world.device, amp):
                output = rule.answer(split.inputs[first : first + EVALUATION_BATCH])
            loss = rule.loss(output.float(), targets).double() * len(targets)
            hits = (output.argmax(-1) == targets).sum().double() if classes else torch.zeros_like(loss)
            sums += torch.stack((loss, hits))
    for module, mode in modes.items():
        module.training = mode
    loss_sum, hits = world.sum(sums.clone()).tolist()
    return loss_sum / len(split), hits / len(split) if classes else None


def probe_batch(train: Split, size: int) -> tuple[Tensor, Tensor]:
    """The `size` training images, always the same, on which gradients are compared: inputs, targets."""
    chosen = torch.randperm(len(train), generator=generator("cpu", 0, "probe"))[:size].to(train.inputs.device)
    return train.inputs[chosen], train.targets[chosen]


def alignment(rule: CreditRule, train: Split, probe: int) -> dict[str, dict[str, float | None]]:
    """The fields of `FIELDS` for each layer, angles in degrees, None where undefined; nothing if `probe` is 0.

    A rule whose dynamics is unstable on the probe batch, as it may be before its feedback is trained, has no gradient there.
    """
    if not probe:
        return {}
    weights = layer_alignment(rule)
    try:
        gradients = gradient_alignment(rule, *probe_batch(train, probe))
    except InstabilityError:
        gradients = {}
    layers = {}
    for name in {**gradients, **weights}:
        values = {**weights.get(name, {}), **gradients.get(name, {})}
        layers[name] = {field: _finite(values.get(field)) for field in FIELDS}
    with unchanged(rule):
        for name, (a, b) in rule.pairs(*probe_batch(train, probe)).items():
            layers.setdefault(name, {})["pair_cka"] = _finite(linear_cka(a, b))
    return layers


def depth_accuracy(rule: CreditRule, test: Split) -> dict[str, float]:
    """Accuracy (0 to 1) of the read-out at each depth, by layer name; empty for rules and data without any."""
    if test.targets.is_floating_point():
        return {}
    hits: dict[str, int] = {}
    with unchanged(rule):
        for first in range(0, len(test), EVALUATION_BATCH):
            batch = slice(first, first + EVALUATION_BATCH)
            for name, classes in rule.read_outs(test.inputs[batch]).items():
                hits[name] = hits.get(name, 0) + int((classes == test.targets[batch]).sum())
    return {name: count / len(test) for name, count in hits.items()}


def examples(rule: CreditRule, test: Split) -> tuple[Tensor, Tensor] | None:
    """The first test images and what an autoencoder makes of them (n, *shape); None where targets are no images."""
    inputs = test.inputs[:EXAMPLES]
    if inputs.dim() != 4 or not torch.equal(inputs.flatten(1), test.targets[:EXAMPLES]):
        return None
    with unchanged(rule), evaluating(rule), torch.no_grad():
        return inputs, rule.answer(inputs).view_as(inputs)


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


CONDITIONS = ("minimum_norm_alignment", "condition_two")
"""Keys of :func:`conditions`."""

_WIDEST = 64
"""Outputs up to which the conditions are cheap to measure."""


def conditions(rule: CreditRule, train: Split, probe: int) -> dict[str, float | None]:
    """How near the rule's update is to the minimum-norm one (degrees, damping 1, which is Gauss-Newton's on one sample up to
    the layers' input norms) and, for feedback control, Condition 2 (0 to 1); on the probe batch, of dense chains only.
    """
    found: dict[str, float | None] = dict.fromkeys(CONDITIONS)
    if not probe or not rule.feed_forward or _chain(rule) is None:
        return found
    inputs, targets = probe_batch(train, probe)
    with suppress(InstabilityError):
        found["minimum_norm_alignment"] = _finite(minimum_norm_alignment(rule, inputs, targets, damping=1.0)["all"])
    if isinstance(rule, ControlRule):
        with torch.no_grad():
            jacobian = output_jacobian(rule.chain, rule.run(inputs))
            found["condition_two"] = _finite(float(condition_two(jacobian, rule.q).mean()))
    return found


def _chain(rule: CreditRule) -> Chain | None:
    try:
        chain = rule.chain if isinstance(rule, ControlRule) else Chain(rule.model)
    except UnsupportedModelError:
        return None
    return chain if all(stage.is_dense for stage in chain.stages) and chain.stages[-1].size <= _WIDEST else None
