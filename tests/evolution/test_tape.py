"""What a recorded function repeats: its operations, on new values, to the same bits."""

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from apical.evolution.tape import recorded


def test_transforms_are_repeated_on_other_values() -> None:
    draw = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, 5, 3, dtype=torch.double, generator=draw)
    weight = torch.randn(3, dtype=torch.double, generator=draw)
    step = vmap(grad(lambda row: (row * weight).sin().sum()))
    repeat = recorded(step, (x,))
    assert torch.equal(repeat(other), step(other))
    assert (repeat(other) - weight * (other * weight).cos()).abs().max() < 1e-14


def test_a_missing_argument_stays_missing() -> None:
    repeat = recorded(lambda x, y: x + 1 if y is None else x, (torch.zeros(2), None))
    assert repeat(torch.ones(2), None).tolist() == [2.0, 2.0]


def test_operations_with_several_results_and_in_place() -> None:
    def step(x: Tensor) -> Tensor:
        total = torch.tensor([1.0, 1.0])
        for part in x.split(2):
            total.add_(part)
        return total

    repeat = recorded(step, (torch.zeros(4),))
    for _ in range(2):  # the constant is as new each time
        assert repeat(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [5.0, 7.0]


def test_the_argument_itself_can_be_the_result() -> None:
    assert recorded(lambda x: x, (torch.zeros(2),))(torch.ones(2)).tolist() == [1.0, 1.0]


def test_operations_that_depend_on_values_are_refused() -> None:
    with pytest.raises(RuntimeError, match="depend on the value of a tensor"):
        recorded(lambda x: x if x.sum() > 0 else -x, (torch.ones(2),))
