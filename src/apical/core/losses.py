"""Losses that PyTorch does not have in this form."""

import torch.nn.functional as F
from torch import Tensor

from apical.errors import ConfigError


def squared_error(output: Tensor, targets: Tensor) -> Tensor:
    """`1/2 |output - target|^2` per sample, the mean over the batch; class labels stand for one-hot targets.

    Args:
        output: (batch, outputs).
        targets: (batch,) class labels, or numbers of the output's shape.

    Raises:
        ConfigError: numbers of another shape, which would be spread over the output unnoticed.

    >>> import torch
    >>> squared_error(torch.tensor([[1.0, 2.0]]), torch.tensor([0]))
    tensor(2.)
    """
    return (output - wanted(output, targets)).square().sum() / (2 * len(output))


def wanted(output: Tensor, targets: Tensor) -> Tensor:
    """Targets as numbers of the output's shape (batch, outputs): one-hot rows for class labels."""
    if targets.is_floating_point():
        if targets.shape != output.shape:
            raise ConfigError(f"targets of shape {tuple(targets.shape)} do not fit outputs of shape {tuple(output.shape)}")
        return targets.to(output.dtype)
    return F.one_hot(targets, output.shape[-1]).to(output.dtype)
