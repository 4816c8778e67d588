"""A pair of ranks serves task after task, hands errors over, and is replaced when one ends."""

import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist

from apical.testing.two_ranks import RankError, on_two_ranks


def summed(rank: int, value: float) -> tuple[int, float]:
    total = torch.tensor(value + rank)
    dist.all_reduce(total)
    return os.getpid(), float(total)


def one_fails(rank: int) -> None:
    if rank == 0:
        raise ValueError("planted")
    dist.barrier()  # waits for the other for ever


def one_ends(rank: int) -> None:
    if rank == 1:
        os._exit(3)
    dist.barrier()


def default(rank: int, leave: torch.dtype) -> torch.dtype:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(leave)
    return dtype


def test_tasks_begin_with_the_default_dtype_of_the_process_that_asks() -> None:
    """Else a rule of float64 models is compared with itself in float32, and a task inherits what the one before has left."""
    assert on_two_ranks(default, torch.double) == [torch.float] * 2
    assert on_two_ranks(default, torch.float) == [torch.float] * 2
    torch.set_default_dtype(torch.double)
    try:
        assert on_two_ranks(default, torch.float) == [torch.double] * 2
    finally:
        torch.set_default_dtype(torch.float)


def test_tasks_errors_and_ends() -> None:
    first, second = on_two_ranks(summed, 1.5), on_two_ranks(summed, 2.5)
    assert [value for _, value in first] == [4.0, 4.0]
    assert [value for _, value in second] == [6.0, 6.0]
    assert [process for process, _ in first] == [process for process, _ in second]
    with pytest.raises(RankError, match=r"rank 0: (?s:.*)ValueError: planted"):
        on_two_ranks(one_fails)
    third = on_two_ranks(summed, 1.5)
    assert [value for _, value in third] == [4.0, 4.0]
    assert third[0][0] != first[0][0]
    with pytest.raises(RankError, match=r"rank [01]"):
        on_two_ranks(one_ends)


def test_a_rank_that_ended_between_tasks_is_replaced() -> None:
    ((first, _), _) = on_two_ranks(summed, 1.5)
    [rank] = [child for child in multiprocessing.active_children() if child.pid == first]
    rank.kill()
    rank.join(60)
    again = on_two_ranks(summed, 1.5)
    assert [value for _, value in again] == [4.0, 4.0]
    assert first not in [process for process, _ in again]
