"""Deep feedback control against its slow re-implementation: every solver and option, float64."""

from functools import partial
from itertools import pairwise, product

import dfc_reference as ref
import pytest
import torch
from torch import Tensor, nn

from apical import DeepFeedbackControl as Rule
from apical.errors import ConfigError

HIDDEN = {
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "relu": nn.ReLU(),
    "leaky": nn.LeakyReLU(0.2),
    "linear": nn.Identity(),
    "softplus": nn.Softplus(),
}
ALPHA, K_P = 0.3, 0.7

DeepFeedbackControl = partial(Rule, normalised=False)  # the rule with the paper's factor 2


def batch(shape: tuple[int, ...], classes: int, size: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, *shape, dtype=torch.double, generator=generator)
    return inputs, torch.randint(0, classes, (size,), generator=generator)


def gradients(rule: Rule, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    """Gradients of the model's parameters in the order of its layers, weight and bias."""
    rule.zero_grad()
    rule(inputs, targets).backward()
    return [p.grad.clone() for p in rule.model.parameters() if p.grad is not None]


def far(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest difference relative to the largest entry of its tensor."""
    pairs = zip(ours, theirs, strict=True)
    return max(float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in pairs)


def wished(net: ref.Net, inputs: Tensor, targets: Tensor, nudge: float) -> Tensor:
    output = torch.stack([ref.feed_forward(net, x)[1][-1] for x in inputs])
    return ref.deltas(output, targets, nudge)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random feedback need not be stable: the linear solution exists
@pytest.mark.parametrize("output", [None, nn.Tanh()], ids=["linear-output", "tanh-output"])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_ssa_is_the_linear_solve_of_the_whole_system(hidden: str, output: nn.Module | None) -> None:
    inputs, targets = batch((5,), 3)
    options = product([True, False], ["code", "paper"], ["rate", "voltage"], ["random", "product"])
    for bias, leak, difference, feedback in options:
        model, net = ref.mlp((5, 7, 6, 3), HIDDEN[hidden], output, bias)
        rule = DeepFeedbackControl(
            model, variant="ssa", nudge=0.5, alpha=ALPHA, k_p=K_P, leak=leak, difference=difference, feedback=feedback
        )
        a = ALPHA if leak == "code" else ALPHA / (1 + ALPHA * K_P)
        expected = ref.ssa(net, inputs, rule.q, wished(net, inputs, targets, 0.5), a, difference)
        assert far(gradients(rule, inputs, targets), expected) < 1e-10, (bias, leak, difference, feedback)


@pytest.mark.parametrize("difference", ["rate", "voltage"])
def test_ssa_on_convolutions(difference: str) -> None:
    inputs, targets = batch((2, 6, 6), 3, size=3)
    model, net = ref.conv_net()
    rule = DeepFeedbackControl(
        model, variant="ssa", nudge=0.5, alpha=ALPHA, difference=difference, learn="none", input_shape=(2, 6, 6)
    )
    expected = ref.ssa(net, inputs, rule.q, wished(net, inputs, targets, 0.5), ALPHA, difference)
    assert far(gradients(rule, inputs, targets), expected) < 1e-10


LOOPS = {
    "plain": {},
    "paper": {"leak": "paper"},
    "not-proactive": {"proactive": False},
    "not-instant": {"instant_transmission": False},
    "neither": {"proactive": False, "instant_transmission": False, "leak": "paper"},
    "integral-only": {"k_p": 0.0},
    "tau-is-dt": {"tau": 0.1, "k_p": 0.05},
}
BASE = {"dt": 0.1, "tau": 0.3, "points": 14, "alpha": 0.2, "k_p": 0.4}


@pytest.mark.parametrize("kind", ["mlp", "linear-tanh", "conv"])
@pytest.mark.parametrize("variant", ["dfc", "ss"])
@pytest.mark.parametrize("name", LOOPS)
def test_simulation_is_the_slow_loop(name: str, variant: str, kind: str) -> None:
    loop = {"leak": "code", **BASE, **LOOPS[name]}
    if kind == "conv":
        shape, (model, net) = (2, 6, 6), ref.conv_net()
    else:
        hidden, output = (nn.Sigmoid(), None) if kind == "mlp" else (nn.Identity(), nn.Tanh())
        shape, (model, net) = (5,), ref.mlp((5, 6, 4, 3), hidden, output)
    inputs, targets = batch(shape, 3, size=2)
    for difference in ("rate", "voltage"):
        rule = DeepFeedbackControl(
            model,
            variant=variant,
            solver="simulate",
            nudge=0.7,
            difference=difference,
            input_shape=shape,
            learn="none",
            **loop,
        )
        expected = ref.simulated(net, inputs, rule.q, wished(net, inputs, targets, 0.7), variant, difference, **loop)
        assert far(gradients(rule, inputs, targets), expected) < 1e-12


@pytest.mark.parametrize("leak", ["code", "paper"])
@pytest.mark.parametrize("conv", [False, True], ids=["mlp", "conv"])
def test_steady_state_is_where_a_long_simulation_ends(leak: str, conv: bool) -> None:
    shape, (model, _) = ((2, 6, 6), ref.conv_net()) if conv else ((5,), ref.mlp((5, 7, 6, 3), nn.Tanh()))
    inputs, targets = batch(shape, 3)
    options = {
        "variant": "ss",
        "nudge": 0.3,
        "alpha": 0.2,
        "k_p": 0.5,
        "leak": leak,
        "dt": 0.1,
        "tau": 0.2,
        "input_shape": shape,
    }
    long = gradients(DeepFeedbackControl(model, solver="simulate", points=600, **options), inputs, targets)
    steady = gradients(DeepFeedbackControl(model, newton=12, **options), inputs, targets)
    assert far(steady, long) < 1e-9
    assert far(gradients(DeepFeedbackControl(model, newton=1, **options), inputs, targets), long) > 1e-7  # it is nonlinear


@pytest.mark.parametrize("leak", ["code", "paper"])
@pytest.mark.parametrize("k_p", [0.0, 0.5])
def test_closed_form_is_the_settled_simulation_for_weak_nudging(leak: str, k_p: float) -> None:
    model, _ = ref.mlp((5, 7, 6, 3), nn.Tanh())
    inputs, targets = batch((5,), 3)
    options = {"alpha": 0.4, "k_p": k_p, "leak": leak, "dt": 0.05, "tau": 0.1, "points": 600}

    def distance(nudge: float) -> float:
        simulated = gradients(DeepFeedbackControl(model, solver="simulate", nudge=nudge, **options), inputs, targets)
        return far(gradients(DeepFeedbackControl(model, nudge=nudge, **options), inputs, targets), simulated)

    assert distance(1e-4) < 1e-4
    assert 5 < distance(1e-2) / distance(1e-3) < 20  # first order in the nudge
    linearised = DeepFeedbackControl(model, variant="ssa", nudge=1e-4, **options)
    simulation = DeepFeedbackControl(model, solver="simulate", nudge=1e-4, **options)
    assert far(gradients(linearised, inputs, targets), gradients(simulation, inputs, targets)) > 1e-3


def test_steady_state_meets_its_linearisation_as_the_square_of_the_nudge() -> None:
    model, _ = ref.mlp((5, 7, 6, 3), nn.Tanh())
    inputs, targets = batch((5,), 3)
    distances = []
    for nudge in (0.1, 0.05, 0.025):
        pair = [DeepFeedbackControl(model, variant=v, newton=12, nudge=nudge, alpha=0.1) for v in ("ss", "ssa")]
        exact, linear = (torch.cat([g.flatten() for g in gradients(rule, inputs, targets)]) for rule in pair)
        distances.append(float((exact - linear).norm()))
    for wide, narrow in pairwise(distances):
        assert 3.5 < wide / narrow < 4.5


@pytest.mark.parametrize("leak", ["code", "paper"])
@pytest.mark.parametrize("instant", [True, False])
def test_simulation_converges_to_the_differential_equation_with_order_one(leak: str, instant: bool) -> None:
    ode = pytest.importorskip("torchdiffeq")
    model, net = ref.mlp((5, 6, 4, 3), nn.Tanh())
    inputs, targets = batch((5,), 3, size=1)
    tau, alpha, k_p, nudge, time = 0.3, 0.4, 0.5, 0.7, 1.0
    rule = DeepFeedbackControl(model)
    delta = wished(net, inputs, targets, nudge)[0]
    v, r = ref.feed_forward(net, inputs[0])
    sizes = [each.numel() for each in v]

    def control(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *_, last, integral = state.split([*sizes, len(delta)])
        error = r[-1] + delta - net[-1].phi(last)
        return integral, integral + k_p * error, error

    def flow(_: Tensor, state: Tensor) -> Tensor:
        integral, u, error = control(state)
        rates, change = inputs[0], []
        for section, q, each in zip(net, rule.q, state.split([*sizes, len(delta)])[:-1], strict=True):
            change.append((section.v(rates) + q @ u - each) / tau)
            rates = section.phi(each)
        return torch.cat([*change, error - alpha * (u if leak == "code" else integral)])

    start = torch.cat([*v, torch.zeros_like(delta)])
    with torch.no_grad():
        exact = ode.odeint(flow, start, torch.tensor([0.0, time]).double(), rtol=1e-10, atol=1e-12)[-1]
    errors = []
    for dt in (0.02, 0.01, 0.005):
        loop = {"dt": dt, "tau": tau, "alpha": alpha, "k_p": k_p, "leak": leak, "instant_transmission": instant}
        walk = DeepFeedbackControl(model, solver="simulate", nudge=nudge, points=round(time / dt) + 1, **loop)
        trace = walk.trace(inputs, targets)
        assert float(trace.times[-1]) == pytest.approx(time)
        state = torch.cat([*(soma[-1, 0] for soma in trace.soma), trace.u[-1, 0]])
        errors.append(float((state - torch.cat([exact[: sum(sizes)], control(exact)[1]])).norm()))
    for wide, narrow in pairwise(errors):
        assert 1.8 < wide / narrow < 2.2


@pytest.mark.parametrize("name", LOOPS)
def test_trace_shows_the_compartments_of_the_slow_loop(name: str) -> None:
    loop = {"leak": "code", **BASE, **LOOPS[name]}
    model, net = ref.mlp((5, 6, 4, 3), nn.Tanh())
    inputs, targets = batch((5,), 3, size=2)
    rule = DeepFeedbackControl(model, variant="ss", solver="simulate", nudge=0.7, **loop)
    trace = rule.trace(inputs, targets)
    for sample, (x, delta) in enumerate(zip(inputs, wished(net, inputs, targets, 0.7), strict=True)):
        history = ref.simulate(net, x, rule.q, delta, **loop)
        assert len(history) == len(trace.times)
        for time, point in enumerate(history):
            assert float(trace.times[time]) == pytest.approx(time * loop["dt"])
            for ours, theirs in ((trace.u, point.u), (trace.output, point.r[-1])):
                torch.testing.assert_close(ours[time, sample], theirs, rtol=1e-12, atol=1e-13)
            for kind in ("soma", "basal", "apical"):
                for ours, theirs in zip(
                    getattr(trace, kind), point.v if kind == "soma" else getattr(point, kind), strict=True
                ):
                    torch.testing.assert_close(ours[time, sample], theirs, rtol=1e-12, atol=1e-13)


def test_feedback_at_initialisation() -> None:
    """The product of the weights is J^T of the network without activations; random Q_L is the identity."""
    model, net = ref.conv_net()
    linear = [ref.Section(section.affine, lambda v: v) for section in net]
    expected = ref.jacobian(linear, torch.zeros(2, 6, 6).double())
    for q, block in zip(DeepFeedbackControl(model, input_shape=(2, 6, 6)).q, expected, strict=True):
        torch.testing.assert_close(q, block.T, rtol=1e-12, atol=1e-14)
    torch.manual_seed(0)
    dense, _ = ref.mlp((5, 200, 40), nn.Tanh())
    first, last = DeepFeedbackControl(dense, feedback="random").q
    assert torch.equal(last, torch.eye(40).double())
    assert float(first.detach().std()) == pytest.approx((2 / 240) ** 0.5, rel=0.05)
    assert abs(float(first.detach().mean())) < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "ssaa"}, "did you mean 'ssa'"),
        ({"difference": "voltages"}, "did you mean 'voltage'"),
        ({"feedback": "products"}, "did you mean 'product'"),
        ({"learn": "expectation"}, "did you mean 'expected'"),
        ({"variant": "ssa", "solver": "simulate"}, "'ssa' has no solver 'simulate'"),
        ({"nudge": 0.0}, "nudge"),
        ({"newton": 0}, "newton"),
        ({"alpha": -1.0}, "alpha"),
        ({"dt": 0.3}, r"tau=0.2 must not be smaller than the step dt=0.3"),
        ({"points": 1}, "points must be a whole number, at least 2"),
        ({"leak": "both"}, "leak"),
        ({"proactive": False}, "solver='simulate'"),
        ({"instant_transmission": False}, "solver='simulate'"),
        ({"sigma_fb": 0.0}, "sigma must be positive"),
    ],
)
def test_unusable_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DeepFeedbackControl(nn.Linear(3, 2), **options)


def test_normalised_updates_are_the_papers_over_twice_the_nudge() -> None:
    model, _ = ref.mlp((5, 7, 6, 3), nn.Tanh())
    inputs, targets = torch.randn(6, 5, dtype=torch.double), torch.randint(3, (6,))
    for options in ({"variant": "ssa"}, {"variant": "dfc", "solver": "simulate", "points": 30}):
        plain = gradients(DeepFeedbackControl(model, nudge=0.05, **options), inputs, targets)
        normal = gradients(Rule(model, nudge=0.05, **options), inputs, targets)
        assert len(plain) == 6
        for a, b in zip(normal, plain, strict=True):
            torch.testing.assert_close(a, b / 0.1, rtol=1e-12, atol=0)
