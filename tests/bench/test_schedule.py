import math

import pytest
import torch

from apical.bench.schedule import alignment_decay, data_order, derive_seed, generator, piecewise


def test_piecewise_changes_after_the_named_number_of_finished_epochs() -> None:
    values = [piecewise((3.0, 2.0, 1.0), (1, 4), finished) for finished in range(6)]
    assert values == [3.0, 2.0, 2.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize(("lr", "steps", "momentum"), [(0.1, 351, 0.9), (0.02, 44, 0.9), (0.05, 156, 0.9), (0.1, 44, 0.0)])
def test_alignment_phase_spends_the_same_budget_whatever_the_data(lr: float, steps: int, momentum: float) -> None:
    decay, epochs = alignment_decay(lr, steps, momentum)
    assert math.isclose(lr * decay * steps * epochs / (1 - momentum), 2.5, rel_tol=1e-6)
    assert epochs == 1 or decay <= 0.03 < decay * epochs / (epochs - 1)


def test_a_long_epoch_is_one_phase() -> None:
    assert alignment_decay(0.001, 300, 0.9)[1] == 1


def test_seeds_differ_by_purpose_and_place_and_repeat() -> None:
    places = [(0, "order", 1), (0, "order", 2), (1, "order", 1), (0, "augment", 1), (0, "augment", 1, 1)]
    seeds = [derive_seed(*place) for place in places]  # type: ignore[arg-type]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [derive_seed(*place) for place in places]  # type: ignore[arg-type]


def test_data_order_is_a_permutation_of_its_own_and_leaves_the_global_state_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = data_order(50, 0, 1), data_order(50, 0, 2)
    torch.rand(3, generator=generator("cpu", 0, "augment", 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.sort().values.tolist() == list(range(50))
    assert not torch.equal(first, second)
    assert torch.equal(first, data_order(50, 0, 1))
