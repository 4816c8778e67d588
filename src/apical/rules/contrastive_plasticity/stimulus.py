"""A stimulus: positive samples and the negative ones derived from them."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Negatives = Literal["labels", "mixtures"]


class Stimulus(NamedTuple):
    """Spike probabilities of positive, then negative samples; there is one row per sample and kind.

    Attributes:
        x: of the input (kinds, samples, n_0); negatives that differ only in their class use no memory.
        phase: uniform numbers (samples, n_0) that every step shifts, see :func:`.neurons.draw_with_shift_`.
        context: 1 for the shown class, which fires at every step (rows, K); None without labels.
        target: the read-out's target for positive samples (samples, K).
        y: 1 and 0 (rows,).
        samples: positive rows.
    """

    x: Tensor
    phase: Tensor
    context: Tensor | None
    target: Tensor
    y: Tensor
    samples: int


def stimulus(x: Tensor, targets: Tensor, classes: int, negatives: Negatives, mix: float) -> Stimulus:
    """Build from inputs (batch, n_0) and class labels (batch,); a single sample has no partner to mix with."""
    targets = targets.long()
    right = F.one_hot(targets, classes).to(x.dtype)
    context = None
    if negatives == "labels":
        away = torch.randint(1, classes, targets.shape, device=targets.device)
        context = torch.cat([right, F.one_hot((targets + away) % classes, classes).to(x.dtype)])
        both = x.expand(2, *x.shape)
    elif len(x) == 1:
        both = x.unsqueeze(0)
    else:
        own = torch.arange(len(x), device=x.device)
        other = (own + torch.randint(1, len(x), (), device=x.device)) % len(x)
        both = torch.stack([x, torch.lerp(x[other], x, mix)])
    y = x.new_ones(len(both), len(x))
    y[1:] = 0
    return Stimulus(both, torch.rand_like(x), context, right, y.flatten(), len(x))
