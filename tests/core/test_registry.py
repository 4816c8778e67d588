"""Types of a user's own: one call makes a layer or an activation known to every rule, which then trains it as its own."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical.core.activations import complex_parts, derivative, difference, is_activation, is_elementwise
from apical.core.credit import CreditRule
from apical.core.layers import computes_plainly, effective_weight, is_weighted
from apical.core.sigmoids import ShiftedSigmoid
from apical.core.units import weighted_layers
from apical.errors import ConfigError, UnsupportedModelError


class Bend(nn.Module):
    """The hyperbolic tangent under another name."""

    def forward(self, v: Tensor) -> Tensor:
        return (v.exp() - (-v).exp()) / (v.exp() + (-v).exp())


class Step(nn.Module):
    """ShiftedSigmoid by an operation that takes no complex numbers."""

    def forward(self, v: Tensor) -> Tensor:
        return torch.special.expit(4 * v - 2) if not v.is_complex() else v.clamp(0, 1)


class Slope(nn.Module):
    """An activation with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3))

    def forward(self, v: Tensor) -> Tensor:
        return torch.where(v > 0, v, self.slope * v)


class Twice(nn.ReLU):
    def forward(self, v: Tensor) -> Tensor:
        return 2 * super().forward(v)


class Lecun(nn.Tanh):
    """A tanh by inheritance, but another one."""

    def __init__(self, scale: float = 1.7159) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, v: Tensor) -> Tensor:
        return self.scale * torch.tanh(2 / 3 * v)


class LecunAlone(nn.Module):
    def forward(self, v: Tensor) -> Tensor:
        return 1.7159 * torch.tanh(2 / 3 * v)


class Again(Twice):
    def forward(self, v: Tensor) -> Tensor:
        return -super().forward(v)


class Dense(nn.Module):
    """A layer that shares nothing with nn.Linear but the names of its parameters."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(n_out, n_in)), nn.Parameter(torch.empty(n_out))

    def forward(self, h: Tensor) -> Tensor:
        return (self.weight @ h.T).T + self.bias


def logistic_parts(module: Step, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return complex_parts(ShiftedSigmoid(), a, b)


apical.register_activation(Bend, derivative=lambda module, v, r: 1 - r * r, difference=lambda module, v, r, d: bent(v, d))
apical.register_activation(Step, complex_parts=logistic_parts)
apical.register_activation(Slope, elementwise=False)
apical.register_activation(Twice)
apical.register_activation(Lecun, derivative=lambda module, v, r: 2 / 3 * (module.scale - r * r / module.scale))
apical.register_activation(LecunAlone)
apical.register_layer(Dense)


def bent(v: Tensor, d: Tensor) -> Tensor:
    return torch.sinh(d) / (torch.cosh(v) * torch.cosh(v + d))


RULES: dict[str, Callable[[nn.Module], CreditRule]] = {
    "bp": apical.Backprop,
    "fa": apical.FeedbackAlignment,
    "sign symmetry": apical.SignSymmetry,
    "kolen-pollack": apical.KolenPollack,
    "weight mirror": apical.WeightMirror,
    "pfa": apical.ProductFeedbackAlignment,
    "dfa": apical.DirectFeedbackAlignment,
    "tdca": apical.TopDownCreditAssignment,
    "dtp": apical.DifferenceTargetPropagation,
    "dfc": apical.DeepFeedbackControl,
    "dfc-ss": lambda model: apical.DeepFeedbackControl(model, variant="ss"),
    "strong-dfc": apical.StrongDeepFeedbackControl,
    "ep": lambda model: apical.EquilibriumPropagation(model, free_steps=20, nudged_steps=10),
    "ccl": apical.CounterCurrentLearning,
}


def model_of(layer: Callable[[int, int], nn.Module], phi: Callable[[], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    like = [nn.Linear(*sizes) for sizes in ((5, 6), (6, 7), (7, 3))]
    model = nn.Sequential(layer(5, 6), phi(), layer(6, 7), phi(), layer(7, 3))
    for index, source in zip((0, 2, 4), like, strict=True):
        model[index].load_state_dict(source.state_dict())
    return model.double()


def gradients(make: Callable[[nn.Module], CreditRule], model: nn.Module, dtype: torch.dtype = torch.double) -> list[Tensor]:
    torch.manual_seed(1)
    inputs, targets = torch.randn(8, 5, dtype=torch.double).to(dtype), torch.arange(8) % 3
    rule = make(model)
    torch.manual_seed(2)
    rule(inputs, targets).backward()
    return [parameter.grad for parameter in rule.parameters() if parameter.grad is not None]


@pytest.mark.filterwarnings("ignore:the steady state is not a stable one")
@pytest.mark.parametrize("own", ["activation", "layer"])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_trains_it_as_the_built_in_one(name: str, own: str) -> None:
    built_in = model_of(nn.Linear, nn.Tanh)
    model = model_of(nn.Linear, Bend) if own == "activation" else model_of(Dense, nn.Tanh)
    mine, expected = gradients(RULES[name], model), gradients(RULES[name], built_in)
    assert len(mine) == len(expected) >= 6
    for gradient, wanted in zip(mine, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)


INHERITED = {
    **{name: RULES[name] for name in ("dfa", "dtp", "dfc-ss", "ccl")},
    "dfc-simulate": lambda model: apical.DeepFeedbackControl(model, solver="simulate", points=20),
    "ep-hardtanh": lambda model: apical.EquilibriumPropagation(model, damping=0.3, free_steps=20, nudged_steps=10),
}


@pytest.mark.filterwarnings("ignore:the steady state is not a stable one")
@pytest.mark.parametrize("name", INHERITED)
@pytest.mark.parametrize("dtype", [torch.double, torch.float])
def test_a_type_is_not_taken_for_the_one_it_inherits_from(name: str, dtype: torch.dtype) -> None:
    """In float32 too, where the simulation has a series for tanh alone."""
    found = [
        gradients(lambda model: INHERITED[name](model.to(dtype)), model_of(nn.Linear, phi), dtype)
        for phi in (Lecun, LecunAlone)
    ]
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.double else {"rtol": 2e-3, "atol": 2e-5}
    for gradient, wanted in zip(*found, strict=True):
        torch.testing.assert_close(gradient, wanted, **tolerance)


def test_a_bounded_relu_is_not_one_by_inheritance() -> None:
    rule = apical.EquilibriumPropagation(model_of(nn.Linear, Twice))
    assert rule.remarks == []
    v = torch.tensor([3.0])
    assert rule.chain.stages[0].activation(v) == 6


def test_complex_parts_serve_holomorphic_equilibrium_propagation() -> None:
    def make(model: nn.Module) -> CreditRule:
        return apical.EquilibriumPropagation(model, estimator="holomorphic", points=4, free_steps=20, nudged_steps=10)

    mine, expected = gradients(make, model_of(nn.Linear, Step)), gradients(make, model_of(nn.Linear, ShiftedSigmoid))
    for gradient, wanted in zip(mine, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)


def test_formulas_default_to_autograd_and_the_plain_difference() -> None:
    v = torch.linspace(-2, 2, 9).double()
    torch.testing.assert_close(derivative(Twice(), v, Twice()(v)), 2.0 * (v > 0), check_dtype=False)
    torch.testing.assert_close(difference(Twice(), v, Twice()(v), v), Twice()(2 * v) - Twice()(v))
    parts = complex_parts(Bend(), v, v)
    torch.testing.assert_close(torch.complex(*parts), torch.tanh(torch.complex(v, v)))


def test_the_registered_forward_is_what_is_known() -> None:
    assert is_activation(Again())
    assert not is_elementwise(Again())
    assert is_elementwise(Twice())
    with pytest.raises(UnsupportedModelError, match=r"'1' \(Again\).*register_activation\(Again\)"):
        apical.DeepFeedbackControl(model_of(nn.Linear, Again))


def test_an_activation_with_parameters_is_no_orphan_but_no_part_of_a_chain() -> None:
    model = model_of(nn.Linear, Slope)
    assert list(weighted_layers(model)) == ["0", "2", "4"]
    assert len(gradients(apical.DirectFeedbackAlignment, model)) == 8
    with pytest.raises(UnsupportedModelError, match=r"'1' \(Slope\) is not supported in a chain"):
        apical.DeepFeedbackControl(model)


def test_a_registered_type_takes_the_general_path() -> None:
    layer = Dense(2, 3)
    assert is_weighted(layer)
    assert not computes_plainly(layer)
    assert effective_weight(layer) is layer.weight


class Nested(nn.Linear):
    """Low-rank adaptation by layers inside."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.down, self.up = nn.Linear(n_in, 2, bias=False), nn.Linear(2, n_out, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h) + self.up(self.down(h))


def test_what_is_inside_a_registered_layer_belongs_to_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Nested(5, 4), nn.Tanh(), Nested(4, 3)).double()
    assert list(weighted_layers(model)) == ["0", "0.down", "0.up", "2", "2.down", "2.up"]
    apical.register_layer(Nested, weight=lambda layer: layer.weight + layer.up.weight @ layer.down.weight)
    assert list(weighted_layers(model)) == ["0", "2"]
    plain = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    for index in (0, 2):
        plain[index].weight.data, plain[index].bias.data = effective_weight(model[index]).detach(), model[index].bias.data
    for make in (RULES["dfc"], RULES["dtp"], RULES["ep"], RULES["ccl"]):
        model.zero_grad()
        plain.zero_grad()
        gradients(make, model)
        gradients(make, plain)
        for layer, twin in ((model[0], plain[0]), (model[2], plain[2])):
            torch.testing.assert_close(layer.up.weight.grad, twin.weight.grad @ layer.down.weight.T, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(layer.down.weight.grad, layer.up.weight.T @ twin.weight.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("register", [apical.register_layer, apical.register_activation])
def test_only_types_of_modules_can_be_registered(register: Callable[[object], None]) -> None:
    for wrong in (F.relu, nn.ReLU(), int):
        with pytest.raises(ConfigError, match=r"takes a subclass of nn.Module"):
            register(wrong)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_every_type_of_pytorchs_computes_plainly(kind: type[nn.Module]) -> None:
    assert computes_plainly(kind(2, 2) if kind is nn.Linear else kind(2, 2, 1))


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_transposed_convolutions_compute_plainly(kind: type[nn.Module]) -> None:
    layer = kind(2, 3, 2)
    assert computes_plainly(layer)
    assert effective_weight(layer) is layer.weight


def test_local_modules_of_ones_own() -> None:
    """Scales of several shapes get their exact derivative, and are refused as orphans before they are known."""

    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.whole = nn.Parameter(torch.ones(3, dtype=torch.float64)), nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.whole * self.gain * x

    model = nn.Sequential(nn.Linear(4, 3), Gain(), nn.Tanh(), nn.Linear(3, 2)).double()
    with pytest.raises(UnsupportedModelError, match=r"'1\.gain', '1\.whole' are orphans"):
        apical.FeedbackAlignment(model)
    apical.register_local(Gain)
    rule = apical.FeedbackAlignment(model)
    rule.set_feedback("3", model[3].weight.detach())
    x, y = torch.randn(5, 4).double(), torch.arange(5) % 2
    rule(x, y).backward()
    expected = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), model[1].gain)[0]
    assert (model[1].gain.grad - expected).abs().max() < 1e-15
    with pytest.raises(ConfigError, match="use register_layer"):
        apical.register_local(nn.Linear)
    with pytest.raises(ConfigError, match="takes a subclass"):
        apical.register_local(3)  # type: ignore[arg-type]


class Claimed(nn.Module):
    """tanh, of which others say what is not so."""

    def forward(self, v: Tensor) -> Tensor:
        return v.tanh()


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, v: Tensor) -> Tensor:
        return self.scale * v.tanh()


class Shared(nn.Module):
    def forward(self, v: Tensor) -> Tensor:
        return v.softmax(-1)


class Noisy(nn.Module):
    def forward(self, v: Tensor) -> Tensor:
        return v.tanh() + 0.1 * torch.randn_like(v)


@pytest.mark.parametrize(
    ("kind", "formulas", "words"),
    [
        (Claimed, {"derivative": lambda m, v, r: 1 + r * r}, "derivative"),
        (Claimed, {"derivative": lambda m, v, r: (1 - r * r).mean()}, "derivative"),
        (Claimed, {"difference": lambda m, v, r, d: (1 - r * r) * d}, "difference"),
        (Claimed, {"complex_parts": lambda m, a, b: (a.tanh(), b)}, "complex_parts"),
        (Scaled, {}, "has parameters"),
        (Shared, {}, "each number independently"),
        (Noisy, {}, "each number independently"),
    ],
)
@pytest.mark.parametrize("rule", ["dtp", "dfc", "ep", "ccl"])
def test_what_is_said_of_an_activation_must_be_so(rule: str, kind: type, formulas: dict, words: str) -> None:
    apical.register_activation(kind, **formulas)
    words = f"activation {kind.__name__} .*{words}.*register_activation"
    with pytest.raises((ConfigError, UnsupportedModelError), match=f"{words}|draws random numbers"):
        RULES[rule](model_of(nn.Linear, kind))(torch.randn(4, 5, dtype=torch.double), torch.arange(4) % 3)
    apical.register_activation(kind, elementwise=kind is Claimed)


def test_right_formulas_are_taken_whatever_the_precision_of_numbers_in_the_module() -> None:
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steep", torch.tensor(1.7))

        def forward(self, v: Tensor) -> Tensor:
            return (self.steep * v).tanh()

    apical.register_activation(
        Steep,
        derivative=lambda m, v, r: m.steep * (1 - r * r),
        difference=lambda m, v, r, d: (m.steep * (v + d)).tanh() - r,
    )
    assert is_elementwise(Steep())


class Told(nn.Linear):
    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, 2 * self.weight, self.bias)


@pytest.mark.parametrize("rule", ["dtp", "dfc", "strong-dfc", "ep"])
def test_what_is_said_of_a_layer_must_be_so(rule: str) -> None:
    apical.register_layer(Told)  # wrongly: its forward applies twice the weight
    model = model_of(Told, nn.Tanh)
    with pytest.raises(UnsupportedModelError, match=r"'0' \(Told\).*given to apical.register_layer"):
        RULES[rule](model)(torch.randn(4, 5, dtype=torch.double), torch.arange(4) % 3)
    apical.register_layer(Told, weight=lambda layer: 2 * layer.weight)
    RULES[rule](model_of(Told, nn.Tanh))(torch.randn(4, 5, dtype=torch.double), torch.arange(4) % 3)


def test_the_mirror_of_counter_current_learning_has_activations_that_nobody_registered() -> None:
    class Unnamed(nn.Module):
        def forward(self, v: Tensor) -> Tensor:
            return v.tanh()

    updates = []
    for kind in (Unnamed, nn.Tanh):
        model = model_of(nn.Linear, kind)
        torch.manual_seed(1)
        rule = apical.CounterCurrentLearning(model)
        torch.manual_seed(2)
        rule(torch.randn(6, 5, dtype=torch.double), torch.arange(6) % 3).backward()
        updates.append([p.grad for p in rule.parameters()])
    torch.testing.assert_close(*updates, rtol=1e-6, atol=1e-8)


class Slopes(nn.Module):
    """An activation with a number for each unit, which takes potentials of that width alone."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.full((units,), 0.5))

    def forward(self, v: Tensor) -> Tensor:
        return torch.tanh(self.slope * v)


class LowRank(nn.Module):
    """A layer whose weight is a product, which autocast computes in its own type."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(n_out, 3)), nn.Parameter(torch.randn(3, n_in) / 3)
        self.bias = nn.Parameter(torch.zeros(n_out))

    @property
    def weight(self) -> Tensor:
        return self.u @ self.v

    def forward(self, h: Tensor) -> Tensor:
        return (h @ self.v.T) @ self.u.T + self.bias


class OfMaps(nn.Module):
    """tanh of feature maps (batch, channels, height, width) alone."""

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        return x.view(batch, channels, height, width).tanh()


def test_a_formula_that_cannot_be_checked_is_refused() -> None:
    apical.register_activation(OfMaps, elementwise=False, derivative=lambda m, v, r: 1 - r)  # which is wrong
    with pytest.raises(ConfigError, match=r"OfMaps does not run on rows of numbers.*register it with no formula"):
        is_elementwise(OfMaps())
    apical.register_activation(OfMaps, elementwise=False)
    assert not is_elementwise(OfMaps())


def test_an_activation_of_units_and_a_layer_of_factors() -> None:
    apical.register_activation(Slopes, elementwise=False, derivative=lambda m, v, r: m.slope * (1 - r * r))
    apical.register_layer(LowRank, weight=lambda layer: layer.u @ layer.v)
    x, y = torch.randn(8, 6), torch.arange(8) % 3
    for kind in (apical.FeedbackAlignment, apical.DirectFeedbackAlignment, apical.CounterCurrentLearning):
        rule = kind(nn.Sequential(nn.Linear(6, 9), Slopes(9), nn.Linear(9, 5), Slopes(5), nn.Linear(5, 3)))
        rule(x, y).backward()
        assert all(bool(p.grad.any()) for p in rule.model.parameters())
    with pytest.raises(UnsupportedModelError, match=r"module '1' \(Slopes\) is not supported in a chain"):
        apical.DeepFeedbackControl(nn.Sequential(nn.Linear(6, 9), Slopes(9), nn.Linear(9, 3)))
    apical.register_activation(Slopes, elementwise=False, derivative=lambda m, v, r: 1 - r * r)
    with pytest.raises(ConfigError, match="Slopes is not what the derivative says"):
        is_elementwise(Slopes(9))
    for kind in (apical.CounterCurrentLearning, apical.LocalClassifiers, apical.PredictiveCoding):
        torch.manual_seed(0)
        rule = kind(nn.Sequential(LowRank(6, 9), nn.Tanh(), LowRank(9, 5), nn.Tanh(), LowRank(5, 3)))
        with torch.autocast("cpu", torch.bfloat16):
            rule(x, y).backward()
        assert all(p.grad.dtype == torch.float32 for p in rule.model.parameters())
