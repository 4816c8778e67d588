"""Ray changes nothing but who computes: bit-equal results, workers and machines that die, a cluster of two nodes."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apical.bench.evolve.loop import Evolution
from apical.errors import ConfigError
from apical.evolution.classification import Classification, Images, Setting
from apical.evolution.population import Lifetime
from apical.evolution.strategy import Strategy
from apical.evolution.workers import Here, RayWorkers

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.xdist_group("ray")  # two clusters at once hinder each other
QUIET: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}


class Mortal:
    """Fitness is minus the distance from one; whoever first evaluates generation 1 dies halfway, if `fatal`."""

    def __init__(self, mark: Path, fatal: bool = True) -> None:
        self.start = torch.zeros(3)
        self.mark, self.fatal = mark, fatal

    def fitness(self, individuals: Tensor, generation: int) -> Tensor:
        if generation == 1 and self.fatal and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return -(individuals - 1).square().sum(1)


class Wrong:
    def __init__(self) -> None:
        self.start = torch.zeros(3)

    def fitness(self, individuals: Tensor, generation: int) -> Tensor:
        raise ConfigError("this task cannot be")


class Third:
    """Fitness depends on a constant of the default dtype."""

    def __init__(self) -> None:
        self.start = torch.zeros(3)

    def fitness(self, individuals: Tensor, generation: int) -> Tensor:
        return (individuals.double() * torch.tensor(1 / 3)).sum(1)


def images() -> Images:
    draw = torch.Generator().manual_seed(0)
    return Images(torch.randn(60, 1, 4, 4, generator=draw), torch.arange(60) % 3, 3)


def classification() -> Classification:
    setting = Setting(model="mlp-tanh-6", lifetime=Lifetime(steps=5), hidden=5, examples=20)
    return Classification([images()], setting)


@pytest.fixture
def two(local_cluster: None) -> Iterator[RayWorkers]:
    with RayWorkers("local", 2, chunk=4) as workers:
        yield workers


def after(task: Any, workers: Any, generations: int = 3) -> Evolution:
    evolution = Evolution(task, Strategy(population=16), workers, seed=1)
    for _ in range(generations):
        evolution.step()
    return evolution


def test_workers_have_the_default_dtype_of_the_one_that_asks(two: RayWorkers) -> None:
    individuals = torch.ones(8, 3)
    torch.set_default_dtype(torch.double)
    try:
        assert torch.equal(two.evaluate(Third(), individuals, 0), Here().evaluate(Third(), individuals, 0))
    finally:
        torch.set_default_dtype(torch.float)
    assert torch.equal(two.evaluate(Third(), individuals, 0), Here().evaluate(Third(), individuals, 0))


def test_two_ray_workers_equal_no_ray_bit_for_bit(two: RayWorkers) -> None:
    here, there = after(classification(), Here(4)), after(classification(), two)
    assert torch.equal(here.search.center, there.search.center)
    assert here.line["center"] == there.line["center"]
    assert not torch.equal(here.search.center, here.task.start)


def test_a_worker_killed_in_a_generation_costs_nothing(two: RayWorkers, tmp_path: Path) -> None:
    killed = after(Mortal(tmp_path / "died"), two)
    assert (tmp_path / "died").exists()
    whole = after(Mortal(tmp_path / "never", fatal=False), Here(4))
    assert torch.equal(killed.search.center, whole.search.center)


def test_an_error_of_the_task_is_not_tried_again_and_arrives_as_it_is(two: RayWorkers) -> None:
    with pytest.raises(ConfigError, match="this task cannot be"):
        two.evaluate(Wrong(), torch.zeros(8, 3), 0)


def test_chunks_bound_what_is_evaluated_at_once() -> None:
    sizes: list[int] = []

    class Counting(Wrong):
        def fitness(self, individuals: Tensor, generation: int) -> Tensor:
            sizes.append(len(individuals))
            return individuals.sum(1)

    fitness = Here(5).evaluate(Counting(), torch.arange(36.0).view(12, 3), 0)
    assert sizes == [5, 5, 2]
    assert torch.equal(fitness, torch.arange(36.0).view(12, 3).sum(1))
    with pytest.raises(ConfigError, match="chunk"):
        Here(0)


def test_a_cluster_of_two_nodes_survives_the_loss_of_one(tmp_path: Path) -> None:
    if ray.is_initialized():
        ray.shutdown()
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    workers = RayWorkers(cluster.address, chunk=2)
    try:
        assert sum(node["Alive"] for node in ray.nodes()) == 2
        evolution = Evolution(Mortal(tmp_path / "x", fatal=False), Strategy(population=16), workers, seed=1)
        evolution.step()
        cluster.remove_node(second, allow_graceful=False)
        evolution.step()
        evolution.step()
        whole = after(Mortal(tmp_path / "y", fatal=False), Here(2))
        assert torch.equal(evolution.search.center, whole.search.center)
        assert not second.any_processes_alive()
    finally:
        workers.close()
        cluster.shutdown()


def test_no_cluster_at_the_address_is_said() -> None:
    if ray.is_initialized():
        ray.shutdown()
    with pytest.raises(ConfigError, match=r"no Ray cluster answers at '127\.0\.0\.1:1'"):
        RayWorkers("127.0.0.1:1")
