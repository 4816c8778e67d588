"""The steady state of strong control against a root finder on the slow re-implementation, float64."""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.optimize
import torch
from tests.rules import dfc_reference as ref
from torch import Tensor, nn

from apical.core.chain import Chain, States
from apical.rules.feedback_control.states import product_feedback, random_feedback
from apical.rules.feedback_control.strong_control import Held, controlled_states, error_left, hold, outcome, outcome_slope

HIDDEN = {"tanh": nn.Tanh(), "relu": nn.ReLU()}
KINDS = [*HIDDEN, "conv"]
Problem = tuple[Chain, ref.Net, Tensor, States, list[Tensor], Tensor]


def labels(targets: Tensor, classes: int, label: float = 0.9) -> Tensor:
    goal = torch.full((len(targets), classes), (1 - label) / (classes - 1), dtype=torch.double)
    goal[torch.arange(len(targets)), targets] = label
    return goal


def problem(kind: str, classes: bool, size: int = 6, scales: Tensor | None = None) -> Problem:
    """Chain, sections, inputs (times `scales`), states, feedback that is not the product of the weights, and goals."""
    model, net = ref.conv_net() if kind == "conv" else ref.mlp((6, 9, 8, 4), HIDDEN[kind])
    shape, outputs = ((2, 6, 6), 3) if kind == "conv" else ((6,), 4)
    chain = Chain(model.requires_grad_(False), shape)
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(size, *shape, dtype=torch.double, generator=generator)
    if scales is not None:
        inputs *= scales.view(-1, *[1] * len(shape))
    noise = [torch.randn(q.shape, dtype=torch.double, generator=generator) for q in product_feedback(chain)]
    feedback = [q + 0.1 * xi for q, xi in zip(product_feedback(chain), noise, strict=True)]
    drawn = torch.randn(size, outputs, dtype=torch.double, generator=generator)
    goal = labels(drawn.argmax(1), outputs) if classes else 2 * drawn
    return chain, net, inputs, chain.run(inputs), feedback, goal


def left(net: ref.Net, x: Tensor, feedback: list[Tensor], goal: Tensor, a: float, classes: bool) -> Callable[..., Tensor]:
    """u -> `goal - out(r_L) - a u` of one sample, by a plain forward pass with `Q_i u` added."""

    def equation(u: Tensor) -> Tensor:
        r = ref.controlled(net, x, feedback, u).r[-1].flatten()
        return goal - (r.exp() / r.exp().sum() if classes else r) - a * u

    return equation


def root(equation: Callable[..., Tensor], size: int) -> Tensor:
    """The solution by MINPACK's hybrid method with finite differences."""
    found = scipy.optimize.root(lambda u: equation(torch.from_numpy(u)).numpy(), np.zeros(size), options={"xtol": 1e-14})
    solution = torch.from_numpy(found.x)
    assert equation(solution).norm() < 1e-11, found.message
    return solution


def held(problem: Problem, a: float, classes: bool, tolerance: float = 1e-13, **options: int) -> Held:
    chain, _, _, states, feedback, goal = problem
    return hold(chain, states, feedback, goal, a, classes=classes, tolerance=tolerance, **options)


def residuals(problem: Problem, u: Tensor, a: float, classes: bool) -> Tensor:
    """What is left of each sample's equation, relative to what there is without control."""
    _, net, inputs, _, feedback, goal = problem
    equations = [left(net, x, feedback, g, a, classes) for x, g in zip(inputs, goal, strict=True)]
    each = zip(equations, u, strict=True)
    return torch.stack([equation(control).norm() / equation(torch.zeros_like(control)).norm() for equation, control in each])


@pytest.mark.parametrize("classes", [True, False], ids=["classes", "regression"])
@pytest.mark.parametrize("kind", KINDS)
def test_control_is_the_root_of_the_equation(kind: str, classes: bool) -> None:
    given = problem(kind, classes)
    _, net, inputs, _, feedback, goal = given
    for a in (0.02, 0.3):
        ours = held(given, a, classes)
        assert ours.residual.max() < 1e-11
        for sample, x in enumerate(inputs):
            u = root(left(net, x, feedback, goal[sample], a, classes), goal.shape[1])
            torch.testing.assert_close(ours.u[sample], u, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("classes", [True, False], ids=["classes", "regression"])
def test_without_leak_the_goal_is_reached(classes: bool) -> None:
    given = problem("tanh", classes)
    ours, (_, net, inputs, _, feedback, goal) = held(given, 0.0, classes), given
    for sample, x in enumerate(inputs):
        r = ref.controlled(net, x, feedback, ours.u[sample]).r[-1]
        torch.testing.assert_close(r.softmax(0) if classes else r, goal[sample], rtol=1e-9, atol=1e-10)


def test_one_linear_layer_is_solved_in_one_step() -> None:
    """`(Q + a I) u = goal - W x - b`."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 3).double().requires_grad_(False)
    chain, q = Chain(layer), torch.randn(3, 3).double()
    inputs, goal = torch.randn(4, 5).double(), torch.randn(4, 3).double()
    ours = hold(chain, chain.run(inputs), [q], goal, 0.2, classes=False, tolerance=1e-10)
    exact = torch.linalg.solve(q + 0.2 * torch.eye(3).double(), (goal - layer(inputs)).T).T
    torch.testing.assert_close(ours.u, exact, rtol=1e-11, atol=1e-12)
    assert ours.passes == 1


@pytest.mark.parametrize("a", [0.0, 1e-3, 0.3])
def test_control_of_classes_sums_to_zero(a: float) -> None:
    """Errors of probabilities do, and without a leak that direction has no effect and is left alone."""
    u = held(problem("tanh", True), a, True).u
    assert u.sum(1).abs().max() < 1e-11
    assert u.abs().max() > 0.1


def test_returned_state_is_the_network_under_the_returned_control() -> None:
    for kind in KINDS:
        given = problem(kind, True)
        _, net, inputs, states, feedback, _ = given
        ours = held(given, 0.05, True)
        moved = controlled_states(states, ours.state)
        assert torch.equal(moved.r[0], inputs)
        for sample, x in enumerate(inputs):
            point = ref.controlled(net, x, feedback, ours.u[sample])
            for i in range(len(net)):
                torch.testing.assert_close(ours.state.q[i][sample], point.apical[i], rtol=0, atol=1e-12)
                torch.testing.assert_close(moved.v[i][sample], point.v[i], rtol=0, atol=1e-12)
                torch.testing.assert_close(moved.r[i + 1][sample], point.r[i + 1], rtol=0, atol=1e-12)


MIX = torch.logspace(-2, 1.5, 150, dtype=torch.double)
"""Inputs of very different size: the network is nearly linear for some and saturated for others."""


@pytest.mark.parametrize("classes", [True, False], ids=["classes", "regression"])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_large_batches_of_very_different_samples(hidden: str, classes: bool) -> None:
    given = problem(hidden, classes, size=150, scales=MIX)
    ours = held(given, 0.01, classes, tolerance=1e-10)
    few = held(given, 0.01, classes, tolerance=1e-10, most=4)
    assert few.passes == 4
    assert few.residual.max() > 100 * few.residual.min()  # some samples are done long before others
    for each in (ours, few):
        torch.testing.assert_close(each.residual, residuals(given, each.u, 0.01, classes), rtol=1e-4, atol=1e-12)
    assert ours.residual.max() < 1.1e-10


@pytest.mark.parametrize("classes", [True, False], ids=["classes", "regression"])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_result_of_a_sample_does_not_depend_on_its_batch(hidden: str, classes: bool) -> None:
    chain, _, inputs, _, feedback, goal = problem(hidden, classes, size=150, scales=MIX)

    def u(samples: Tensor, tolerance: float) -> Tensor:
        states = chain.run(inputs[samples])
        return hold(chain, states, feedback, goal[samples], 0.01, classes=classes, tolerance=tolerance).u

    everyone, order = torch.arange(150), torch.randperm(150, generator=torch.Generator().manual_seed(0))
    for tolerance in (1e-10, 1e-3):  # where it stops does not depend on the others either
        whole = u(everyone, tolerance)
        torch.testing.assert_close(u(order, tolerance), whole[order], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(u(everyone[40:97], tolerance), whole[40:97], rtol=1e-9, atol=1e-9)
        for sample in range(0, 150, 10):
            torch.testing.assert_close(u(everyone[sample : sample + 1], tolerance)[0], whole[sample], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("hidden", HIDDEN)
def test_goals_that_cannot_be_held_end_with_an_honest_residual(hidden: str) -> None:
    """Feedback of the wrong sign breaks Condition 3, a bounded output cannot reach its goal: no error, no false claim."""
    torch.manual_seed(0)
    model, net = ref.mlp((6, 9, 8, 4), HIDDEN[hidden], nn.Tanh())
    chain = Chain(model.requires_grad_(False))
    inputs, goal = 5 * torch.randn(20, 6).double(), 3 * torch.randn(20, 4).double()
    states = chain.run(inputs)
    for feedback in ([-q for q in product_feedback(chain)], [3 * torch.randn_like(q) for q in random_feedback(chain)]):
        ours = hold(chain, states, feedback, goal, 1e-3, classes=False, tolerance=1e-10)
        assert ours.u.isfinite().all()
        assert (ours.residual > 1e-3).sum() > 3
        assert ours.residual.max() <= 1  # never worse than no control
        given = chain, net, inputs, states, feedback, goal
        torch.testing.assert_close(ours.residual, residuals(given, ours.u, 1e-3, False), rtol=1e-6, atol=1e-9)


def test_a_sample_without_any_slope_is_left_alone_and_stops_no_other() -> None:
    """A dead ReLU at the output makes the system of the first sample singular where there is no leak."""
    layer = nn.Linear(2, 2).double().requires_grad_(False)
    layer.weight.copy_(torch.eye(2))
    layer.bias.zero_()
    chain = Chain(nn.Sequential(layer, nn.ReLU()))
    inputs, goal = torch.tensor([[-1.0, -1.0], [1.0, 3.0]]).double(), torch.full((2, 2), 2.0).double()
    ours = hold(chain, chain.run(inputs), [torch.eye(2).double()], goal, 0.0, classes=False, tolerance=1e-10)
    assert ours.u.tolist() == [[0, 0], [1, -1]]
    assert ours.residual.tolist() == [1, 0]


def test_nan_does_not_hang_and_stays_in_its_sample() -> None:
    chain, _, inputs, states, feedback, goal = problem("tanh", True)
    alone = hold(chain, states, feedback, goal, 0.01, classes=True, tolerance=1e-10)
    inputs[2, 0] = float("nan")
    ours = hold(chain, chain.run(inputs), feedback, goal, 0.01, classes=True, tolerance=1e-10)
    others = torch.tensor([0, 1, 3, 4, 5])
    assert ours.residual[2].isnan()
    torch.testing.assert_close(ours.u[others], alone.u[others], rtol=1e-9, atol=1e-9)
    assert ours.passes == alone.passes


def test_large_outputs_cost_float32_no_digits() -> None:
    """Control that moves outputs of about 1000 by 0.001, which float32 resolves to 6e-5 there."""
    model, _ = ref.mlp((6, 9, 8, 4), nn.Tanh())
    model.requires_grad_(False).float()[-1].bias += 1000
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    delta = torch.randint(-9, 10, (8, 4), generator=torch.Generator().manual_seed(1)) / 2**10  # exact beside 1000
    found = []
    for kind in (torch.float32, torch.float64):
        chain = Chain(model.to(kind))
        states = chain.run(inputs.to(kind))
        goal = states.r[-1] + delta.to(kind)
        tolerance = 1e-5 if kind == torch.float32 else 1e-12
        found.append(hold(chain, states, product_feedback(chain), goal, 0.01, classes=False, tolerance=tolerance))
        assert found[-1].residual.max() < 2 * tolerance
        shift = states.r[-1].new_full((1,), 1e-5)
        assert float(error_left(states.r[-1], goal, shift, False).sub(delta - 1e-5).abs().max()) < 1e-9
    single, double = (each.u.double() for each in found)
    assert float((single - double).norm(dim=1).div(double.norm(dim=1)).max()) < 1e-4


@pytest.mark.parametrize("classes", [True, False])
def test_outcome_its_slope_and_its_error(classes: bool) -> None:
    output, goal, rho = torch.randn(3, 2, 5, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    slope = outcome_slope(output, classes)
    for sample, each in enumerate(output):
        exact = torch.autograd.functional.jacobian(lambda r: outcome(r.unsqueeze(0), classes)[0], each)
        torch.testing.assert_close(slope[sample], exact, rtol=1e-12, atol=1e-14)
        moved = (each + rho[sample]).exp()
        error = goal[sample] - (moved / moved.sum() if classes else each + rho[sample])
        torch.testing.assert_close(error_left(output, goal, rho, classes)[sample], error, rtol=1e-12, atol=1e-14)
