"""Data-parallel training of one rule under `torchrun`: the process group, and the few collectives the loop needs."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from apical.data import Dataset, Split
from apical.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process's rank among the processes of one training.

    Attributes:
        rank: 0 .. size - 1; only rank 0 writes files.
        device: where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum `values` over all processes, in place; does nothing with one process."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def largest(self, value: int) -> int:
        """Return the largest `value` over all processes."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared.item())

    def barrier(self) -> None:
        """Wait until all processes reach this point."""
        if self.size > 1:
            dist.barrier()

    def own_slice(self, batch: Tensor) -> Tensor:
        """Return this process's equal share of a global batch (n, ...)."""
        share = batch.shape[0] // self.size
        return batch[self.rank * share : (self.rank + 1) * share] if self.size > 1 else batch


def under_torchrun() -> bool:
    """Return whether this process is one of several started by torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def pick_device(name: str) -> torch.device:
    """Return the device that "auto", "cpu" or "cuda" means on this machine.

    Raises:
        ConfigError: a CUDA device is requested but there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def joined(device: str, batch_size: int, *, drop_last: bool = True) -> Iterator[World]:
    """Join the process group described by torchrun, and leave it at the end; without torchrun, run alone.

    Raises:
        ConfigError: the batch cannot be shared equally.
    """
    place = pick_device(device)
    if not under_torchrun():
        yield World(0, 1, place)
        return
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if batch_size % size:
        raise ConfigError(f"--batch-size {batch_size} is not divisible by the number of processes, {size}; change one")
    if not drop_last:
        raise ConfigError("--drop-last False does not work with several processes: the last batch has no equal shares")
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    yield World(rank, size, place)
    if place.type == "cuda":
        dist.destroy_process_group()
    # a gloo group is not destroyed: its destructor can deadlock, holding the interpreter lock while it waits for a thread
    # that needs that lock (torch 2.13); the command line ends the process without destructors (:func:`leave`)


def leave(status: int) -> NoReturn:
    """End this process immediately, after flushing its output: under torchrun, see :func:`joined`."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def place(dataset: Dataset, device: torch.device) -> Dataset:
    """Return the data set with all its tensors on `device`."""

    def moved(split: Split) -> Split:
        return replace(split, inputs=split.inputs.to(device), targets=split.targets.to(device))

    validation = None if dataset.validation is None else moved(dataset.validation)
    return replace(dataset, train=moved(dataset.train), validation=validation, test=moved(dataset.test))
