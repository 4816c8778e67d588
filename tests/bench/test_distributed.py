"""Data-parallel training with real processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.command import Command

from apical.bench.distributed import World, joined, pick_device
from apical.cli.main import main
from apical.errors import ConfigError

TRAIN = ("train", "--model", "mlp-64", "--epochs", "2", "--batch-size", "32", "--train-limit", "640", "--crop", "1")
TRAIN = (*TRAIN, "--lr", "0.02", "--device", "cpu", "--threads", "1")


def start(processes: int, *arguments: str) -> "subprocess.Popen[str]":
    """`apical ARGUMENTS` under torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}")
    launcher = ("torch.distributed.run", *rendezvous, "--nproc-per-node", str(processes), "-m", "apical")
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_equal_one(tmp_path: Path) -> None:
    process = start(2, *TRAIN, "--out", str(tmp_path / "two"))
    assert main([*TRAIN, "--out", str(tmp_path / "one")]) == 0
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.count("epoch   2/2") == 1
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("one", "two"))
    for name, value in one["rule"].items():
        assert torch.allclose(value, two["rule"][name], rtol=0, atol=1e-6), name
    for key in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
        assert one["metrics"][key] == pytest.approx(two["metrics"][key], abs=1e-5)


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    """By each of the processes, in the environment that torchrun would give it, before they meet."""
    ranks = []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        environment = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(
            Command([*TRAIN, "--batch-size", "33", "--out", str(tmp_path / "run")], tmp_path / str(rank), environment)
        )
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2
        said = "--batch-size 33 is not divisible by the number of processes, 2; change one"
        assert errors == f"apical: error: {said}\n"
    assert not (tmp_path / "run").exists()


def test_alone_nothing_is_exchanged() -> None:
    with joined("cpu", 7, drop_last=False) as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        values = torch.tensor([1.0, 2.0])
        assert world.sum(values) is values
        assert world.own_slice(values) is values
        assert world.largest(3) == 3


def test_slices_make_up_the_batch() -> None:
    batch = torch.arange(12).reshape(6, 2)
    parts = [World(rank, 3, torch.device("cpu")).own_slice(batch) for rank in range(3)]
    assert torch.equal(torch.cat(parts), batch)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_one_line() -> None:
    with pytest.raises(ConfigError, match="--device cuda"):
        pick_device("cuda")
    assert pick_device("auto").type == "cpu"
