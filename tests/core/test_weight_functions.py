"""Layers that compute with a function of their weight: the rule itself, in eager, compiled and autocast mode."""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import apical
from apical.bench.names import find_rule
from apical.core.effective import measured_weight
from apical.core.units import key
from apical.diagnostics.alignment import layer_alignment
from apical.errors import UnsupportedModelError

warnings.filterwarnings("ignore", category=FutureWarning)


@pytest.fixture(autouse=True)
def _double() -> object:
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float)


class Weighted:
    """Mixin: the layer applies `function(weight)`."""

    weight: Tensor

    def function(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        w = self.function(self.weight)
        return F.linear(x, w, self.bias) if isinstance(self, nn.Linear) else self._conv_forward(x, w, self.bias)


def scaled(weight: Tensor) -> Tensor:
    return 0.5 * weight


def masked(weight: Tensor) -> Tensor:
    return weight * (torch.arange(weight.numel(), device=weight.device) % 3 > 0).view_as(weight)


def standardised(weight: Tensor) -> Tensor:
    flat = weight.flatten(1)
    return ((flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 1e-5)).view_as(weight)


def equalised(weight: Tensor) -> Tensor:
    return weight * (2 / weight[0].numel()) ** 0.5


def positive(weight: Tensor) -> Tensor:
    return F.softplus(weight)


def binary(weight: Tensor) -> Tensor:
    return weight + (weight.sign() - weight).detach()  # straight-through


def quantised(weight: Tensor) -> Tensor:
    return weight + ((weight * 16).round() / 16 - weight).detach()


def cast(weight: Tensor) -> Tensor:
    return weight.float().to(weight.dtype)


def dropped(weight: Tensor) -> Tensor:
    return F.dropout(weight, 0.3)


FUNCTIONS = (scaled, masked, standardised, equalised, positive, binary, quantised, cast, dropped)


def subclass(base: type[nn.Module], function: Callable[[Tensor], Tensor]) -> type[Any]:
    return type(function.__name__, (Weighted, base), {"function": lambda self, weight: function(weight)})


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DoubledConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Lora(nn.Linear):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.a, self.b = nn.Parameter(torch.randn(2, n_in)), nn.Parameter(torch.randn(n_out, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.b @ self.a, self.bias)


class LoraInTwoSteps(Lora):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + x @ self.a.T @ self.b.T


class Gained(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.linspace(0.5, 2, self.out_channels, dtype=x.dtype).view(-1, 1, 1)


class Tanh(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.tanh()


def parametrised(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Tanh())


def on_the_instance(layer: nn.Module) -> nn.Module:
    layer.forward = lambda x: F.linear(x, 3 * layer.weight, layer.bias)
    return layer


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.5)


WRAPPERS = {
    "pruned": pruned,
    "parametrised": parametrised,
    "weight_norm": parametrizations.weight_norm,
    "weight_norm-old": lambda layer: nn.utils.weight_norm(layer),
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer).eval(),
    "spectral_norm-old": lambda layer: nn.utils.spectral_norm(layer).eval(),
}
DENSE: dict[str, Callable[[int, int], nn.Module]] = {
    **{function.__name__: subclass(nn.Linear, function) for function in FUNCTIONS},
    **{name: lambda a, b, wrap=wrap: wrap(nn.Linear(a, b)) for name, wrap in WRAPPERS.items()},
    "doubled": Doubled,
    "lora": Lora,
    "lora-in-two-steps": LoraInTwoSteps,
    "instance": lambda a, b: on_the_instance(nn.Linear(a, b)),
}
CONV: dict[str, Callable[..., nn.Module]] = {
    **{function.__name__: subclass(nn.Conv2d, function) for function in FUNCTIONS},
    **{name: lambda *a, wrap=wrap, **k: wrap(nn.Conv2d(*a, **k)) for name, wrap in WRAPPERS.items()},
    "doubled": DoubledConv,
    "gained": Gained,
}
ZOO = {f"dense-{name}": (make, None) for name, make in DENSE.items()} | {
    f"conv-{name}": (None, make) for name, make in CONV.items()
}


def network(name: str) -> tuple[nn.Sequential, Tensor]:
    """A network with the odd layer in the middle (named "2") and at its end ("4"), and inputs."""
    torch.manual_seed(0)
    dense, conv = ZOO[name]
    if dense is not None:
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), dense(6, 7), nn.Tanh(), dense(7, 4)), torch.randn(9, 5)
    layers = (
        conv(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Tanh(),
        conv(6, 4, (2, 3), padding=(0, 1), padding_mode="circular"),
    )
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), *layers, nn.Flatten())
    return model, torch.randn(9, 2, 9, 8)


def squares(output: Tensor, targets: Tensor) -> Tensor:
    ramp = torch.linspace(0.5, 1.5, output.numel(), dtype=torch.double).view_as(output)
    return (ramp * output.double().square()).mean()


def gradients(model: nn.Module, step: Callable[[], Any]) -> dict[str, Tensor]:
    """Of one backward pass, with the random numbers that every other gets."""
    model.zero_grad()
    torch.manual_seed(7)
    step()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / b[n].norm().clamp_min(1e-9)) for n in a)


def rule_step(rule: nn.Module, inputs: Tensor) -> Callable[[], None]:
    return lambda: rule(inputs, inputs).backward()


def use(rule: apical.FeedbackAlignment, weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        rule.set_feedback(name, B=weight)


def weights_of_the_pass(rule: apical.FeedbackAlignment, model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """What the layers compute with in the pass that :func:`gradients` makes, from their Jacobian there."""
    found: dict[str, Tensor] = {}
    original = rule.feedback_of

    def spy(name: str) -> Any:
        found[name] = rule.forward_weight(name).detach().clone()
        return original(name)

    rule.feedback_of = spy
    gradients(model, rule_step(rule, inputs))
    del rule.feedback_of
    for name, layer in rule.layers.items():
        found.setdefault(name, layer.weight.detach())
    return found


@pytest.mark.parametrize("name", ZOO)
def test_feedback_alignment_is_not_backpropagation_and_with_the_forward_weights_it_is(name: str) -> None:
    model, inputs = network(name)
    backprop = gradients(model, lambda: squares(model(inputs), inputs).backward())
    rule = apical.FeedbackAlignment(model, squares)
    assert not rule.is_plain("2")
    first = gradients(model, rule_step(rule, inputs))
    last = {n: g for n, g in first.items() if n.startswith("4.")}
    assert far(last, {n: backprop[n] for n in last}) < 1e-10  # nothing but the loss lies behind the last layer
    assert all(far({n: first[n]}, {n: backprop[n]}) > 1e-2 for n in ("0.weight", "0.bias"))
    use(rule, weights_of_the_pass(rule, model, inputs))
    assert far(gradients(model, rule_step(rule, inputs)), backprop) < 1e-10


@pytest.mark.parametrize("name", ZOO)
def test_error_at_the_input_is_linear_in_the_feedback(name: str) -> None:
    """Twice the feedback of the middle layer is twice the error below it; none is none."""
    model, inputs = network(name)
    rule = apical.FeedbackAlignment(model, squares)
    once = gradients(model, rule_step(rule, inputs))
    feedback = rule.feedback_weights()["2"]
    rule.set_feedback("2", B=2 * feedback)
    twice = gradients(model, rule_step(rule, inputs))
    for parameter, value in once.items():
        factor = 2.0 if parameter.startswith("0.") else 1.0
        assert torch.allclose(twice[parameter], factor * value, rtol=1e-10, atol=1e-13), parameter
    rule.set_feedback("2", B=torch.zeros_like(feedback))
    assert not gradients(model, rule_step(rule, inputs))["0.weight"].any()


@pytest.mark.parametrize(
    "name", ["dense-doubled", "dense-dropped", "dense-pruned", "dense-instance", "conv-masked", "conv-weight_norm"]
)
def test_compiled_is_eager(name: str) -> None:
    """T18; also a rule that has seen no batch before."""
    model, inputs = network(name)
    rule = apical.FeedbackAlignment(model, squares)
    torch._dynamo.reset()
    compiled = torch.compile(rule, backend="aot_eager", fullgraph=True)
    graph = gradients(model, rule_step(compiled, inputs))
    assert far(graph, gradients(model, rule_step(rule, inputs))) < 1e-10


@pytest.mark.parametrize("name", ZOO)
def test_autocast_is_the_same_rule(name: str) -> None:
    """With B = W it is backpropagation under autocast, to bfloat16's rounding; with random B it is not."""
    torch.set_default_dtype(torch.float)
    model, inputs = network(name)

    def both(step: Callable[[], Any]) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return gradients(model, step)

    backprop = both(lambda: squares(model(inputs), inputs).backward())
    rule = apical.FeedbackAlignment(model, squares)
    random = both(rule_step(rule, inputs))
    cosine = F.cosine_similarity(random["0.weight"].flatten(), backprop["0.weight"].flatten(), dim=0)
    assert cosine < 0.95
    use(rule, weights_of_the_pass(rule, model, inputs))
    oracle = both(rule_step(rule, inputs))
    for parameter, exact in backprop.items():
        cosine = F.cosine_similarity(oracle[parameter].flatten(), exact.flatten(), dim=0)
        assert cosine > 0.98, (parameter, float(cosine))


@pytest.mark.parametrize("name", ZOO)
def test_signs_are_those_of_the_weight_that_is_applied(name: str) -> None:
    """uSF with its scalar magnitude is FA with `s sign(W_eff)`, for random weights those of this very pass."""
    model, inputs = network(name)
    rule = apical.SignSymmetry(model, squares)
    found = gradients(model, rule_step(rule, inputs))
    magnitude = {n: rule.magnitude.get_buffer(key(n)) for n in rule.layers}
    rule.detach()
    reference = apical.FeedbackAlignment(model, squares)
    weights = weights_of_the_pass(reference, model, inputs)
    use(reference, {n: magnitude[n] * w.sign() for n, w in weights.items()})
    assert far(found, gradients(model, rule_step(reference, inputs))) < 1e-10


@pytest.mark.parametrize("name", ["dense-doubled", "dense-lora", "dense-masked", "conv-gained", "conv-standardised"])
def test_the_mirror_sees_the_weight_that_is_applied(name: str) -> None:
    model, _ = network(name)
    rule = apical.WeightMirror(model, squares, warmup=400, rate=0.02)
    for layer, feedback in rule.feedback_weights().items():
        weight = measured_weight(model.get_submodule(layer))
        assert F.cosine_similarity(feedback.flatten(), weight.flatten(), dim=0) > 0.95
        assert 0.8 < float(feedback.norm() / weight.norm()) < 1.25


@pytest.mark.parametrize("name", [n for n in ZOO if not n.endswith("dropped")])
def test_measured_weight_is_the_layers_derivative(name: str) -> None:
    """Forwards, at random inputs; and neither random numbers nor buffers take notice."""
    model, inputs = network(name)
    layer, h = model[2], model[:2](inputs).detach()
    state, before = torch.get_rng_state(), {n: b.clone() for n, b in model.named_buffers()}
    weight = measured_weight(layer)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[n], b) for n, b in model.named_buffers())
    if isinstance(layer, nn.Linear):
        linear = F.linear(h, weight)
    else:
        linear = F.conv2d(h, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    assert torch.allclose(layer(h) - layer(torch.zeros_like(h)), linear, rtol=0, atol=1e-12)


def test_measured_weight_of_a_random_layer_is_that_of_its_next_call() -> None:
    layer = subclass(nn.Linear, dropped)(5, 4)
    x = torch.randn(3, 5)
    weight = measured_weight(layer)
    assert torch.allclose(layer(x) - layer.bias, x @ weight.T, rtol=0, atol=1e-12)
    assert not torch.equal(weight, layer.weight)


class Rectified(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Softly(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


class NormalisedInput(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.layer_norm(x, x.shape[-1:]))


class DroppedInput(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5))


class DroppedOutput(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5)


class QuantisedInput(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + ((8 * x).round() / 8 - x).detach())


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight))


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x), self.bias)[0].unflatten(-1, (2, -1)).flatten(-2).flip(0)


class SameConv(nn.Conv2d):
    """Pads by itself: another geometry than the layer declares."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / x.std())


class Skipped(nn.Linear):
    """Error passes beside the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh() + x[:, :4]


class Gated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.mean(1, keepdim=True).sigmoid()


class SkippedLater(nn.Linear):
    """The gate of the skip is zero at first."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh() + self.gate * x[:, :4]


class Quantise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + ((8 * x).round() / 8 - x).detach()


class Standardise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.std()


class Flip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(0)


@pytest.mark.parametrize("rule", [apical.FeedbackAlignment, apical.SignSymmetry, apical.KolenPollack])
@pytest.mark.parametrize("kind", [Cosine, Skipped, SkippedLater, Gated])
def test_error_beside_the_weight_is_refused_by_name(kind: Any, rule: Any) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), kind(6, 4)), torch.randn(6, 5)
    with pytest.raises(UnsupportedModelError, match=r"'2'.*affine.*exact=\('2',\)"):
        rule(model, squares)(inputs, inputs)
    exact = rule(model, squares, exact=("2",))
    torch.manual_seed(7)
    assert exact(inputs, inputs).loss.isfinite()


class Latest(nn.Linear):
    """Needs an axis of time."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, -1])


class OverTime(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 0.1))


class ChannelsLast(nn.Conv1d):
    """A causal convolution over (batch, time, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


class Moment(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1]


class Normal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 0.1)


class Past(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x.transpose(1, 2), (2, 0))


class Turn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


WITHIN: dict[Any, tuple[Callable[[], nn.Module] | None, Callable[[], nn.Module] | None]] = {
    Rectified: (None, nn.ReLU),
    Softly: (None, nn.Tanh),
    NormalisedInput: (lambda: nn.LayerNorm(6, elementwise_affine=False), None),
    DroppedInput: (nn.Dropout, None),
    DroppedOutput: (None, nn.Dropout),
    QuantisedInput: (Quantise, None),
    Pair: (None, Flip),
    SameConv: (lambda: nn.ZeroPad2d(1), None),
    Standardised: (Standardise, None),
    Latest: (Moment, None),
    OverTime: (Normal, None),
    ChannelsLast: (Past, Turn),
}
"""What stands before the product with the weight, and behind it."""


def within(kind: Any) -> tuple[nn.Sequential, nn.Sequential, Tensor]:
    """A model with such a layer as "layer", the same of modules, and inputs."""
    torch.manual_seed(0)
    before, behind = WITHIN[kind]
    if issubclass(kind, nn.Conv2d):
        below, layer, inputs = nn.Conv2d(2, 4, 3), kind(4, 4, 3), torch.randn(4, 2, 8, 8)
        plain: nn.Module = nn.Conv2d(4, 4, 3)
    elif issubclass(kind, nn.Conv1d):
        below, layer, inputs = nn.Linear(5, 6), kind(6, 4, 3), torch.randn(6, 7, 5)
        plain = nn.Conv1d(6, 4, 3)
    elif kind in (Latest, OverTime):
        below, layer, inputs = nn.Linear(5, 6), kind(6, 4), torch.randn(6, 7, 5)
        plain = nn.Linear(6, 4)
    else:
        below, layer, inputs = nn.Linear(5, 6), kind(6, 4), torch.randn(6, 5)
        plain = nn.Linear(6, 4)
    plain.load_state_dict(layer.state_dict())
    parts = [("before", before and before()), ("layer", plain), ("behind", behind and behind())]
    written = OrderedDict([("below", copy.deepcopy(below)), ("tanh", nn.Tanh())])
    written |= [(name, module) for name, module in parts if module is not None]
    own = OrderedDict([("below", below), ("tanh", nn.Tanh()), ("layer", layer), ("flat", nn.Flatten())])
    return nn.Sequential(own), nn.Sequential(OrderedDict([*written.items(), ("flat", nn.Flatten())])), inputs


@pytest.mark.parametrize(
    ("rule", "mode"),
    [
        *((rule, "eager") for rule in ("fa", "usf", "kp", "kp explicit", "kp-mirror", "pfa", "pfa-o explicit", "wm")),
        *((rule, "autocast") for rule in ("fa", "kp")),
        ("fa", "compiled"),
    ],
)
@pytest.mark.parametrize("kind", WITHIN)
def test_what_stands_around_the_product_is_as_if_written_of_modules(kind: Any, rule: str, mode: str) -> None:
    if mode == "compiled" and issubclass(kind, DroppedInput | DroppedOutput):
        pytest.skip("compiled dropout draws in another order")
    kinds, changes = torch.float if mode == "autocast" else torch.double, []
    for model in within(kind)[:2]:
        model, inputs = model.to(kinds), within(kind)[2].to(kinds)
        torch.manual_seed(1)
        form = {"form": "explicit"} if rule.endswith("explicit") else {}
        made = find_rule(rule.split()[0]).build(model, loss=squares, **form)
        call: Any = torch.compile(made, backend="aot_eager") if mode == "compiled" else made
        optimizer = torch.optim.SGD(made.parameters(), lr=0.05, weight_decay=0.01)
        first = {name: p.detach().clone() for name, p in model.named_parameters()}
        for step in range(3):
            torch.manual_seed(7 + step)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
                credit = call(inputs, inputs)
            credit.backward()
            optimizer.step()
        changes.append({name: p.detach() - first[name] for name, p in model.named_parameters()})
    assert far(*changes) < (0.02 if mode == "autocast" else 1e-10)


def test_a_skip_that_large_batches_take_is_refused() -> None:
    class Batched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh() + (x[:, :4] if len(x) > 4 else 0.0)

    model, inputs = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), Batched(6, 4)), torch.randn(6, 5)
    rule = apical.FeedbackAlignment(model, squares)
    rule(inputs[:3], inputs[:3]).backward()
    with pytest.raises(UnsupportedModelError, match=r"'2' \(Batched\) does more in its forward.*exact=\('2',\)"):
        rule(inputs, inputs)


def test_a_skip_that_is_switched_on_later_is_refused() -> None:
    class Switched(nn.Linear):
        skips = False

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh() + (x[:, :4] if self.skips else 0.0)

    model, inputs = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), Switched(6, 4)), torch.randn(6, 5)
    rule = apical.FeedbackAlignment(model, squares)
    rule(inputs, inputs).backward()
    model[2].skips = True
    with pytest.raises(UnsupportedModelError, match=r"'2' \(Switched\) does more in its forward.*exact=\('2',\)"):
        rule(inputs, inputs)


def test_first_layer_may_compute_what_it_likes() -> None:
    """No error passes it."""
    model, inputs = nn.Sequential(NormalisedInput(5, 6), nn.Tanh(), nn.Linear(6, 4)), torch.randn(6, 5)
    backprop = gradients(model, lambda: squares(model(inputs), inputs).backward())
    rule = apical.FeedbackAlignment(model, squares)
    use(rule, {"2": model[2].weight.detach()})
    assert far(gradients(model, rule_step(rule, inputs)), backprop) < 1e-6


@pytest.mark.parametrize("change", ["prune", "parametrise", "norm"])
def test_a_layer_changed_after_the_rule_was_made(change: str) -> None:
    model, inputs = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)), torch.randn(6, 5)
    rule = apical.FeedbackAlignment(model, squares)
    rule(inputs, inputs).backward()
    {"prune": pruned, "parametrise": parametrised, "norm": parametrizations.weight_norm}[change](model[2])
    backprop = gradients(model, lambda: squares(model(inputs), inputs).backward())
    random = gradients(model, rule_step(rule, inputs))
    assert far({"": random["0.weight"]}, {"": backprop["0.weight"]}) > 1e-2
    use(rule, {"2": model[2].weight.detach()})
    assert far(gradients(model, rule_step(rule, inputs)), backprop) < 1e-10


def test_weight_as_another_type_of_tensor_never_met_by_the_swap() -> None:
    """The layer's type is plain but autograd keeps a copy of the weight, not the weight: the edge takes over."""

    class Copies(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            plain = [a.as_subclass(torch.Tensor) * 1.0 if isinstance(a, Copies) else a for a in args]
            return (
                func(*plain, **(kwargs or {})) if func is F.linear else super().__torch_function__(func, types, args, kwargs)
            )

    model, inputs = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)), torch.randn(6, 5)
    model[2].weight = nn.Parameter(model[2].weight.detach().as_subclass(Copies))
    backprop = gradients(model, lambda: squares(model(inputs), inputs).backward())
    rule = apical.FeedbackAlignment(model, squares)
    rule.feedback = nn.Module()
    rule.feedback.register_buffer("2", torch.zeros(4, 6))
    assert not gradients(model, rule_step(rule, inputs))["0.weight"].any()
    rule.feedback.get_buffer("2").copy_(model[2].weight.detach().as_subclass(torch.Tensor))
    assert far(gradients(model, rule_step(rule, inputs)), backprop) < 1e-10


def test_autocast_inside_the_model() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.last(torch.tanh(self.first(x)))

    model, inputs = Mixed(), torch.randn(6, 5)
    rule = apical.FeedbackAlignment(model, squares)
    use(rule, {"last": torch.zeros(4, 6)})
    for _ in range(2):
        assert not gradients(model, rule_step(rule, inputs))["first.weight"].any()


@pytest.mark.parametrize("make", [apical.SignSymmetry, partial(apical.WeightMirror, warmup=3)])
def test_a_random_weight_is_refused_where_a_graph_cannot_follow_it(make: Callable[..., nn.Module]) -> None:
    model, inputs = network("dense-dropped")
    rule = make(model, squares)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"torch\.compile"):
        torch.compile(rule, backend="aot_eager", fullgraph=True)(inputs, inputs)


def test_alignment_is_measured_to_the_weight_that_is_applied() -> None:
    model, _ = network("dense-masked")
    rule = apical.FeedbackAlignment(model, squares)
    use(rule, {"2": 3 * masked(model[2].weight.detach())})
    found = layer_alignment(rule)["2"]
    assert abs(found["weight_alignment"]) < 1e-6
    assert abs(found["norm_ratio"] - 3) < 1e-9
