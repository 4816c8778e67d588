"""Sums and rows over two ranks; what one rank measures by itself waits for no other."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from apical import Backprop, LocalClassifiers, LocalSolve
from apical.core.processes import alone, gathered, summed
from apical.diagnostics.alignment import gradient_alignment
from apical.rules.local_classifiers import class_similarity, similarity
from apical.testing.networks import dense_batch, dense_network
from apical.testing.two_ranks import on_two_ranks

SHARES = (slice(0, 3), slice(3, 5))
"""Of a batch of five: ranks may have different numbers of samples."""


def rows() -> Tensor:
    return torch.randn(5, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0))


def shared(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    own = rows()[SHARES[rank]]
    with alone():
        assert gathered(own) is own
        assert summed(own) is own
    return summed(own.sum(0)), gathered(own), gathered(torch.arange(5)[SHARES[rank]])


def compared(rank: int) -> tuple[Tensor, Tensor]:
    """Five rows of each rank's: ten compared with each other."""
    own, labels = rows() + rank, torch.arange(5) % (2 + rank)
    return similarity(own, class_similarity(labels, 3, torch.double))


def measured_by_one(rank: int) -> float:
    for rule in (LocalSolve(Backprop(dense_network())), LocalClassifiers(dense_network(), F.cross_entropy, "similarity")):
        if rank == 0:
            gradient_alignment(rule, *dense_batch(0))
    arrived = torch.tensor(1.0)
    dist.all_reduce(arrived)
    return float(arrived)


def test_sums_and_rows_of_all() -> None:
    for total, every, numbers in on_two_ranks(shared):
        torch.testing.assert_close(total, rows().sum(0), rtol=1e-14, atol=0)
        assert torch.equal(every, rows())
        assert torch.equal(numbers, torch.arange(5))


def test_samples_are_compared_with_those_of_all_ranks() -> None:
    labels = torch.cat([torch.arange(5) % 2, torch.arange(5) % 3])
    loss, whole = similarity(torch.cat([rows(), rows() + 1]), class_similarity(labels, 3, torch.double))
    (first, upper), (second, lower) = on_two_ranks(compared)
    torch.testing.assert_close((first + second) / 2, loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.cat([upper, lower]) / 2, whole, rtol=1e-12, atol=1e-15)  # as the average of ranks is


def test_what_one_rank_measures_waits_for_no_other() -> None:
    assert on_two_ranks(measured_by_one) == [2.0, 2.0]
