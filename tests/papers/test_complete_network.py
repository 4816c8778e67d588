"""Complete directed networks against their equations (arXiv 2006.08798)."""

import pytest
import torch

from apical.errors import ConfigError
from apical_papers.equilibrium.complete_network import (
    Complete,
    asymmetric_settle,
    asymmetric_update,
    flow,
    is_surely_stable,
    settle,
    shrunk,
)

NETWORK = Complete(3, 4, 2)


def drawn(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    weight = torch.randn(NETWORK.size, NETWORK.size).double() * NETWORK.mask()
    return NETWORK.start(torch.rand(5, 2).double()), weight


def test_what_flows_out_of_one_neuron_flows_into_others() -> None:
    torch.manual_seed(0)
    s, weight = torch.rand(6, 9).double(), torch.randn(9, 9).double()
    assert flow(s, weight).sum(1).abs().max() < 1e-12
    slow = torch.zeros_like(s)
    for j in range(9):
        for i in range(9):
            slow[:, j] += weight[i, j] * s[:, i] - s[:, j] * weight[j, i]
    assert (flow(s, weight) - slow).abs().max() < 1e-12


def test_a_nudged_phase_is_that_of_the_equations() -> None:
    s, weight = drawn()
    y = torch.tensor([[1.0, 0.0]]).double().expand(5, 2)
    own, product = settle(NETWORK, s, weight, 7, 0.05, beta=2.0, y=y)
    slow, total = s.clone(), torch.zeros_like(weight)
    for _ in range(7):
        before = slow.clone()
        for j in range(3, 9):
            change = sum(weight[i, j] * before[:, i] for i in range(9)) - before[:, j] * weight[j].sum()
            if j >= 7:
                change = change + 2.0 * (y[:, j - 7] - before[:, j])
            slow[:, j] = (before[:, j] + 0.05 * change).clamp(0, 1)
        for sample in range(5):
            total += torch.outer(slow[sample], slow[sample] - before[sample]) / 7
    assert (own - slow).abs().max() < 1e-12
    assert (product - total).abs().max() < 1e-12


def test_states_stay_in_their_box_and_inputs_where_they_were() -> None:
    s, weight = drawn()
    for _ in range(30):
        after, _ = settle(NETWORK, s, 20 * weight, 1, 0.05)
        assert after.min() >= 0
        assert after[:, 3:].max() <= 1
        assert torch.equal(after[:, :3], s[:, :3])
        s = after
    assert torch.equal(s[:, 2], torch.ones(5).double())


def test_the_mask_forbids_loops_and_ways_into_inputs() -> None:
    mask = NETWORK.mask()
    assert mask.diagonal().sum() == 0
    assert mask[:, :3].sum() == 0
    assert mask.sum() == 9 * 6 - 6
    with pytest.raises(ConfigError, match="2 inputs"):
        NETWORK.start(torch.rand(5, 3))


def test_the_baseline_leaks_by_itself() -> None:
    s, weight = drawn()
    after = asymmetric_settle(NETWORK, s, weight, 1, 0.05)
    assert torch.allclose(after[:, 3:], (s + 0.05 * (s @ weight - s))[:, 3:].clamp(0, 1))
    nudged = asymmetric_settle(NETWORK, s, weight, 1, 0.05, beta=3.0, y=torch.ones(5, 2).double())
    assert (nudged[:, 7:] >= after[:, 7:]).all()
    expected = sum(torch.outer(after[b], nudged[b] - after[b]) for b in range(5)) / 15
    assert torch.allclose(asymmetric_update(after, nudged, 3.0), expected)


def test_gershgorin_and_shrinking() -> None:
    _, weight = drawn()
    assert torch.allclose(shrunk(weight, 0.1), weight - 0.1 * weight.sign())
    stable = torch.zeros(9, 9).double()
    stable[3, 4], stable[4, 3], stable[5:, 3] = 0.5, 0.6, 0.01
    assert not is_surely_stable(NETWORK, stable)
    ring = torch.zeros(9, 9).double()
    for k in range(3, 9):
        ring[k, 3 + (k - 2) % 6] = 1.0
    ring[3:, 0] = 0.5  # ways out that nothing comes back by
    assert is_surely_stable(NETWORK, ring)
    assert not is_surely_stable(NETWORK, -ring)
