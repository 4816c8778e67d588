"""The scripts in benchmarks/: they still fit the library, and their floors count what they say."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import apical

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import limits
import scaling
import settling


@pytest.mark.parametrize("name", [name for name in settling.RULES if name != "bp"])
def test_settling_finds_its_phases(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling, "STEPS", 1)
    with torch.no_grad():
        runs = settling.cases(name, torch.device("cpu"))
        for run in runs.values():
            run()
    assert {"free", "nudged", "own, free", "own, nudged"} <= set(runs)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def a_step(make: Any) -> Any:
    rule = make(network())
    x, y = torch.randn(4, 7), torch.arange(4) % 3

    def step() -> None:
        rule.zero_grad()
        rule(x, y).backward()

    step()
    return step


@pytest.mark.parametrize("make", [apical.Backprop, apical.FeedbackAlignment, apical.DirectFeedbackAlignment])
def test_products_of_a_step_are_those_of_its_equations(make: Any) -> None:
    """Three forward, three gradients of weights; errors to two hidden layers."""
    step = a_step(make)
    with limits.Products() as noted:
        step()
    assert len(noted.calls) == 8


def test_convolutions_are_products() -> None:
    x, w = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    with limits.Products() as noted:
        F.conv2d(x, w).sum().backward()
    assert len(noted.calls) == 2


def test_the_floor_adds_products_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [[3.0, 3.0], [2.0, 2.0], [10.0, 10.0]]
    monkeypatch.setattr(limits, "in_turns", lambda *_: seconds)
    monkeypatch.setattr(limits, "products", lambda step: step)
    row = limits.limits("kp", lambda: None, lambda: None, fed_back=100, per_byte=1e-3, rounds=2, times=1)
    # (3 - 2) / 10 more products; 12 bytes for W + c E and 8 to watch, of 100 numbers, at 1 ms each, of a step of 10 s
    assert row["floor"] == pytest.approx(1 + 0.1 + 0.12)
    assert row["floor_watched"] == pytest.approx(1.22 + 0.08)
    assert (row["forced_mb"], row["watched_mb"]) == (0.001, 0.001)
    more = limits.limits("ccl", lambda: None, lambda: None, fed_back=100, per_byte=1e-3, rounds=2, times=1, more=500)
    assert more["floor"] == more["floor_watched"] == pytest.approx(1 + 0.1 + 0.05)
    assert limits.limits("dfc", lambda: None, lambda: None, 0, 0.0, 2, 1)["floor"] == pytest.approx(1.1)  # products alone


def test_linear_solves_count_as_products() -> None:
    a, b = torch.eye(3).expand(2, 3, 3), torch.randn(2, 3)
    with limits.Products() as noted:
        torch.linalg.lu_solve(*torch.linalg.lu_factor_ex(a)[:2], b.unsqueeze(-1))
    assert len(noted.calls) == 2


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_the_exponent_is_that_of_a_power_law(power: float) -> None:
    sizes = (2, 4, 8, 16, 32)
    assert scaling.exponent(sizes, [3.0 * s**power for s in sizes]) == pytest.approx(power)
