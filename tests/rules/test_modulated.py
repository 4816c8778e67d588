"""Gains on errors: GRAPES against a slow reference, its control, and a gain of one against the bare rule."""

import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import apical
from apical.bench.names import AROUND, constructor_options, find_rule, options_for
from apical.bench.recipe import WRAPPERS, rule_name
from apical.core.credit import CreditRule, Loss
from apical.core.transport import as_matrix, geometry
from apical.core.units import key
from apical.errors import ConfigError, UnsupportedModelError
from apical.rules.modulated import Modulated
from apical.rules.node_importance import Matched, NodeImportance, importance
from apical.testing import CHECKS, check_model
from apical.testing.comparison import Factory, gradients, make, require_same, train
from apical.testing.networks import dense_batch, image_batch, residual_network
from apical.testing.two_ranks import on_two_ranks

DTP = partial(apical.DifferenceTargetPropagation, variant="dtp")
EP = partial(apical.EquilibriumPropagation, free_steps=3, nudged_steps=2)
DFC = partial(apical.DeepFeedbackControl, variant="ss")
CHAINED: dict[str, Factory] = {
    "bp": apical.Backprop,
    "fa": apical.FeedbackAlignment,
    "usf": apical.SignSymmetry,
    "kp": apical.KolenPollack,
    "kp-closed": partial(apical.KolenPollack, form="closed"),
    "wm": partial(apical.WeightMirror, warmup=10),
    "pfa": apical.ProductFeedbackAlignment,
}
LOCAL: dict[str, Factory] = {
    "bp": apical.Backprop,
    "fa": apical.FeedbackAlignment,
    "dfa": apical.DirectFeedbackAlignment,
    "tdca": apical.TopDownCreditAssignment,
    "ccl": apical.CounterCurrentLearning,
    "dtp": DTP,
    "dfc": DFC,
    "ep": EP,
    "pc": apical.PredictiveCoding,
}
Mode = Any
IMPORT = re.compile(r"^ *(from|import) apical\.rules\.node_importance", re.MULTILINE)


class One:
    """A gain of one."""

    def __init__(self, mode: Mode) -> None:
        self.mode: Mode = mode

    def __call__(self, rows: Tensor) -> Tensor:
        return rows.new_ones(len(rows))


def grapes(kind: Factory, mode: Mode, model: nn.Module, loss: Loss = F.cross_entropy) -> CreditRule:
    return Modulated(kind(model, loss), NodeImportance(mode))


def unchanged(kind: Factory, mode: Mode, model: nn.Module, loss: Loss = F.cross_entropy) -> CreditRule:
    return Modulated(kind(model, loss), One(mode))


def mlp(*widths: int, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for n_in, n_out in pairwise(widths):
        parts += [nn.Linear(n_in, n_out, bias=bias), nn.ReLU()]
    return nn.Sequential(*parts[:-1]).double()


def reference(
    model: nn.Sequential, x: Tensor, y: Tensor, back: list[Tensor], propagating: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """dW_l and db_l of a dense ReLU chain, sample by sample, with the feedback matrices `back`."""
    layers = [m for m in model if isinstance(m, nn.Linear)]
    gains = []
    for layer in layers[:-1]:
        sums = [sum(abs(w) for w in row) for row in layer.weight.tolist()]
        gains.append(torch.tensor([min(max(2 * s / max(sums), 1.0), 2.0) for s in sums], dtype=torch.double))
    weights = [torch.zeros_like(layer.weight) for layer in layers]
    biases = [torch.zeros(len(layer.weight), dtype=torch.double) for layer in layers]
    for sample, label in zip(x, y, strict=True):
        h, a = [sample], []
        for layer in layers:
            a.append(layer.weight.detach() @ h[-1] + layer.bias.detach())
            h.append(a[-1].clamp(min=0))
        delta = torch.softmax(a[-1], 0) - F.one_hot(label, len(a[-1]))
        for i in reversed(range(len(layers))):
            own = delta
            if i < len(gains):
                own = gains[i] * delta
                delta = own if propagating else delta
            weights[i] += torch.outer(own, h[i]) / len(x)
            biases[i] += own / len(x)
            if i:
                delta = (back[i].T @ delta) * (a[i - 1] > 0)
    return weights, biases


@pytest.mark.parametrize("mode", ["propagating", "local"])
@pytest.mark.parametrize("kind", [apical.Backprop, apical.FeedbackAlignment])
def test_grapes_of_the_paper(kind: type[CreditRule], mode: Mode) -> None:
    model = mlp(6, 9, 8, 7, 4)
    x, y = dense_batch(0)
    rule = Modulated(kind(model), NodeImportance(mode))
    own = {name: m.weight.detach() for name, m in model.named_children() if isinstance(m, nn.Linear)}
    fed = {**own, **rule.feedback_weights()} if kind is apical.FeedbackAlignment else own
    weights, biases = reference(model, x, y, list(fed.values()), mode == "propagating")
    credit = rule(x, y)
    credit.backward()
    for name, weight, bias in zip(own, weights, biases, strict=True):
        layer = model.get_submodule(name)
        torch.testing.assert_close(layer.weight.grad, weight, rtol=0, atol=1e-13)
        torch.testing.assert_close(layer.bias.grad, bias, rtol=0, atol=1e-13)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("kind", [apical.Backprop, apical.FeedbackAlignment])
def test_outgoing_weights_of_dense_layers(kind: type[CreditRule], clip: bool) -> None:
    """Propagating gains M_l of the columns of W_{l+1}: dW_1 and dW_2 of a chain of three by their own equations."""
    model = mlp(6, 9, 8, 4)
    x, y = dense_batch(0)
    w = [m.weight.detach() for m in model if isinstance(m, nn.Linear)]
    b = [m.bias.detach() for m in model if isinstance(m, nn.Linear)]
    rule = Modulated(kind(model), NodeImportance(clip=clip, weights="outgoing"))
    back = list({**dict(zip("024", w, strict=True)), **rule.feedback_weights()}.values())
    gains = [2 * v.abs().sum(0) / v.abs().sum(0).max() for v in w[1:]]
    gains = [gain.clamp(1, 2) if clip else gain for gain in gains]
    a1 = x @ w[0].T + b[0]
    a2 = a1.relu() @ w[1].T + b[1]
    d3 = ((a2.relu() @ w[2].T + b[2]).softmax(1) - F.one_hot(y, 4)) / len(x)
    d2 = gains[1] * (d3 @ back[2]) * (a2 > 0)
    d1 = gains[0] * (d2 @ back[1]) * (a1 > 0)
    rule(x, y).backward()
    for layer, grad in zip("024", (d1.T @ x, d2.T @ a1.relu(), d3.T @ a2.relu()), strict=True):
        torch.testing.assert_close(model.get_submodule(layer).weight.grad, grad, rtol=0, atol=1e-13)


def test_outgoing_weights_of_channels() -> None:
    """A channel's outgoing weights: all taps of a convolution, and all its positions behind nn.Flatten."""
    torch.manual_seed(0)
    conv, deep, dense = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 5, 3, padding=1), nn.Linear(5 * 4 * 4, 4)
    model = nn.Sequential(conv, nn.ReLU(), deep, nn.ReLU(), nn.Flatten(), dense).double()
    rule = Modulated(apical.Backprop(model), NodeImportance("local", clip=False, weights="outgoing"))
    rule(torch.rand(6, 2, 4, 4).double(), torch.arange(6) % 4).backward()
    for name, sums in (
        ("0", [sum(abs(deep.weight[i, j]).sum() for i in range(5)) for j in range(3)]),
        ("2", [sum(abs(dense.weight[i, 16 * j : 16 * j + 16]).sum() for i in range(4)) for j in range(5)]),
    ):
        torch.testing.assert_close(rule.gains()[name], 2 * torch.stack(sums).detach() / max(sums).detach())


def test_outgoing_weights_that_are_not_known_are_refused() -> None:
    grouped = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 4))
    tokens = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 4))
    for model, x in ((grouped, torch.rand(4, 2, 5, 5)), (tokens, torch.rand(4, 2, 5))):
        rule = Modulated(apical.Backprop(model), NodeImportance(weights="outgoing"))
        with pytest.raises(UnsupportedModelError):
            rule(x, torch.arange(4))
    with pytest.raises(ConfigError, match="incoming"):
        Modulated(apical.Backprop(mlp(6, 5, 4)), NodeImportance(weights="both"))  # type: ignore[arg-type]


@pytest.mark.parametrize(("mode", "factors"), [("propagating", (4, 2, 1)), ("local", (2, 2, 1))])
def test_equal_norms_double_every_hidden_layer(mode: Mode, factors: tuple[int, ...]) -> None:
    model = mlp(6, 8, 7, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.sign() / 4)
    x, y = dense_batch(0)
    plain = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    credit = Modulated(apical.Backprop(model), NodeImportance(mode))(x, y)
    credit.backward()
    for i, (parameter, grad) in enumerate(zip(model.parameters(), plain, strict=True)):
        assert torch.equal(parameter.grad, factors[i // 2] * grad)
    assert (credit.logs["gain"].item(), credit.logs["compounded"].item()) == (2.0, 4.0)


def test_importance() -> None:
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).double()
    gains = importance(rows)
    assert gains.min() >= 1
    assert gains.max() == 2
    assert torch.equal(importance(-4 * rows), gains)
    assert torch.equal(importance(rows.flip(0)), gains.flip(0))
    torch.testing.assert_close(importance(rows[:, torch.randperm(5)]), gains)
    loose = importance(rows, clip=False)
    assert loose.min() < 1
    assert torch.equal(loose.clamp(1, 2), gains)
    assert torch.equal(importance(torch.zeros(3, 2)), torch.ones(3))
    control = Matched(NodeImportance("local"))
    assert control.mode == "local"
    torch.testing.assert_close(control(rows), torch.full((7,), float(gains.mean())).double())


def test_local_gains_leave_a_descent_direction() -> None:
    """Kantorovich: a diagonal with entries in [1, 2] turns a vector by at most arccos(2 sqrt 2 / 3)."""
    gains = importance(torch.randn(200, 30))
    deltas = torch.randn(1000, 200)
    cosines = F.cosine_similarity(deltas * gains, deltas)
    assert cosines.min() >= 2 * 2**0.5 / 3


@pytest.mark.parametrize("matched", [False, True])
def test_the_control_takes_the_same_mean_step(matched: bool) -> None:
    model = mlp(6, 9, 4)
    x, y = dense_batch(0)
    importances = NodeImportance()
    rule = Modulated(apical.Backprop(model), Matched(importances) if matched else importances)
    credit = rule(x, y)
    assert credit.logs["gain"].item() == pytest.approx(float(importances(model[0].weight.detach()).mean()), rel=1e-12)
    (gain,) = rule.gains().values()
    assert (len(gain.unique()) == 1) == matched


COMBINATIONS = [*((kind, "propagating") for kind in CHAINED), *((kind, "local") for kind in LOCAL)]


def of(kind: str, mode: Mode) -> Factory:
    return CHAINED[kind] if mode == "propagating" else LOCAL[kind]


def trained(factory: Factory) -> dict[str, Tensor]:
    rule = make(factory)
    torch.manual_seed(1)
    train(rule, range(3))
    return rule.state_dict()


@pytest.mark.parametrize(("kind", "mode"), COMBINATIONS)
def test_a_gain_of_one_changes_no_bit(kind: str, mode: Mode) -> None:
    bare = of(kind, mode)
    require_same(trained(partial(unchanged, bare, mode)), trained(bare), 0.0, "a gain of one")


def compiled(factory: Factory) -> dict[str, Tensor]:
    """Gradients of the captured graph, run by PyTorch's own kernels; :func:`test_conformance` traces backward passes."""
    rule = make(factory)
    torch.manual_seed(1)
    rule(*dense_batch(0)).backward()
    rule.zero_grad()
    torch._dynamo.reset()
    torch.compile(rule, backend="eager", fullgraph=True)(*dense_batch(1)).backward()
    return {name.removeprefix("rule."): grad for name, grad in gradients(rule).items()}


@pytest.mark.parametrize(("kind", "mode"), [("fa", "propagating"), ("dfa", "local")])
def test_a_gain_of_one_changes_no_bit_compiled(kind: str, mode: Mode) -> None:
    bare = of(kind, mode)
    require_same(compiled(partial(unchanged, bare, mode)), compiled(bare), 0.0, "a gain of one, compiled")


def on_rank(rank: int, factory: Factory) -> dict[str, Tensor]:
    from apical.testing.distributed import _rank

    return _rank(rank, factory)


@pytest.mark.parametrize(("kind", "mode"), [("fa", "propagating"), ("dfa", "local"), ("dtp", "local")])
def test_a_gain_of_one_changes_no_bit_on_two_ranks(kind: str, mode: Mode) -> None:
    bare = of(kind, mode)
    found, expected = (on_two_ranks(on_rank, factory)[0] for factory in (partial(unchanged, bare, mode), bare))
    require_same(found, expected, 0.0, "a gain of one, two ranks")


SLOW = ("compile", "distributed", "odd_modules")
STAND_FOR_ALL = [("fa", "propagating"), ("kp", "propagating"), ("dfa", "local"), ("ccl", "local"), ("dtp", "local")]
"""By edges fixed and learned, cuts, local losses and targets; what is around them is the same, and they have tests alone."""


@pytest.mark.parametrize(
    ("kind", "mode", "check"),
    [(*pair, check) for check in CHECKS for pair in (STAND_FOR_ALL if check in SLOW else COMBINATIONS)],
)
def test_conformance(kind: str, mode: Mode, check: str) -> None:
    CHECKS[check](partial(grapes, of(kind, mode), mode))


@pytest.mark.compiles
@pytest.mark.parametrize("kind", ["fa", "dfa", "ccl", "dtp", "dfc", "ep"])
def test_on_a_model(kind: str) -> None:
    """Compiled here are those alone that :func:`test_conformance` does not compile."""
    x, y = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
    modes: list[Mode] = ["propagating", "local"] if kind == "fa" else ["local"]
    for mode in modes:
        rule = grapes(of(kind, mode), mode, mlp(6, 9, 7, 4).float())
        is_compiled = (kind, mode) not in {*STAND_FOR_ALL, ("fa", "local")}
        report = check_model(rule, x, y, skip=() if is_compiled else ("compiled",))
        assert is_compiled == ("compiled" in report.passed)
        assert {"gradients", "placement", "determinism", "scaled loss"} <= report.passed.keys()


@pytest.mark.parametrize("mode", ["propagating", "local"])
def test_feedback_equal_to_the_weights_is_grapes_on_backprop(mode: Mode) -> None:
    found = []
    for kind in (apical.Backprop, apical.FeedbackAlignment):
        torch.manual_seed(0)
        inner = kind(residual_network())
        for name, layer in inner.layers.items() if isinstance(inner, apical.FeedbackAlignment) else ():
            inner.feedback.get_buffer(key(name)).copy_(layer.weight.detach())
        rule = Modulated(inner, NodeImportance(mode))
        rule(*image_batch(0)).backward()
        found.append(gradients(rule.model))
    require_same(found[1], found[0], 1e-12, "FA with the weights as feedback")


def test_one_gain_for_each_channel() -> None:
    torch.manual_seed(0)
    model = residual_network()
    rule = Modulated(apical.Backprop(model), NodeImportance())
    rule(*image_batch(0)).backward()
    for name, gain in rule.gains().items():
        weight = model.get_submodule(name).weight.detach()
        torch.testing.assert_close(gain, importance(weight.flatten(1)))
    assert "8" not in rule.gains()
    assert len(rule.gains()) == 7


class Branched(nn.Module):
    """Two heads on one trunk, a layer used twice, a function for an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(6, 5), nn.Linear(5, 5)
        self.left, self.right = nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x), inplace=True)
        h = torch.tanh(self.again(torch.tanh(self.again(h))))
        return self.left(h) + self.right(h)


def test_layers_that_others_read_are_hidden() -> None:
    rule = Modulated(apical.Backprop(Branched().double()), NodeImportance())
    rule(*dense_batch(0)).backward()
    assert list(rule.gains()) == ["first", "again"]


def test_frozen_layers_still_pass_their_gain_on() -> None:
    model = mlp(6, 8, 7, 4)
    model[2].requires_grad_(False)
    x, y = dense_batch(0)
    Modulated(apical.Backprop(model), NodeImportance())(x, y).backward()
    weights, _ = reference(model, x, y, [m.weight.detach() for m in model if isinstance(m, nn.Linear)], True)
    torch.testing.assert_close(model[0].weight.grad, weights[0])
    assert model[2].weight.grad is None


@pytest.mark.parametrize("inference", ["state", "error", None])
def test_local_gains_are_not_passed_on_where_all_hidden_layers_are_frozen(inference: str | None) -> None:
    """Read-out and normalisation learn as without gains: these change the weights of hidden units, and nothing else."""
    kind = apical.Backprop if inference is None else partial(apical.PredictiveCoding, inference=inference)
    updates = []
    for wrap in (lambda rule: rule, lambda rule: Modulated(rule, NodeImportance("local"))):
        model = mlp(6, 7, 5, 3)
        model.insert(0, nn.LayerNorm(6).double()) if inference is None else None
        for layer in [module for module in model if isinstance(module, nn.Linear)][:-1]:
            layer.requires_grad_(False)
        rule = wrap(kind(model))
        rule(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).double(), torch.arange(8) % 3).backward()
        updates.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(updates[0]) == (4 if inference is None else 2)
    torch.testing.assert_close(updates[1], updates[0])


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body, self.reentrant = mlp(6, 8, 7, 4), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant:
            x = x.detach().requires_grad_()
        h: Tensor = checkpoint(self.body[:4], x, use_reentrant=self.reentrant)
        return self.body[4](h)


@pytest.mark.parametrize("kind", [apical.Backprop, apical.FeedbackAlignment])
def test_activation_checkpoints(kind: type[CreditRule]) -> None:
    found = []
    for model in (Checkpointed(False), mlp(6, 8, 7, 4)):
        torch.manual_seed(3)
        rule = Modulated(kind(model), NodeImportance())
        rule(*dense_batch(0)).backward()
        found.append([p.grad for p in rule.model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(UnsupportedModelError, match="use_reentrant=False"):
        Modulated(kind(Checkpointed(True)), NodeImportance())(*dense_batch(0))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(F.linear(x, self.a.weight, self.a.bias)))


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"KolenPollack.*mode='propagating'"):
        grapes(apical.KolenPollack, "local", mlp(6, 5, 4))
    with pytest.raises(ConfigError, match=r"DirectFeedbackAlignment sends no error.*mode='local'"):
        grapes(apical.DirectFeedbackAlignment, "propagating", mlp(6, 5, 4))
    with pytest.raises(ConfigError, match="must be 'propagating' or 'local', not 'both'"):
        grapes(apical.Backprop, "both", mlp(6, 5, 4))
    with pytest.raises(UnsupportedModelError, match="'a' was not called"):
        grapes(apical.Backprop, "propagating", Functional().double())(*dense_batch(0))
    with pytest.raises(UnsupportedModelError, match="'1' \\(GRU\\)"):
        grapes(apical.Backprop, "propagating", nn.Sequential(nn.Linear(3, 3), nn.GRU(3, 3), nn.Linear(3, 2)))
    model = mlp(6, 5, 4)
    torch.nn.utils.parametrizations.weight_norm(model[0])
    grapes(apical.Backprop, "propagating", model)(*dense_batch(0)).backward()
    with pytest.raises(UnsupportedModelError, match=r"'0'.*mode='propagating'"):
        grapes(apical.Backprop, "local", model)(*dense_batch(0))
    with pytest.raises(ConfigError, match="first batch"):
        Modulated(apical.Backprop(model), NodeImportance()).gains()


class Sometimes(nn.Module):
    """Takes a layer in at every second call in training."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 4)
        self.calls, self.always = 0, always

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.calls += self.training or not self.always
        if self.calls % 4 == 3 or (self.always and not self.training):
            h = self.b(h)
        result: Tensor = self.c(h)
        return result


def test_layers_that_are_called_now_and_then() -> None:
    rule = Modulated(apical.Backprop(Sometimes(always=True).double()), NodeImportance())
    rule(*dense_batch(0)).backward()
    assert list(rule.gains()) == ["a", "b"]
    rule = Modulated(apical.Backprop(Sometimes(always=False).double()), NodeImportance())
    rule(*dense_batch(0)).backward()
    rule(*dense_batch(0))
    with pytest.raises(UnsupportedModelError, match="'b' was not called on the first batch"):
        rule(*dense_batch(0))


def halved(credit: apical.Credit) -> None:
    (credit.loss / 2).backward()


def scaled(credit: apical.Credit) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(credit.loss).backward()


@pytest.mark.parametrize(("backward", "factor"), [(halved, 0.5), (scaled, 4.0)])
@pytest.mark.parametrize("mode", ["propagating", "local"])
def test_multiples_of_the_loss(mode: Mode, backward: Callable[[apical.Credit], None], factor: float) -> None:
    found = []
    for each in (apical.Credit.backward, backward):
        rule = make(partial(grapes, apical.FeedbackAlignment, mode))
        torch.manual_seed(1)
        each(rule(*dense_batch(0)))
        found.append(gradients(rule))
    require_same(found[1], {name: factor * grad for name, grad in found[0].items()}, 1e-14, "a multiple")


def test_evaluation_without_gradients() -> None:
    rule = make(partial(grapes, apical.Backprop, "propagating"))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            credit = rule(*dense_batch(0))
        assert "gain" not in credit.logs
        assert not credit.loss.requires_grad
    rule(*dense_batch(0)).backward()


def test_the_patent_is_mentioned() -> None:
    rule = make(partial(grapes, apical.Backprop, "propagating"))
    assert any("12,020,162" in remark for remark in rule.remarks)
    assert Modulated(rule.rule, Matched()).remarks == []


def test_matrix_of_a_grouped_layer() -> None:
    layer = nn.Conv1d(4, 6, 3, groups=2)
    assert as_matrix(geometry(layer), layer.weight).shape == (6, 6)


def test_nothing_but_the_command_line_imports_the_patented_module() -> None:
    source = Path(apical.__file__).parents[1]
    users = {path.stem for path in source.rglob("*.py") if IMPORT.search(path.read_text())}
    assert users == {"names"}
    code = "import sys, apical.bench.names, apical.cli.commands; assert 'apical.rules.node_importance' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_on_the_command_line() -> None:
    assert set(WRAPPERS) == set(AROUND)
    entry = find_rule("matched:grapes:fa")
    assert {"exact", "mode", "clip"} <= set(constructor_options(entry))
    rule = entry.build(mlp(6, 5, 4), loss=F.cross_entropy, first_layer=True, clip=False)
    assert isinstance(rule, Modulated)
    assert isinstance(rule.modulator, Matched)
    assert not rule.modulator.of.clip
    assert isinstance(rule.rule, Modulated)
    assert rule.mode == "propagating"
    assert find_rule("grapes:dfa").build(mlp(6, 5, 4)).mode == "local"
    assert rule_name("grapes:dfa") == "grapes-dfa"
    assert options_for("grapes:fa", ("mode=local", "grapes-fa:clip=False", "expansion=4")) == ("mode=local", "clip=False")
    with pytest.raises(ConfigError, match="unknown rule 'ba'"):
        find_rule("grapes:ba")


class TiedDecoder(nn.Module):
    """An autoencoder that decodes by the transposed weight of its encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.T)


class TiedEmbedding(nn.Module):
    """A model of words, whose output layer has the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.output = nn.Embedding(4, 6), nn.Linear(6, 6), nn.Linear(6, 4, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        result: Tensor = self.output(torch.tanh(self.hidden(self.embedding(words))))
        return result


@pytest.mark.parametrize("mode", ["propagating", "local"])
def test_weights_used_outside_their_layer_are_refused(mode: Mode) -> None:
    x = torch.randn(5, 6)
    with pytest.raises(UnsupportedModelError, match="'encoder' is used outside the layer's calls"):
        Modulated(apical.Backprop(TiedDecoder(), F.mse_loss), NodeImportance(mode))(x, x)
    words = torch.arange(5) % 4
    rule = Modulated(apical.Backprop(TiedEmbedding()), NodeImportance(mode), exact=("embedding",))
    rule(words, words).backward()
    assert set(rule.gains()) == {"hidden"}


def test_either_rule_may_be_detached() -> None:
    rule = Modulated(apical.Backprop(mlp(6, 5, 4)), NodeImportance())
    rule.rule.detach()
    with pytest.raises(ConfigError, match="Backprop was detached"):
        rule(torch.randn(5, 6).double(), torch.arange(5) % 4)


def test_gains_where_the_model_breaks_a_compiled_graph() -> None:
    """From the first batch on, which shows what the hidden layers are."""

    class Broken(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self[0](x))
            torch._dynamo.graph_break()
            return self[2](torch.tanh(self[1](h)))

    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        rule = apical.Modulated(
            apical.FeedbackAlignment(Broken(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3))), Tripled()
        )
        run = torch.compile(rule, backend="eager") if compiled else rule
        x, y = torch.arange(32.0).sin().view(8, 4), torch.arange(8) % 3
        run(x, y).backward()
        found.append([parameter.grad for parameter in rule.model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


class Tripled:
    """Three for every unit."""

    mode = "propagating"

    def __call__(self, rows: Tensor) -> Tensor:
        return rows.new_full((len(rows),), 3.0)


@pytest.mark.parametrize(("kind", "remedy"), [("bp", "use mode='propagating', or remove"), ("pc", "unit; remove")])
def test_layers_that_compute_their_weight_are_refused_only_where_they_learn(kind: str, remedy: str) -> None:
    """A frozen one has no gradient whose rows could be scaled; the remedy is one that the rule has."""
    model = mlp(6, 7, 5, 3)
    torch.nn.utils.parametrizations.weight_norm(model[0])
    rule = Modulated(LOCAL[kind](model), NodeImportance("local"))
    inputs, targets = torch.rand(8, 6).double(), torch.arange(8) % 3
    with pytest.raises(UnsupportedModelError, match=f"layer '0' computes with a function of its parameters.*{remedy}"):
        rule(inputs, targets)
    model[0].requires_grad_(False)
    rule(inputs, targets).backward()
    assert model[2].weight.grad.abs().max() > 0
