"""Models that came out of `torch.compile`, whole or in parts: a rule is what it is on the plain model. Sharded ones."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apical
from apical.errors import UnsupportedModelError

RULES = {
    "fa": apical.FeedbackAlignment,
    "usf": apical.SignSymmetry,
    "kp": apical.KolenPollack,
    "pfa": apical.ProductFeedbackAlignment,
    "wm": apical.WeightMirror,
    "dfa": apical.DirectFeedbackAlignment,
    "tdca": apical.TopDownCreditAssignment,
    "ccl": apical.CounterCurrentLearning,
    "dtp": apical.DifferenceTargetPropagation,
    "pc": apical.PredictiveCoding,
    "local": apical.LocalClassifiers,
    "grapes": lambda model: apical.Modulated(apical.Backprop(model), Halved()),
}


class Halved:
    """A gain of one half everywhere."""

    mode = "propagating"

    def __call__(self, rows: Tensor) -> Tensor:
        return rows.new_full((len(rows),), 0.5)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5))
    return nn.Sequential(block, nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))


class Counted:
    """A backend of `torch.compile` that counts what it is given."""

    graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


def whole(model: nn.Sequential, backend: Counted) -> nn.Module:
    return torch.compile(model, backend=backend)  # type: ignore[return-value]


def in_place(model: nn.Sequential, backend: Counted) -> nn.Module:
    model.compile(backend=backend)
    return model


def method(model: nn.Sequential, backend: Counted) -> nn.Module:
    model.forward = torch.compile(model.forward, backend=backend)  # type: ignore[method-assign]
    return model


def block(model: nn.Sequential, backend: Counted) -> nn.Module:
    model[0].compile(backend=backend)
    return model


def block_around(model: nn.Sequential, backend: Counted) -> nn.Module:
    model[0] = torch.compile(model[0], backend=backend)  # type: ignore[assignment]
    return model


class Helped(nn.Sequential):
    """Its forward calls a method, which is compiled, or not."""

    def inner(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)  # type: ignore[no-any-return,operator]


def attribute(model: nn.Sequential, backend: Counted) -> nn.Module:
    helped = Helped(*model)
    helped.run = torch.compile(helped.inner, backend=backend)
    return helped


def of_class(model: nn.Sequential, backend: Counted) -> nn.Module:
    return type("Decorated", (Helped,), {"run": torch.compile(Helped.inner, backend=backend)})(*model)


FORMS = (whole, in_place, method, block, block_around, attribute, of_class)
Form = Callable[[nn.Sequential, Counted], nn.Module]


def gradients(rule: apical.CreditRule, steps: int = 2) -> list[Tensor]:
    """Of the model's parameters, after some batches."""
    torch.manual_seed(2)
    x, y = torch.randn(8, 6), torch.arange(8) % 3
    for _ in range(steps):
        rule.zero_grad()
        torch.manual_seed(3)
        rule(x, y).backward()
    return [parameter.grad for parameter in rule.model.parameters() if parameter.grad is not None]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(one, other, strict=True)
    )


def made(kind: str, model: nn.Module) -> apical.CreditRule:
    torch.manual_seed(1)
    return RULES[kind](model)


def rectified(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x).relu()  # type: ignore[no-any-return]


class Helpless(nn.Module):
    """Its layers are called by functions that it finds in a list."""

    def __init__(self, *functions: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.functions = nn.Linear(6, 5), nn.Linear(5, 3), list(functions)

    def forward(self, x: Tensor) -> Tensor:
        for function in self.functions:
            x = function(self.a, x)
        return self.b(x)  # type: ignore[no-any-return]


GLOBAL: Any = None


class OfGlobal(Helpless):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(GLOBAL(self.a, x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["fa", "kp", "dfa"])
def test_a_compiled_function_elsewhere_that_calls_layers_is_named(kind: str) -> None:
    torch._dynamo.reset()
    rule = made(kind, Helpless(torch.compile(rectified, backend=Counted())))
    with pytest.raises(UnsupportedModelError, match=r"the model calls rectified\(\), which torch.compile has compiled"):
        gradients(rule)
    with torch.compiler.set_stance("force_eager"):  # the remedy
        assert same(gradients(rule), gradients(made(kind, Helpless(rectified))))


def through(layer: nn.Module, x: Tensor) -> Tensor:
    return place.inner(layer, x)  # type: ignore[no-any-return]


place = ModuleType("place")


@pytest.mark.parametrize("where", ["global", "module"])
def test_so_is_one_among_the_global_variables_or_those_of_a_module(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(rectified, backend=Counted())
    monkeypatch.setitem(vars(place), "inner", compiled)
    monkeypatch.setitem(globals(), "GLOBAL", compiled if where == "global" else through)
    with pytest.raises(UnsupportedModelError, match="the model calls rectified"):
        gradients(made("fa", OfGlobal()))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("kind", RULES)
def test_a_compiled_model_is_trained_as_the_plain_one(kind: str, form: Form) -> None:
    backend = Counted()
    model = form(network(), backend)
    with pytest.warns(RuntimeWarning, match="runs uncompiled while the rule learns"):
        rule = made(kind, model)
    assert same(gradients(rule), gradients(made(kind, network())))
    assert backend.graphs == 0


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("batches", [0, 1])
def test_so_is_one_that_is_compiled_after_the_rule_was_made(kind: str, batches: int) -> None:
    rule, other = made(kind, network()), made(kind, network())
    for each in (rule, other):
        gradients(each, batches)
    rule.model.compile(backend=Counted())
    with pytest.warns(RuntimeWarning, match="runs uncompiled while the rule learns"):
        assert same(gradients(rule), gradients(other))


@pytest.mark.parametrize("form", [whole, method, block_around, attribute, of_class], ids=lambda form: form.__name__)
def test_backpropagation_uses_what_was_compiled(form: Form) -> None:
    torch._dynamo.reset()
    backend = Counted()
    rule = apical.Backprop(form(network(), backend))
    assert same(gradients(rule), gradients(apical.Backprop(network())))
    assert backend.graphs > 0


@pytest.mark.compiles
@pytest.mark.parametrize("kind", RULES)
@pytest.mark.filterwarnings("ignore:the model is compiled")
def test_it_is_not_compiled_twice(kind: str) -> None:
    rule = made(kind, block_around(network(), Counted()))
    with pytest.raises(apical.errors.UnsupportedModelError, match="make the rule from the uncompiled model"):
        gradients(torch.compile(rule, backend="eager"))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:the model is compiled")
def test_the_compiled_model_answers_as_before() -> None:
    """The stance of the compiler is the rule's while it learns, and the user's afterwards."""
    torch._dynamo.reset()
    backend = Counted()
    rule = apical.FeedbackAlignment(whole(network(), backend))  # held: it leaves the model when it is collected
    gradients(rule)
    assert backend.graphs == 0
    rule.model(torch.randn(8, 6))
    assert backend.graphs > 0


class Sharded(nn.Sequential):
    """What `fully_shard` makes of a class is a subclass of this one."""


def test_a_model_that_is_sharded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import fsdp

    monkeypatch.setattr(fsdp, "FSDPModule", Sharded)
    for model in (Sharded(nn.Linear(6, 3)), nn.Sequential(Sharded(nn.Linear(6, 5)), nn.Linear(5, 3))):
        with pytest.raises(apical.errors.UnsupportedModelError, match=r"wrap the rule, fully_shard\(rule\)"):
            apical.Backprop(model)


@pytest.mark.parametrize("kind", ["fa", "dfa", "ccl", "pc"])
def test_a_layer_that_is_sharded_later_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import fsdp

    class Layer(nn.Linear):
        pass

    monkeypatch.setattr(fsdp, "FSDPModule", Layer)
    rule = made(kind, network())
    first = next(module for module in rule.model.modules() if isinstance(module, nn.Linear))
    first.__class__ = Layer
    with pytest.raises(apical.errors.UnsupportedModelError, match=r"sharded by itself.* call fully_shard\(rule\) alone"):
        gradients(rule)


def test_static_methods_of_objects_are_no_fault_of_the_model() -> None:
    """Classes that `fully_shard` makes have one without a module's name."""

    class Called:
        __module__ = None  # type: ignore[assignment]

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Odd(nn.Sequential):
        odd = staticmethod(Called())

    with pytest.raises(apical.errors.ConfigError, match="the loss returns a str"):
        apical.FeedbackAlignment(Odd(*network()), lambda output, targets: "no loss")(torch.randn(8, 6), torch.arange(8) % 3)


def test_a_rule_whose_parameters_were_taken_away_is_refused() -> None:
    """As `FullyShardedDataParallel(rule)` does, which cannot pass a credit on."""
    rules = [apical.FeedbackAlignment(network()) for _ in range(2)]
    for rule in rules:
        rule._is_fsdp_managed_module = True
    gradients(rules[0])  # fully_shard leaves them
    rules[1]._parameters["_flat_param"] = nn.Parameter(torch.zeros(3))
    with pytest.raises(apical.errors.UnsupportedModelError, match=r"fully_shard\(rule\) or DistributedDataParallel"):
        gradients(rules[1])


def test_hooks_on_the_loss_are_called_by_either_backward() -> None:
    for kind in ("fa", "dfa", "ccl", "pc"):
        rule, seen = made(kind, network()), []
        credit = rule(torch.randn(8, 6), torch.arange(8) % 3)
        credit.loss.register_hook(lambda gradient, seen=seen: seen.append(float(gradient)))
        credit.backward()
        assert seen == [1.0]
        assert all(parameter.grad is not None for parameter in rule.model.parameters())


def test_an_old_compiler_leaves_rules_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of PyTorch 2.6 does."""
    monkeypatch.setattr("apical.core.wrappers.COMPILES", False)
    backend = Counted()
    torch._dynamo.reset()
    with pytest.warns(RuntimeWarning, match="cannot compile rules: FeedbackAlignment runs uncompiled; update PyTorch"):
        compiled = gradients(torch.compile(apical.FeedbackAlignment(network()), backend=backend))  # type: ignore[arg-type]
    assert same(compiled, gradients(apical.FeedbackAlignment(network())))
    assert backend.graphs == 0
    torch._dynamo.reset()
    rule: Any = torch.compile(apical.FeedbackAlignment(network()), backend=backend, fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        gradients(rule)
