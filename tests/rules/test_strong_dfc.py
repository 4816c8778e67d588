"""Strong deep feedback control: steady state, its descent on the control effort, options. float64."""

from itertools import product

import dfc_reference as ref
import pytest
import torch
from strong_dfc_reference import KINDS, LOOP, goals, gradients, jacobian_at, made, named, set_feedback, slope_at
from test_dfc import far
from torch import Tensor, nn

from apical import StrongDeepFeedbackControl, data
from apical.errors import ConfigError, InstabilityError
from apical.rules.feedback_control.strong_control import hold


@pytest.mark.parametrize("leak", ["code", "paper"])
@pytest.mark.parametrize("kind", KINDS)
def test_held_network_meets_its_label_but_for_the_leak(kind: str, leak: str) -> None:
    """`e = a u`: a = alpha where all of the control leaks, alpha / (1 + alpha k_p) where only its integral does."""
    rule, net, inputs, targets = made(kind, alpha=0.2, k_p=1.5, leak=leak, label=0.8)
    u, a = rule.hold(inputs, targets).u, 0.2 if leak == "code" else 0.2 / 1.3
    for sample, goal in enumerate(goals(targets, 3, 0.8)):
        r = ref.controlled(net, inputs[sample], rule.q, u[sample]).r[-1]
        error = goal - (r.softmax(0) if kind == "classes" else r)
        torch.testing.assert_close(error, a * u[sample], rtol=1e-8, atol=1e-9)
    logs = rule(inputs, targets).logs
    effort = sum(float((q @ each).detach().square().sum()) for q in rule.q for each in u) / 2 / len(u)
    assert float(logs["effort"]) == pytest.approx(effort, rel=1e-9)
    assert 0 < float(logs["residual"]) < 1.1e-10


@pytest.mark.parametrize("leak", ["code", "paper"])
@pytest.mark.parametrize("kind", KINDS)
def test_long_simulation_settles_at_the_steady_state(kind: str, leak: str) -> None:
    loop = {"alpha": 0.1, "k_p": 0.4, "dt": 0.05, "tau": 0.1, "points": 4000, "leak": leak, "label": 0.8}
    rule, _, inputs, targets = made(kind, solver="simulate", learn="none", sigma=0.0, **loop)
    trace, held = rule.trace(inputs, targets), rule.hold(inputs, targets)
    torch.testing.assert_close(trace.u[-1], held.u, rtol=1e-6, atol=1e-7)
    assert (trace.u[20] - held.u).norm() > 0.01 * held.u.norm()
    states = rule.run(inputs)
    for soma, apical, v, d, q in zip(trace.soma, trace.apical, states.v, held.state.d, held.state.q, strict=True):
        torch.testing.assert_close(soma[-1], v + d, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(apical[-1], q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("label", [0.5, 0.9, 1 - 1e-6])
def test_a_linear_network_without_leak_is_held_at_any_label_in_one_step(label: float) -> None:
    """In logits the equation `J Q u = log goal - r_L + c` is linear; in probabilities it takes many steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Identity(), nn.Linear(7, 3)).double()
    rule = StrongDeepFeedbackControl(model, label=label)
    inputs, targets = torch.randn(6, 5, dtype=torch.double), torch.randint(3, (6,))
    with torch.no_grad():
        states = rule.run(inputs)
        goal, classes = rule.goal(states.r[-1], targets)
        held = hold(rule.chain, states, rule.q, goal, 0.0, classes=classes, tolerance=1e-9)
    assert held.passes == 1
    torch.testing.assert_close((states.r[-1] + held.state.rho[-1]).softmax(1), goal, rtol=1e-9, atol=1e-12)


def test_labels_out_of_reach_of_the_logits_leave_newtons_steps_as_they_are() -> None:
    """A last ReLU: the step in logits asks for negative outputs; what it does not bring closer it does not take."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.ReLU()).double()
    rule = StrongDeepFeedbackControl(model, label=0.999, alpha=0.1)
    inputs, targets = torch.randn(6, 5, dtype=torch.double), torch.randint(3, (6,))
    held = rule.hold(inputs, targets)
    assert held.u.isfinite().all()
    assert (held.residual <= 1).all()  # never farther than without control


@pytest.mark.parametrize("difference", ["rate", "voltage"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_rule_at_the_steady_state(kind: str, difference: str) -> None:
    rule, net, inputs, targets = made(kind, alpha=0.05, difference=difference, learn="none")
    u = rule.hold(inputs, targets).u
    points = [ref.controlled(net, x, rule.q, each) for x, each in zip(inputs, u, strict=True)]
    ours = gradients(rule, inputs, targets)
    assert far(list(ours.values()), ref.gradients(net, points, 2 / len(inputs), difference)) < 1e-10


def satisfy_condition_two(rule: StrongDeepFeedbackControl, net: ref.Net, inputs: Tensor, targets: Tensor) -> None:
    """`Q_i = J_i^T` at the steady state that this very Q leads to, for one sample."""
    for _ in range(200):
        point = ref.controlled(net, inputs[0], rule.q, rule.hold(inputs, targets).u[0])
        new = [block.T for block in jacobian_at(net, point)]
        change = max(float((a - b).detach().abs().max()) for a, b in zip(rule.q, new, strict=True))
        set_feedback(rule, new)
        if change < 1e-12:
            return
    raise AssertionError("no fixed point found")


def effort_slopes(rule: StrongDeepFeedbackControl, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    """dH/dW of every parameter by central differences, `H = 1/2 |Q u|^2` with Q fixed."""

    def effort() -> float:
        u = rule.hold(inputs, targets).u[0]
        return sum(float((q @ u).square().sum()) for q in rule.q) / 2

    slopes = []
    for parameter in rule.model.parameters():
        values, slope = parameter.data.view(-1), torch.zeros(parameter.numel(), dtype=torch.double)
        for i, value in enumerate(values.tolist()):
            ends = []
            for step in (1e-4, -1e-4):
                values[i] = value + step
                ends.append(effort())
            values[i] = value
            slope[i] = (ends[0] - ends[1]) / 2e-4
        slopes.append(slope.view_as(parameter))
    return slopes


def effort_formula(rule: StrongDeepFeedbackControl, net: ref.Net, x: Tensor, u: Tensor, kind: str) -> list[Tensor]:
    """The same by implicit differentiation: `dH = -(Q u)^T Q (H J Q + a I)^-1 H J (dW_i r_{i-1})_i`."""
    point = ref.controlled(net, x, rule.q, u)
    q = torch.cat(list(rule.q)).detach()
    pulled = slope_at(point, kind) @ torch.cat(jacobian_at(net, point), 1)
    system = pulled @ q + rule.loop.a * torch.eye(len(u), dtype=torch.double)
    parts = (-(q @ u) @ q @ torch.linalg.solve(system, pulled)).split([v.numel() for v in point.v])
    return [each for part, r in zip(parts, point.r, strict=False) for each in (torch.outer(part, r), part)]


@pytest.mark.parametrize("kind", KINDS)
def test_local_rule_descends_the_effort_where_condition_two_holds(kind: str) -> None:
    """Half the gradient (the rule has a factor 2) is dH/dW for Col(Q) = Row(J), alpha -> 0, and only there."""
    options = {"alpha": 1e-7, "label": 0.8, "tolerance": 1e-13, "difference": "voltage", "learn": "none"}
    rule, net, inputs, targets = made(kind, (3, 4, 3, 3), 1, **options)
    satisfy_condition_two(rule, net, inputs, targets)

    def compare() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        local = [gradient / 2 for gradient in gradients(rule, inputs, targets).values()]
        formula = effort_formula(rule, net, inputs[0], rule.hold(inputs, targets).u[0], kind)
        return effort_slopes(rule, inputs, targets), local, formula

    finite, local, formula = compare()
    assert far(formula, finite) < 1e-6
    assert far(local, finite) < 1e-5
    torch.manual_seed(0)
    set_feedback(rule, [q + 0.3 * torch.randn_like(q) for q in rule.q])
    finite, local, formula = compare()
    assert far(formula, finite) < 1e-6
    assert far(local, finite) > 0.1


@pytest.mark.parametrize("leak", ["code", "paper"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_leak_bends_the_descent_as_predicted(kind: str, leak: str) -> None:
    options = {"alpha": 0.1, "k_p": 2.0, "leak": leak, "tolerance": 1e-13, "difference": "voltage", "learn": "none"}
    rule, net, inputs, targets = made(kind, (3, 4, 3, 3), 1, label=0.8, **options)
    satisfy_condition_two(rule, net, inputs, targets)
    finite = effort_slopes(rule, inputs, targets)
    formula = effort_formula(rule, net, inputs[0], rule.hold(inputs, targets).u[0], kind)
    assert far(formula, finite) < 1e-6
    assert far([gradient / 2 for gradient in gradients(rule, inputs, targets).values()], finite) > 0.01


@pytest.mark.parametrize(
    "options", [{}, {"solver": "simulate", **LOOP}, {"solver": "simulate", "learn": "noise", **LOOP}], ids=str
)
def test_phases_write_the_gradients_they_name(options: dict[str, object]) -> None:
    found = {}
    for phase in ("both", "forward", "feedback"):
        rule, _, inputs, targets = made("classes", **options)
        rule.phase = phase
        torch.manual_seed(0)
        found[phase] = gradients(rule, inputs, targets)
    assert set(found["forward"]) == {f"model.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert set(found["feedback"]) == {"feedback.0", "feedback.1"}
    assert set(found["both"]) == set(found["forward"]) | set(found["feedback"])
    for name, gradient in found["both"].items():
        assert gradient.abs().max() > 0
        assert torch.equal(gradient, (found["forward"] | found["feedback"])[name]), name


def test_learn_chooses_what_feedback_is_trained() -> None:
    kinds = product(("none", "expected"), (False, True))
    trained = {(learn, last): made("classes", learn=learn, learn_output=last)[0] for learn, last in kinds}
    counts = {key: len(rule.feedback_parameters()) for key, rule in trained.items()}
    assert counts == {("none", False): 0, ("none", True): 0, ("expected", False): 2, ("expected", True): 3}
    _, _, inputs, targets = made("classes")
    for rule in trained.values():
        feedback = {name for name in gradients(rule, inputs, targets) if name.startswith("feedback")}
        assert feedback == {f"feedback.{i}" for i in range(len(rule.feedback_parameters()))}
        assert torch.equal(rule.q[-1], torch.eye(3))


def test_state_dict_holds_the_feedback_and_detach_returns_the_model() -> None:
    rule, _, inputs, targets = made("classes", feedback="random")
    keys = set(rule.model.state_dict())
    assert set(rule.state_dict()) == {f"model.{key}" for key in keys} | {f"feedback.{i}" for i in range(3)}
    twin = StrongDeepFeedbackControl(ref.mlp((5, 7, 6, 3), nn.Tanh(), seed=5)[0], feedback="random")
    twin.load_state_dict(rule.state_dict())
    expected = gradients(rule, inputs, targets)
    for name, gradient in gradients(twin, inputs, targets).items():
        assert torch.equal(gradient, expected[name])
    model = rule.model
    assert rule.detach() is model
    for call in (rule, rule.trace):
        with pytest.raises(ConfigError, match="detached"):
            call(inputs, targets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": 0.0}, "label must lie between 0 and 1, got 0.0"),
        ({"label": 1.0}, "label must lie between 0 and 1, got 1.0; at 1 no finite control"),
        ({"label": 1.2}, "label must lie between 0 and 1, got 1.2"),
        ({"label": float("nan")}, "label must lie between 0 and 1"),
        ({"tau_slow": 1.0}, r"tau_slow must lie between dt=0\.001 and 1.*got 1\.0"),
        ({"tau_slow": 1e-4}, "tau_slow must lie"),
        ({"tolerance": 0.0}, r"tolerance must lie between 0 and 1, got 0\.0"),
        ({"tolerance": -1e-5}, "tolerance must lie"),
        ({"learn": "noise"}, "'steady' has no noise to learn feedback from: pass learn='expected' or 'none'"),
        ({"sigma": 0.0}, "sigma must be positive, got 0.0"),
        ({"sigma": -0.1}, "sigma must not be negative"),
        ({"sigma_output": -0.1}, "sigma_output must not be negative, got -0.1"),
        ({"sigma_output": float("nan")}, "sigma_output must not be negative"),
        ({"tau_noise": 0.0}, "tau_noise must be positive"),
        ({"tau": 1e-4}, "tau=0.0001 must not be smaller than the step dt=0.001"),
        ({"points": 1}, "points must be a whole number, at least 2"),
        ({"solver": "simulated"}, "unknown solver 'simulated'; did you mean 'simulate'"),
        ({"learn": "expect"}, "unknown learn 'expect'; did you mean 'expected'"),
        ({"feedback": "products"}, "unknown feedback 'products'; did you mean 'product'"),
        ({"difference": "rates"}, "unknown difference 'rates'; did you mean 'rate'"),
        ({"leak": "papers"}, "leak must be"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made("classes", **options)


def test_class_labels_need_two_outputs() -> None:
    rule = StrongDeepFeedbackControl(nn.Linear(3, 1))
    with pytest.raises(ConfigError, match="at least 2 outputs, got 1"):
        rule(torch.zeros(2, 3), torch.tensor([0, 0]))


def test_nan_inputs_and_runaway_loops_end() -> None:
    rule, _, inputs, targets = made("classes")
    inputs[1, 0] = float("nan")
    assert rule(inputs, targets).logs["residual"].isnan()
    simulated, _, _, _ = made("classes", solver="simulate", points=200)
    with pytest.raises(InstabilityError, match="not finite"):
        simulated(inputs, targets)
    wild, _, inputs, targets = made("regression", solver="simulate", k_p=300.0, dt=0.05, tau=0.05, points=900)
    with pytest.raises(InstabilityError, match=r"diverged.*k_p"):
        wild(inputs, targets)
    assert named(wild) == {}


def test_trains_on_digits() -> None:
    torch.manual_seed(0)
    digits = data.load("digits")
    inputs, targets = digits.train.inputs.flatten(1), digits.train.targets
    model = nn.Sequential(nn.Linear(inputs.shape[1], 64), nn.Tanh(), nn.Linear(64, 10))
    rule = StrongDeepFeedbackControl(model, label=0.9)
    optimizer = torch.optim.Adam(rule.parameters(), lr=3e-3)
    efforts = []
    for _ in range(3):
        for rows in torch.randperm(len(inputs)).split(64):
            optimizer.zero_grad()
            credit = rule(inputs[rows], targets[rows])
            credit.backward()
            optimizer.step()
        efforts.append(float(credit.logs["effort"]))
    accuracy = (model(digits.test.inputs.flatten(1)).argmax(1) == digits.test.targets).double().mean()
    assert float(accuracy) > 0.85
    assert efforts[-1] < efforts[0]  # the network needs less and less help
