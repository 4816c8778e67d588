"""Steady states of feedback control far from where the loop is linear: reached, or said with the residual and a remedy."""

import warnings
from itertools import pairwise

import dfc_reference as ref
import pytest
import torch
from torch import Tensor, nn

import apical
from apical.rules.feedback_control import deep_feedback_control as rule_module
from apical.rules.feedback_control import states as control
from apical.rules.feedback_control.states import settle


def network(scale: float, seed: int, sizes: tuple[int, ...] = (13, 32, 32, 6)) -> tuple[nn.Sequential, ref.Net]:
    torch.manual_seed(seed)
    layers = [nn.Linear(n, m).double() for n, m in pairwise(sizes)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(scale)
    *hidden, last = layers
    net = [*(ref.Section(layer, torch.tanh) for layer in hidden), ref.Section(last, lambda v: v)]
    return nn.Sequential(*(module for layer in hidden for module in (layer, nn.Tanh())), last), net


def batch(inputs: int = 13, size: int = 16, outputs: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(size, inputs, dtype=torch.double, generator=generator), torch.arange(size) % outputs


def residuals(rule: apical.DeepFeedbackControl, net: ref.Net, inputs: Tensor, labels: Tensor) -> Tensor:
    """`|rho + a u - delta| / |delta|` of the control that the rule settled on, by the slow network."""
    s = rule.states(inputs, labels)
    found = []
    for x, u, output, target in zip(inputs, s["u"][0], s["r_minus"][-1], s["target"][0], strict=True):
        reached = ref.controlled(net, x, rule.q, u).r[-1].flatten()
        found.append((reached + rule.loop.a * u - target).norm() / (target - output).norm())
    return torch.stack(found)


def caught(rule: apical.CreditRule, inputs: Tensor, targets: Tensor) -> tuple[dict[str, Tensor], list[str]]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        credit = rule(inputs, targets)
        credit.backward()
    return credit.logs, [str(each.message) for each in seen if "steady state is unstable" not in str(each.message)]


@pytest.mark.parametrize("newton_steps", [1, 2, 20])
@pytest.mark.parametrize("feedback", ["random", "product"])
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("scale", [1.0, 4.0, 8.0])
def test_every_sample_is_at_rest_or_is_counted_in_a_warning(
    scale: float, seed: int, feedback: str, newton_steps: int
) -> None:
    model, net = network(scale, seed)
    inputs, labels = batch()
    rule = apical.DeepFeedbackControl(model, variant="ss", learn="none", feedback=feedback, newton=newton_steps)
    logs, messages = caught(rule, inputs, labels)
    left = residuals(rule, net, inputs, labels)
    late = left > 1e-3
    assert late.sum() <= 4
    assert left.max() < 1.0  # never farther from the target than without control
    assert logs["residual"] < 0.2
    assert all(p.grad.isfinite().all() and p.grad.norm() < 100 for p in model.parameters())
    if late.any():
        (message,) = messages
        assert f"no steady state was found for {int(late.sum())} of 16 samples" in message
        assert f"largest residual {float(left.max()):.1e}" in message
        assert "Q" in message or "lower nudge=0.01" in message
    else:
        assert messages == []


def test_far_from_linear_the_first_steps_fail_and_the_damped_ones_arrive() -> None:
    model, net = network(8.0, 3)
    inputs, labels = batch()
    rule = apical.DeepFeedbackControl(model, variant="ss", learn="none")
    with torch.no_grad():
        states = rule.run(inputs)
        _, error = rule_module.output_error(rule.loss, states.r[-1], labels)
        delta, resolvent = rule.delta(error), rule._resolvent(states)
        _, _, miss = control.steady_state(rule.chain, states, rule.q, delta, resolvent, 2)
        _, _, more = control.steady_state(rule.chain, states, rule.q, delta, resolvent, 20)
    first = miss.norm(dim=1) / delta.norm(dim=1)
    late = first > 1e-3
    assert 1 <= late.sum() < 16
    assert (more.norm(dim=1) / delta.norm(dim=1)).max() > 0.1  # going on like that does not help
    left = residuals(rule, net, inputs, labels)
    assert left[late].max() < 1e-9
    assert torch.allclose(left[~late], first[~late], atol=1e-12)  # the others are left as they are


def test_the_steady_state_of_a_stable_loop_is_where_its_simulation_ends() -> None:
    model, _ = network(3.0, 1, (5, 7, 6, 3))
    inputs, labels = batch(5, 4, 3)
    options = {"variant": "ss", "learn": "none", "nudge": 3.0, "alpha": 0.3, "k_p": 0.5}
    steady = apical.DeepFeedbackControl(model, newton=1, **options)
    long = apical.DeepFeedbackControl(model, solver="simulate", points=3000, dt=0.02, tau=0.1, **options)
    one, two = steady.states(inputs, labels), long.states(inputs, labels)
    assert (one["u"][0] - two["u"][0]).abs().max() < 1e-10


def test_near_the_linear_nothing_but_the_first_steps_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(rule_module, "settle", never)
    passes = []
    whole = control.controlled_pass
    monkeypatch.setattr(control, "controlled_pass", lambda *given: passes.append(1) or whole(*given))
    rule = apical.DeepFeedbackControl(network(1.0, 0)[0], variant="ss", learn="none")
    logs, messages = caught(rule, *batch())
    assert (len(passes), messages) == (3, [])
    assert logs["residual"] < 1e-6


def test_wide_outputs_go_on_below_as_well() -> None:
    model, net = network(3.0, 0, (9, 20, 70))
    inputs, _ = batch(9, 6)
    targets = torch.randn(6, 70, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    rule = apical.DeepFeedbackControl(model, nn.MSELoss(), variant="ss", learn="none", nudge=300.0, alpha=0.3)
    assert control.goes_below(rule.chain, rule.q)
    logs, messages = caught(rule, inputs, targets)
    left = residuals(rule, net, inputs, targets)
    assert left.max() < 1e-3
    assert (logs["residual"] < 1e-3, messages) == (True, [])
    with torch.no_grad():
        states = rule.run(inputs)
        delta = rule.states(inputs, targets)["target"][0] - states.r[-1]
        _, _, miss = control.steady_state(rule.chain, states, rule.q, delta, rule._resolvent(states), 2)
    assert (miss.norm(dim=1) / delta.norm(dim=1)).max() > 1e-2


@pytest.mark.parametrize(("variant", "other"), [("ssa", "variant='ss'"), ("dfc", "solver='simulate'")])
def test_a_linearisation_that_does_not_hold_is_said_and_one_that_holds_is_not(variant: str, other: str) -> None:
    weak, strong = (
        caught(apical.DeepFeedbackControl(network(scale, 1)[0], variant=variant, learn="none", feedback="random"), *batch())
        for scale in (1.0, 8.0)
    )
    assert weak[1] == []
    assert strong[0]["residual"] > 0.1
    (message,) = strong[1]
    assert f"misses its target by {float(strong[0]['residual']):.1e}" in message
    assert "lower nudge=0.01" in message
    assert other in message


def test_warnings_come_once_in_a_hundred_calls() -> None:
    rule = apical.DeepFeedbackControl(network(8.0, 1)[0], variant="ss", learn="none")
    inputs, labels = batch(size=16)
    counts = [len(caught(rule, inputs, labels)[1]) for _ in range(101)]
    assert counts[0] == counts[100] == 1
    assert not any(counts[1:100])


def test_samples_without_an_error_are_at_rest() -> None:
    model, _ = network(4.0, 1)
    rule = apical.DeepFeedbackControl(model, nn.MSELoss(), variant="ss", learn="none", feedback="product", nudge=1e-3)
    inputs, _ = batch()
    targets = model(inputs).detach()
    targets[3:] += 0.1
    logs, messages = caught(rule, inputs, targets)
    assert logs["residual"].isfinite()
    assert messages == []


def test_newtons_method_gives_a_sample_up_and_does_not_hold_the_others_back() -> None:
    """`3 tanh(u)` reaches 1 but never 5, to which it comes as near as 2."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False)).double()
    rule = apical.DeepFeedbackControl(model, nn.MSELoss(), variant="ss", learn="none", alpha=1e-3)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[2].weight.fill_(3.0)
        rule.feedback[0].fill_(1.0)
        rule.feedback[1].fill_(0.0)
        states = rule.run(torch.tensor([[0.0], [0.0]]).double())
        delta = torch.tensor([[5.0], [1.0]]).double()
        u = settle(rule.chain, states, rule.q, delta, torch.zeros(2, 1).double(), rule._resolvent, 0.0, 1e-12)
    assert abs(3 * torch.tanh(u[1]) - 1) < 1e-11
    assert abs(5 - 3 * torch.tanh(u[0]) - 2) < 1e-3


# Strong control.


def test_strong_control_says_which_goals_are_out_of_reach() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2), nn.Tanh()).double()
    rule = apical.StrongDeepFeedbackControl(model, nn.MSELoss(), learn="none", alpha=0.0)
    inputs, _ = batch(5, 6)
    within, beyond = torch.full((6, 2), 0.2).double(), torch.full((6, 2), 0.2).double()
    beyond[4] = 1.7
    logs, messages = caught(rule, inputs, within)
    assert (logs["residual"] < 1e-8, messages) == (True, [])
    logs, messages = caught(rule, inputs, beyond)
    (message,) = messages
    assert "1 of 6 outputs are not held at their goal" in message
    assert f"largest residual {float(logs['residual']):.1e}" in message
    assert "last layer" in message


def test_strong_control_of_classes_reaches_its_goals_far_from_linear() -> None:
    for seed in (1, 2, 3):
        rule = apical.StrongDeepFeedbackControl(network(2.0, seed)[0], learn="none")
        logs, messages = caught(rule, *batch())
        assert logs["residual"] < 1e-3 or len(messages) == 1


# Single precision.


@pytest.mark.parametrize("variant", ["dfc", "ss", "ssa"])
@pytest.mark.parametrize("activation", [nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.SELU, nn.Hardtanh, nn.Softsign])
def test_weak_control_of_any_activation_keeps_float32s_digits(activation: type[nn.Module], variant: str) -> None:
    found = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(13, 30), activation(), nn.Linear(30, 30), activation(), nn.Linear(30, 6)).to(dtype)
        rule = apical.DeepFeedbackControl(model, variant=variant, learn="none", nudge=1e-5, alpha=1e-4)
        inputs, labels = batch()
        rule(inputs.to(dtype), labels).backward()
        found.append(torch.cat([p.grad.double().flatten() for p in model.parameters()]))
    assert (found[0] - found[1]).norm() < 2e-6 * found[0].norm()
