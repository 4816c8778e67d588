"""How layers change the length of errors."""

import torch
from torch import Tensor, nn


def gain(layer: nn.Module) -> float:
    """Return the factor on the squared length of random errors below a layer, from its weights: 1 under the Xavier law.

    >>> _ = torch.manual_seed(0)
    >>> round(gain(nn.Linear(300, 300)), 1)  # PyTorch's own law: a third
    0.3
    """
    with torch._C.DisableTorchFunction():  # calls made here do not count as the model's
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() < 2:
            return 1.0
        fans = (weight.shape[0] + weight.shape[1]) * weight.shape[2:].numel()
        return float(weight.detach().float().square().mean()) * fans / 2 or 1.0  # weights that start at zero will grow
