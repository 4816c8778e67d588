"""Figure 2's numpy check: that it is the rule's update, that its feedback is optimal, and its plane geometry."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from apical.rules.feedback_control.deep_feedback_control import DeepFeedbackControl
from apical_papers.dfc.toy.optimal import (
    angle,
    inside,
    normed,
    optimal_feedback,
    principal_plane,
    random_network,
    random_optimal,
    ssa_update,
)


def test_numpy_update_is_the_rules() -> None:
    draw = np.random.default_rng(5)
    network = random_network(draw)
    q = random_optimal(network.jacobian, 1, draw)[0]
    model = nn.Sequential(nn.Linear(5, 2, bias=False), nn.Tanh(), nn.Linear(2, 2, bias=False)).double()
    for layer, weight in ((model[0], network.w1), (model[2], network.w2)):
        layer.weight.data = torch.from_numpy(weight)
    rule = DeepFeedbackControl(model, lambda r, t: (r * t).sum(1).mean(), "ssa", nudge=0.5, alpha=1e-3, learn="none")
    rule.feedback[0].data, rule.feedback[1].data = torch.from_numpy(q[:2]), torch.from_numpy(q[2:])
    rule(torch.from_numpy(network.x)[None], torch.from_numpy(-network.delta / 0.5)[None]).backward()
    update = torch.cat([-model[i].weight.grad.flatten() / 2 for i in (0, 2)]).numpy()
    np.testing.assert_allclose(ssa_update(network, q, 1e-3), update, rtol=1e-9)


def test_random_optimal_feedback_meets_conditions_two_and_three() -> None:
    draw = np.random.default_rng(1)
    j = random_network(draw).jacobian
    projector = np.linalg.pinv(j) @ j
    for q in random_optimal(j, 50, draw):
        np.testing.assert_allclose(projector @ q, q, atol=1e-12)
        assert np.linalg.norm(q) == pytest.approx(1)
        assert np.linalg.eigvals(j @ q).real.min() > 0


def test_jacobian_by_finite_differences() -> None:
    network = random_network(np.random.default_rng(2))

    def output(push: np.ndarray[Any, Any]) -> Any:
        return network.w2 @ np.tanh(network.w1 @ network.x + push[:2]) + push[2:]

    columns = [(output(1e-6 * e) - output(-1e-6 * e)) / 2e-6 for e in np.eye(4)]
    np.testing.assert_allclose(network.jacobian, np.array(columns).T, atol=1e-9)


def test_optimal_feedback_agrees_and_suboptimal_does_not() -> None:
    found = optimal_feedback(draws=200, seed=3)
    assert found.angles.max() < 0.1
    assert len(found.angles) == 200 + 1 + 100
    assert found.cloud.shape == (200, 2)
    network = random_network(np.random.default_rng(3))
    outside = normed(network.jacobian.T + 0.3 * np.random.default_rng(0).normal(size=(4, 2)))
    exact = ssa_update(network, np.linalg.pinv(network.jacobian))
    assert angle(ssa_update(network, outside), exact) > 1
    assert angle(ssa_update(network, normed(network.jacobian.T), alpha=0.5), exact) > 0.1  # the leak must be small


def test_plane_geometry() -> None:
    square = np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    assert inside(np.array([0.5, 0.9]), square)
    assert not inside(np.array([0.5, 1.1]), square)
    assert not inside(np.array([-3.0, 0.5]), square)
    turned = np.hstack([square * [3, 1], np.zeros((4, 2))]) @ np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    plane, explained = principal_plane(turned)
    assert explained.tolist() == pytest.approx([0.9, 0.1])
    assert np.ptp(plane, axis=0).tolist() == pytest.approx([3, 1])
