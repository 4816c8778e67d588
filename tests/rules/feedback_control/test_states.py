"""Solvers of the controlled chain against dense matrices and against the dynamics they replace, float64."""

import itertools

import pytest
import torch
from tests.rules import dfc_reference as ref
from torch import Tensor, nn

from apical.core.chain import Chain, States
from apical.rules.feedback_control import states as control
from apical.rules.feedback_control.trajectory import Loop, trajectory


def problem(hidden: nn.Module, seed: int = 0) -> tuple[Chain, ref.Net, Tensor, States, list[Tensor]]:
    """A dense chain with output tanh, three samples, their states, and feedback that is not the product of the weights."""
    model, net = ref.mlp((5, 7, 6, 3), hidden, nn.Tanh(), seed=seed)
    model.requires_grad_(False)
    chain = Chain(model)
    inputs = torch.randn(3, 5, dtype=torch.double)
    feedback = [q + 0.1 * torch.randn_like(q) for q in control.product_feedback(chain)]
    return chain, net, inputs, chain.run(inputs), feedback


def blocks(net: ref.Net, inputs: Tensor) -> list[list[Tensor]]:
    """J_i of every sample."""
    return [ref.jacobian(net, x) for x in inputs]


def test_loop_gains_are_the_products_and_the_resolvent_inverts_their_sum() -> None:
    chain, net, inputs, states, feedback = problem(nn.Tanh())
    jacobian = control.output_jacobian(chain, states)
    gains, resolvent = control.loop_gains(jacobian, feedback), control.Resolvent(chain, states, feedback, 0.3)
    right = torch.randn(3, 3, dtype=torch.double)
    for sample, rows in enumerate(blocks(net, inputs)):
        products = [block @ q for block, q in zip(rows, feedback, strict=True)]
        for ours, theirs in zip(gains, products, strict=True):
            torch.testing.assert_close(ours[sample], theirs, rtol=1e-12, atol=1e-14)
        exact = torch.linalg.solve(sum(products) + 0.3 * torch.eye(3).double(), right[sample])
        torch.testing.assert_close(resolvent.solve(right)[sample], exact, rtol=1e-11, atol=1e-13)
        weighted = 3 * products[0] + 2 * products[1] + products[2]
        torch.testing.assert_close(resolvent.by_depth(right)[sample], weighted @ right[sample], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 7, 100])
def test_batches_are_cut_into_parts_and_put_together(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, net, _, _, feedback = problem(nn.Tanh())
    inputs = torch.randn(7, 5, dtype=torch.double)
    states = chain.run(inputs)
    monkeypatch.setattr(control, "CACHE", samples * 3 * 7 * 8)  # bytes of n_L rows of the widest stage, 7 neurons
    seen: list[int] = []
    whole, forward = control.output_jacobian, control.responses
    monkeypatch.setattr(control, "output_jacobian", lambda c, s: seen.append(len(s.r[0])) or whole(c, s))
    monkeypatch.setattr(control, "responses", lambda c, g, p: seen.append(len(g[0])) or forward(c, g, p))
    product = sum(torch.stack([rows[i] @ q for rows in blocks(net, inputs)]) for i, q in enumerate(feedback))
    gain, mean = control.gain_and_mean(chain, states, feedback)
    backward = seen.copy()
    seen.clear()
    for ours, parts in ((gain, backward), (control.loop_gain(chain, states, feedback), seen)):
        assert sum(parts) == 7
        assert max(parts) <= samples
        assert len(parts) == -(-7 // samples)
        torch.testing.assert_close(ours, product, rtol=1e-12, atol=1e-14)
    for i, rows in enumerate(zip(*blocks(net, inputs), strict=True)):
        torch.testing.assert_close(mean[i], torch.stack(rows).mean(0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_jacobian_of_the_lower_stages(stages: int) -> None:
    chain, net, inputs, states, _ = problem(nn.Sigmoid())
    rows = control.output_jacobian(chain, states, stages)
    assert len(rows) == stages
    for sample, expected in enumerate(blocks(net[:stages], inputs)):
        for ours, theirs in zip(rows, expected, strict=True):
            torch.testing.assert_close(ours[sample], theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("hidden", [nn.Tanh(), nn.ReLU(), nn.Softplus()])
def test_controlled_pass_is_the_forward_pass_with_control_added(hidden: nn.Module) -> None:
    chain, net, inputs, states, feedback = problem(hidden)
    u = torch.randn(3, 3, dtype=torch.double)
    state = control.controlled_pass(chain, states, control.apical(chain, feedback, u))
    credit = control.soma_minus_basal(chain, states, state, state.q)
    for sample, x in enumerate(inputs):
        point = ref.controlled(net, x, feedback, u[sample])
        for i, section in enumerate(net):
            torch.testing.assert_close(states.v[i][sample] + state.d[i][sample], point.v[i], rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(
                states.r[i + 1][sample] + state.rho[i][sample], point.r[i + 1], rtol=1e-12, atol=1e-13
            )
            expected = section.phi(point.v[i]) - section.phi(point.basal[i])
            torch.testing.assert_close(credit[i][sample], expected, rtol=1e-11, atol=1e-13)


def test_linear_pass_is_the_derivative_of_the_controlled_pass() -> None:
    chain, _, _, states, feedback = problem(nn.Tanh())
    u = torch.randn(3, 3, dtype=torch.double)
    pushes = control.apical(chain, feedback, u)
    response = control.linear_pass(chain, control.slopes(chain, states), pushes)
    step = 1e-6
    ahead = control.controlled_pass(chain, states, [step * push for push in pushes]).rho
    behind = control.controlled_pass(chain, states, [-step * push for push in pushes]).rho
    for linear, plus, minus in zip(response, ahead, behind, strict=True):
        torch.testing.assert_close(linear, (plus - minus) / (2 * step), rtol=1e-8, atol=1e-9)


def test_newton_halves_the_digits_to_go_and_meets_the_equation() -> None:
    """The residual is that of the nonlinear equation; a chord step gains a factor of the order of the nudge."""
    chain, net, inputs, states, feedback = problem(nn.Tanh())
    resolvent = control.Resolvent(chain, states, feedback, 0.2)
    delta = 0.02 * torch.randn(3, 3, dtype=torch.double)
    residuals = []
    for iterations in range(4):
        u, _, residual = control.steady_state(chain, states, feedback, delta, resolvent, iterations)
        for sample, x in enumerate(inputs):
            shift = ref.controlled(net, x, feedback, u[sample]).r[-1] - ref.feed_forward(net, x)[1][-1]
            torch.testing.assert_close(residual[sample], shift + 0.2 * u[sample] - delta[sample], rtol=0, atol=1e-14)
        residuals.append(float(residual.norm()))
    assert residuals[0] > 1e-6
    for before, after in itertools.pairwise(residuals):
        assert after < 0.1 * before


@pytest.mark.parametrize("leak", ["code", "paper"])
@pytest.mark.parametrize("k_p", [0.0, 0.6])
def test_time_average_of_a_linear_network_is_exact_once_settled(leak: str, k_p: float) -> None:
    """With linear layers the discrete loop is linear at every nudge: no error but the un-settled remainder is left."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 3)).double().requires_grad_(False)
    chain = Chain(model)
    states, feedback = chain.run(torch.randn(3, 5).double()), control.product_feedback(chain)
    loop = Loop(0.5, k_p, 0.05, 2000, 0.1, leak)
    delta = torch.randn(3, 3, dtype=torch.double)
    resolvent = control.Resolvent(chain, states, feedback, loop.a)
    u, state, _ = control.steady_state(chain, states, feedback, delta, resolvent, 0)
    averaged = control.time_averaged(chain, feedback, state, resolvent, u, loop)
    sums = [torch.zeros_like(v) for v in states.v]
    for moment in trajectory(chain, states, feedback, lambda rho: delta - rho, loop):
        for total, d, basal in zip(sums, moment.d, moment.basal, strict=True):
            total += d - basal
    torch.testing.assert_close(moment.u, u, rtol=1e-10, atol=1e-12)
    for ours, total, q in zip(averaged, sums, state.q, strict=True):
        torch.testing.assert_close(ours, total / loop.points, rtol=1e-9, atol=1e-11)
        assert float((ours - q).norm() / q.norm()) > 1e-4  # the approach to rest does count


def test_feedback_of_one_layer_is_the_identity() -> None:
    chain = Chain(nn.Linear(4, 3))
    for start in (control.product_feedback, control.random_feedback):
        (q,) = start(chain)
        assert torch.equal(q, torch.eye(3))
        assert not q.requires_grad
