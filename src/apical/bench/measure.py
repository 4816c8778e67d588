"""Measurements after each epoch: loss and accuracy of the answers, alignment of each layer."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress

import torch
from torch import Tensor, nn

from apical.bench.distributed import World
from apical.bench.schedule import generator
from apical.core.chain import Chain
from apical.core.credit import CreditRule, Measures, Panel
from apical.core.rest import evaluating
from apical.data import Split
from apical.diagnostics.alignment import gradient_alignment, layer_alignment, unchanged
from apical.diagnostics.gauss_newton import minimum_norm_alignment
from apical.errors import ConfigError, InstabilityError, UnsupportedModelError

EVALUATION_BATCH = 1000
EXAMPLES = 8
_LARGEST = 700.0
"""Largest number of nats whose exponential fits into a float."""
FIELDS = ("weight_alignment", "norm_ratio", "gradient_alignment", "gradient_norm_ratio")


def autocast(device: torch.device, amp: str) -> AbstractContextManager[object]:
    """Set the precision of the forward pass: bfloat16 if `amp` is "bf16"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16")


def evaluate(rule: CreditRule, split: Split, amp: str, world: World, *, counts_hits: bool) -> tuple[float, float | None]:
    """Return mean loss and accuracy (0 to 1) of the rule's answers, in evaluation mode; processes share the batches.

    There is an accuracy only if answers are right or wrong: `counts_hits`.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    with evaluating(rule.model), torch.inference_mode():
        for first in range(0, len(split), EVALUATION_BATCH)[world.rank :: world.size]:
            targets = split.targets[first : first + EVALUATION_BATCH]
            with autocast(world.device, amp):
                output = rule.answer(split.inputs[first : first + EVALUATION_BATCH])
            loss = rule.loss(output.float(), targets).double() * len(targets)
            hits = (output.argmax(-1) == targets).sum().double() if counts_hits else torch.zeros_like(loss)
            sums += torch.stack((loss, hits))
    loss_sum, hits = world.sum(sums.clone()).tolist()
    return loss_sum / len(split), hits / (len(split) * split.answers) if counts_hits else None


def probe_batch(train: Split, size: int) -> tuple[Tensor, Tensor]:
    """Return the `size` training images, always the same, on which gradients are compared: inputs, targets."""
    samples = torch.randperm(len(train), generator=generator("cpu", 0, "probe"))[:size].to(train.inputs.device)
    return train.inputs[samples], train.targets[samples]


def alignment(rule: CreditRule, train: Split, probe: int) -> dict[str, dict[str, float | None]]:
    """Return the fields of `FIELDS` for each layer, angles in degrees, None where undefined; nothing if `probe` is 0.

    A rule whose dynamics are unstable on the probe batch, which can happen before its feedback is trained, has no gradient.
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
        layers[name] = {field: finite(values.get(field)) for field in FIELDS}
    return layers


def own_measures(rule: CreditRule, train: Split, test: Split, probe: int) -> Measures:
    """Return the rule's own measurements; nothing if `probe` is 0."""
    if not probe:
        return Measures()
    batches = list(zip(test.inputs.split(EVALUATION_BATCH), test.targets.split(EVALUATION_BATCH), strict=True))
    with unchanged(rule):
        own = rule.measures(probe_batch(train, probe), batches)
    if not isinstance(own, Measures):
        raise ConfigError(f"{type(rule).__name__}.measures returns a {type(own).__name__}, not apical.core.credit.Measures")
    return own


def panels(rule: CreditRule, train: Split, probe: int) -> Sequence[Panel]:
    """Return the figures that the rule or its model provides; none if `probe` is 0."""
    if not probe:
        return ()
    with unchanged(rule), torch.no_grad():
        return rule.panels(probe_batch(train, probe))


def matrices(rule: CreditRule, train: Split, probe: int) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return the matrices of a model with a method `matrices(inputs)`, for figures; by title, row and column."""
    own = getattr(rule.model, "matrices", None)
    if not probe or not callable(own):
        return {}
    with unchanged(rule), torch.no_grad():
        tensors = own(probe_batch(train, probe)[0])
    return {
        title: {f"{i}": {f"{j}": finite(x) for j, x in enumerate(row)} for i, row in enumerate(matrix.tolist())}
        for title, matrix in tensors.items()
    }


def examples(rule: CreditRule, test: Split) -> tuple[Tensor, Tensor] | None:
    """Return the first test images and their reconstructions (n, *shape); None if the targets are not images."""
    inputs = test.inputs[:EXAMPLES]
    if inputs.dim() != 4 or not torch.equal(inputs.flatten(1), test.targets[:EXAMPLES]):
        return None
    with unchanged(rule), evaluating(rule), torch.no_grad():
        return inputs, rule.answer(inputs).view_as(inputs)


def finite(value: float | None) -> float | None:
    """Return the number for metrics.jsonl: None for NaN and infinity."""
    return float(value) if value is not None and math.isfinite(value) else None


def per_token(nats: float | None) -> dict[str, float | None]:
    """Convert the loss of a text, in nats per token, to its other units.

    >>> {name: round(value, 3) for name, value in per_token(1.386294361).items()}
    {'bits_per_token': 2.0, 'perplexity': 4.0}
    """
    if nats is None or nats > _LARGEST:
        return {"bits_per_token": None, "perplexity": None}
    return {"bits_per_token": nats / math.log(2), "perplexity": math.exp(nats)}


def minimum_norm(rule: CreditRule, train: Split, probe: int) -> float | None:
    """Return the angle between the rule's update and the minimum-norm one, in degrees, on the probe batch; small chains.

    The damping is 1; on one sample this is the Gauss-Newton update, up to the layers' input norms.
    """
    if not probe or not rule.feed_forward or not _is_small_chain(rule.model):
        return None
    with suppress(InstabilityError, UnsupportedModelError):  # on these samples the model may not be a chain
        return finite(minimum_norm_alignment(rule, *probe_batch(train, probe), damping=1.0)["all"])
    return None


def _is_small_chain(model: nn.Module) -> bool:
    try:
        return Chain(model).is_small
    except UnsupportedModelError:
        return False


FACTOR = 100.0
"""A loss this many times that of an untrained network counts as diverged."""
_SAMPLES = 1000


def chance_loss(rule: CreditRule, test: Split, output_shape: Callable[[int], tuple[int, ...]]) -> float:
    """Return the loss of all-zero answers, which for classes is that of guessing, on the first test samples."""
    targets = test.targets[:_SAMPLES]
    with torch.no_grad():
        return float(rule.loss(torch.zeros(output_shape(len(targets)), device=targets.device), targets))


def has_diverged(train_loss: float | None, test_loss: float, untrained: float) -> bool:
    """Return whether the loss was far above that of an untrained network throughout a finished epoch and at its end.

    Both must exceed :data:`FACTOR` times that loss: the mean training loss of the epoch, which a short spike does not raise
    that far, and the test loss at its end, which is low again if the training recovered.

    Args:
        train_loss: mean over the epoch; None before training.
        untrained: the larger of the test loss before training and :func:`chance_loss`.

    >>> has_diverged(3865.0, 4102.0, 2.3), has_diverged(3865.0, 1.1, 2.3), has_diverged(12.0, 15.0, 2.3)
    (True, False, False)
    """
    return train_loss is not None and untrained > 0 and min(train_loss, test_loss) > FACTOR * untrained
