"""Local solver: the identities of the damped least-squares step, and every rule that it wraps or refuses."""

import copy
import gc
import math
import weakref
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical.bench.names import find_rule
from apical.core.credit import Credit, CreditRule, Loss
from apical.core.solve import gram, patches, solved, solved_by_rows, strength
from apical.core.wrapped import WrappedRule, innermost
from apical.diagnostics.interference import interference
from apical.errors import ConfigError, UnsupportedModelError
from apical.rules.local_solve import LocalSolve, Problem
from apical.testing import CHECKS, check_model
from apical.testing.comparison import Factory, gradients, make, require_same
from apical.testing.networks import dense_batch, image_batch, residual_network

DTP = partial(apical.DifferenceTargetPropagation, variant="dtp")
RULES: dict[str, Factory] = {
    "bp": apical.Backprop,
    "fa": apical.FeedbackAlignment,
    "usf": apical.SignSymmetry,
    "wm": partial(apical.WeightMirror, warmup=10),
    "dfa": apical.DirectFeedbackAlignment,
    "tdca": apical.TopDownCreditAssignment,
    "ccl": apical.CounterCurrentLearning,
    "dtp": DTP,
    "ddtp-linear": partial(apical.DifferenceTargetPropagation, variant="linear"),
    "pc": partial(apical.PredictiveCoding, inference="state", steps=6),
    "pc-error": apical.PredictiveCoding,
    "pc-staged": partial(apical.PredictiveCoding, inference="staged"),
}


def around(kind: Factory, model: nn.Module, loss: Loss = F.cross_entropy, damping: float = 1e-2) -> CreditRule:
    return LocalSolve(kind(model, loss), damping)


def mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for n_in, n_out in pairwise(widths):
        parts += [nn.Linear(n_in, n_out), nn.Tanh()]
    return nn.Sequential(*parts[:-1]).double()


def batch(n: int, size: int, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, n, dtype=torch.double, generator=generator), torch.arange(size) % classes


@pytest.mark.parametrize("size", [5, 40])
def test_both_layers_of_a_chain(size: int) -> None:
    """dW^T = (A^T A + lam I)^-1 A^T D by numpy, with errors of single samples: fewer and more samples than inputs."""
    model, (x, y) = mlp(12, 9, 4), batch(12, size)
    LocalSolve(apical.Backprop(model), damping=0.03)(x, y).backward()
    hidden = torch.tanh(model[0](x)).detach()
    delta = (torch.softmax(model[2](hidden), 1) - F.one_hot(y, 4)).detach()
    below = (delta @ model[2].weight.detach()) * (1 - hidden**2)
    for layer, seen, error in ((model[2], hidden, delta), (model[0], x, below)):
        a = np.concatenate([seen.numpy(), np.ones((size, 1))], 1)
        lam = 0.03 * np.trace(a.T @ a) / a.shape[1]
        expected = np.linalg.solve(a.T @ a + lam * np.eye(a.shape[1]), a.T @ error.numpy()).T
        np.testing.assert_allclose(layer.weight.grad.numpy(), expected[:, :-1], atol=1e-12)
        np.testing.assert_allclose(layer.bias.grad.numpy(), expected[:, -1], atol=1e-12)


def test_fewer_samples_than_inputs_get_what_they_asked_for() -> None:
    model, (x, y) = mlp(30, 4), batch(30, 8)
    z = model(x).detach()
    LocalSolve(apical.Backprop(model), damping=1e-10)(x, y).backward()
    delta = torch.softmax(z, 1) - F.one_hot(y, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.3 * parameter.grad
    torch.testing.assert_close(model(x).detach(), z - 0.3 * delta, rtol=0, atol=1e-8)


def test_one_sample_is_normalised_least_mean_squares() -> None:
    model, (x, y) = mlp(7, 4), batch(7, 1)
    LocalSolve(apical.Backprop(model), damping=0.1)(x, y).backward()
    a = torch.cat([x[0], torch.ones(1)])
    delta = (torch.softmax(model(x), 1) - F.one_hot(y, 4)).detach()[0]
    expected = torch.outer(delta, a) / (a @ a * (1 + 0.1 / 8))
    torch.testing.assert_close(torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1), expected)


def test_the_two_forms_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    for m, n in ((5, 9), (9, 5), (7, 7)):
        a, g = torch.randn(m, n, generator=generator).double(), torch.randn(3, n, generator=generator).double()
        g = g @ a.T @ a
        lam = strength(a.square().sum(), n, 1e-2)
        torch.testing.assert_close(solved_by_rows(g, a, lam), solved(g, gram(a), lam), rtol=1e-10, atol=1e-10)


def test_much_damping_leaves_the_direction() -> None:
    model, (x, y) = mlp(12, 9, 4), batch(12, 6)
    apical.Backprop(model)(x, y).backward()
    plain = gradients(model)
    model.zero_grad()
    LocalSolve(apical.Backprop(model), damping=1e9)(x, y).backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad / grad.norm(), plain[name] / plain[name].norm())


def test_orthonormal_inputs_change_nothing_but_the_size() -> None:
    model = nn.Linear(8, 4, bias=False).double()
    x = torch.linalg.qr(torch.randn(8, 8, dtype=torch.double)).Q[:5]
    y = torch.arange(5) % 4
    apical.Backprop(model)(x, y).backward()
    plain = 5 * model.weight.grad
    model.zero_grad()
    LocalSolve(apical.Backprop(model), damping=1e-9)(x, y).backward()
    torch.testing.assert_close(model.weight.grad, plain)


def test_conflicting_requests_are_averaged() -> None:
    """One input twice with different labels: the change is the mean of what each asks for."""
    model = nn.Linear(6, 2, bias=False).double()
    x = torch.randn(1, 6).double().repeat(2, 1)
    LocalSolve(apical.Backprop(model), damping=1e-9)(x, torch.tensor([0, 1])).backward()
    delta = torch.softmax(model(x), 1).detach() - torch.eye(2)
    torch.testing.assert_close(x @ model.weight.grad.T, delta.mean(0).expand(2, 2).double(), atol=1e-7, rtol=0)


def test_function_space_does_not_depend_on_the_basis() -> None:
    """A -> A T, W -> T^-1 W without damping: the effect on the layer's output is the same."""
    x, y = batch(9, 5)
    t = torch.randn(9, 9, dtype=torch.double, generator=torch.Generator().manual_seed(3))
    effects = []
    torch.manual_seed(0)
    weight = torch.randn(4, 9).double()
    for inputs, w in ((x, weight), (x @ t, weight @ torch.linalg.inv(t).T)):
        model = nn.Linear(9, 4, bias=False).double()
        model.weight.data = w.clone()
        LocalSolve(apical.Backprop(model), damping=1e-12)(inputs, y).backward()
        effects.append(inputs @ model.weight.grad.T)
    torch.testing.assert_close(effects[0], effects[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dims", [1, 2])
def test_convolutions_are_matrices_on_patches(dims: int) -> None:
    torch.manual_seed(0)
    kind = nn.Conv1d if dims == 1 else nn.Conv2d
    for options in ({}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": "same", "padding_mode": "circular"}):
        layer = kind(3, 4, 3, **options).double()
        x = torch.randn(2, 3, *[8] * dims).double()
        rows = patches(layer, x) @ layer.weight.flatten(1).T + layer.bias
        expected = layer(x).flatten(2).transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(rows, expected)


def test_a_convolution_is_solved_like_its_matrix() -> None:
    torch.manual_seed(0)
    layer, head = nn.Conv1d(2, 3, 2).double(), nn.Linear(6, 4).double()
    x, y = torch.randn(3, 2, 3).double(), torch.arange(3) % 4
    LocalSolve(apical.Backprop(nn.Sequential(layer, nn.Flatten(), head)), damping=0.1)(x, y).backward()
    found = layer.weight.grad.clone(), layer.bias.grad.clone()
    dense = nn.Linear(4, 3).double()
    dense.weight.data, dense.bias.data = layer.weight.data.flatten(1), layer.bias.data
    rows = torch.stack([x[:, :, i : i + 2].flatten(1) for i in range(2)], 1)  # (batch, places, fan_in)

    class Places(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h.transpose(1, 2).flatten(1)

    LocalSolve(apical.Backprop(nn.Sequential(dense, Places(), head)), damping=0.1)(rows, y).backward()
    torch.testing.assert_close(found[0].flatten(1), dense.weight.grad)
    torch.testing.assert_close(found[1], dense.bias.grad)


STAND_FOR_ALL = ("fa", "dfa", "ccl", "dtp", "pc-error")
"""By edges, cuts, local losses, targets and states; what is around them is the same, and they have tests alone."""
SLOW = ("distributed", "odd_modules")


@pytest.mark.parametrize(
    ("kind", "check"),
    [(kind, check) for check in CHECKS if check != "compile" for kind in (STAND_FOR_ALL if check in SLOW else RULES)],
)
def test_conformance(kind: str, check: str) -> None:
    CHECKS[check](partial(around, RULES[kind]))


@pytest.mark.parametrize("kind", ["fa", "dfa", "ccl", "dtp"])
def test_on_a_model(kind: str) -> None:
    x, y = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
    report = check_model(around(RULES[kind], mlp(6, 9, 7, 4)), x.double(), y, skip={"compiled"})
    assert {"gradients", "placement", "determinism", "scaled loss"} <= report.passed.keys()


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        (apical.DeepFeedbackControl, "2"),
        (apical.StrongDeepFeedbackControl, "2"),
        (partial(apical.EquilibriumPropagation, free_steps=3, nudged_steps=2), "2"),
    ],
)
def test_rules_whose_layers_learn_from_something_else_are_refused(kind: Factory, layer: str) -> None:
    rule = make(partial(around, kind))
    with pytest.raises(UnsupportedModelError, match=f"layer '{layer}'.*wrap a rule whose layers learn from their inputs"):
        rule(*dense_batch(0))


def test_compiled_it_runs_eagerly() -> None:
    rule, other = (make(partial(around, apical.Backprop)) for _ in range(2))
    rule(*dense_batch(0)).backward()
    torch._dynamo.reset()
    torch.compile(other, backend="aot_eager")(*dense_batch(0)).backward()
    require_same(gradients(other), gradients(rule), 0.0, "compiled")
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"LocalSolve solves in .*do not compile the rule"):
        torch.compile(other, backend="aot_eager", fullgraph=True)(*dense_batch(0))
    torch._dynamo.reset()


class AllConvolutional(nn.Module):
    """No dense layer: every layer has more places than inputs, so any gradient lies in the span of its patches."""

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.again = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3), again

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if self.again:
            hidden = hidden + F.conv2d(x.flip(0, 2), self.first.weight, padding=1)
        return self.second(hidden).mean((2, 3))


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 2, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 4


@pytest.mark.parametrize("kind", [apical.Backprop, apical.FeedbackAlignment])
def test_a_network_without_dense_layers(kind: Factory) -> None:
    torch.manual_seed(0)
    model, (x, y) = AllConvolutional().double(), images()
    bare = kind(model, F.cross_entropy)
    bare(x, y).backward()
    plain = gradients(model)
    model.zero_grad()
    rule = LocalSolve(bare, damping=0.1)
    rule(x, y).backward()
    assert rule.calls_used == "last"  # seen by the errors that arrive at each layer's output
    for name, seen in (("first", x), ("second", torch.tanh(model.first(x)).detach())):
        a = patches(getattr(model, name), seen)
        a = torch.cat([a, torch.ones(len(a), 1)], 1)
        g = torch.cat([plain[f"{name}.weight"].flatten(1), plain[f"{name}.bias"][:, None]], 1)
        lam = 0.1 * a.square().sum() / a.shape[1]
        expected = 5 * torch.linalg.solve(a.T @ a + lam * torch.eye(a.shape[1]), g.T).T
        torch.testing.assert_close(getattr(model, name).weight.grad.flatten(1), expected[:, :-1])


class Invented(CreditRule):
    """Gradients that are made of nothing."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        output = self.model(inputs)
        loss = self.loss(output, targets)
        return Credit.of([(p, torch.ones_like(p)) for p in self.model.parameters()], output.detach(), loss.detach())


def test_convolutions_of_which_nothing_is_known_are_refused() -> None:
    x, y = images()
    with pytest.raises(UnsupportedModelError, match="'first' is not computed from the layer's inputs"):
        LocalSolve(apical.Backprop(AllConvolutional(again=True).double()))(x, y)
    with pytest.raises(UnsupportedModelError, match=r"Invented gives layer 'first' .* cannot be determined"):
        LocalSolve(Invented(AllConvolutional().double(), F.cross_entropy))(x, y)


class Lately(Invented):
    """Such gradients for the first layer, and none in the first batch."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        output = self.model(inputs)
        loss = self.loss(output, targets)
        invented = torch.ones_like(self.model[0].weight) * float(self.model[0].bias.any())
        return Credit.of([(self.model[0].weight, invented), (loss, None)], output.detach(), loss)


def test_layers_without_an_error_are_looked_at_again() -> None:
    model, (x, y) = mlp(12, 9, 4), batch(12, 6)
    nn.init.zeros_(model[0].bias)
    nn.init.zeros_(model[2].weight)  # the hidden layer has no error yet
    rule = LocalSolve(Lately(model, F.cross_entropy))
    rule(x, y).backward()
    model[0].bias.data.fill_(1.0)
    with pytest.raises(UnsupportedModelError, match="'0' is not computed from the layer's inputs"):
        rule(x, y)


def test_a_model_of_whole_batches() -> None:
    """Where a few samples do not do, the whole batch is looked at."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.layer(x).view(6, 4)
            return result

    rule = LocalSolve(apical.Backprop(Whole().double()))
    rule(*batch(12, 6)).backward()
    assert rule.calls_used == "last"


@pytest.mark.parametrize("pack", [lambda y: {"y": y}, lambda y: (y, torch.ones(len(y)))], ids=["dict", "tuple"])
def test_targets_in_a_container(pack: Any) -> None:
    """They are shortened with the inputs where few samples will do."""
    found, (x, targets) = [], batch(6, 9)

    def loss(output: Tensor, packed: Any) -> Tensor:
        assert len(packed) == len(pack(targets))
        return F.cross_entropy(output, packed["y"] if isinstance(packed, dict) else packed[0])

    for wanted, given in ((F.cross_entropy, targets), (loss, pack(targets))):
        rule = around(apical.FeedbackAlignment, mlp(6, 7, 5, 4), wanted)
        rule(x, given).backward()
        found.append([parameter.grad for parameter in rule.model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:the loss is not finite")
def test_inputs_that_are_no_numbers() -> None:
    for size in (5, 40):
        model, (x, y) = mlp(12, 9, 4), batch(12, size)
        LocalSolve(apical.Backprop(model))(x * torch.nan, y).backward()
        assert all(bool(grad.isnan().all()) for grad in gradients(model).values())
        assert all(
            math.isnan(value) for pair in interference(apical.Backprop(model), x * torch.nan, y).values() for value in pair
        )


class Recurrent(nn.Module):
    """One layer at several steps."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(20, 20), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.inner(x))
        result: Tensor = self.head(x)
        return result


def test_a_layer_of_several_calls_is_solved_on_all_of_them() -> None:
    torch.manual_seed(0)
    model, (x, y) = Recurrent().double(), batch(20, 5)
    rule = LocalSolve(apical.Backprop(model), damping=0.1)
    rule(x, y).backward()
    assert rule.calls_used == "all"
    plain = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.inner.parameters()))
    calls = [x]
    for _ in range(2):
        calls.append(torch.tanh(model.inner(calls[-1])).detach())
    a = torch.cat([torch.cat(calls), torch.ones(15, 1)], 1)
    g = torch.cat([plain[0], plain[1][:, None]], 1)
    lam = 0.1 * a.square().sum() / 21
    expected = 5 * torch.linalg.solve(a.T @ a + lam * torch.eye(21), g.T).T
    torch.testing.assert_close(model.inner.weight.grad, expected[:, :-1])


class Twice(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return 2 * h


@pytest.mark.parametrize("kind", [apical.Backprop, apical.DirectFeedbackAlignment])
def test_a_hook_before_a_layer_counts_though_it_comes_later(kind: Factory) -> None:
    """As a module that does the same."""
    x, y = dense_batch(0)
    hooked = mlp(6, 8, 4).double()
    module = nn.Sequential(*hooked[:2], Twice(), hooked[2])
    expected = around(kind, copy.deepcopy(module))
    torch.manual_seed(1)
    expected(x, y).backward()
    rule = around(kind, hooked)
    torch.manual_seed(1)
    rule(x, y)
    hooked[2].register_forward_pre_hook(lambda layer, given: (2 * given[0],))
    if isinstance(kind, type) and issubclass(kind, apical.DirectFeedbackAlignment):
        for own, its in zip(innermost(rule).feedback.buffers(), innermost(expected).feedback.buffers(), strict=True):
            own.copy_(its)
    rule(x, y).backward()
    for own, its in zip(hooked.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(own.grad, its.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "0"])
def test_frozen_parameters(frozen: str) -> None:
    model, (x, y) = mlp(12, 9, 4), batch(12, 6)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    LocalSolve(apical.Backprop(model))(x, y).backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
    if frozen == "0.weight":
        hidden = torch.tanh(model[0](x)).detach()
        delta = torch.softmax(model[2](hidden), 1) - F.one_hot(y, 4)
        below = (delta @ model[2].weight) * (1 - hidden**2)
        torch.testing.assert_close(model[0].bias.grad, (below.sum(0) / (6 + 6 * 1e-2)).detach())


def test_normalised_residual_networks() -> None:
    torch.manual_seed(0)
    model = residual_network()
    rule = LocalSolve(apical.FeedbackAlignment(model))
    moved = model[1].num_batches_tracked.item()
    rule(*image_batch(0)).backward()
    assert model[1].num_batches_tracked.item() == moved + 1
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_float32_and_autocast() -> None:
    model, (x, y) = mlp(12, 9, 4), batch(12, 6)
    LocalSolve(apical.Backprop(model), 1e-4)(x, y).backward()
    exact = gradients(model)
    model.zero_grad()
    model.float()
    rule = LocalSolve(apical.Backprop(model), 1e-4)
    rule(x.float(), y).backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad.double(), exact[name], rtol=1e-4, atol=1e-4)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        credit = rule(x.float(), y)
    credit.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_interference() -> None:
    model = mlp(64, 128, 128, 10)
    x, y = batch(64, 40, 10)
    rule = apical.Backprop(model)
    before = {name: value.clone() for name, value in rule.state_dict().items()}
    found = interference(rule, x.abs(), y)
    assert list(found) == ["0", "2", "4"]
    assert all(with_ > 0.99 for _, with_ in found.values())
    assert found["0"][0] < 0.6  # positive inputs: samples move each other
    require_same(rule.state_dict(), before, 0.0, "after the diagnostic")
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert interference(LocalSolve(rule), x.abs(), y) == found
    x, y = x[:1], y[:1]
    assert all(min(pair) > 1 - 1e-12 for pair in interference(rule, x, y).values())  # one sample has nobody to disturb


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="damping must be positive"):
        LocalSolve(apical.Backprop(mlp(6, 4)), 0.0)
    with pytest.raises(ConfigError, match=r"KolenPollack.*wrap FeedbackAlignment"):
        LocalSolve(apical.KolenPollack(mlp(6, 5, 4)))
    with pytest.raises(ConfigError, match="reduction='sum'"):
        LocalSolve(apical.Backprop(mlp(6, 4), nn.CrossEntropyLoss(reduction="sum")))
    with pytest.raises(ConfigError, match="already wrapped in LocalSolve"):
        LocalSolve(WrappedRule(LocalSolve(apical.Backprop(mlp(6, 4)))))
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(UnsupportedModelError, match=r"'0' \(Conv2d, 2 groups\)"):
        LocalSolve(apical.Backprop(grouped))
    model = mlp(6, 5, 4)
    torch.nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(UnsupportedModelError, match="'0' computes with a function"):
        LocalSolve(apical.Backprop(model))(*dense_batch(0))


def test_on_the_command_line() -> None:
    rule = find_rule("cwu:grapes:bp").build(mlp(6, 5, 4), damping=0.5, mode="local")
    assert isinstance(rule, LocalSolve)
    assert rule.damping == 0.5
    rule(*dense_batch(0)).backward()


def test_nothing_is_kept_of_a_batch() -> None:
    rule, (x, y) = LocalSolve(apical.Backprop(mlp(6, 5, 4))), batch(6, 5)
    for learn in (True, False):
        kept = []
        original = Problem.settle

        def settle(problem: Problem, samples: float, kept: list[object] = kept, original: Any = original) -> None:
            original(problem, samples)
            kept.append(weakref.ref(problem))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Problem, "settle", settle)
            credit = rule(x, y)
        if learn:
            credit.backward()
        del credit
        gc.collect()
        assert len(kept) == 2
        assert not any(reference() for reference in kept)


def test_a_gradient_that_has_nearly_vanished_accuses_nobody() -> None:
    """In a deep plain network gradients become denormal numbers on their way down, of which few digits are right."""
    torch.manual_seed(0)
    hidden = [layer for _ in range(128) for layer in (nn.Linear(32, 32), nn.ReLU())]
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), *hidden, nn.Linear(32, 10))
    rule = LocalSolve(apical.Backprop(model))
    rule(torch.randn(8, 16), torch.randint(10, (8,))).backward()
    assert model[-1].weight.grad.any()
    assert not model[0].weight.grad.any()
