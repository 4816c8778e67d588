"""States on request, feedback set from outside, and generators: against the rules' equations and their own updates."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical import CreditRule
from apical.core.losses import squared_error
from apical.errors import ConfigError


def network(activation: type[nn.Module] = nn.Tanh, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), activation(), nn.Linear(6, 4), activation(), nn.Linear(4, 3)).double()


def batch(size: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(size, 5, dtype=torch.double, generator=generator), torch.arange(size) % 3


def learned(rule: CreditRule, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    rule.zero_grad()
    rule(inputs, targets).backward()
    return [p.grad.clone() for p in rule.parameters() if p.grad is not None]


# Deep feedback control.

DFC = {
    "ss": {"variant": "ss", "nudge": 0.5, "alpha": 0.1},
    "ssa": {"variant": "ssa", "nudge": 0.5, "alpha": 0.1},
    "dfc": {"variant": "dfc", "nudge": 0.5, "alpha": 0.1},
    "ss, simulated": {"variant": "ss", "solver": "simulate", "points": 60, "dt": 0.1, "tau": 0.3, "alpha": 0.1},
    "strong": {},
    "strong, simulated": {"solver": "simulate", "points": 60, "dt": 0.01, "tau": 0.05, "sigma": 0.0, "learn": "none"},
}


def control(name: str, **options: object) -> apical.DeepFeedbackControl | apical.StrongDeepFeedbackControl:
    kind = apical.StrongDeepFeedbackControl if name.startswith("strong") else apical.DeepFeedbackControl
    return kind(network(), **{"learn": "none", **DFC[name], **options})


@pytest.mark.parametrize("name", DFC)
def test_states_under_control_obey_the_equations(name: str) -> None:
    rule = control(name)
    inputs, labels = batch()
    s = rule.states(inputs, labels)
    assert set(s) == {"v_minus", "r_minus", "target", "u", "v", "r", "v_ff", "v_fb"}
    rates, forward = inputs, inputs
    for i, stage in enumerate(rule.chain.stages):
        assert (s["v_minus"][i] - stage.layer(forward)).abs().max() < 1e-12
        assert (s["r_minus"][i] - stage.activation(s["v_minus"][i])).abs().max() < 1e-12
        assert (s["v_ff"][i] - stage.layer(rates)).abs().max() < 1e-11
        assert (s["v_fb"][i] - s["u"][0] @ rule.q[i].T).abs().max() < 1e-12
        if "simulated" not in name:
            assert (s["v"][i] - s["v_ff"][i] - s["v_fb"][i]).abs().max() < 1e-11
        assert (s["r"][i] - stage.activation(s["v"][i])).abs().max() < 1e-12
        rates, forward = s["r"][i], s["r_minus"][i]
    output, target, u = s["r_minus"][-1], s["target"][0], s["u"][0]
    soft = torch.full((7, 3), 0.005, dtype=torch.double).scatter_(1, labels[:, None], 0.99)
    wished = (
        soft if name.startswith("strong") else output - rule.nudge * (output.softmax(1) - F.one_hot(labels, 3))  # per sample
    )
    assert (target - wished).abs().max() < 1e-12
    if name == "ss":
        assert (target - s["r"][-1] - 0.1 * u).norm() < 1e-3 * (target - output).norm()
    if name == "strong":
        assert (target - s["r"][-1].softmax(1) - 1e-3 * u).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["ss", "ssa", "ss, simulated", "strong"])
def test_the_update_is_that_of_the_states(name: str) -> None:
    rule = control(name)
    inputs, labels = batch()
    own = learned(rule, inputs, labels)
    s = rule.states(inputs, labels)
    below = [inputs, *s["r"]]
    for i, stage in enumerate(rule.chain.stages):
        signal = s["r"][i] - stage.activation(s["v_ff"][i])
        expected = -rule.factor / 7 * signal.T @ below[i]
        assert (own[2 * i] - expected).abs().max() < 1e-10 * rule.factor


# The other rules.


@pytest.mark.parametrize("variant", ["dtp", "drl", "linear", "hidden", "control", "lee"])
def test_targets_are_those_that_the_update_follows(variant: str) -> None:
    rule = apical.DifferenceTargetPropagation(network(), variant=variant, learn=False)
    inputs, labels = batch()
    own = learned(rule, inputs, labels)
    s = rule.states(inputs, labels)
    assert (s["t"][-1] - s["h"][-1] + rule.eta * (s["h"][-1].softmax(1) - F.one_hot(labels, 3))).abs().max() < 1e-14
    below = [inputs, *s["h"]]
    for i, (h, t) in enumerate(zip(s["h"], s["t"], strict=True)):
        slope = 1 - h * h if i < 2 else torch.ones_like(h)
        expected = -((t - h) * slope).T @ below[i] / (rule.eta * 7)
        assert (own[2 * i] - expected).abs().max() < 1e-12


def test_the_logs_have_the_reconstruction_loss_of_every_map() -> None:
    rule = apical.DifferenceTargetPropagation(network(), variant="dtp", generator=torch.Generator().manual_seed(0))
    inputs, labels = batch()
    rule.generator.manual_seed(5)
    logs = rule(inputs, labels).logs
    assert list(logs) == ["reconstruction", "reconstruction 0", "reconstruction 2"]
    h = [each.detach() for each in rule.states(inputs, labels)["h"]]
    again = torch.Generator().manual_seed(5)
    losses = []
    for i, g in enumerate(rule.maps):
        disturbed = h[i] + rule.sigma * torch.randn(h[i].shape, dtype=torch.double, generator=again)
        above = rule.chain.stages[i + 1]
        raised = above.activation(above.layer(disturbed))
        back = torch.tanh(raised @ g.q.T + g.c)
        losses.append(0.5 * (back - disturbed).square().sum() / 7)
    for i, expected in zip((0, 2), losses, strict=True):
        assert abs(logs[f"reconstruction {i}"] - expected) < 1e-12
    assert abs(logs["reconstruction"] - sum(losses) / 2) < 1e-12


@pytest.mark.parametrize("estimator", ["one-sided", "symmetric", "five-point", "holomorphic"])
def test_free_and_nudged_states_give_the_estimate(estimator: str) -> None:
    rule = apical.EquilibriumPropagation(
        network(nn.Sigmoid), squared_error, estimator=estimator, points=5, free_steps=9, nudged_steps=5
    )
    inputs, labels = batch()
    own = learned(rule, inputs, labels)
    s = rule.states(inputs, labels)
    beta, nudged, free = s["beta"][0], s["nudged"], s["free"]
    assert all(each.shape == (len(beta), 7, n) for each, n in zip(nudged, (6, 4), strict=True))
    assert all(each.is_complex() == (estimator == "holomorphic") for each in (beta, *nudged))
    sizes = {"one-sided": [0.4], "symmetric": [0.4, -0.4], "five-point": [0.4, -0.4, 0.8, -0.8]}
    if estimator == "holomorphic":  # of each conjugate pair one
        points = 0.4 * torch.exp(2j * torch.pi * torch.arange(3).double() / 5)
        assert (beta - points).abs().max() < 1e-12
        weights = torch.tensor([1.0, 2.0, 2.0]).double() / (5 * points)
    else:
        assert beta.tolist() == pytest.approx(sizes[estimator])
        factors = {"one-sided": [1.0], "symmetric": [0.5, -0.5], "five-point": [8 / 12, -8 / 12, -1 / 12, 1 / 12]}
        weights = torch.tensor(factors[estimator], dtype=torch.double) / 0.4
    product = sum(w * up.T @ down for w, up, down in zip(weights, nudged[1], nudged[0], strict=True))
    if estimator == "one-sided":
        product = product - free[1].T @ free[0] / 0.4
    assert (own[2] + torch.as_tensor(product).real / 7).abs().max() < 1e-12


def test_the_states_of_nudges_that_go_round_are_those_of_the_last_turn() -> None:
    rule = apical.EquilibriumPropagation(
        network(nn.Sigmoid), squared_error, "holomorphic", points=4, cycles=3, free_steps=9, nudged_steps=400
    )
    s = rule.states(*batch())
    assert (s["beta"][0] - 0.4 * torch.tensor([1, 1j, -1, -1j])).abs().max() < 1e-7
    once = apical.EquilibriumPropagation(
        rule.model, squared_error, "holomorphic", points=4, nudged_steps=400, free_steps=400
    )
    settled = once.states(*batch())  # at 1, -1 and i
    for round_, at_once in zip(s["nudged"], settled["nudged"], strict=True):
        assert (round_[[0, 2, 1]] - at_once).abs().max() < 1e-10
        assert (round_[3] - at_once[2].conj()).abs().max() < 1e-10


@pytest.mark.parametrize("nudge", ["one-sided", "random-sign", "symmetric"])
def test_the_phases_of_corinfomax_give_its_update(nudge: str) -> None:
    model = network(nn.ReLU)
    rule = apical.CorInfoMax(model, nudge=nudge, generator=torch.Generator().manual_seed(0)).eval()
    inputs, labels = batch()
    rule.generator.manual_seed(3)
    own = learned(rule, inputs, labels)
    rule.generator.manual_seed(3)
    s = rule.states(inputs, labels)
    width = float(s["width"][0])
    assert width == (2.0 if nudge == "symmetric" else 1.0) or (nudge == "random-sign" and width == -1.0)
    back = rule.backward[0].detach()
    up, down = ((s[k][0] - s[k][1] @ back.T).T @ s[k][1] for k in ("nudged", "against"))
    expected = -(up - down) / (width * rule.epsilon * 7)
    assert min((each - expected).abs().max() for each in own if each.shape == back.shape) < 1e-12


def test_the_activities_and_codes_of_counter_current_learning() -> None:
    rule = apical.CounterCurrentLearning(network(nn.ELU), input_pair=True)
    s = rule.states(*batch())
    assert [tuple(each.shape) for each in s["a"]] == [(7, 5), (7, 6), (7, 4), (7, 3)]
    assert [tuple(each.shape) for each in s["b"]] == [(3, 5), (3, 6), (3, 4), (3, 3)]
    assert torch.equal(s["a"][1], F.elu(rule.model[0](batch()[0])))
    assert (
        rule(*batch()).logs["local 0"] - 0.5 * 256 / 6 * (s["a"][1] @ s["b"][1].T - F.one_hot(batch()[1], 3)).square().mean()
    ).abs() < 1e-12


# Feedback from outside.

SETTABLE: dict[str, tuple[Callable[[], CreditRule], str, str, Callable[[CreditRule], Tensor]]] = {
    "dfc": (lambda: control("ss"), "2", "Q", lambda rule: rule.q[1]),
    "strong": (lambda: control("strong"), "0", "Q", lambda rule: rule.q[0]),
    "dtp": (
        lambda: apical.DifferenceTargetPropagation(network(), variant="drl"),
        "0",
        "Q",
        lambda rule: rule.feedback_weights()["2"].T,
    ),
    "dtp, bias": (
        lambda: apical.DifferenceTargetPropagation(network(), variant="dtp"),
        "2",
        "c",
        lambda rule: rule.maps[1].c,
    ),
    "ep": (
        lambda: apical.EquilibriumPropagation(network(nn.Sigmoid), weights="directed"),
        "2",
        "B",
        lambda rule: rule.feedback_weights()["2"],
    ),
    "corinfomax": (
        lambda: apical.CorInfoMax(network(nn.ReLU), nudge="one-sided"),
        "4",
        "Wb",
        lambda rule: rule.feedback_weights()["4"].T,
    ),
    "corinfomax, lateral": (
        lambda: apical.CorInfoMax(network(nn.ReLU), nudge="one-sided", forgetting=0.9),
        "2",
        "B",
        lambda rule: rule.inverses()[1],
    ),
    "ccl": (
        lambda: apical.CounterCurrentLearning(network(nn.ELU)),
        "2",
        "G",
        lambda rule: rule.feedback_weights()["2"].T,
    ),
    "ccl, free": (
        lambda: apical.CounterCurrentLearning(network(nn.ELU), feedback="free"),
        "2",
        "B",
        lambda rule: rule.codes()[1],
    ),
}


@pytest.mark.parametrize("name", SETTABLE)
def test_feedback_that_was_set_is_what_the_rule_uses(name: str) -> None:
    make, layer, symbol, get = SETTABLE[name]
    rule = make()
    inputs, labels = batch()
    rule.eval()
    torch.manual_seed(3)
    before, shape = learned(rule, inputs, labels), get(rule).shape
    matrix = torch.randn(shape, dtype=torch.double)
    rule.set_feedback(layer, **{symbol: matrix})
    assert torch.equal(get(rule).detach(), matrix)
    torch.manual_seed(3)
    after = learned(rule, inputs, labels)
    assert max(float((one - two).abs().max()) for one, two in zip(before, after, strict=True)) > 1e-6
    other = make()
    other.load_state_dict(rule.state_dict())
    other.eval()
    torch.manual_seed(3)
    for one, two in zip(after, learned(other, inputs, labels), strict=True):
        assert torch.equal(one, two)
    for layer_, given, words in (
        ("9", {symbol: matrix}, "no feedback at a layer '9'"),
        (layer, {"X": matrix}, "no matrix 'X'"),
        (layer, {symbol: matrix[..., :1].expand(*matrix.shape[:-1], matrix.shape[-1] + 1)}, f"{symbol} of layer.*shape"),
        (layer, {}, "no matrix was given"),
    ):
        with pytest.raises(ConfigError, match=words):
            rule.set_feedback(layer_, **given)
    assert torch.equal(get(rule).detach(), matrix)


def test_symmetric_weights_have_no_feedback_to_set() -> None:
    with pytest.raises(ConfigError, match="their own feedback"):
        apical.EquilibriumPropagation(network(nn.Sigmoid)).set_feedback("2", B=torch.zeros(4, 6))


# Generators.

NOISY: dict[str, Callable[..., CreditRule]] = {
    "dfc, noise": partial(
        apical.DeepFeedbackControl, network(), learn="noise", feedback="random", points_fb=8, solver="simulate", points=8
    ),
    "strong, noise": partial(
        apical.StrongDeepFeedbackControl, network(), solver="simulate", learn="noise", feedback="random", points=8
    ),
    "dtp": partial(apical.DifferenceTargetPropagation, network(), variant="dtp"),
    "ddtp-rhl": partial(apical.DifferenceTargetPropagation, network(), variant="hidden", neurons=8),
    "ep, sign": partial(apical.EquilibriumPropagation, network(nn.Sigmoid), estimator="random-sign"),
    "ep, directed": partial(
        apical.EquilibriumPropagation, network(nn.Sigmoid), weights="directed", noise=0.1, homeostasis=0.1
    ),
    "corinfomax": partial(apical.CorInfoMax, network(nn.ReLU), nudge="random-sign"),
}


@pytest.mark.parametrize("name", NOISY)
def test_a_generator_alone_decides_all_that_is_drawn(name: str) -> None:
    def run(seed: int, other: int) -> list[Tensor]:
        torch.manual_seed(other)
        rule = NOISY[name](generator=torch.Generator().manual_seed(seed)).eval()
        grads = learned(rule, *batch())
        for _ in range(7):
            grads += learned(rule, *batch())
        return [*grads, *(p.detach().clone() for p in rule.parameters())]

    state = torch.random.get_rng_state()
    one = run(0, 1)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    two = run(0, 2)
    assert torch.equal(torch.random.get_rng_state(), before)  # the global one is left alone
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, run(1, 1), strict=True))
    torch.random.set_rng_state(state)
