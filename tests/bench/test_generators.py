"""Models that draw by Python's or NumPy's generators: one seed is one result, resuming is exact, and nobody else notices."""

import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from apical import CreditClassifier
from apical.bench.loop import Training
from apical.bench.recipe import Recipe
from apical.bench.signals import Interrupted, StopSignals

Begin = Callable[..., Training]
Same = Callable[[Path, Path], None]

MODEL = """
import random

import numpy as np
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 10)
        nn.init.constant_(self.a.bias, random.random() + np.random.rand())

    def forward(self, x):
        h = torch.relu(self.a(x.flatten(1)))
        if self.training and random.random() < 0.5:
            h = h + torch.relu(self.b(h))
        return self.c(h) * (1 + np.random.rand() * self.training)
"""


@pytest.fixture
def recipe(small: Recipe, tmp_path: Path) -> Recipe:
    (tmp_path / "net.py").write_text(MODEL)
    return replace(small, model=f"{tmp_path / 'net.py'}:Net", rule="fa")


def disturb(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)


def test_one_seed_is_one_result(begin: Begin, recipe: Recipe, tmp_path: Path, assert_same_state: Same) -> None:
    for seed, path in ((1, "first"), (2, "second")):
        disturb(seed)
        training = begin(recipe, tmp_path / path)
        for epoch in range(2):
            training.train_epoch()
            disturb(10 * seed + epoch)
        training.folder.unlock()
    assert_same_state(tmp_path / "first" / "checkpoint.pt", tmp_path / "second" / "checkpoint.pt")


def test_measuring_changes_no_training(begin: Begin, recipe: Recipe, tmp_path: Path) -> None:
    weights = []
    for probe in (0, 64):  # other rules keep feedback for the first layer too where it is measured
        training = begin(replace(recipe, probe=probe, rule="bp"), tmp_path / str(probe))
        for _ in range(2):
            training.train_epoch()
        training.folder.unlock()
        weights.append(torch.cat([p.detach().flatten() for p in training.rule.model.parameters()]))
    assert torch.equal(*weights)


def test_resuming_is_exact(begin: Begin, recipe: Recipe, tmp_path: Path, assert_same_state: Same) -> None:
    whole = begin(recipe, tmp_path / "whole")
    for _ in range(2):
        whole.train_epoch()
    stop = StopSignals()
    part = begin(recipe, tmp_path / "part", stop=stop)

    def on_step(step: int) -> None:
        stop.signum = signal.SIGTERM if step == 4 else None

    with pytest.raises(Interrupted):
        part.train_epoch(on_step)
    stop.signum = None
    part.folder.unlock()
    disturb(5)
    part = begin(recipe, tmp_path / "part", resume=True)
    for _ in range(2):
        part.train_epoch()
    assert_same_state(tmp_path / "whole" / "checkpoint.pt", tmp_path / "part" / "checkpoint.pt")


def test_a_checkpoint_without_their_states_is_read(begin: Begin, recipe: Recipe, tmp_path: Path) -> None:
    """As earlier versions wrote them."""
    begin(recipe, tmp_path / "run").folder.unlock()
    path = tmp_path / "run" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    del saved["sha256"], saved["rng"]["python"], saved["rng"]["numpy"]
    torch.save(saved, path)
    begin(recipe, tmp_path / "run", resume=True).train_epoch()


def test_the_users_own_generators_stay(begin: Begin, recipe: Recipe, tmp_path: Path) -> None:
    disturb(3)
    expected = random.random(), np.random.rand()
    disturb(3)
    begin(recipe, tmp_path / "run").train_epoch()
    assert (random.random(), np.random.rand()) == expected
    disturb(3)
    CreditClassifier("fa", hidden=(4,), epochs=1, random_state=0).fit(np.eye(6), np.arange(6) % 2)
    assert (random.random(), np.random.rand()) == expected
