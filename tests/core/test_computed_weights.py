"""Layers that compute with a function of their weight, and changed activations, under every closed form.

A rule of chains, or CCL, must do with such a layer what it does with a plain layer of the effective weight, and hand the
gradient of that weight on to the parameters behind it; or refuse the layer by name.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import apical
from apical.core.credit import CreditRule
from apical.core.layers import effective_weight
from apical.core.transport import Geometry
from apical.errors import UnsupportedModelError

N, HIDDEN, OUT = 5, 6, 3


class Masked(nn.Linear):
    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weight * self.mask, self.bias)

    @property
    def mask(self) -> Tensor:
        return (torch.arange(self.weight.numel()).view_as(self.weight) % 3 > 0).to(self.weight.dtype)


class Standardised(nn.Linear):
    def forward(self, h: Tensor) -> Tensor:
        mean, scale = self.weight.mean(1, keepdim=True), self.weight.std(1, keepdim=True)
        return F.linear(h, (self.weight - mean) / scale, self.bias)


class Quantised(nn.Linear):
    def forward(self, h: Tensor) -> Tensor:
        rounded = (8 * self.weight).round() / 8
        return F.linear(h, self.weight + (rounded - self.weight).detach(), self.bias)


class Lora(nn.Linear):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.a, self.b = nn.Parameter(torch.randn(2, n_in)), nn.Parameter(torch.randn(n_out, 2))

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weight + self.b @ self.a, self.bias)


class Equalised(nn.Linear):
    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weight * self.weight.shape[1] ** -0.5, self.bias)


class Doubled(nn.Linear):
    def forward(self, h: Tensor) -> Tensor:
        return 2 * super().forward(h)


class Cast(nn.Linear):
    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weight.float().to(h.dtype), self.bias)


class Property(nn.Linear):
    @property
    def weight(self) -> Tensor:
        return self._parameters["weight"].tanh()


class Registered(Masked):
    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h)


class Rows(nn.Module):
    """Not a subclass of nn.Linear; its weight is a product."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(n_out, 3) / 3), nn.Parameter(torch.randn(3, n_in) / 3)
        self.bias = nn.Parameter(torch.randn(n_out) / 3)

    @property
    def weight(self) -> Tensor:
        return self.left @ self.right

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.right.T @ self.left.T + self.bias


apical.register_layer(Registered, weight=lambda layer: layer.weight * layer.mask)
apical.register_layer(Rows)


class Sharp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, weight: Tensor) -> Tensor:
        return (self.gain * weight).tanh()


def parametrised(n_in: int, n_out: int) -> nn.Module:
    return parametrize.register_parametrization(nn.Linear(n_in, n_out), "weight", Sharp())


def parametrised_bias(n_in: int, n_out: int) -> nn.Module:
    return parametrize.register_parametrization(nn.Linear(n_in, n_out), "bias", Sharp())


def pruned(n_in: int, n_out: int) -> nn.Module:
    return prune.random_unstructured(prune.l1_unstructured(nn.Linear(n_in, n_out), "weight", 0.3), "bias", 0.5)


def still(wrap: Callable[..., nn.Module]) -> Callable[[int, int], nn.Module]:
    """Power iterations move with every call in training mode."""
    return lambda n_in, n_out: wrap(nn.Linear(n_in, n_out)).eval()


def on_instance(n_in: int, n_out: int) -> nn.Module:
    layer = nn.Linear(n_in, n_out)
    layer.forward = lambda h: F.linear(h, layer.weight.abs(), layer.bias)
    return layer


def hooked(n_in: int, n_out: int) -> nn.Module:
    layer = nn.Linear(n_in, n_out)
    layer.register_forward_hook(lambda module, given, made: 3 * made)
    return layer


def hooked_before(n_in: int, n_out: int) -> nn.Module:
    layer = nn.Linear(n_in, n_out)
    layer.register_forward_pre_hook(lambda module, given: (given[0] / 2,))
    return layer


def watched(n_in: int, n_out: int) -> nn.Module:
    layer = nn.Linear(n_in, n_out)
    layer.register_forward_hook(lambda module, given, made: None)
    return layer


KNOWN: dict[str, Callable[[int, int], nn.Module]] = {
    "plain": nn.Linear,
    "weight norm": lambda *sizes: parametrizations.weight_norm(nn.Linear(*sizes)),
    "old weight norm": lambda *sizes: nn.utils.weight_norm(nn.Linear(*sizes)),
    "spectral norm": still(parametrizations.spectral_norm),
    "old spectral norm": still(nn.utils.spectral_norm),
    "orthogonal": lambda *sizes: parametrizations.orthogonal(nn.Linear(*sizes)),
    "parametrised": parametrised,
    "parametrised bias": parametrised_bias,
    "pruned": pruned,
    "registered": Registered,
    "registered module": Rows,
    "watched": watched,
}
"""Effective weights that are known: chains train these."""

UNKNOWN: dict[str, Callable[[int, int], nn.Module]] = {
    **{kind.__name__: kind for kind in (Masked, Standardised, Quantised, Lora, Equalised, Doubled, Cast)},
    "on instance": on_instance,
    "hooked": hooked,
    "hooked before": hooked_before,
}
"""Effective weights that only autograd knows: chains refuse these."""


def plainly(layer: nn.Module, n_in: int) -> nn.Linear:
    """A plain layer of the effective weight, read off the layer's own outputs."""
    with torch.no_grad():
        bias = layer(torch.zeros(1, n_in, dtype=torch.double))[0]
        weight = (layer(torch.eye(n_in, dtype=torch.double)) - bias).T
    twin = nn.Linear(n_in, len(bias)).double()
    twin.weight.data, twin.bias.data = weight.contiguous(), bias
    return twin


def twins(make: Callable[[int, int], nn.Module]) -> tuple[nn.Sequential, nn.Sequential]:
    """A model of three such layers, and one of plain layers that computes the same."""
    torch.manual_seed(0)
    sizes = [(N, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, OUT)]
    layers = [make(*size).double() for size in sizes]
    plain = [plainly(layer, n_in) for layer, (n_in, _) in zip(layers, sizes, strict=True)]
    return tuple(nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), c) for a, b, c in (layers, plain))  # type: ignore[return-value]


def credited(rule: CreditRule, inputs: Tensor, targets: Tensor) -> None:
    torch.manual_seed(2)
    rule(inputs, targets).backward()


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(7, N, dtype=torch.double), torch.arange(7) % OUT


def same(model: nn.Sequential, plain: nn.Sequential) -> None:
    """Gradients of the plain layers' weights, pulled back through the functions that made them."""
    for layer, twin in zip(model, plain, strict=True):
        if not isinstance(twin, nn.Linear):
            continue
        n_in = twin.in_features
        bias = layer(torch.zeros(1, n_in, dtype=torch.double))[0]
        weight = (layer(torch.eye(n_in, dtype=torch.double)) - bias).T
        parameters = [p for p in layer.parameters() if p.requires_grad]
        expected = torch.autograd.grad((weight, bias), parameters, (twin.weight.grad, twin.bias.grad), allow_unused=True)
        for parameter, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-11)
            assert parameter.grad.abs().sum() > 0


CHAINS: dict[str, Callable[[nn.Module], CreditRule]] = {
    "dtp": apical.DifferenceTargetPropagation,
    "dtp-lee": lambda model: apical.DifferenceTargetPropagation(model, variant="lee"),
    "dfc": apical.DeepFeedbackControl,
    "dfc-ss": lambda model: apical.DeepFeedbackControl(model, variant="ss"),
    "dfc-simulate": lambda model: apical.DeepFeedbackControl(model, solver="simulate", points=20),
    "strong-dfc": apical.StrongDeepFeedbackControl,
    "ep": lambda model: apical.EquilibriumPropagation(model, free_steps=20, nudged_steps=10),
    "ep-directed": lambda model: apical.EquilibriumPropagation(model, weights="directed", free_steps=20, homeostasis=0.1),
}
BLOCKS: dict[str, Callable[[nn.Module], CreditRule]] = {
    "ccl": apical.CounterCurrentLearning,
    "ccl-cosine": lambda model: apical.CounterCurrentLearning(model, pair="cosine"),
    "ccl-input": lambda model: apical.CounterCurrentLearning(model, input_pair=True),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.filterwarnings("ignore:the steady state is not a stable one")
@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("name", CHAINS | BLOCKS)
def test_a_known_weight_is_trained_as_a_plain_one(name: str, kind: str) -> None:
    inputs, targets = batch()
    model, plain = twins(KNOWN[kind])
    for each in (model, plain):
        torch.manual_seed(3)
        rule = (CHAINS | BLOCKS)[name](each)
        credited(rule, inputs, targets)
    same(model, plain)


@pytest.mark.parametrize("kind", UNKNOWN)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_leave_an_unknown_weight_to_autograd(name: str, kind: str) -> None:
    inputs, targets = batch()
    model, plain = twins(UNKNOWN[kind])
    for each in (model, plain):
        torch.manual_seed(3)
        credited(BLOCKS[name](each), inputs, targets)
    same(model, plain)


@pytest.mark.parametrize("kind", UNKNOWN)
@pytest.mark.parametrize("name", CHAINS)
def test_chains_refuse_an_unknown_weight(name: str, kind: str) -> None:
    inputs, targets = batch()
    model, _ = twins(UNKNOWN[kind])
    make, words = CHAINS[name], "layer '0'.*apical.register_layer"
    if kind.startswith("hooked"):
        rule = make(model)
        with pytest.raises(UnsupportedModelError, match=r"hook on module '0' .*separate module"):
            rule(inputs, targets)
        return
    with pytest.raises(UnsupportedModelError, match=words):
        make(model)


LATER: dict[str, Callable[[nn.Linear], object]] = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "parametrised": lambda layer: parametrize.register_parametrization(layer, "weight", Sharp().double()),
    "old weight norm": nn.utils.weight_norm,
    "on instance": lambda layer: setattr(layer, "forward", lambda h: F.linear(h, layer.weight.abs(), layer.bias)),
    "hooked": lambda layer: layer.register_forward_hook(lambda module, given, made: 3 * made),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("change", LATER)
@pytest.mark.parametrize("name", CHAINS)
def test_chains_see_what_is_changed_after_the_rule(name: str, change: str) -> None:
    inputs, targets = batch()
    model, _ = twins(nn.Linear)
    rule = CHAINS[name](model)
    rule(inputs, targets).backward()
    LATER[change](model[2])
    with pytest.raises(UnsupportedModelError, match="'2'"):
        rule(inputs, targets)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("change", LATER)
def test_blocks_follow_what_is_changed_after_the_rule(change: str) -> None:
    inputs, targets = batch()
    model, plain = twins(nn.Linear)
    torch.manual_seed(3)
    rule = apical.CounterCurrentLearning(model)
    LATER[change](model[2])
    credited(rule, inputs, targets)
    plain[2] = plainly(model[2], HIDDEN)
    torch.manual_seed(3)
    credited(apical.CounterCurrentLearning(plain), inputs, targets)
    same(model, plain)


OUTSIDE: dict[str, Callable[[nn.Sequential], object]] = {
    "hook": lambda model: model.register_forward_hook(lambda module, given, made: 2 * made),
    "hook before": lambda model: model.register_forward_pre_hook(lambda module, given: (given[0] + 1,)),
    "inner hook": lambda model: model[1].register_forward_hook(lambda module, given, made: 2 * made),
    "forward": lambda model: setattr(model[1], "forward", lambda h: model[1][0](h).sin()),
}


@pytest.mark.parametrize("change", OUTSIDE)
@pytest.mark.parametrize("name", CHAINS | BLOCKS)
def test_what_containers_do_later_is_refused(name: str, change: str) -> None:
    inputs, targets = batch()
    layers = list(twins(nn.Linear)[0])
    model = nn.Sequential(nn.Sequential(*layers[:2]), nn.Sequential(*layers[2:]))
    rule = (CHAINS | BLOCKS)[name](model)
    rule(inputs, targets).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    watch = model.register_forward_hook(lambda module, given, made: None)
    rule(inputs, targets).backward()  # who only looks is welcome
    watch.remove()
    assert len(expected) == 6
    OUTSIDE[change](model)
    with pytest.raises(UnsupportedModelError, match=r"module '1?' \(Sequential\) computes another function"):
        rule(inputs, targets)


@pytest.mark.parametrize("name", CHAINS)
def test_chains_follow_weights_that_move(name: str) -> None:
    """The effective weight is that of each batch, also where memory is reused in place."""
    inputs, targets = batch()
    model, _ = twins(KNOWN["registered module"])
    rule, plain = CHAINS[name](model), None
    for _ in range(3):
        before = copy.deepcopy(rule)
        model.zero_grad()
        credited(rule, inputs, targets)
        expected = [parameter.grad.clone() for parameter in model.parameters()]
        before.zero_grad()
        credited(before, inputs, targets)  # a copy, which has nothing of earlier batches
        for gradient, parameter in zip(expected, before.model.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)
    assert plain is None


@pytest.mark.filterwarnings("ignore:the steady state is not a stable one")
@pytest.mark.parametrize("name", CHAINS | BLOCKS)
def test_frozen_parts_of_a_computed_weight_stay(name: str) -> None:
    inputs, targets = batch()
    model, plain = twins(KNOWN["registered module"])
    model[2].left.requires_grad_(False)
    model[4].requires_grad_(False)
    for each in (model, plain):
        torch.manual_seed(3)
        credited((CHAINS | BLOCKS)[name](each), inputs, targets)
    assert model[2].left.grad is None
    assert all(parameter.grad is None for parameter in model[4].parameters())
    same(nn.Sequential(*model[:4]), nn.Sequential(*plain[:4]))


class StandardisedConv(nn.Conv2d):
    """The way many networks do it: `_conv_forward` is what is overridden."""

    def _conv_forward(self, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        centred = weight - weight.mean((1, 2, 3), keepdim=True)
        return super()._conv_forward(h, centred, bias)


class RegisteredConv(nn.Conv2d):
    def forward(self, h: Tensor) -> Tensor:
        return F.conv2d(h, self.weight.tanh(), self.bias, self.stride, self.padding)


class Patches(nn.Module):
    """A convolution that is no subclass of PyTorch's."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(n_out, n_in, 2, 2) / 2)

    @property
    def weight(self) -> Tensor:
        return self.kernel

    def forward(self, h: Tensor) -> Tensor:
        return F.conv2d(h, self.kernel, None, stride=2)


apical.register_layer(RegisteredConv, weight=lambda layer: layer.weight.tanh())
apical.register_layer(Patches, geometry=lambda layer: Geometry((2, 2), (0, 0), (1, 1), False, (0, 0), 1))


def pooled(first: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [first, nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, OUT)]
    return nn.Sequential(*layers).double()


IMAGES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module]]] = {
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Conv2d(2, 3, 3, padding=1)),
        lambda layer: with_weight(nn.Conv2d(2, 3, 3, padding=1), layer),
    ),
    "circular": (
        lambda: parametrize.register_parametrization(
            nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), "weight", Sharp()
        ),
        lambda layer: with_weight(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), layer),
    ),
    "pruned": (
        lambda: prune.l1_unstructured(nn.Conv2d(2, 3, 3, padding=1), "weight", 0.5),
        lambda layer: with_weight(nn.Conv2d(2, 3, 3, padding=1), layer),
    ),
    "registered": (
        lambda: RegisteredConv(2, 3, 3, padding=1),
        lambda layer: with_weight(nn.Conv2d(2, 3, 3, padding=1), layer, layer.weight.tanh()),
    ),
    "patches": (lambda: Patches(2, 3), lambda layer: with_weight(nn.Conv2d(2, 3, 2, stride=2, bias=False), layer)),
}


def with_weight(twin: nn.Conv2d, layer: nn.Module, weight: Tensor | None = None) -> nn.Conv2d:
    twin = twin.double()
    twin.weight.data = (layer.weight if weight is None else weight).detach().clone()
    if twin.bias is not None:
        twin.bias.data = layer.bias.detach().clone()
    return twin


@pytest.mark.filterwarnings("ignore:the steady state is not a stable one")
@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("name", ["dtp", "dfc", "dfc-ss", "ep", "ep-directed", "ccl"])
def test_convolutions_of_a_known_weight(name: str, kind: str) -> None:
    options = {
        "dtp": lambda model: apical.DifferenceTargetPropagation(model, variant="linear", input_shape=(2, 4, 4)),
        "dfc": lambda model: apical.DeepFeedbackControl(model, input_shape=(2, 4, 4)),
        "dfc-ss": lambda model: apical.DeepFeedbackControl(model, variant="ss", input_shape=(2, 4, 4)),
        "ep": lambda model: apical.EquilibriumPropagation(model, free_steps=15, input_shape=(2, 4, 4)),
        "ep-directed": lambda model: apical.EquilibriumPropagation(
            model, weights="directed", free_steps=15, input_shape=(2, 4, 4)
        ),
        "ccl": lambda model: apical.CounterCurrentLearning(model, input_shape=(2, 4, 4)),
    }
    make, plainer = IMAGES[kind]
    model = pooled(make())
    plain = pooled(plainer(model[0]))
    if kind == "patches":
        model[2] = plain[2] = nn.Identity()
    for layer, twin in ((model[3], plain[3]), (model[6], plain[6])):
        twin.load_state_dict(layer.state_dict())
    inputs, targets = torch.randn(7, 2, 4, 4, dtype=torch.double), torch.arange(7) % OUT
    for each in (model, plain):
        torch.manual_seed(3)
        credited(options[name](each), inputs, targets)
    weight = model[0].weight.tanh() if kind == "registered" else effective_weight(model[0])
    parameters = [p for n, p in model[0].named_parameters() if "bias" not in n]
    expected = torch.autograd.grad(weight, parameters, plain[0].weight.grad)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-11)
    for mine, other in zip(model[3:], plain[3:], strict=True):
        for p, q in zip(mine.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11)


def test_a_convolution_that_overrides_what_applies_the_weight() -> None:
    model = pooled(StandardisedConv(2, 3, 3, padding=1))
    with pytest.raises(UnsupportedModelError, match=r"layer '0' .*StandardisedConv.*register_layer"):
        apical.DeepFeedbackControl(model, input_shape=(2, 4, 4))
    rule = apical.CounterCurrentLearning(model, input_shape=(2, 4, 4))
    credited(rule, torch.randn(7, 2, 4, 4, dtype=torch.double), torch.arange(7) % OUT)
    assert model[0].weight.grad.mean((1, 2, 3)).abs().max() < 1e-12 < model[0].weight.grad.abs().max()


class Single(nn.Linear):
    """Keeps its weight in single precision, whatever the model is cast to."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return super()._apply(lambda t: fn(t).float(), recurse)

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weight.to(h.dtype), self.bias.to(h.dtype))


@pytest.mark.parametrize("name", CHAINS | BLOCKS)
def test_a_weight_of_another_type_is_refused(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Single(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with pytest.raises(UnsupportedModelError, match=r"layer '2'.*precision|layer '2' \(Single\)"):
        (CHAINS | BLOCKS)[name](model)


def test_corinfomax_trains_a_known_weight_and_refuses_others() -> None:
    inputs, targets = batch()
    for kind in ("pruned", "registered module", "weight norm"):
        model, plain = twins(KNOWN[kind])
        for each in (model, plain):
            each[1], each[3] = nn.ReLU(), nn.ReLU()
            torch.manual_seed(3)
            credited(apical.CorInfoMax(each, free_steps=5), inputs.abs(), targets)
        same(model, plain)
    model, _ = twins(Masked)
    model[1], model[3] = nn.ReLU(), nn.ReLU()
    with pytest.raises(UnsupportedModelError, match="layer '0'"):
        apical.CorInfoMax(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
@pytest.mark.parametrize("kind", ["weight norm", "pruned"])
def test_compiled_chains_hand_the_gradient_on_too(kind: str) -> None:
    inputs, targets = batch()
    found = []
    for compiled in (False, True):
        model, _ = twins(KNOWN[kind])
        torch.manual_seed(3)
        rule = apical.DifferenceTargetPropagation(model, learn=False)
        torch._dynamo.reset()
        run = torch.compile(rule, backend="aot_eager", fullgraph=True) if compiled else rule
        run(inputs, targets).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for eager, other in zip(*found, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-12, atol=1e-14)


class Checkpointed(nn.Module):
    """A chain whose first half is recomputed in the backward pass."""

    def __init__(self, chain: nn.Sequential, reentrant: bool | None) -> None:
        super().__init__()
        self.chain, self.reentrant = chain, reentrant

    def forward(self, h: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.chain(h)
        return self.chain[2:](checkpoint(self.chain[:2], h, use_reentrant=self.reentrant))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["dtp", "dfc", "ep", "ccl"])
def test_activation_checkpoints_change_nothing(name: str, reentrant: bool) -> None:
    inputs, targets = batch()
    found = []
    for option in (None, reentrant):
        model = Checkpointed(twins(Masked if name == "ccl" else nn.Linear)[0], option)
        torch.manual_seed(3)
        credited((CHAINS | BLOCKS)[name](model), inputs, targets)
        found.append([parameter.grad for parameter in model.parameters()])
    for plain, other in zip(*found, strict=True):
        assert torch.equal(plain, other)


@pytest.mark.parametrize("kind", ["weight norm", "Masked", "hooked"])
def test_blocks_under_autocast_follow_autograd(kind: str) -> None:
    """The signal is the same, so gradients differ from those without autocast by bfloat16's digits alone."""
    inputs, targets = batch()
    found = []
    for enabled in (False, True):
        model, _ = twins((KNOWN | UNKNOWN)[kind])
        model = model.float()
        torch.manual_seed(3)
        rule = apical.CounterCurrentLearning(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            credited(rule, inputs.float(), targets)
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert 0 < (found[1] - found[0]).norm() < 0.03 * found[0].norm()


class Transposed(nn.Module):
    """Stores its weight as (n_in, n_out), as GPT-2's layers do in some libraries."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.weight


apical.register_layer(Transposed, weight=lambda layer: layer.weight.T)


def transposed(outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), Transposed(outputs, 5), nn.Tanh(), nn.Linear(outputs, 2))


@pytest.mark.parametrize("make", [apical.FeedbackAlignment, apical.KolenPollack, apical.ProductFeedbackAlignment])
def test_feedback_of_another_layout_is_refused_by_name(make: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"layer '2' \(Transposed\).*layout.*nn\.Linear"):
        make(transposed(4))(torch.randn(6, 3), torch.arange(6) % 2).backward()


@pytest.mark.parametrize("make", [apical.SignSymmetry, apical.DirectFeedbackAlignment])
def test_rules_without_stored_feedback_of_a_layer_take_any_layout(make: Any) -> None:
    model = transposed(4)
    make(model)(torch.randn(6, 3), torch.arange(6) % 2).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


class Late(nn.Module):
    """What its weight is made of exists from the first call on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, h: Tensor) -> Tensor:
        self.gain = 2.0
        return h @ (self.weight * self.gain).T


apical.register_layer(Late, weight=lambda layer: layer.weight * layer.gain)


@pytest.mark.parametrize("make", [apical.FeedbackAlignment, apical.KolenPollack, apical.DirectFeedbackAlignment])
def test_a_weight_that_is_known_from_the_first_call_on(make: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), Late(), nn.Tanh(), nn.Linear(4, 2))
    make(model)(torch.randn(6, 3), torch.arange(6) % 2).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.mark.parametrize(
    "make", [apical.Backprop, apical.WeightMirror, apical.ForwardForward, apical.EquilibriumPropagation]
)
def test_weights_that_torch_caches_learn_as_ever(make: Callable[[nn.Module], CreditRule]) -> None:
    """A rule that reads a weight without a graph first leaves no such weight in the cache."""
    after = []
    for context in (nullcontext, parametrize.cached):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT)
        )
        parametrize.register_parametrization(model[2], "weight", Halved())
        rule = make(model)
        optimizer = torch.optim.SGD(rule.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            with context():
                rule(torch.rand(N, HIDDEN), torch.randint(OUT, (N,))).backward()
            optimizer.step()
        after.append(model[2].parametrizations.weight.original.detach().clone())
    assert torch.equal(*after)
