"""Sums and rows over the processes that train together."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from apical.core.stepping import distributed
from apical.errors import ConfigError

_alone = [False]


@contextmanager
def alone() -> Iterator[None]:
    """Within, this process waits for no other: for measurements, which may be one process's alone."""
    _alone.append(True)
    try:
        yield
    finally:
        _alone.pop()


def summed(value: Tensor) -> Tensor:
    """Return the sum of every process's `value`, in each of them; `value` itself where there is one process.

    For what is not linear in the batch, such as the inverse of a Gram matrix: averages of each process's own are another
    thing.

    Raises:
        ConfigError: within `DistributedDataParallel.join()`, where processes that have ended would take part in no sum.
    """
    if _alone[-1] or not distributed():
        return value
    _refuse_join()
    value = value.detach().clone()
    dist.all_reduce(value)
    return value


def gathered(rows: Tensor) -> Tensor:
    """Return the rows (n, ...) of all processes in order of rank, without gradient; `rows` itself in a single process.

    Numbers of rows may differ. For losses that compare the samples of a batch.
    """
    if _alone[-1] or not distributed():
        return rows
    rank = dist.get_rank()
    counts = torch.zeros(dist.get_world_size(), dtype=torch.long, device=rows.device)
    counts[rank] = len(rows)
    numbers = summed(counts).tolist()
    whole = rows.new_zeros(sum(numbers), *rows.shape[1:])
    start = sum(numbers[:rank])
    whole[start : start + len(rows)] = rows
    return summed(whole)


def is_parted(tensor: Tensor) -> bool:
    """Return whether each process holds a part of the tensor, as under `fully_shard`."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor, put together from its parts."""
    return cast(Any, tensor).full_tensor() if is_parted(tensor) else tensor


def parted(tensor: Tensor, example: Tensor) -> Tensor:
    """Return this process's part of a tensor that all processes hold whole, if `example` is in parts; else the tensor."""
    if not is_parted(example):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    own = cast(DTensor, example)
    return distribute_tensor(tensor, own.device_mesh, own.placements)


def without_diagonal_(matrix: Tensor) -> None:
    """Set the diagonal to zero, in place."""
    if is_parted(matrix):
        matrix.mul_(parted(1 - torch.eye(*matrix.shape, dtype=matrix.dtype, device=matrix.device), matrix))
    else:
        matrix.fill_diagonal_(0.0)


def compressed() -> bool:
    """Return whether the calling `DistributedDataParallel` has a gradient hook (`register_comm_hook`), which may round."""
    return bool(getattr(_active(), "_comm_hooks", ()))


def _active() -> DistributedDataParallel | None:
    """Return the `DistributedDataParallel` whose forward pass is running; None if there is none."""
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


def _refuse_join() -> None:
    active = _active()
    join = getattr(active, "_join_config", None)
    if join is not None and join.enable and not join.throw_on_early_termination:
        raise ConfigError(
            f"{type(getattr(active, 'module', None)).__name__} sums over processes itself, and under "
            "DistributedDataParallel.join() a process without batches does not take part: give every process the same "
            "number of batches, or pass throw_on_early_termination=True to join()"
        )
