"""When a training whose loss is still finite counts as diverged."""

from collections.abc import Callable

import torch

from apical.core.credit import CreditRule
from apical.data import Split

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
