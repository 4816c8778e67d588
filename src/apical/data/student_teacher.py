"""Student-teacher regression: a small network learns the function of a large, fixed random network.

The task of Meulemans et al. 2021 (arXiv 2106.07887), figures 1D and 3: 15 inputs uniform on (-1, 1); a teacher with four
hidden ReLU layers of 1000 units, Xavier-normal weights of gain 3 and a linear output. Of the 6,000 training samples the
paper holds out 1,000 for validation.
"""

import math
from functools import lru_cache
from itertools import pairwise

import torch

from apical.data.arrays import Arrays, Labelled

INPUTS, HIDDEN, DEPTH, GAIN = 15, 1000, 4, 3.0
TRAIN, TEST = 6000, 1000
_SEED = 42


@lru_cache(maxsize=2)
def make(outputs: int) -> Arrays:
    """Return inputs (N, 15) and targets (N, outputs), float32; always the same."""
    draw = torch.Generator().manual_seed(_SEED)
    activity = inputs = 2 * torch.rand((TRAIN + TEST, INPUTS), generator=draw) - 1
    sizes = [INPUTS, *[HIDDEN] * DEPTH, outputs]
    for depth, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        weight = GAIN * math.sqrt(2 / (fan_in + fan_out)) * torch.randn((fan_out, fan_in), generator=draw)
        activity = activity @ weight.T
        if depth < DEPTH:
            activity = activity.relu_()
    split: list[Labelled] = [(inputs[part].numpy(), activity[part].numpy()) for part in (slice(TRAIN), slice(TRAIN, None))]
    return Arrays(split[0], split[1])
