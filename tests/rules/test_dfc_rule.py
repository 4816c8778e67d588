"""Deep feedback control as a rule: what each phase writes, wide outputs, float32, unstable controllers, compilation."""

import warnings
from collections.abc import Callable

import dfc_reference as ref
import pytest
import torch
import torch.nn.functional as F
from test_dfc import batch, far, gradients, wished
from torch import Tensor, nn

from apical import DeepFeedbackControl
from apical.diagnostics.gauss_newton import requested_change
from apical.errors import InstabilityError, UnsupportedModelError
from apical.rules.feedback_control import states as control

VARIANTS = ["dfc", "ss", "ssa"]


def named(rule: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in rule.named_parameters() if p.grad is not None}


def trained(phase: str, **options: object) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model, _ = ref.mlp((5, 7, 6, 3), nn.Tanh())
    rule = DeepFeedbackControl(model, **options)
    rule.phase = phase
    rule(*batch((5,), 3)).backward()
    return named(rule)


@pytest.mark.parametrize(
    "options", [{}, {"learn": "noise"}, {"solver": "simulate", "points": 20}, {"variant": "ss"}], ids=str
)
def test_phases_write_the_gradients_they_name(options: dict[str, object]) -> None:
    model = {f"model.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    hidden = {"feedback.0", "feedback.1"}
    forward, feedback = (trained(phase, **options) for phase in ("forward", "feedback"))
    assert set(forward) == model
    assert set(feedback) == hidden
    both = trained("both", **options)
    assert set(both) == model | hidden
    for name, gradient in both.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, (forward | feedback)[name], rtol=1e-12, atol=1e-14)


def test_learn_chooses_what_feedback_is_trained() -> None:
    assert set(trained("feedback", learn_output=True)) == {"feedback.0", "feedback.1", "feedback.2"}
    assert not any(name.startswith("feedback") for name in trained("both", learn="none", learn_output=True))
    forward = trained("forward", learn="none")
    for learn in ("expected", "noise"):  # how feedback learns changes nothing for the forward weights
        both = trained("both", learn=learn)
        for name, gradient in forward.items():
            torch.testing.assert_close(both[name], gradient, rtol=1e-12, atol=1e-14)
    model, _ = ref.mlp((5, 7, 6, 3), nn.Tanh())
    assert DeepFeedbackControl(model, learn="none").feedback_parameters() == []
    assert not DeepFeedbackControl(model, learn="none").learns_apart
    rule = DeepFeedbackControl(model)
    assert rule.learns_apart
    assert [id(p) for p in rule.feedback_parameters()] == [id(p) for p in list(rule.feedback)[:2]]


@pytest.mark.parametrize("options", [{"variant": v} for v in VARIANTS] + [{"solver": "simulate", "points": 20}], ids=str)
def test_frozen_parameters_get_no_gradient_and_change_nothing_for_the_others(options: dict[str, object]) -> None:
    model, _ = ref.mlp((5, 7, 6, 3), nn.Tanh())
    rule = DeepFeedbackControl(model, learn="none", **options)
    rule(*batch((5,), 3)).backward()
    everything = named(rule)
    for frozen in (("0.weight",), ("2.bias",), ("0.weight", "0.bias"), ("4.weight", "4.bias")):
        rule.zero_grad()
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        rule(*batch((5,), 3)).backward()
        left = named(rule)
        assert set(left) == set(everything) - {f"model.{name}" for name in frozen}
        for name, gradient in left.items():
            assert torch.equal(gradient, everything[name])
        model.requires_grad_()


def test_state_dict_holds_the_feedback_and_detach_returns_the_model() -> None:
    model, _ = ref.mlp((5, 7, 6, 3), nn.Tanh())
    keys = list(model.state_dict())
    rule = DeepFeedbackControl(model, feedback="random")
    assert set(rule.state_dict()) == {f"model.{key}" for key in keys} | {f"feedback.{i}" for i in range(3)}
    twin = DeepFeedbackControl(ref.mlp((5, 7, 6, 3), nn.Tanh(), seed=5)[0], feedback="random")
    twin.load_state_dict(rule.state_dict())
    for ours, theirs in zip(gradients(rule, *batch((5,), 3)), gradients(twin, *batch((5,), 3)), strict=True):
        assert torch.equal(ours, theirs)
    assert rule.detach() is model
    assert list(model.state_dict()) == keys
    with pytest.raises(Exception, match="detached"):
        rule(*batch((5,), 3))


def wide(outputs: int = 70, seed: int = 0) -> tuple[nn.Sequential, ref.Net]:
    return ref.mlp((9, 12, 6, outputs), nn.Tanh(), seed=seed)


def test_asking_for_a_change_changes_nothing() -> None:
    model, _ = ref.mlp((5, 7, 6, 3), nn.Tanh())
    rule = DeepFeedbackControl(model, learn="noise")
    state = {key: value.clone() for key, value in rule.state_dict().items()}
    expected = [-gradient for gradient in gradients(rule, *batch((5,), 3))]
    rule.zero_grad()
    torch.manual_seed(4)
    random = torch.get_rng_state()
    asked, delta = requested_change(rule, *batch((5,), 3))
    for ours, theirs in zip(asked.values(), expected, strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(delta, wished(_sections(model), *batch((5,), 3), 1.0), rtol=1e-12, atol=1e-14)
    assert named(rule) == {}
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[key]) for key, value in rule.state_dict().items())


def _sections(model: nn.Sequential) -> ref.Net:
    return [ref.Section(model[0], torch.tanh), ref.Section(model[2], torch.tanh), ref.Section(model[4], lambda v: v)]


def goes_below(rule: DeepFeedbackControl) -> bool:
    return control.goes_below(rule.chain, rule.q)


def mean_squared(output: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(output, targets)


@pytest.mark.parametrize("a", [0.0, 0.4])
def test_solve_below_a_wide_output_is_the_dense_solve(a: float) -> None:
    model, _ = wide()
    rule = DeepFeedbackControl(model, mean_squared)
    assert goes_below(rule)
    with torch.no_grad():
        states = rule.run(batch((9,), 2, size=3)[0])
        q = [weights + 0.1 * torch.randn_like(weights) for weights in rule.q[:-1]] + [rule.q[-1]]
        dense, gains = (
            control.Resolvent(rule.chain, states, q, a),
            control.loop_gains(control.output_jacobian(rule.chain, states), q),
        )
        below = control.WideResolvent(rule.chain, states, q, a)
        right = torch.randn(3, 70, dtype=torch.double)
        torch.testing.assert_close(below.solve(right), dense.solve(right), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(below.by_depth(right), dense.by_depth(right), rtol=1e-12, atol=1e-12)
        gain = torch.stack([sum((3 - i) * m[s] for i, m in enumerate(gains)) for s in range(3)])
        torch.testing.assert_close(dense.by_depth(right), (gain @ right.unsqueeze(-1)).squeeze(-1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close((sum(gains) @ dense.solve(right)[..., None])[..., 0] + a * dense.solve(right), right)


@pytest.mark.parametrize("variant", VARIANTS)
def test_autoencoder_goes_below_and_gives_the_dense_gradients(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, net = wide()
    inputs, _ = batch((9,), 2, size=3)
    targets = torch.randn(3, 70, dtype=torch.double)
    rule = DeepFeedbackControl(model, mean_squared, variant=variant, alpha=0.2, nudge=30.0, normalised=False)
    built: list[type] = []

    class Seen(control.WideResolvent):
        def __init__(self, *args: object) -> None:
            built.append(type(self))
            super().__init__(*args)

    monkeypatch.setattr(control, "WideResolvent", Seen)
    below = rule(inputs, targets)
    below.backward()
    through, feedback = [p.grad.clone() for p in model.parameters()], [q.grad for q in rule.feedback_parameters()]
    assert set(built) == {Seen}  # more than one where so strong a nudge needs further Newton steps
    before = len(built)
    if variant == "ssa":  # the mean over 70 outputs and 3 samples, of which the target takes each sample's own part
        delta = -30.0 * 2 / 70 * (model(inputs) - targets).detach()
        assert far(through, ref.ssa(net, inputs, rule.q, delta, 0.2)) < 1e-10
    monkeypatch.setattr(control, "WIDE", 1000)
    rule.zero_grad()
    dense = rule(inputs, targets)
    dense.backward()
    assert len(built) == before
    assert far([p.grad for p in model.parameters()], through) < 1e-11
    assert far([q.grad for q in rule.feedback_parameters()], feedback) < 1e-11
    torch.testing.assert_close(dense.logs["control"], below.logs["control"], rtol=1e-11, atol=0)


def test_only_a_frozen_identity_below_a_wide_linear_output_goes_below() -> None:
    assert not goes_below(DeepFeedbackControl(wide()[0], learn_output=True))
    assert not goes_below(DeepFeedbackControl(ref.mlp((9, 12, 6, 20), nn.Tanh())[0]))
    assert not goes_below(DeepFeedbackControl(ref.mlp((9, 80, 70), nn.Tanh())[0]))
    assert not goes_below(DeepFeedbackControl(ref.mlp((9, 6, 70), nn.Tanh(), nn.Tanh())[0]))
    rule = DeepFeedbackControl(wide()[0])
    assert goes_below(rule)
    with torch.no_grad():
        rule.feedback[-1][0, 0] = 2
    assert not goes_below(rule)


@pytest.mark.parametrize("hidden", [nn.Tanh(), nn.Sigmoid(), nn.ReLU(), nn.LeakyReLU(0.1)], ids=lambda m: type(m).__name__)
def test_weak_nudges_keep_float32_exact(hidden: nn.Module) -> None:
    inputs, targets = batch((20,), 5, size=16)
    loop = {"points": 25, "dt": 0.1, "tau": 0.3, "k_p": 0.4}
    for options in ({"variant": "ssa"}, {"variant": "dfc"}, {"variant": "ss"}, {"solver": "simulate", **loop}):
        model, _ = ref.mlp((20, 30, 25, 5), hidden)
        rule = DeepFeedbackControl(model, nudge=1e-6, alpha=0.05, learn="none", **options)
        exact = gradients(rule, inputs, targets)
        rule.float()
        assert far(gradients(rule, inputs.float(), targets), exact) < 1e-5, options


def test_plain_differences_lose_float32() -> None:
    """Why everything is in deviations: the slow re-implementation in float32 is wrong in the third digit or before."""
    inputs, targets = batch((20,), 5, size=2)
    model, net = ref.mlp((20, 30, 25, 5), nn.Tanh())
    rule = DeepFeedbackControl(model, variant="ssa", nudge=1e-6, alpha=0.05, learn="none")
    delta = wished(net, inputs, targets, 1e-6)
    exact = gradients(rule, inputs, targets)
    rule.float()
    assert far(ref.ssa(net, inputs.float(), rule.q, delta.float(), 0.05), exact) > 1e-3


UNSTABLE: dict[str, tuple[dict[str, float], Callable[[Tensor], Tensor], str]] = {
    "step": ({"dt": 0.2, "tau": 0.2, "k_p": 5.0}, lambda q: q, r"dt = 0\.2 is too large for k_p = 5 .* largest stable dt"),
    "gain": ({"dt": 0.02, "tau": 0.2, "k_p": 200.0}, lambda q: q, "k_p = 200"),
    "feedback": ({"dt": 0.02, "tau": 0.2, "k_p": 0.0}, torch.neg, "Condition 3 is violated.* alpha = 0.01.* raise alpha"),
}


def unstable(name: str, **options: object) -> DeepFeedbackControl:
    loop, change, _ = UNSTABLE[name]
    torch.manual_seed(0)
    model, net = ref.mlp((5, 7, 6, 3), nn.Tanh())
    rule = DeepFeedbackControl(model, alpha=0.01, nudge=0.1, **loop, **options)
    with torch.no_grad():
        for q, block in zip(rule.feedback, ref.jacobian(net, batch((5,), 3)[0][0]), strict=True):
            q.copy_(change(block.T))
    return rule


@pytest.mark.parametrize("variant", ["dfc", "ss"])
@pytest.mark.parametrize("name", UNSTABLE)
def test_unstable_simulation_stops_and_names_the_cause(name: str, variant: str) -> None:
    rule = unstable(name, variant=variant, solver="simulate", points=1500)
    with pytest.raises(InstabilityError, match=UNSTABLE[name][2]):
        rule(*batch((5,), 3)).backward()
    assert named(rule) == {}


@pytest.mark.parametrize("name", UNSTABLE)
def test_closed_forms_warn_once_of_what_a_simulation_would_do(name: str) -> None:
    rule = unstable(name, variant="dfc")
    with pytest.warns(RuntimeWarning, match=UNSTABLE[name][2]):
        rule(*batch((5,), 3)).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            rule(*batch((5,), 3)).backward()
    assert all(gradient.isfinite().all() for gradient in named(rule).values())


def test_stable_loops_neither_warn_nor_stop() -> None:
    model, _ = ref.mlp((5, 7, 6, 3), nn.Tanh())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(DeepFeedbackControl(model, variant="ssa"), *batch((5,), 3))
        rule = DeepFeedbackControl(model, solver="simulate", points=1500)
        credit = rule(*batch((5,), 3))
    assert float(credit.logs["settled"]) == 1


def test_outputs_smaller_than_the_nudge_are_not_taken_for_runaways() -> None:
    """A network that starts at zero output is as far from its target as the target is long."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    rule = DeepFeedbackControl(model, solver="simulate", points=10)
    credit = rule(*batch((5,), 3))
    credit.backward()
    assert float(credit.logs["settled"]) == 0
    assert model[2].weight.grad.abs().max() > 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_singular_controllers_are_refused(variant: str) -> None:
    model = nn.Linear(3, 2).double()
    rule = DeepFeedbackControl(model, variant=variant, alpha=0.5, k_p=0.0, learn="none")
    with torch.no_grad():
        rule.feedback[0].copy_(-0.5 * torch.eye(2))  # J Q + a I = 0
    with pytest.raises(InstabilityError, match=r"no finite steady state.*alpha = 0\.5.*raise alpha"):
        rule(*batch((3,), 2)).backward()
    assert named(rule) == {}


def test_samples_of_another_shape_are_refused_by_name() -> None:
    model, _ = ref.conv_net()
    rule = DeepFeedbackControl(model, input_shape=(2, 6, 6))
    with pytest.raises(UnsupportedModelError, match=r"layer '0' gave \(3, 7, 7\).*\(3, 6, 6\).*input_shape"):
        rule(torch.zeros(2, 2, 7, 7).double(), torch.tensor([0, 1]))


def test_image_targets_and_outputs() -> None:
    """A loss on outputs that are images: the target is as large as the output, flattened."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1)
    model = nn.Sequential(first, nn.Tanh(), second).double()
    net = [ref.Section(first, torch.tanh), ref.Section(second, lambda v: v)]
    inputs = torch.randn(2, 1, 4, 4).double()
    targets = torch.randn(2, 1, 4, 4).double()
    rule = DeepFeedbackControl(
        model, F.mse_loss, variant="ssa", alpha=0.3, nudge=1.0, normalised=False, input_shape=(1, 4, 4)
    )
    delta = (-2 / 16 * (model(inputs) - targets)).detach().flatten(1)
    assert far(gradients(rule, inputs, targets), ref.ssa(net, inputs, rule.q, delta, 0.3)) < 1e-10


COMPILED = {
    "in-place": lambda: (ref.mlp((5, 7, 6, 3), nn.ReLU(inplace=True))[0], (5,)),
    "convolutions": lambda: (ref.conv_net()[0], (2, 6, 6)),
    "wide": lambda: (wide()[0], (9,)),
}
"""Plain dense networks are compiled in the rule's conformance, which also traces the backward pass."""


@pytest.mark.parametrize("kind", COMPILED)
def test_solvers_compile_whole(kind: str) -> None:
    model, shape = COMPILED[kind]()
    inputs, targets = batch(shape, 3)
    rule = DeepFeedbackControl(model, input_shape=shape)
    rule(inputs, targets).backward()
    eager = named(rule)
    rule.zero_grad()
    torch._dynamo.reset()
    torch.compile(rule, backend="eager", fullgraph=True)(inputs, targets).backward()
    for name, gradient in named(rule).items():
        torch.testing.assert_close(gradient, eager[name], rtol=1e-10, atol=1e-14)
