"""A stimulus: positive samples, and the negative ones that are made of them."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Negatives = Literal["labels", "mixtures"]


class Stimulus(NamedTuple):
    """Spike probabilities of positive samples, then negative ones: rows are samples times the kinds there are.

    Attributes:
        x: of the input (kinds, samples, n_0); negatives that differ by their class alone take no memory.
        phase: uniform numbers (samples, n_0) that every step shifts, see :func:`.neurons.draw_with_shift_`.
        context: 1 for the class that is shown, which fires at every step (rows, K); None without labels.
        target: what the read-out is to answer to positive samples (samples, K).
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
    """Of inputs (batch, n_0) and class labels (batch,); one sample alone has nobody to be mixed with."""
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
