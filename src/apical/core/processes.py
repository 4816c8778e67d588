"""Sums over the processes that train together."""

import torch.distributed as dist
from torch import Tensor

from apical.core.stepping import distributed


def summed(value: Tensor) -> Tensor:
    """The sum of every process's `value`, in each of them; `value` itself where there is one process.

    For what is not linear in the batch, such as the inverse of a Gram matrix: averages of each process's own are another
    thing.
    """
    if not distributed():
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value
