"""What is measured after each epoch: loss and accuracy of the answers, alignment of each layer."""

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
"""Nats whose exponential a float holds."""
FIELDS = ("weight_alignment", "norm_ratio", "gradient_alignment", "gradient_norm_ratio")


def autocast(device: torch.device, amp: str) -> AbstractContextManager[object]:
    """The forward pass's precision: bfloat16 where `amp` is "bf16"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16")


def evaluate(rule: CreditRule, split: Split, amp: str, world: World, *, counts_hits: bool) -> tuple[float, float | None]:
    """Mean loss and accuracy (0 to 1) of the rule's answers, the model in evaluation mode; processes share the batches.

    There is no accuracy unless answers are right or wrong: `counts_hits`.
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
    """The `size` training images, always the same, on which gradients are compared: inputs, targets."""
    samples = torch.randperm(len(train), generator=generator("cpu", 0, "probe"))[:size].to(train.inputs.device)
    return train.inputs[samples], train.targets[samples]


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
        layers[name] = {field: finite(values.get(field)) for field in FIELDS}
    return layers


def own_measures(rule: CreditRule, train: Split, test: Split, probe: int) -> Measures:
    """What the rule measures of itself; nothing if `probe` is 0."""
    if not probe:
        return Measures()
    batches = list(zip(test.inputs.split(EVALUATION_BATCH), test.targets.split(EVALUATION_BATCH), strict=True))
    with unchanged(rule):
        own = rule.measures(probe_batch(train, probe), batches)
    if not isinstance(own, Measures):
        raise ConfigError(f"{type(rule).__name__}.measures returns a {type(own).__name__}, no apical.core.credit.Measures")
    return own


def panels(rule: CreditRule, train: Split, probe: int) -> Sequence[Panel]:
    """Figures that the rule or its model has of itself; none if `probe` is 0."""
    if not probe:
        return ()
    with unchanged(rule), torch.no_grad():
        return rule.panels(probe_batch(train, probe))


def matrices(rule: CreditRule, train: Split, probe: int) -> dict[str, dict[str, dict[str, float | None]]]:
    """Matrices that the model has to be drawn, if it has a method `matrices(inputs)`; by title, row and column."""
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
    """The first test images and what an autoencoder makes of them (n, *shape); None where targets are no images."""
    inputs = test.inputs[:EXAMPLES]
    if inputs.dim() != 4 or not torch.equal(inputs.flatten(1), test.targets[:EXAMPLES]):
        return None
    with unchanged(rule), evaluating(rule), torch.no_grad():
        return inputs, rule.answer(inputs).view_as(inputs)


def finite(value: float | None) -> float | None:
    """The number that metrics.jsonl has: None for NaN and infinity."""
    return float(value) if value is not None and math.isfinite(value) else None


def per_token(nats: float | None) -> dict[str, float | None]:
    """The loss of a text, nats per token, in its other units.

    >>> {name: round(value, 3) for name, value in per_token(1.386294361).items()}
    {'bits_per_token': 2.0, 'perplexity': 4.0}
    """
    if nats is None or nats > _LARGEST:
        return {"bits_per_token": None, "perplexity": None}
    return {"bits_per_token": nats / math.log(2), "perplexity": math.exp(nats)}


def minimum_norm(rule: CreditRule, train: Split, probe: int) -> float | None:
    """How near the rule's update is to the minimum-norm one, in degrees, on the probe batch; of small chains only.

    The damping is 1, with which that is Gauss-Newton's on one sample up to the layers' input norms.
    """
    if not probe or not rule.feed_forward or not _is_small_chain(rule.model):
        return None
    with suppress(InstabilityError, UnsupportedModelError):  # the model may take these samples in a way that is no chain
        return finite(minimum_norm_alignment(rule, *probe_batch(train, probe), damping=1.0)["all"])
    return None


def _is_small_chain(model: nn.Module) -> bool:
    try:
        return Chain(model).is_small
    except UnsupportedModelError:
        return False


FACTOR = 100.0
"""A loss this many times that of an untrained network is diverged."""
_SAMPLES = 1000


def chance_loss(rule: CreditRule, test: Split, output_shape: Callable[[int], tuple[int, ...]]) -> float:
    """Loss of answers that are all zero, which for classes is that of guessing, on the first test samples."""
    targets = test.targets[:_SAMPLES]
    with torch.no_grad():
        return float(rule.loss(torch.zeros(output_shape(len(targets)), device=targets.device), targets))


def has_diverged(train_loss: float | None, test_loss: float, untrained: float) -> bool:
    """Whether a finished epoch was spent far above the loss of an untrained network, and ended there.

    Both have to be above :data:`FACTOR` times that loss: the mean training loss of the epoch, which a short spike does not
    raise so far, and the test loss at its end, which a training that came down again has left behind.

    Args:
        train_loss: mean over the epoch; None before training.
        untrained: the larger of the test loss before training and :func:`chance_loss`.

    >>> has_diverged(3865.0, 4102.0, 2.3), has_diverged(3865.0, 1.1, 2.3), has_diverged(12.0, 15.0, 2.3)
    (True, False, False)
    """
    return train_loss is not None and untrained > 0 and min(train_loss, test_loss) > FACTOR * untrained
