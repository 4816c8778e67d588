"""Small runs on digits, shared by the tests of the experiment layer."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.command import Command

from apical import data
from apical.bench.distributed import World
from apical.bench.loop import MakeRule, Training
from apical.bench.names import make_rule, resolve
from apical.bench.recipe import Recipe
from apical.bench.run_folder import RunFolder
from apical.bench.signals import StopSignals
from apical.data import Dataset


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return data.load("digits", train_limit=320)


@pytest.fixture
def small() -> Recipe:
    return Recipe(model="mlp-32", epochs=2, batch_size=32, train_limit=320, probe=64, device="cpu", lr=(0.05,))


@pytest.fixture
def begin(digits: Dataset) -> Callable[..., Training]:
    """Make a training in a folder and start it."""

    def make(
        recipe: Recipe, path: Path, *, resume: bool = False, stop: StopSignals | None = None, make_rule: MakeRule = make_rule
    ) -> Training:
        resolved, notes = resolve(recipe, len(digits.train))
        training = Training(resolved, digits, make_rule, RunFolder(path), World(0, 1, torch.device("cpu")), stop)
        training.start(resume=resume, command="test", notes=notes, environment={"commit": None})
        return training

    return make


@pytest.fixture
def apical(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Command]]:
    """Start the command line as a process of its own, on one thread; what still runs at the end of the test is killed."""
    started: list[Command] = []

    def start(*arguments: object) -> Command:
        started.append(Command([str(argument) for argument in arguments], tmp_path_factory.mktemp("command")))
        return started[-1]

    yield start
    for command in started:
        command.end()


def tensors(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    """Every tensor in nested dictionaries and lists, by path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    else:
        return {}
    return {name: tensor for key, item in items for name, tensor in tensors(item, f"{path}/{key}").items()}


@pytest.fixture
def assert_same_state() -> Callable[[Path, Path], None]:
    """Check that two checkpoints hold bit-identical tensors: weights, feedback, optimiser and random state."""

    def check(a: Path, b: Path) -> None:
        states = [torch.load(path, weights_only=True) for path in (a, b)]
        first, second = (tensors({k: s[k] for k in ("rule", "optimizer", "rng")}) for s in states)
        assert first.keys() == second.keys()
        assert first
        different = [name for name in first if not torch.equal(first[name], second[name])]
        assert different == []
        assert states[0]["epoch"] == states[1]["epoch"]

    return check
