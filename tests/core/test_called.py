"""Functions between modules are steps of chains and rows, as the modules that compute the same."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical.bench.measure import minimum_norm
from apical.bench.names import RULES, find_rule
from apical.core.blocks import blocks, through
from apical.core.called import Call, Functions, Mean, module_of, on_path
from apical.data.dataset import Split
from apical.errors import UnsupportedModelError

SAME: list[tuple[Callable[..., Tensor], nn.Module, tuple[int, ...]]] = [
    (F.relu, nn.ReLU(), (3, 4)),
    (Tensor.relu_, nn.ReLU(), (3, 4)),
    (F.softplus, nn.Softplus(), (3, 4)),
    (partial(F.gelu, approximate="tanh"), nn.GELU("tanh"), (3, 4)),
    (torch.special.expit, nn.Sigmoid(), (3, 4)),
    (F.logsigmoid, nn.LogSigmoid(), (3, 4)),
    (partial(F.log_softmax, dim=1), nn.LogSoftmax(1), (3, 4)),
    (partial(F.max_pool2d, kernel_size=2, stride=1), nn.MaxPool2d(2, 1), (3, 2, 4, 4)),
    (
        lambda x: F.avg_pool2d(x, 3, padding=1, count_include_pad=False),
        nn.AvgPool2d(3, padding=1, count_include_pad=False),
        (3, 2, 6, 6),
    ),
    (lambda x: F.adaptive_avg_pool2d(x, 1), nn.AdaptiveAvgPool2d(1), (3, 2, 4, 4)),
    (partial(torch.flatten, start_dim=1), nn.Flatten(), (3, 2, 4)),
    (lambda x: x.view(len(x), -1), nn.Flatten(), (3, 2, 4)),
    (lambda x: x.reshape(-1, 8), nn.Flatten(), (3, 2, 4)),
    (lambda x: x.mean(2, keepdim=True), Mean(2, True), (3, 2, 4)),
    (lambda x: torch.mean(x, dim=(-1,)), Mean(-1), (3, 2, 4, 4)),
]
NONE: list[tuple[Callable[..., Tensor], tuple[int, ...]]] = [
    (torch.flatten, (3, 2, 4)),
    (lambda x: x.view(-1), (3, 4)),
    (lambda x: x.reshape(3, 4, 2), (3, 2, 4)),
    (torch.mean, (3, 4)),
    (lambda x: x.mean((0, 2)), (3, 2, 4)),
    (partial(F.softmax, dim=1, dtype=torch.float32), (3, 4)),
    (lambda x: F.dropout(x, 0.5), (3, 4)),
    (lambda x: F.rrelu(x, training=True), (3, 4)),
    (F.leaky_relu, (3, 4)),  # PyTorch hands its default on like any number,
    (partial(F.leaky_relu, negative_slope=0.3), (3, 4)),  # a number that may be another by the next batch
    (lambda x: F.elu(x, 0.7, True), (3, 4)),
    (lambda x: F.hardtanh(x, 0, 1), (3, 4)),
    (partial(F.softplus, beta=2), (3, 4)),
    (lambda x: F.threshold(x, 0.1, 3.0), (3, 4)),
    (lambda x: x + x, (3, 4)),
    (lambda x: torch.cumsum(x, 1), (3, 4)),
]


def calls_of(function: Callable[..., Tensor], shape: tuple[int, ...]) -> tuple[list[Call], Tensor]:
    calls: list[Call] = []
    torch.manual_seed(0)
    inputs = torch.randn(shape, dtype=torch.double)
    with Functions(calls.append):
        result = function(inputs)
    return on_path(calls, result), inputs


@pytest.mark.parametrize(("function", "module", "shape"), SAME, ids=[str(module) for _, module, _ in SAME])
def test_a_function_is_its_module(function: Callable[..., Tensor], module: nn.Module, shape: tuple[int, ...]) -> None:
    (call,), _ = calls_of(function, shape)
    assert type(call.module) is type(module)
    inputs = torch.randn(5, *shape[1:], dtype=torch.double)
    assert torch.equal(call.module(inputs.clone()), module(inputs.clone()))


@pytest.mark.parametrize(("function", "shape"), NONE)
def test_other_functions_are_none(function: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    assert calls_of(function, shape)[0] == []


def test_what_nothing_comes_of_is_left_out() -> None:
    def looks(x: Tensor) -> Tensor:
        x.sigmoid().sum()
        return x.tanh().relu()

    calls, inputs = calls_of(looks, (3, 4))
    assert [call.name for call in calls] == ["F.tanh", "F.relu"]
    assert calls[0].given is inputs


def test_random_numbers_are_left_as_they_are() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    module_of(F.relu, torch.zeros(2, 3), (), {})
    assert torch.equal(torch.get_rng_state(), before)


class Written(nn.Module):
    """A perceptron written with functions."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.act = nn.Linear(12, 9), nn.Linear(9, 8), nn.Linear(8, 4), act

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.a(x.flatten(1)))
        return self.c(self.act(self.b(x)))


def modular(act: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 9), act(), nn.Linear(9, 8), act(), nn.Linear(8, 4))


ONE_OF_EACH = ("dfc-ss", "strong-dfc", "dtp", "ddtp-control", "ep", "hep", "corinfomax", "dualprop", "sibp", "csdp")
ONE_OF_EACH += ("ccl", "pc", "pc-error", "local-both", "mono-forward", "ff", "scff")


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_rules_learn_the_same_from_functions_and_modules(name: str) -> None:
    entry, found = RULES[name], []
    torch.manual_seed(2)
    batch = torch.rand(6, 3, 4, dtype=torch.double), torch.arange(6) % 4
    function, kind = (torch.tanh, nn.Tanh) if name == "hep" else (F.relu, nn.ReLU)
    for make in (partial(Written, function), partial(modular, kind)):
        torch.manual_seed(0)
        model = make().double()
        takes = {} if name in ("corinfomax", "sibp", "csdp") else {"input_shape": (3, 4)}
        rule = entry.build(model, loss=F.cross_entropy, **takes, **entry.options)
        torch.manual_seed(1)
        rule.accumulate(*batch)
        found.append([parameter.grad for parameter in model.parameters()])
    assert any(grad is not None and bool(grad.any()) for grad in found[1])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


class Residual(nn.Module):
    """A block with a skip between functions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(5, 6), Skip(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.inner(torch.tanh(self.first(x)))))


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.layer(x))


def test_functions_between_blocks_belong_to_the_block_before() -> None:
    model = Residual().double()
    with pytest.raises(UnsupportedModelError, match="but the result of 'add'"):
        blocks(model)
    head, row = blocks(model, skips=True)
    assert [block.name for block in row] == ["first", "inner", "last"]
    assert [[type(module).__name__ for module in block.modules] for block in row] == [
        ["Linear", "Tanh"],
        ["Skip", "ReLU"],
        ["Linear"],
    ]
    inputs = torch.randn(4, 5, dtype=torch.double)
    assert torch.equal(through([*head, *row], inputs), model(inputs))


def test_a_forward_with_functions_that_is_changed_later_is_refused() -> None:
    model = Written(F.relu)
    rule = apical.DeepFeedbackControl(model, input_shape=(3, 4))
    model.forward = lambda x: 2 * Written.forward(model, x)  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModelError, match="forward"):
        rule(torch.randn(6, 3, 4), torch.arange(6) % 4)


class Choosing(nn.Module):
    """Takes another way when something is another than before."""

    def __init__(self, choice: Callable[[nn.Module, Tensor], bool]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.choice, self.flag, self.options = choice, False, {"flag": False}

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(F.relu(self.a(x)))
        return self.c(torch.tanh(h) if self.choice(self, x) else F.relu(h))


class Options:
    """A choice kept outside the model."""

    flag = False


LATER = {"flag": False}


def later() -> bool:
    return LATER["flag"]


CHOICES: dict[str, Callable[[Any, Tensor], bool]] = {
    "attribute": lambda model, x: model.flag,
    "inside an attribute": lambda model, x: model.options["flag"],
    "class": lambda model, x: Options.flag,
    "module": lambda model, x: LATER["flag"],
    "function": lambda model, x: later(),
}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("name", ["dfc-ss", "dtp", "ep", "corinfomax", "dualprop", "ccl", "pc", "local-both", "ff"])
def test_another_way_through_a_forward_is_refused_at_the_batch_that_takes_it(name: str, choice: Any) -> None:
    entry, model = RULES[name], Choosing(choice)
    rule = entry.build(model, loss=F.cross_entropy, **entry.options)
    x, targets = -torch.rand(6, 4), torch.arange(6) % 3
    for _ in range(6):
        rule(x, targets).backward()
    model.flag = model.options["flag"] = Options.flag = LATER["flag"] = True
    try:
        with pytest.raises(UnsupportedModelError, match="'' \\(Choosing\\) computes another function"):
            rule(-x, targets)
    finally:
        Options.flag = LATER["flag"] = False


class Methods(nn.Module):
    """Nothing but the attribute tells of another way: its methods find nothing by a global name."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c = layers
        self.flag = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).relu())
        return self.c(h.tanh() if self.flag else h.relu())


@pytest.mark.parametrize("name", ["dtp", "ep", "local-pred", "cwu:local-pred"])
def test_another_way_is_refused_until_the_old_one_is_taken_again(name: str) -> None:
    """Who catches the error trains nothing else; nor does a rule that tries a few samples before the batch."""
    entry, model = find_rule(name), Methods(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    rule = entry.build(model, loss=F.cross_entropy, **entry.options)
    x, targets = torch.rand(6, 4), torch.arange(6) % 3
    for _ in range(6):
        rule(x, targets)
    model.flag = True
    for _ in range(3):
        with pytest.raises(UnsupportedModelError, match="computes another function"):
            rule(x, targets)
    model.flag = False
    rule(x, targets).backward()


class InDouble(nn.Module):
    """Takes single precision, which layers in double precision alone do not."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.body(x.double())
        return output


@pytest.mark.parametrize("name", ["dfc-ss", "dtp", "ep", "corinfomax", "dualprop", "sibp", "ccl", "pc", "local-both", "ff"])
def test_a_conversion_that_is_no_module_is_refused(name: str) -> None:
    entry = RULES[name]
    rule = entry.build(InDouble(), loss=F.cross_entropy, **entry.options)
    with pytest.raises(UnsupportedModelError, match=r"a dtype conversion.*same dtype"):
        rule(torch.rand(6, 4), torch.arange(6) % 3)


def test_probes_of_chains_leave_out_what_takes_its_samples_otherwise() -> None:
    data = Split(torch.rand(6, 4), torch.arange(6) % 3)
    assert minimum_norm(apical.Backprop(InDouble()), data, probe=4) is None


def test_a_compiled_rule_stops_at_another_way_too() -> None:
    torch._dynamo.reset()
    model = Choosing(CHOICES["attribute"])
    rule = apical.DeepFeedbackControl(model)
    compiled = torch.compile(rule, backend="aot_eager", fullgraph=True)
    x, targets = torch.randn(6, 4), torch.arange(6) % 3
    for _ in range(2):
        compiled(x, targets).backward()
    model.flag = True
    with pytest.raises(RuntimeError, match="computes another function"):
        compiled(x, targets)


VALUED: list[Callable[[Tensor], object]] = [
    lambda x: x.mean() > 0,
    lambda x: x.mean().item() > 0,
    lambda x: float(x[0, 0]) > 0,
    lambda x: int(x.sum()) > 1,
    lambda x: torch.allclose(x, x.abs()),
    lambda x: x.mean().tolist() > 0,
]


@pytest.mark.parametrize("choice", VALUED)
def test_a_choice_by_the_numbers_of_the_batch_is_refused(choice: Any) -> None:
    model = Choosing(lambda model, x: bool(choice(x)))
    for make in (apical.DeepFeedbackControl, apical.CounterCurrentLearning):
        with pytest.raises(UnsupportedModelError, match="reads values of the batch"):
            make(model)


@pytest.mark.parametrize("chance", [random.random, lambda: torch.rand(()).numpy()])
def test_a_choice_by_chance_is_refused(chance: Any) -> None:
    model = Choosing(lambda model, x: model.training and chance() < 0)
    with pytest.raises(UnsupportedModelError, match=r"draws random numbers|reads values"):
        apical.DeepFeedbackControl(model)


def test_a_slope_that_is_changed_later_is_seen_in_place_too() -> None:
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(0.1, inplace), nn.Linear(6, 3)).double()
        rule = apical.DeepFeedbackControl(model)
        model[1].negative_slope = 0.7
        rule(torch.randn(5, 4, dtype=torch.double), torch.arange(5) % 3).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["dfc-ss", "ep", "ccl", "pc", "local-both", "ff"])
def test_a_mean_over_places_is_pooling_and_flattening(name: str) -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x)).mean((2, 3)))

    entry, found = RULES[name], []
    x, targets = torch.rand(6, 2, 5, 5, dtype=torch.double), torch.arange(6) % 3
    for written in (True, False):
        torch.manual_seed(0)
        model: nn.Module = Mapped().double()
        if not written:
            model = nn.Sequential(model.a, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.b)
        rule = entry.build(model, loss=F.cross_entropy, input_shape=(2, 5, 5), **entry.options)
        torch.manual_seed(1)
        rule.accumulate(x, targets)
        found.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


class Plain(nn.Module):
    """What most people write: the only names in it are a module of Python and the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.calls: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.calls is not None:
            self.calls()
        return self.b(F.relu(self.a(torch.flatten(x, 1))))


@pytest.mark.parametrize("name", ["dtp", "ep", "ccl", "pc", "local-pred"])
def test_a_forward_of_a_users_is_run_at_the_first_batches_and_now_and_then_alone(name: str) -> None:
    """Each look costs two passes; functions that are named in it, and their module's hundreds of names, are no change."""
    entry, model = find_rule(name), Plain()
    rule = entry.build(model, loss=F.cross_entropy, **entry.options)
    x, targets = torch.rand(6, 4), torch.arange(6) % 3
    looks, calls = [], []
    model.calls = partial(calls.append, None)
    for _ in range(40):
        before = len(calls)
        rule(x, targets).backward()
        looks.append(len(calls) > before)
    assert [batch for batch, looked in enumerate(looks) if looked] == [0, 1, 2, 3, 16, 32]
