"""Sums and rows over two ranks; what one rank measures by itself waits for no other."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from apical import Backprop, LocalClassifiers, LocalSolve, SemiImplicit
from apical.core.processes import alone, gathered, summed
from apical.diagnostics.alignment import gradient_alignment
from apical.errors import ConfigError
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


def unequal(rank: int) -> tuple[str, str]:
    """One batch on the first rank, two on the other."""
    said = []
    for throws in (False, True):
        torch.manual_seed(0)
        rule = DistributedDataParallel(SemiImplicit(dense_network()))
        try:
            with rule.join(throw_on_early_termination=throws):
                for seed in range(1 + rank):
                    rule(*dense_batch(seed)).backward()
            said.append("")
        except (RuntimeError, ConfigError) as error:
            said.append(str(error))
    return said[0], said[1]


def test_a_rule_that_sums_over_processes_refuses_batches_that_one_of_them_lacks() -> None:
    for within, thrown in on_two_ranks(unequal):
        assert "SemiImplicit sums over processes" in within
        assert "exhausted" in thrown
