"""Feedback edges on models that are not a row of layers: branches, sharing, other outputs, other types of numbers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical.errors import ConfigError, UnsupportedModelError


@pytest.fixture(autouse=True)
def _double() -> object:
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float)


def squares(output: Tensor, targets: Tensor) -> Tensor:
    return (torch.linspace(0.5, 1.5, output.numel()).view_as(output) * output.square()).mean()


def gradients(model: nn.Module, step: Callable[[], Any]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    step()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def oracle(rule: Any) -> None:
    for name, layer in rule.layers.items():
        rule.set_feedback(name, B=layer.weight.detach())


def is_rule_and_not_backprop(rule: Any, inputs: Any, below: str) -> None:
    """With random feedback the gradient `below` differs from backpropagation's; with B = W every gradient is the same."""
    model = rule.model
    exact = gradients(model, lambda: rule.loss(model(inputs), inputs).backward())
    found = gradients(model, lambda: rule(inputs, inputs).backward())
    assert found.keys() == exact.keys()
    assert not torch.allclose(found[below], exact[below], rtol=1e-2)
    oracle(rule)
    found = gradients(model, lambda: rule(inputs, inputs).backward())
    assert all(torch.allclose(found[name], exact[name], rtol=0, atol=1e-12) for name in exact)


class Tied(nn.Module):
    """A weight used by its layer, and outside it in one of many ways."""

    def __init__(self, way: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.way, self.first, self.code = way, nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.way(torch.tanh(self.code(h)), self.code.weight)


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda h, w: F.linear(h, w.t()),
    "operator": lambda h, w: h @ w,
    "reversed operator": lambda h, w: (w.T @ h.T).T,
    "scaled": lambda h, w: h @ (0.5 * w),
    "masked": lambda h, w: torch.mm(h, w * (w > 0)),
    "einsum": lambda h, w: torch.einsum("bi,ij->bj", h, w),
    "addmm": lambda h, w: torch.addmm(h.new_zeros(6), h, w),
    "convolution": lambda h, w: F.conv1d(h.unsqueeze(2), w.T.unsqueeze(2)).squeeze(2),
}


@pytest.mark.parametrize("make", [apical.FeedbackAlignment, apical.KolenPollack, apical.SignSymmetry])
@pytest.mark.parametrize("way", WAYS)
def test_a_weight_used_outside_its_layer_is_refused_and_the_remedy_works(way: str, make: Any) -> None:
    inputs = torch.randn(4, 5)
    rule = make(Tied(WAYS[way]), squares)
    for _ in range(2):  # and not only the first time
        with pytest.raises(UnsupportedModelError, match=r"'code'.*outside.*exact=\('code',\)"):
            rule(inputs, inputs)
    make(Tied(WAYS[way]), squares, exact=("code",), first_layer=True)(inputs, inputs).backward()


@pytest.mark.parametrize("way", ["penalty", "norm", "logged"])
def test_a_weight_that_multiplies_no_activity_may_be_used_anywhere(way: str) -> None:
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "penalty": lambda h, w: h + w.square().sum(),
        "norm": lambda h, w: h / (w @ w.T).trace().sqrt(),
        "logged": lambda h, w: h + 0 * (h.detach() @ w).sum(),
    }
    rule, inputs = apical.FeedbackAlignment(Tied(ways[way]), squares), torch.randn(4, 5)
    is_rule_and_not_backprop(rule, inputs, "first.weight")


class Branches(nn.Module):
    """Layers of which some are not called in every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right, self.head, self.aux = (nn.Linear(4, 4) for _ in range(5))
        self.take: tuple[str, ...] = ("left",)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        for name in self.take:
            h = h + torch.tanh(self.get_submodule(name)(h))
        return self.head(h)


@pytest.mark.parametrize("make", [apical.FeedbackAlignment, apical.SignSymmetry, apical.KolenPollack])
def test_branches_that_are_not_taken_get_no_credit(make: Any) -> None:
    """Stochastic depth, an expert without samples, an auxiliary head that training does not use: at the first batch too."""
    model, inputs = Branches(), torch.randn(6, 4)
    rule = make(model, squares)
    for model.take in (("left",), (), ("right", "left"), ("right",)):
        found = gradients(model, lambda: rule(inputs, inputs).backward())
        assert {name.split(".")[0] for name in found} == {"stem", "head", *model.take}
        exact = gradients(model, lambda: squares(model(inputs), inputs).backward())
        assert not torch.allclose(found["stem.weight"], exact["stem.weight"], rtol=1e-2)


def test_credit_paths() -> None:
    model, inputs = Branches(), torch.randn(6, 4)
    model.left.requires_grad_(False)
    model.take = ("left", "right")
    rule = apical.FeedbackAlignment(model, squares, exact=("right",))
    assert rule.credit_paths(inputs) == {
        "stem": "no layer below",
        "left": "frozen",
        "right": "exact",
        "head": "own feedback",
        "aux": "no credit",
    }


class Tokens(nn.Module):
    """An embedding below the first layer, and its table again at the head."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.position = nn.Embedding(5, 6)
        self.table = nn.Embedding(9, 6)
        self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 9, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.table(tokens) + self.position.weight
        h = h + self.down(torch.tanh(self.up(h)))
        return self.head(h)


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_below_the_first_layer(tied: bool) -> None:
    """The first layer holds feedback, since an error passes it; a tied table gets its part from the head as well."""
    tokens = torch.randint(9, (3, 5))
    rule = apical.FeedbackAlignment(Tokens(tied), squares)
    assert list(rule.layers) == ["up", "down", "head"]
    is_rule_and_not_backprop(rule, tokens, "table.weight" if not tied else "position.weight")


def test_first_layer_without_an_error_keeps_the_numbers_of_a_seed() -> None:
    def draw(*modules: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(3)
        return apical.FeedbackAlignment(nn.Sequential(*modules)).feedback_weights()

    layers = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)
    torch.manual_seed(3)
    expected = nn.init.xavier_uniform_(torch.empty(3, 5))
    found = draw(*layers)
    assert list(found) == ["2"]
    assert torch.equal(found["2"], expected)
    assert list(draw(nn.LayerNorm(4), *layers)) == ["1", "3"]
    assert list(draw(nn.LayerNorm(4).requires_grad_(False), *layers)) == ["3"]


@pytest.mark.parametrize("make", [apical.FeedbackAlignment, partial(apical.WeightMirror, warmup=2, rate=0.0)])
def test_layers_that_share_a_weight_share_its_feedback(make: Any) -> None:
    model, inputs = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(6, 4)
    model[4].weight = model[2].weight
    rule = make(model, squares)
    assert torch.equal(rule.feedback_weights()["2"], rule.feedback_weights()["4"])
    rule.set_feedback("2", B=torch.eye(4))
    assert torch.equal(rule.feedback_weights()["4"], torch.eye(4))
    is_rule_and_not_backprop(rule, inputs, "0.weight")


class Scaled(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, inputs: Tensor) -> Tensor:
        return 3 * super().forward(inputs)


@pytest.mark.parametrize("make", [apical.FeedbackAlignment, apical.WeightMirror])
@pytest.mark.parametrize("kinds", [(Scaled, Scaled), (nn.Linear, Scaled)])
def test_so_do_those_with_a_forward_of_their_own(make: Any, kinds: tuple[type[nn.Linear], type[nn.Linear]]) -> None:
    model = nn.Sequential(nn.Linear(4, 5), kinds[0](5, 5), nn.Tanh(), kinds[1](5, 5), nn.Tanh(), nn.Linear(5, 2))
    model[3].weight = model[1].weight
    rule = make(model)
    rule(torch.randn(3, 4), torch.tensor([0, 1, 1])).backward()
    feedback = rule.feedback_weights()
    assert torch.equal(feedback["1"], feedback["3"])


def test_one_module_under_two_names() -> None:
    body = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "a": body, "b": body, "last": nn.Linear(4, 2)})
    model.forward = lambda x: model["last"](torch.tanh(model["b"](torch.tanh(model["a"](torch.tanh(model["first"](x)))))))
    rule = apical.FeedbackAlignment(model, squares)
    assert list(rule.layers) == ["a", "last"]
    is_rule_and_not_backprop(rule, torch.randn(6, 4), "first.weight")


@pytest.mark.parametrize("kind", ["dict", "tuple", "object"])
def test_outputs_and_inputs_of_any_kind(kind: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

        def forward(self, batch: dict[str, Tensor]) -> Any:
            h = torch.tanh(self.body(batch["x"]))
            logits, value = self.one(h), self.two(h)
            if kind == "object":
                return type("Output", (), {"logits": logits, "value": value})
            return {"logits": logits, "value": value} if kind == "dict" else (logits, value)

    def loss(output: Any, targets: Any) -> Tensor:
        if kind == "object":
            return squares(output.logits, targets) + squares(output.value, targets)
        return sum(squares(part, targets) for part in (output.values() if kind == "dict" else output))

    batch = {"x": torch.randn(6, 4)}
    rule = apical.FeedbackAlignment(Model(), loss)
    is_rule_and_not_backprop(rule, batch, "body.weight")
    assert type(rule(batch, batch).output) in (dict, tuple, type)


def test_frozen_backbone_without_gradient_gets_no_credit() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = torch.tanh(self.backbone(x))
            return self.head(torch.tanh(self.body(h)))

    is_rule_and_not_backprop(apical.FeedbackAlignment(Frozen(), squares), torch.randn(6, 4), "body.weight")


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))


MOVED = {
    "fa": apical.FeedbackAlignment,
    "usf": apical.SignSymmetry,
    "frsf": partial(apical.SignSymmetry, variant="fixed"),
    "wm": partial(apical.WeightMirror, warmup=2),
}


@pytest.mark.parametrize("dtype", [torch.float, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whole", [True, False], ids=["rule", "model alone"])
@pytest.mark.parametrize("name", MOVED)
def test_another_type_of_numbers_afterwards(name: str, whole: bool, dtype: torch.dtype) -> None:
    """The rule moved as a whole, or the model under it: the same update, to rounding."""
    inputs = torch.randn(32, 5)
    rule = MOVED[name](net(), squares)
    full = gradients(rule.model, lambda: rule(inputs, inputs).backward())
    (rule if whole else rule.model).to(dtype)
    moved = gradients(rule.model, lambda: rule(inputs.to(dtype), inputs).backward())
    for parameter, value in full.items():
        assert moved[parameter].dtype == dtype
        assert F.cosine_similarity(moved[parameter].double().flatten(), value.flatten(), dim=0) > 0.97, parameter


def test_set_feedback_checks_what_it_is_given() -> None:
    rule = apical.FeedbackAlignment(net())
    with pytest.raises(ConfigError, match="'9'"):
        rule.set_feedback("9", B=torch.zeros(6, 6))
    with pytest.raises(ConfigError, match=r"\(6, 6\).*\(6, 5\)"):
        rule.set_feedback("2", B=torch.zeros(6, 5))
    for variant in ("uniform", "batchwise"):
        with pytest.raises(ConfigError, match="fixed"):
            apical.SignSymmetry(net(), variant=variant).set_feedback("2", U=torch.zeros(6, 6))
    signs, magnitude = apical.SignSymmetry(net(), variant="fixed"), torch.randn(6, 6)
    signs.set_feedback("2", U=magnitude)
    assert torch.equal(signs.feedback_weights()["2"], magnitude.abs() * signs.model[2].weight.sign())


@pytest.mark.parametrize(
    "make",
    [
        partial(apical.SignSymmetry, variant="batchwise"),
        partial(apical.SignSymmetry, variant="fixed"),
        partial(apical.WeightMirror, warmup=3, rate=0.1),
    ],
)
def test_a_generator_makes_the_rule_independent_of_the_global_state(make: Any) -> None:
    model, inputs = net(), torch.randn(6, 5)

    def run(seed: int) -> dict[str, Tensor]:
        rule = make(model, squares, generator=torch.Generator().manual_seed(5))
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        rule(inputs, inputs).backward()
        model.zero_grad()
        rule(inputs, inputs).backward()
        assert torch.equal(torch.get_rng_state(), state)
        rule.detach()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    first, second = run(1), run(2)
    assert all(torch.equal(first[name], second[name]) for name in first)


class TwoNames(nn.Module):
    """One layer under two names, the first of all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 4)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.again(torch.tanh(self.first(x)))))


def test_a_first_layer_of_two_names_holds_feedback() -> None:
    """K = W for both uses is backpropagation; K = 0 stops the error on its way to the first use."""
    torch.manual_seed(0)
    model, x, y = TwoNames().double(), torch.randn(8, 6).double(), torch.arange(8) % 4
    rule = apical.FeedbackAlignment(model)
    exact = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    for name, layer in (("first", model.first), ("last", model.last)):
        rule.set_feedback(name, B=layer.weight.detach())
    rule(x, y).backward()
    for parameter, gradient in zip(model.parameters(), exact, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-14)
    rule.zero_grad()
    rule.set_feedback("first", B=torch.zeros(6, 6).double())
    rule(x, y).backward()
    hidden = torch.tanh(model.first(x)).detach()
    (above,) = torch.autograd.grad(F.cross_entropy(model.last(torch.tanh(model.again(hidden))), y), [model.first.weight])
    torch.testing.assert_close(model.first.weight.grad, above, rtol=1e-12, atol=1e-14)


class Skipped(nn.Conv1d):
    """Error passes beside the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh() + x


class Masked(nn.Module):
    """Uses layers' weights by itself, as wired liquid networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        for layer in (self.b, self.c):
            h = torch.tanh(F.linear(h, layer.weight.tril(), layer.bias))
        return self.out(h)


def test_every_layer_that_is_refused_is_named_at_once() -> None:
    layers = [nn.Conv1d(2, 4, 1), Skipped(4, 4, 1), nn.Tanh(), Skipped(4, 4, 1), nn.Flatten(), nn.Linear(20, 3)]
    inputs, targets = torch.randn(6, 2, 5), torch.arange(6) % 3
    with pytest.raises(UnsupportedModelError, match=r"padding .* pass exact=\('1', '3'\)"):
        apical.FeedbackAlignment(nn.Sequential(*layers))(inputs, targets)
    apical.FeedbackAlignment(nn.Sequential(*layers), exact=("1", "3"))(inputs, targets).backward()
    with pytest.raises(UnsupportedModelError, match=r"weights of layers 'b', 'c' are .* by linear.* exact=\('b', 'c'\)"):
        apical.FeedbackAlignment(Masked())(torch.randn(6, 4), targets)
    apical.FeedbackAlignment(Masked(), exact=("b", "c"))(torch.randn(6, 4), targets).backward()
