"""Equilibrium propagation against its equations, written out with complex numbers and loops, and its exact identities."""

import cmath
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from math import log2, pi

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical import models
from apical.core.credit import Loss
from apical.core.losses import squared_error
from apical.core.pooling import SoftmaxPool2d
from apical.core.sigmoids import DoubleSiLU, ShiftedSigmoid
from apical.diagnostics.alignment import gradients as against_exact
from apical.errors import ConfigError, InstabilityError, UnsupportedModelError
from apical.rules.equilibrium.network import homeostatic_loss, jacobian_product
from apical.rules.equilibrium.phases import Phases

EP = apical.EquilibriumPropagation
SIZES = (6, 5, 4, 3)


def network(activation: Callable[[], nn.Module] = ShiftedSigmoid, *, state: bool = False, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for given, size in pairwise(SIZES):
        layers += [nn.Linear(given, size), activation()]
    return nn.Sequential(*(layers if state else layers[:-1])).double()


def batch(size: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(size, SIZES[0], dtype=torch.double), torch.arange(size) % SIZES[-1]


def joined(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def estimated(rule: apical.CreditRule, seed: int = 2) -> Tensor:
    rule.zero_grad()
    inputs, targets = batch()
    torch.manual_seed(seed)
    rule(inputs, targets).backward()
    return joined(rule.model)


# The slow form: every phase by itself, complex matrices, loops over layers.

Error = Callable[[Tensor, Tensor], Tensor]


def cross_entropy_error(o: Tensor, y: Tensor) -> Tensor:
    return o.exp() / o.exp().sum(1, keepdim=True) - y


def squared_distance(o: Tensor, y: Tensor) -> Tensor:
    return o - y


def steep(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(2 - 4 * z))


def reference(
    model: nn.Sequential,
    points: dict[complex, complex],
    error: Error,
    free_steps: int,
    nudged_steps: int,
    phi: Callable[[Tensor], Tensor] = steep,
    damping: float = 0.0,
) -> list[Tensor]:
    """Gradients in the order of the parameters: `points` maps a nudge beta to the weight of dPhi/dW at its equilibrium."""
    linear = [module for module in model if isinstance(module, nn.Linear)]
    state = isinstance(model[-1], nn.Linear) is False
    w = [layer.weight.detach().to(torch.cdouble) for layer in linear]
    b = [layer.bias.detach().to(torch.cdouble) for layer in linear]
    x, labels = batch()
    x, y = x.to(torch.cdouble), F.one_hot(labels, SIZES[-1]).to(torch.cdouble)
    k_max = len(w) if state else len(w) - 1

    def push(s: list[Tensor]) -> Tensor:
        return error(s[-1], y) if state else error(s[-1] @ w[-1].T + b[-1], y) @ w[-1]

    def settle(s: list[Tensor], steps: int, beta: complex) -> list[Tensor]:
        for _ in range(steps):
            new = []
            for k in range(k_max):
                v = (x if k == 0 else s[k - 1]) @ w[k].T + b[k]
                if k + 1 < k_max:
                    v = v + s[k + 1] @ w[k + 1]
                elif beta:
                    v = v - beta * push(s)
                new.append((1 - damping) * phi(v) + damping * s[k])
            s = new
        return s

    free = settle([torch.zeros(len(x), len(w[k]), dtype=torch.cdouble) for k in range(k_max)], free_steps, 0)
    found = [torch.zeros_like(p, dtype=torch.cdouble) for layer in linear for p in (layer.weight, layer.bias)]
    for beta, weight in points.items():
        s = settle(free, nudged_steps, beta) if beta else free
        for k in range(k_max):
            found[2 * k] += weight * s[k].T @ (x if k == 0 else s[k - 1]) / len(x)
            found[2 * k + 1] += weight * s[k].sum(0) / len(x)
        if not state:
            e = error(s[-1] @ w[-1].T + b[-1], y)
            found[-2] += -beta * weight * e.T @ s[-1] / len(x)
            found[-1] += -beta * weight * e.sum(0) / len(x)
    return [each.real for each in found]


def circle(beta: float, n: int) -> dict[complex, complex]:
    roots = [cmath.rect(beta, 2 * pi * k / n) for k in range(n)]
    return {root: -1 / (n * root) for root in roots}


CASES = {
    "one-sided": ({"estimator": "one-sided"}, {0.3: -1 / 0.3, 0: 1 / 0.3}),
    "symmetric": ({"estimator": "symmetric"}, {0.3: -1 / 0.6, -0.3: 1 / 0.6}),
    "five-point": (
        {"estimator": "five-point"},
        {0.3: -8 / 3.6, -0.3: 8 / 3.6, 0.6: 1 / 3.6, -0.6: -1 / 3.6},
    ),
    **{f"N = {n}": ({"estimator": "holomorphic", "points": n}, circle(0.3, n)) for n in (2, 3, 4, 5, 6, 10)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize(("loss", "error"), [(F.cross_entropy, cross_entropy_error), (squared_error, squared_distance)])
def test_the_estimate_is_that_of_the_equations(case: str, state: bool, loss: Loss, error: Error) -> None:
    options, points = CASES[case]
    model = network(state=state)
    rule = EP(model, loss, beta=0.3, free_steps=7, nudged_steps=5, damping=0.25, **options)
    estimated(rule)
    expected = reference(model, points, error, 7, 5, damping=0.25)
    for own, slow in zip(model.parameters(), expected, strict=True):
        assert (own.grad - slow).abs().max() < 1e-12 * max(1.0, float(slow.abs().max()))


def test_tanh_states_may_be_complex() -> None:
    model = network(nn.Tanh)
    estimated(EP(model, beta=0.3, estimator="holomorphic", points=5, free_steps=7, nudged_steps=5))
    expected = reference(model, circle(0.3, 5), cross_entropy_error, 7, 5, torch.tanh)
    for own, slow in zip(model.parameters(), expected, strict=True):
        assert (own.grad - slow).abs().max() < 1e-12


def test_the_first_paper_cuts_off_after_a_damped_step() -> None:
    """s <- clip(s + eps (v - s), 0, 1), with the cost |s - d|^2 of twice our size at half the nudge."""
    torch.manual_seed(0)
    model = models.build("mlp-clip-5", (6,), 3).double()
    rule = EP(model, squared_error, "one-sided", beta=1.0, free_steps=6, nudged_steps=3, damping=0.5)
    estimated(rule)
    (w1, b1, w2, b2), (x, labels) = [p.detach() for p in model.parameters()], batch()
    d, eps = F.one_hot(labels, 3).double(), 0.5

    def settle(s1: Tensor, s2: Tensor, steps: int, beta: float) -> tuple[Tensor, Tensor]:
        for _ in range(steps):
            down1 = s1 - x @ w1.T - b1 - s2 @ w2
            down2 = s2 - s1 @ w2.T - b2 + beta * 2 * (s2 - d)
            s1, s2 = (s1 - eps * down1).clamp(0, 1), (s2 - eps * down2).clamp(0, 1)
        return s1, s2

    free = settle(torch.zeros(5, 5).double(), torch.zeros(5, 3).double(), 6, 0.0)
    nudged = settle(*free, 3, 0.5)
    expected = -(nudged[1].T @ nudged[0] - free[1].T @ free[0]) / 0.5 / 5  # the released rule, for its cost
    assert (2 * model[3].weight.grad - expected).abs().max() < 1e-12
    assert model[3].weight.grad.abs().max() > 1e-3


def finite_difference(model: nn.Sequential, loss: Loss, steps: int = 3000, h: float = 1e-5) -> Tensor:
    """Gradient of the loss at the free equilibrium."""
    rule, found = EP(model, loss, free_steps=steps), []
    x, y = batch()
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for i in range(len(flat)):
            values = []
            for sign in (1, -1):
                flat[i] += sign * h
                with torch.no_grad():
                    values.append(float(loss(rule.answer(x), y)))
                flat[i] -= sign * h
            found.append((values[0] - values[1]) / (2 * h))
    return torch.tensor(found, dtype=torch.double)


def test_estimates_reach_the_gradient_at_their_orders() -> None:
    exact = finite_difference(network(), F.cross_entropy, 200)
    orders = {"one-sided": 1, "symmetric": 2, "five-point": 4, "N = 3": 3, "N = 4": 4, "N = 6": 6}
    for case, order in orders.items():
        options = CASES[case][0]
        errors = []
        for beta in (0.05, 0.025) if case == "five-point" else (0.1, 0.05) if order < 6 else (0.2, 0.1):
            rule = EP(network(), beta=beta, free_steps=200, nudged_steps=200, **options)
            errors.append(float((estimated(rule) - exact).norm()))
        assert log2(errors[0] / errors[1]) == pytest.approx(order, rel=0.25), case
    rule = EP(network(), beta=0.05, free_steps=200, nudged_steps=200, estimator="holomorphic", points=8)
    assert float((estimated(rule) - exact).norm()) < 1e-6


def test_backpropagation_through_the_settling_is_the_implicit_gradient() -> None:
    model, (x, y) = network(), batch()
    rule = EP(model, free_steps=300)
    F.cross_entropy(rule.answer(x), y).backward()
    assert (joined(model) - finite_difference(network(), F.cross_entropy, 300)).norm() < 1e-8
    own, exact = against_exact(EP(model, beta=0.02, free_steps=300, nudged_steps=300), x, y)
    assert all((own[name] - exact[name]).norm() < 1e-2 * exact[name].norm() for name in own)


def test_two_points_of_the_circle_are_the_symmetric_estimate() -> None:
    both = [
        estimated(EP(network(), estimator=kind, points=2, free_steps=9, nudged_steps=5))
        for kind in ("symmetric", "holomorphic")
    ]
    assert (both[0] - both[1]).abs().max() < 1e-14


def test_a_random_sign_is_one_of_the_two() -> None:
    found = {round(float(estimated(EP(network(), estimator="random-sign"), seed).sum()), 12) for seed in range(8)}
    plus = estimated(EP(network(), estimator="one-sided"))
    assert len(found) == 2
    assert round(float(plus.sum()), 12) in found


def test_nudged_steps_are_truncated_backpropagation_through_time() -> None:
    """Gradient-descending updates: the contrast of step t is what BPTT adds t steps before the end."""
    model, (x, y) = network(), batch()
    rule, beta, reach = EP(model, free_steps=400), 1e-5, 12
    net, labels = rule.network, y
    with torch.no_grad():
        free = rule._free(x, noisy=False).s
        given, back = net.given(x), rule._back()

    weights = model[2].weight  # between the two layers of states
    settled, s, contrasts = [f.clone() for f in free], [f.clone() for f in free], []
    for _ in range(reach):
        with torch.no_grad():
            push = _push(net, labels, Phases(torch.tensor([beta], dtype=torch.double), torch.empty(0)), s)
            before, s = s, net.step(s, given, back, lambda _, push=push: push)
            contrasts.append((s[1].T @ s[0] - before[1].T @ before[0]) / beta / len(x))
    leaves = [weights.detach().clone().requires_grad_() for _ in range(reach)]
    states = [f.clone() for f in settled]
    for leaf in leaves:  # unrolled, each step with a weight of its own
        v1 = given[0] + states[1] @ leaf
        v2 = states[0] @ leaf.T + model[2].bias
        states = [ShiftedSigmoid()(v1), ShiftedSigmoid()(v2)]
    loss = F.cross_entropy(states[1] @ model[4].weight.T + model[4].bias, labels)
    through_time = list(reversed(torch.autograd.grad(loss, leaves)))
    for t, (contrast, exact) in enumerate(zip(contrasts, through_time, strict=True)):
        scale = max(float(exact.square().mean().sqrt()), 1e-12)
        assert float((contrast + exact).square().mean().sqrt()) / scale < 1e-3, t
        told = exact.abs() > 1e-9
        assert torch.equal(contrast[told].sign(), -exact[told].sign())


def test_going_round_the_circle_is_the_sum_over_its_points() -> None:
    """Once every phase settles, the mean over full cycles of what the nudge modulates is that of the N points."""
    options = {"estimator": "holomorphic", "beta": 0.2, "free_steps": 150, "nudged_steps": 150}
    for points, state in ((4, False), (5, True)):
        once = estimated(EP(network(state=state), points=points, **options))
        round_ = estimated(EP(network(state=state), points=points, cycles=2, **options))
        assert (once - round_).abs().max() < 1e-12
    short = EP(network(), points=4, cycles=3, **{**options, "nudged_steps": 3})
    assert (estimated(short) - estimated(EP(network(), points=4, **options))).abs().max() > 1e-6
    with pytest.raises(ConfigError, match="cycles"):
        EP(network(), cycles=1)


def test_nothing_to_learn_changes_nothing() -> None:
    model = network(state=True)
    rule = EP(model, squared_error, "holomorphic", points=4, free_steps=500)
    x, _ = batch()
    with torch.no_grad():
        answer = rule.answer(x)
    rule(x, answer).backward()
    assert joined(model).abs().max() < 1e-13


def test_a_nudge_that_leaves_the_branch_is_reported() -> None:
    """More points help only within the disc where equilibria are analytic; `off_branch` says whether they can."""
    told, errors = {}, {}
    for beta in (0.1, 1.6):
        model = network()
        for parameter in model.parameters():
            parameter.data *= 3
        rule = EP(model, beta=beta, free_steps=400, nudged_steps=400, estimator="holomorphic", points=8)
        F.cross_entropy(rule.answer(batch()[0]), batch()[1]).backward()
        exact = joined(model)
        errors[beta] = float((estimated(rule) - exact).norm() / exact.norm())
        told[beta] = float(rule(*batch()).logs["off_branch"])
    assert errors[0.1] < 1e-2
    assert told[0.1] < 1e-2
    assert errors[1.6] > 0.1
    assert told[1.6] > 0.05


# Convolutions and pooling: the equations through autograd.


def convolutional(pool: nn.Module, first: str) -> nn.Sequential:
    torch.manual_seed(0)
    block = [nn.Conv2d(1, 3, 3, padding=1), pool, ShiftedSigmoid()]
    block = block if first == "pool" else [block[0], block[2], block[1]]
    return nn.Sequential(
        *block, nn.Conv2d(3, 2, 3), ShiftedSigmoid(), nn.Flatten(), nn.Linear(8, 5), ShiftedSigmoid(), nn.Linear(5, 3)
    ).double()


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2), SoftmaxPool2d(2)])
@pytest.mark.parametrize("first", ["pool", "activation"])
def test_convolutions_settle_by_the_derivative_of_the_energy(pool: nn.Module, first: str) -> None:
    model = convolutional(pool, first)
    torch.manual_seed(1)
    x, y, beta = torch.rand(4, 1, 8, 8).double(), torch.arange(4) % 3, 0.2
    rule = EP(model, beta=beta, free_steps=6, nudged_steps=4, input_shape=(1, 8, 8))
    rule(x, y).backward()
    conv1, conv2, dense, reader = (m for m in model if isinstance(m, nn.Conv2d | nn.Linear))

    def phi_total(s: list[Tensor], nudge: float) -> Tensor:
        bottom = pool(conv1(x)) if first == "pool" else conv1(x)
        between = conv2(s[0]) if first == "pool" else conv2(pool(s[0]))
        total = (s[0] * bottom).sum() + (s[1] * between).sum() + (s[2] * dense(s[1].flatten(1))).sum()
        return total - nudge * F.cross_entropy(reader(s[2]), y, reduction="sum")

    def settle(s: list[Tensor], steps: int, nudge: float) -> list[Tensor]:
        for _ in range(steps):
            leaves = [each.detach().requires_grad_() for each in s]
            s = [ShiftedSigmoid()(g) for g in torch.autograd.grad(phi_total(leaves, nudge), leaves)]
        return s

    side = 4 if first == "pool" else 8
    free = settle(
        [torch.zeros(4, 3, side, side).double(), torch.zeros(4, 2, 2, 2).double(), torch.zeros(4, 5).double()], 6, 0.0
    )
    plus, minus = settle(free, 4, beta), settle(free, 4, -beta)
    objective = -(phi_total(plus, beta) - phi_total(minus, -beta)) / (2 * beta) / 4
    for parameter, expected in zip(
        model.parameters(), torch.autograd.grad(objective, list(model.parameters())), strict=True
    ):
        assert (parameter.grad - expected).abs().max() < 1e-12


def pooled_twice() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 3, padding=1), SoftmaxPool2d(2, 1.5), DoubleSiLU()),
        *(nn.Conv2d(3, 4, 3, padding=1), SoftmaxPool2d(2, 1.5), DoubleSiLU()),
        *(nn.Flatten(), nn.Linear(16, 3)),
    ).double()


def test_softmax_pooling_is_a_weighted_mean_of_each_window_and_analytic() -> None:
    torch.manual_seed(0)
    pool, v = SoftmaxPool2d(2, 3.0), torch.randn(2, 3, 5, 5).double()
    window = v[1, 2, 2:4, 0:2].flatten()
    assert torch.allclose(pool(v)[1, 2, 1, 0], (window * (3 * window).exp()).sum() / (3 * window).exp().sum(), atol=1e-14)
    assert torch.allclose(pool(v.to(torch.complex128)).real, pool(v), atol=1e-14)
    z, h = torch.complex(v, torch.rand_like(v)), 1e-6
    along, across = ((pool(z + step) - pool(z - step)) / (2 * step) for step in (h, 1j * h))
    assert (along - across).abs().max() < 1e-8  # Cauchy-Riemann
    with pytest.raises(ConfigError, match="softmax pooling must be positive"):
        SoftmaxPool2d(2, 0.0)


@pytest.mark.parametrize("points", [2, 3, 4])
def test_softmax_pooling_settles_by_the_complex_energy(points: int) -> None:
    """Every nudge for itself, by automatic differentiation of the energy of complex states and the limit's definition."""
    model, beta = pooled_twice(), 0.3
    torch.manual_seed(1)
    x, y = torch.rand(4, 1, 8, 8).double(), torch.arange(4) % 3
    options = {"estimator": "holomorphic", "points": points, "beta": beta, "free_steps": 9, "nudged_steps": 5}
    rule = EP(model, **options, input_shape=(1, 8, 8))
    rule(x, y).backward()
    conv1, conv2, reader = (m for m in model if isinstance(m, nn.Conv2d | nn.Linear))
    pool, act, label = model[1], model[2], F.one_hot(y, 3).double()
    kind = torch.complex128

    def conv(layer: nn.Conv2d, s: Tensor) -> Tensor:
        return F.conv2d(s, layer.weight.to(kind), layer.bias.to(kind), padding=1)

    def phi(s: list[Tensor], nudge: complex) -> Tensor:
        total = (s[0] * pool(conv(conv1, x.to(kind)))).sum() + (s[1] * pool(conv(conv2, s[0]))).sum()
        logits = s[1].flatten(1) @ reader.weight.T.to(kind) + reader.bias
        return total - nudge * (logits.exp().sum(1).log() - (logits * label).sum(1)).sum()

    def settle(s: list[Tensor], steps: int, nudge: complex) -> list[Tensor]:
        for _ in range(steps):
            leaves = [each.detach().requires_grad_() for each in s]
            moves = torch.autograd.grad(phi(leaves, nudge), leaves, torch.ones((), dtype=kind))
            s = [act(move.conj()) for move in moves]  # autograd gives the conjugate of a derivative
        return s

    free = settle([torch.zeros(4, 3, 4, 4, dtype=kind), torch.zeros(4, 4, 2, 2, dtype=kind)], 9, 0)
    objective = torch.zeros((), dtype=kind)
    for p in range(points):
        nudge = beta * cmath.exp(2j * pi * p / points)
        objective = objective - phi(settle(free, 5, nudge), nudge) / nudge / points / 4
    parameters = list(model.parameters())
    for parameter, expected in zip(parameters, torch.autograd.grad(objective.real, parameters), strict=True):
        assert (parameter.grad - expected).abs().max() < 1e-12


def test_complex_nudges_of_a_pooled_network_come_near_backpropagation() -> None:
    model = pooled_twice()
    torch.manual_seed(1)
    x, y = torch.rand(4, 1, 8, 8).double(), torch.arange(4) % 3
    errors = []
    for points in (2, 4):
        rule = EP(
            model, estimator="holomorphic", points=points, beta=0.3, free_steps=100, nudged_steps=100, input_shape=(1, 8, 8)
        )
        own, exact = against_exact(rule, x, y)
        errors.append(max(float((own[name] - exact[name]).norm() / exact[name].norm()) for name in own))
        rule.detach()
    assert errors[0] < 0.05
    assert errors[1] < 0.1 * errors[0]


# Directed weights.


def test_directed_weights_that_are_alike_are_symmetric() -> None:
    options = {"free_steps": 9, "nudged_steps": 5}
    directed = EP(network(), weights="directed", asymmetry=0.0, **options)
    assert torch.equal(directed.back[0].data, directed.model[2].weight.data)
    assert (estimated(directed) - estimated(EP(network(), **options))).abs().max() < 1e-14
    assert (directed.back[0].grad - directed.model[2].weight.grad).abs().max() < 1e-14


def test_different_updates_are_what_each_synapse_sees() -> None:
    model = network()
    rule = EP(model, weights="directed", update="different", free_steps=9, nudged_steps=5, beta=0.3)
    estimated(rule)
    x, y = batch()
    with torch.no_grad():
        free = rule._free(x, noisy=False).s
        moved = []
        for beta in (0.3, -0.3):
            one = Phases(torch.tensor([beta], dtype=torch.double), torch.empty(0).double())
            net = rule.network
            push = partial(_push, net, y, one)
            moved.append(net.settle(free, net.given(x), rule._back(), 5, push).s)
        d = [(a - b) / 0.6 / len(x) for a, b in zip(*moved, strict=True)]
    assert (model[0].weight.grad + d[0].T @ x).abs().max() < 1e-12
    assert (model[2].weight.grad + d[1].T @ free[0]).abs().max() < 1e-12
    assert (rule.back[0].grad + free[1].T @ d[0]).abs().max() < 1e-12
    assert not torch.equal(rule.back[0].data, model[2].weight.data)


def _push(net: object, y: Tensor, beta: Phases, s: list[Tensor]) -> Tensor:
    return net.nudged_by(net.errors(F.cross_entropy, s, y, 0), beta, s)


def test_the_error_vector_is_the_adjoint_up_to_the_antisymmetric_part() -> None:
    """d u / d beta = J^-1 J^T delta = delta - 2 S^-1 A delta + O(A^2), delta = -J^-T (dl/du)^T, sign of beta as in 2023."""
    torch.manual_seed(0)
    n = 7
    half = torch.randn(n, n).double() / n
    symmetric, antisymmetric = (half + half.T) / 2 - 2 * torch.eye(n).double(), torch.randn(n, n).double() / n
    antisymmetric = (antisymmetric - antisymmetric.T) / 2
    pull = torch.randn(n).double()
    gaps = []
    for scale in (0.0, 0.1, 0.01, 0.001):
        j = symmetric + scale * antisymmetric
        moved, delta = -torch.linalg.solve(j, pull), -torch.linalg.solve(j.T, pull)
        if scale == 0:
            assert (moved - delta).norm() < 1e-14
        first = delta - 2 * torch.linalg.solve(symmetric, scale * antisymmetric @ delta)
        gaps.append(float((moved - first).norm() / delta.norm()))
    assert gaps[2] / gaps[1] == pytest.approx(0.01, rel=0.25)
    assert gaps[3] / gaps[2] == pytest.approx(0.01, rel=0.25)


def test_a_network_with_symmetric_weights_moves_by_its_adjoint() -> None:
    """d s / d beta of the free state, through the nudged phase, against -dL/dv by the implicit function theorem."""
    model, (x, y) = network(), batch()
    rule, net = EP(model, free_steps=600), None
    net = rule.network
    with torch.no_grad():
        free = rule._free(x, noisy=False).s
        beta = Phases(torch.tensor([1e-6], dtype=torch.double), torch.empty(0).double())
        plus = net.settle(free, net.given(x), rule._back(), 600, partial(_push, net, y, beta)).s
    bias = [module.bias for module in model if isinstance(module, nn.Linear)]
    exact = torch.autograd.grad(F.cross_entropy(rule.answer(x), y), bias)
    for moved, f, gradient in zip(plus, free, exact, strict=False):
        assert ((moved - f).sum(0) / 1e-6 / len(x) + gradient).abs().max() < 1e-5 * gradient.abs().max()


def test_the_homeostatic_loss_is_the_antisymmetric_part() -> None:
    torch.manual_seed(0)
    j = torch.randn(5, 5).double()
    eye = torch.eye(5).double()  # rows e_i: their sum is the trace form
    found = 5 * 5 * homeostatic_loss(lambda d: [d[0] @ j.T], [eye])
    assert float(found) == pytest.approx(float((j - j.T).square().sum() / 2), rel=1e-12)
    shifted = j + torch.diag(torch.randn(5).double())
    again = 5 * 5 * homeostatic_loss(lambda d: [d[0] @ shifted.T], [eye])
    assert float(again) == pytest.approx(float(found), rel=1e-12)
    alike = (j + j.T).requires_grad_()
    loss = homeostatic_loss(lambda d: [d[0] @ alike.T], [eye])
    assert torch.autograd.grad(loss, alike)[0].abs().max() < 1e-12


def test_homeostasis_makes_weights_alike() -> None:
    rule = EP(network(), weights="directed", homeostasis=1.0, free_steps=5, nudged_steps=3)
    stages, back = rule.network.stages, list(rule.back)
    noise = [torch.eye(9).double()[:, :5], torch.eye(9).double()[:, 5:]]
    found = 81 * homeostatic_loss(lambda d: jacobian_product(stages, back, d), noise)
    weight = rule.model[2].weight
    assert found.item() == pytest.approx((weight - back[0]).square().sum().item(), rel=1e-12)
    before = (weight - back[0]).norm().item()
    optimizer = torch.optim.SGD(rule.parameters(), 0.1)
    for _ in range(30):
        rule.zero_grad()
        rule(*batch()).backward()
        optimizer.step()
    assert (rule.model[2].weight - rule.back[0]).norm().item() < 0.5 * before


# What it refuses and what it promises.


def test_noise_is_for_training_only() -> None:
    rule, quiet = EP(network(), noise=0.1), EP(network())
    x, y = batch()
    assert torch.equal(rule.answer(x), quiet.answer(x))
    assert not torch.equal(rule(x, y).output, quiet(x, y).output)


def test_a_tolerance_ends_phases_early() -> None:
    x, y = batch()
    early = EP(network(), free_steps=4000, nudged_steps=4000, tolerance=1e-12)
    late = EP(network(), free_steps=400, nudged_steps=400)
    assert (estimated(early) - estimated(late)).abs().max() < 1e-9
    assert early(x, y).logs["free_residual"] < 1e-12


def test_relu_states_are_cut_off_unless_asked_otherwise() -> None:
    model = network(nn.ReLU)
    assert isinstance(EP(model).network.stages[0].activation, nn.Hardtanh)
    assert isinstance(EP(model, estimator="holomorphic").network.stages[0].activation, ShiftedSigmoid)
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.weight.data.fill_(1.0)
    assert EP(model)(*batch()).loss.isfinite()
    with pytest.raises(InstabilityError, match="bounded"):
        EP(model, bounded=False, free_steps=2000)(*batch())


def test_complex_nudges_need_what_is_analytic() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'0' .*Hardtanh"):
        EP(network(nn.Hardtanh), estimator="holomorphic")
    with pytest.raises(UnsupportedModelError, match="'0' is next to MaxPool2d"):
        EP(convolutional(nn.MaxPool2d(2), "pool"), estimator="holomorphic", input_shape=(1, 8, 8))
    with pytest.raises(UnsupportedModelError, match="is next to SoftmaxPool2d"):
        EP(convolutional(SoftmaxPool2d(2), "activation"), estimator="holomorphic", input_shape=(1, 8, 8))
    with pytest.raises(ConfigError, match="cross_entropy, squared_error, mse_loss"):
        EP(network(), F.l1_loss, estimator="holomorphic")
    assert EP(network(DoubleSiLU), estimator="holomorphic")(*batch()).loss.isfinite()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"beta": 0.0}, "beta"),
        ({"points": 1}, "points"),
        ({"free_steps": 0}, "free_steps"),
        ({"nudged_steps": 2.5}, "nudged_steps must be a whole number"),
        ({"weights": "directed", "asymmetry": float("nan")}, "asymmetry"),
        ({"damping": 1.0}, "damping"),
        ({"noise": -1.0}, "noise"),
        ({"estimator": "best"}, "estimator"),
        ({"weights": "none"}, "weights"),
        ({"homeostasis": 1.0}, "homeostasis"),
        ({"rates": (1.0,)}, "rates"),
        ({"rates": (1.0, -1.0, 1.0)}, "rates"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        EP(network(), **options)


def test_a_read_out_alone_has_nothing_to_settle() -> None:
    with pytest.raises(UnsupportedModelError, match="'0'"):
        EP(nn.Sequential(nn.Linear(4, 3)))
    with pytest.raises(UnsupportedModelError, match="'1'"):
        EP(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)))


def test_input_that_cannot_be_settled_is_named() -> None:
    x, y = batch()
    with pytest.raises(InstabilityError, match="the inputs hold NaN"):
        EP(network())(x * float("nan"), y)
    with pytest.raises(UnsupportedModelError, match=r"'0' gave .*input_shape"):
        EP(convolutional(nn.MaxPool2d(2), "pool"), input_shape=(1, 8, 8))(torch.rand(2, 1, 10, 10).double(), y[:2])
    with pytest.raises(ConfigError, match=r"\(3,\) do not fit outputs of shape \(3, 3\)"):
        squared_error(torch.rand(3, 3), torch.rand(3))


def test_rates_multiply_gradients_layer_by_layer() -> None:
    plain, rated = EP(network()), EP(network(), rates=(2.0, 1.0, 0.5))
    estimated(plain), estimated(rated)
    for number, factor in ((0, 2.0), (2, 1.0), (4, 0.5)):
        for own, other in zip(rated.model[number].parameters(), plain.model[number].parameters(), strict=True):
            assert (own.grad - factor * other.grad).abs().max() < 1e-14


def test_the_error_of_the_mean_square_is_its_derivative() -> None:
    x, _ = batch()
    y = torch.rand(5, 3, dtype=torch.double)

    def mean_square(output: Tensor, targets: Tensor) -> Tensor:  # not known by name: found by autograd
        return F.mse_loss(output, targets)

    found = []
    for loss, estimator in ((F.mse_loss, "symmetric"), (mean_square, "symmetric"), (F.mse_loss, "holomorphic")):
        rule = EP(network(), loss, estimator, beta=0.1, points=2, free_steps=9, nudged_steps=5)
        rule(x, y).backward()
        found.append(joined(rule.model))
    assert (found[0] - found[1]).abs().max() < 1e-13
    assert (found[0] - found[2]).abs().max() < 1e-13


def test_other_losses_find_their_error_by_autograd() -> None:
    smoothed = partial(F.cross_entropy, label_smoothing=0.0)
    both = [estimated(EP(network(), loss, free_steps=9, nudged_steps=5)) for loss in (smoothed, F.cross_entropy)]
    assert (both[0] - both[1]).abs().max() < 1e-13


def test_a_nudged_phase_that_runs_away_is_refused() -> None:
    """The free phase of one layer of states is a feed-forward pass, whatever the activation."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 3))
    with pytest.raises(InstabilityError, match="the nudged phase of equilibrium propagation diverges"):
        EP(model, loss=F.mse_loss, beta=1e6)(torch.randn(6, 4), torch.randn(6, 3))


@pytest.mark.parametrize("estimator", ["one-sided", "symmetric"])
def test_a_loss_of_some_samples_is_theirs_alone(estimator: str) -> None:
    """Samples do not meet in the network, so a loss of the first three of six trains as the three alone do."""

    def few(output: Tensor, targets: Tensor) -> Tensor:
        assert len(output) == len(targets) == 6  # no phases among the samples
        return (output[:3] - targets[:3]).pow(4).mean()

    def fourth(output: Tensor, targets: Tensor) -> Tensor:
        return (output - targets).pow(4).mean()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Hardtanh(0, 1), nn.Linear(5, 3)).double()
    x, y, gradients = torch.rand(6, 6, dtype=torch.float64), torch.rand(6, 3, dtype=torch.float64), []
    for loss, rows, beta in ((few, 6, 0.25), (fourth, 3, 0.5)):  # a mean over six has half of each error
        model.zero_grad()
        rule = EP(model, loss, estimator=estimator, beta=beta, free_steps=400, nudged_steps=400)  # type: ignore[arg-type]
        rule(x[:rows], y[:rows]).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for own, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("rule", [EP, apical.CorInfoMax])
@pytest.mark.parametrize("loss", [F.mse_loss, squared_error])
def test_whole_numbers_of_the_outputs_shape_are_values(rule: Callable[..., apical.CreditRule], loss: Loss) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Hardtanh(0, 1), nn.Linear(5, 3)).double()
    x, y, gradients = torch.rand(6, 6, dtype=torch.float64), torch.randint(2, (6, 3)), []
    for targets in (y, y.double()):
        torch.manual_seed(1)
        model.zero_grad()
        rule(model, loss)(x, targets).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert gradients[0]
