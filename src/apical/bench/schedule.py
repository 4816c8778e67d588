"""Schedules and randomness as pure functions of (seed, purpose, epoch, step), so that a resumed run repeats itself."""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 2.5
"""Decay budget lr * decay * steps / (1 - momentum) of the alignment phase: initial feedback decays by exp(-2.5)."""


def piecewise(values: Sequence[float], epochs: Sequence[int], finished: int) -> float:
    """Return the value after `finished` epochs: value i + 1 starts after `epochs[i]` finished epochs.

    >>> [piecewise((0.1, 0.01), (2,), finished) for finished in range(4)]
    [0.1, 0.1, 0.01, 0.01]
    """
    return values[bisect_right(epochs, finished)]


def cosine(start: float, end: float, epochs: int, finished: int) -> float:
    """Return the value after `finished` epochs, on half a cosine from `start` to `end` over `epochs`.

    >>> [round(cosine(1.0, 0.0, 4, finished), 3) for finished in range(6)]
    [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """
    return end + (start - end) * (1 + math.cos(math.pi * min(finished, epochs) / epochs)) / 2


def alignment_decay(lr: float, steps_per_epoch: int, momentum: float) -> tuple[float, int]:
    """Return the weight decay of the alignment phase and its number of epochs.

    The decay d satisfies lr * d * steps / (1 - momentum) = 2.5 over the phase. The phase is one epoch if that has at least
    300 steps, otherwise the smallest number of epochs with d <= 0.03.

    >>> alignment_decay(0.05, 44, 0.9)
    (0.0284090909, 4)
    """
    one_epoch = ALIGNMENT * (1 - momentum) / (lr * steps_per_epoch)
    epochs = 1 if steps_per_epoch >= 300 else max(1, math.ceil(one_epoch / 0.03))
    return float(f"{one_epoch / epochs:.9g}"), epochs


def derive_seed(seed: int, purpose: str, *where: int) -> int:
    """Return a 63-bit seed for one purpose at one point (epoch, step) of the run with this seed."""
    digest = hashlib.sha256(repr((seed, purpose, *where)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(device: torch.device | str, seed: int, purpose: str, *where: int) -> torch.Generator:
    """Return a new generator on `device`, seeded by :func:`derive_seed`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose, *where))


def data_order(examples: int, seed: int, epoch: int) -> Tensor:
    """Return the order (examples,) in which epoch `epoch` (1, 2, ...) visits the training images; on the CPU."""
    return torch.randperm(examples, generator=generator("cpu", seed, "order", epoch))
