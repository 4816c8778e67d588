"""Conditions 1 to 3 and the angles of Q against dense projectors on all neurons and hand-made cases."""

import itertools
import math
from collections.abc import Iterator
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.chain import Chain, States
from apical.diagnostics.feedback_conditions import (
    condition_one,
    condition_three,
    condition_two,
    control_matrix,
    feedback_angles,
)
from apical.diagnostics.gauss_newton import minimum_norm_alignment
from apical.errors import ConfigError
from apical.rules.feedback_control.deep_feedback_control import DeepFeedbackControl
from apical.rules.feedback_control.states import output_jacobian

SIZES = (6, 5, 4, 3)
M = torch.tensor([[1.0, 2.0, 0.0], [-1.0, 0.5, 1.0], [0.3, 0.0, 2.0]], dtype=torch.double)


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


def net() -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(SIZES):
        layers += [nn.Linear(n_in, n_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def jacobians(batch: int = 7) -> list[Tensor]:
    chain = Chain(net())
    return [block.detach() for block in output_jacobian(chain, chain.run(torch.randn(batch, SIZES[0])))]


def stacked(jacobian: list[Tensor]) -> Tensor:
    """J of each sample, (batch, n_L, N)."""
    return torch.cat(jacobian, 2)


def layers_of(q: Tensor) -> list[Tensor]:
    return list(q.split(SIZES[1:]))


def test_condition_one_by_hand() -> None:
    """Norms 3, 5, 4 of r_0..r_2, the output left out: mean 4, variance 2/3; and a sample of equal norms."""
    r = [
        torch.tensor([[3.0, 0.0], [2.0, 0.0]]),
        torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]]),
        torch.tensor([[[4.0], [0.0]], [[0.0], [-2.0]]]),
        torch.tensor([[100.0], [7.0]]),
    ]
    states = States(r[1:], r)
    assert condition_one(states).tolist() == pytest.approx([math.sqrt(2 / 3) / 4, 0.0], abs=1e-15)
    assert condition_one(states, "code").tolist() == pytest.approx([math.sqrt(2 / 3 / 4), 0.0], abs=1e-15)
    with pytest.raises(ConfigError, match="unknown form 'papers'; did you mean 'paper'"):
        condition_one(states, "papers")  # type: ignore[arg-type]


def test_condition_two_is_the_share_inside_the_row_space() -> None:
    """Against the N x N projector J^+ J of each sample."""
    jacobian = jacobians()
    q = torch.randn(sum(SIZES[1:]), 3)
    expected = [float((torch.linalg.pinv(j) @ j @ q).norm() / q.norm()) for j in stacked(jacobian)]
    assert max(expected) < 0.9  # a random Q is not inside
    assert condition_two(jacobian, layers_of(q)).tolist() == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("basis", [torch.eye(3).double(), M], ids=["transpose", "any basis"])
def test_condition_two_holds_exactly_for_the_row_space_and_vanishes_beside_it(basis: Tensor) -> None:
    jacobian = jacobians(1)
    j = stacked(jacobian)[0]
    inside = j.T @ basis
    outside = torch.linalg.svd(j).Vh[3:6].T  # orthogonal to the rows of J
    assert condition_two(jacobian, layers_of(inside)).item() == pytest.approx(1, abs=1e-13)
    assert condition_two(jacobian, layers_of(outside)).item() == pytest.approx(0, abs=1e-7)
    mixed = 3 * inside / inside.norm() + 4 * outside / outside.norm()
    assert condition_two(jacobian, layers_of(mixed)).item() == pytest.approx(3 / 5, abs=1e-13)


def test_condition_two_with_outputs_that_nothing_moves() -> None:
    """A Jacobian of rank 2: the projector is on two dimensions, and nothing blows up."""
    jacobian = [block * torch.tensor([1.0, 1.0, 0.0])[:, None] for block in jacobians()]
    q = torch.randn(sum(SIZES[1:]), 3)
    expected = [float((torch.linalg.pinv(j[:2]) @ j[:2] @ q).norm() / q.norm()) for j in stacked(jacobian)]
    assert condition_two(jacobian, layers_of(q)).tolist() == pytest.approx(expected, abs=1e-13)


def test_condition_three_is_the_distance_to_instability() -> None:
    """J Q = J J^+ B = B: eigenvalues -0.3 and 1 +- 2i by choice."""
    jacobian = jacobians(1)
    b = torch.tensor([[-0.3, 0.0, 0.0], [0.0, 1.0, 2.0], [0.0, -2.0, 1.0]])
    feedback = layers_of(torch.linalg.pinv(stacked(jacobian)[0]) @ b)
    assert torch.allclose(control_matrix(jacobian, feedback)[0], b, atol=1e-13)
    assert condition_three(jacobian, feedback, 0.25).item() == pytest.approx(-0.05, abs=1e-12)
    assert condition_three(jacobian, feedback, 0.35).item() == pytest.approx(0.05, abs=1e-12)


def reference_angle(a: Tensor, b: Tensor) -> float:
    return math.degrees(math.acos(float((a * b).sum() / (a.norm() * b.norm()))))


def test_feedback_angles() -> None:
    jacobian = jacobians()
    q = torch.randn(sum(SIZES[1:]), 3)
    got = feedback_angles(jacobian, layers_of(q), damping=0.7)
    assert set(got) == {"transpose", "pseudoinverse", "damped"}
    candidates: dict[str, list[Tensor]] = {name: [] for name in got}
    for j in stacked(jacobian):
        candidates["transpose"].append(j.T)
        candidates["pseudoinverse"].append(torch.linalg.pinv(j))
        candidates["damped"].append(torch.linalg.solve(j.T @ j + 0.7 * torch.eye(j.shape[1]), j.T))  # push-through
    averaged = feedback_angles(jacobian, layers_of(q), damping=0.7, average=True)
    for name, each in candidates.items():
        assert got[name].tolist() == pytest.approx([reference_angle(q, c) for c in each], abs=1e-9), name
        assert averaged[name].tolist() == pytest.approx([reference_angle(q, sum(each) / len(each))], abs=1e-9), name


@pytest.mark.parametrize("name", ["transpose", "pseudoinverse", "damped"])
def test_feedback_angle_is_zero_only_where_it_should_be(name: str) -> None:
    jacobian = jacobians(1)
    j = stacked(jacobian)[0]
    damped = j.T @ torch.linalg.inv(j @ j.T + 0.7 * torch.eye(3))
    q = {"transpose": j.T, "pseudoinverse": torch.linalg.pinv(j), "damped": damped}[name]
    angles = feedback_angles(jacobian, layers_of(3 * q), damping=0.7)
    assert angles.pop(name).item() < 1e-9
    assert min(float(angle) for angle in angles.values()) > 1


def test_trained_feedback_is_left_alone() -> None:
    """Feedback weights that require a gradient give plain numbers, and get no gradient."""
    jacobian = jacobians()
    feedback = nn.ParameterList([torch.randn(n, 3) for n in SIZES[1:]])
    results = [condition_two(jacobian, feedback), condition_three(jacobian, feedback, 0.1)]
    results += feedback_angles(jacobian, feedback).values()
    assert not any(result.requires_grad for result in results)


def rule_with_feedback(q: Tensor | None = None, difference: Literal["rate", "voltage"] = "voltage") -> DeepFeedbackControl:
    """DFC-SSA without leak and with the nudge to zero, on the network of these tests, with frozen feedback q (N, n_L)."""
    rule = DeepFeedbackControl(
        net(), F.cross_entropy, variant="ssa", difference=difference, learn="none", alpha=1e-9, nudge=1e-6
    )
    if q is not None:
        with torch.no_grad():
            for weights, part in zip(rule.feedback, layers_of(q), strict=True):
                weights.copy_(part)
    return rule


@pytest.mark.parametrize("seed", range(5))
def test_proposition_4(seed: int) -> None:
    """With the rate of layer i over |r_{i-1}|^2, the change's product with the loss gradient is -|delta|^2.

    Whatever the feedback, as long as the loop is stable: sum_i <Q_i u, J_i^T delta> = delta^T J Q (J Q)^-1 delta, where the
    rule divides its update, of factor 2, by 2 lambda.
    """
    torch.manual_seed(seed)
    x, y = torch.randn(1, SIZES[0]), torch.tensor([1])
    for _ in range(100):
        rule = rule_with_feedback(torch.randn(sum(SIZES[1:]), 3))
        states = rule.chain.run(x)
        jacobian = output_jacobian(rule.chain, states)
        if condition_three(jacobian, rule.feedback, 0.0).item() > 0.1:
            break
    else:
        pytest.fail("no stable feedback among 100 random ones")
    assert condition_two(jacobian, rule.feedback).item() < 0.95  # no help from Condition 2
    rule(x, y).backward()
    weights = [stage.layer.weight for stage in rule.chain.stages]
    gradients = torch.autograd.grad(F.cross_entropy(rule.model(x), y), weights)
    sizes = [r.square().sum() for r in states.r]
    product = sum(float((-w.grad / n * g).sum()) for w, n, g in zip(weights, sizes, gradients, strict=False))
    delta = torch.softmax(states.r[-1], 1) - F.one_hot(y, 3)
    assert product == pytest.approx(-float(delta.square().sum()), rel=1e-4)


@pytest.mark.filterwarnings("ignore:the steady state is not a stable one")  # only its direction matters here
@pytest.mark.parametrize("difference", ["rate", "voltage"])
def test_feedback_in_the_row_space_makes_the_rule_minimum_norm(difference: Literal["rate", "voltage"]) -> None:
    """Theorem 3, through the rule itself: one sample, Q = J^T M; a random Q is far off."""
    x, y = torch.randn(1, SIZES[0]), torch.tensor([2])
    rule = rule_with_feedback(difference=difference)
    j = stacked([block.detach() for block in output_jacobian(rule.chain, rule.chain.run(x))])[0]
    for q, near in ((j.T, True), (j.T @ M, True), (torch.randn_like(j.T), False)):
        with torch.no_grad():
            for weights, part in zip(rule.feedback, layers_of(q), strict=True):
                weights.copy_(part)
        angles = minimum_norm_alignment(rule, x, y, 0.0)
        assert list(angles) == ["0", "2", "4", "all"]
        assert (max(angles.values()) < 0.01) if near else (angles["all"] > 10)
