"""Models that keep a state between calls, wherever they keep it: looking at a model must not move it."""

import itertools
import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.bench.names import find_rule
from apical.core.rest import undisturbed
from apical.testing import check_model

FEED_FORWARD = ["fa", "kp", "pfa", "wm", "dfa", "tdca", "grapes:fa", "cwu:dfa"]
BLOCKS = ["ccl", "pc", "local-both"]


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


class Scaled(nn.Module):
    """Multiplies by a number that a state gives at each call."""

    def __init__(self, state: Any, step: Callable[[Any], float]) -> None:
        super().__init__()
        self.state, self.step = state, step

    def forward(self, h: Tensor) -> Tensor:
        return h * self.step(self.state)


class Counter:
    """Without a dictionary; one of its places is private, and one is filled by the first call."""

    __slots__ = ("__count", "last")

    def __init__(self) -> None:
        self.__count = 0

    def __call__(self) -> float:
        self.__count += 1
        assert hasattr(self, "last") == (self.__count > 1)
        self.last = self.__count
        return 1 + 0.1 * self.__count


def _counted(state: Any) -> float:
    state.count += 1
    return 1 + 0.1 * state.count


def _appended(state: Any) -> float:
    state.append(len(state))
    return 1 + 0.1 * len(state)


def _decayed(state: Tensor) -> float:
    return float(state.mul_(0.9))


def _array(state: Any) -> float:
    state *= 0.9
    return float(state[0])


def _nested(state: Any) -> float:
    state["deep"]["list"][0] += 1
    return 1 + 0.1 * float(state["deep"]["list"][0])


class Guarded:
    """A counter that threads may share."""

    def __init__(self) -> None:
        self.count, self.lock, self.again = 0, threading.Lock(), threading.RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Guarded":
        result = Guarded()
        result.count = self.count
        return result


STATES: dict[str, tuple[Callable[[], Any], Callable[[Any], float]]] = {
    "object": (lambda: SimpleNamespace(count=0), _counted),
    "object with locks": (Guarded, _counted),
    "object with a logger": (lambda: SimpleNamespace(count=0, log=logging.getLogger(__name__)), _counted),
    "slots": (Counter, lambda state: float(state())),
    "deque": (lambda: deque(maxlen=50), _appended),
    "tensor": (lambda: torch.ones(1), _decayed),
    "tensor in a list": (lambda: [torch.ones(1)], lambda state: _decayed(state[0])),
    "array": (lambda: np.ones(1), _array),
    "nested": (lambda: {"deep": {"list": [1]}}, _nested),
    "generator of NumPy": (lambda: np.random.default_rng(0), lambda state: 1 + float(state.random())),
    "generator of Python": (lambda: random.Random(0), lambda state: 1 + state.random()),
    "generator of PyTorch in a tuple": (
        lambda: (torch.Generator().manual_seed(0),),
        lambda state: 1 + float(torch.rand((), generator=state[0])),
    ),
}


def net(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    state, step = STATES[kind]
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Scaled(state(), step), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(8, 6, generator=torch.Generator().manual_seed(2)), torch.arange(8) % 4


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("name", [*FEED_FORWARD, *BLOCKS])
def test_every_batch_moves_the_state_once(name: str, kind: str) -> None:
    model, (inputs, targets) = net(kind), batch()
    reference = deepcopy(model)
    rule = find_rule(name).build(model)
    for _ in range(3):
        rule.zero_grad()
        credit = rule(inputs, targets)
        credit.backward()
        assert torch.allclose(credit.output.detach(), reference(inputs).detach())


@pytest.mark.parametrize("name", [*FEED_FORWARD])
def test_an_average_of_weights_that_the_forward_moves_is_moved_once_a_batch(name: str) -> None:
    """As momentum encoders do (MoCo): the average is a frozen parameter."""

    class Momentum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.average, self.last = nn.Linear(6, 8), nn.Linear(6, 8).requires_grad_(False), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.average.weight.lerp_(self.first.weight, 0.2)
            made: Tensor = self.last((self.first(x) + self.average(x)).tanh())
            return made

    model, (inputs, targets) = Momentum(), batch()
    reference = deepcopy(model)
    rule = find_rule(name).build(model)
    for _ in range(3):
        rule.zero_grad()
        rule(inputs, targets).backward()
        reference(inputs)
        assert torch.equal(model.average.weight, reference.average.weight)


class Annealed:
    """A loss that counts its calls, as schedules do."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, output: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(output, targets)


def _closure() -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[], int]]:
    calls = [0]

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        calls[0] += 1
        return F.cross_entropy(output, targets)

    return loss, lambda: calls[0]


@pytest.mark.parametrize("kind", ["object", "method", "closure", "partial"])
@pytest.mark.parametrize("name", [*FEED_FORWARD, "ccl", "dtp", "dfc-ss"])
def test_a_loss_with_a_state_is_called_once_a_batch(name: str, kind: str) -> None:
    counted = Annealed()
    loss, calls = _closure() if kind == "closure" else (counted, lambda: counted.calls)
    loss = {"method": counted.__call__, "partial": partial(counted)}.get(kind, loss)
    torch.manual_seed(0)
    rule = find_rule(name).build(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), loss=loss)
    for batches in range(3):
        assert calls() == batches
        rule(*batch()).backward()
    assert calls() == 3


KEPT: list[Tensor] = []


def _keep(module: nn.Module, args: Any, output: Tensor) -> None:
    KEPT.append(output)


class Recorder:
    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept.append(output)


@pytest.mark.parametrize("kind", ["global", "method", "closure"])
@pytest.mark.parametrize("name", ["fa", "kp", "dfa", "tdca", "grapes:fa", "cwu:fa", "cwu:dfa"])
def test_activities_that_a_hook_keeps_for_the_loss_are_those_of_the_batch_alone(name: str, kind: str) -> None:
    """What it kept of a look at the model has a graph without cuts and feedback, by which exact errors would come down."""
    updates = []
    for begun in (False, True):
        torch.manual_seed(0)
        model, recorder, own = net("tensor"), Recorder(), list[Tensor]()
        kept = {"global": KEPT, "method": recorder.kept, "closure": own}[kind]

        def inner(module: nn.Module, args: Any, output: Tensor) -> None:
            own.append(output)  # noqa: B023

        model[4].register_forward_hook({"global": _keep, "method": recorder.keep, "closure": inner}[kind])

        def loss(output: Tensor, targets: Tensor) -> Tensor:
            total = F.cross_entropy(output, targets) + sum(part.square().mean() for part in kept)  # noqa: B023
            kept.clear()  # noqa: B023
            return total

        rule = find_rule(name).build(model, loss=loss)
        if begun:
            with torch.no_grad():
                state = model[2].state.clone()
            rule(*batch())
            model[2].state.copy_(state)
        rule.zero_grad()
        torch.manual_seed(3)
        rule(*batch()).backward()
        updates.append([parameter.grad for parameter in model.parameters()])
    for first, second in zip(*updates, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("name", [*FEED_FORWARD, *BLOCKS[:1], "local-both", "dfc-ss", "strong-dfc", "dualprop"])
def test_a_hook_that_keeps_activities_is_heard_once_a_batch(name: str) -> None:
    """Rules that call a layer once. Chains look at hooked modules at each batch, to see that they compute what they did."""
    torch.manual_seed(0)
    model, kept = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), list[Tensor]()
    model[2].register_forward_hook(lambda module, args, output: kept.append(output))
    rule = find_rule(name).build(model)
    for batches in range(3):
        assert len(kept) == batches
        rule(*batch()).backward()
    assert len(kept) == 3


def test_a_layer_that_draws_its_weight_by_a_generator_of_its_own() -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generators = [torch.Generator().manual_seed(0)]

        def forward(self, weight: Tensor) -> Tensor:
            return weight + 0.1 * torch.randn(weight.shape, generator=self.generators[0])

    torch.manual_seed(0)
    model, (inputs, targets) = (
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)),
        batch(),
    )
    nn.utils.parametrize.register_parametrization(model[2], "weight", Noise(), unsafe=True)
    reference = deepcopy(model)
    rule = find_rule("fa").build(model)
    for _ in range(3):
        assert torch.equal(rule(inputs, targets).output, reference(inputs))
    check_model(rule, inputs, targets, skip=("compiled", "autocast", "lengths", "batch sizes"))


def test_global_generators_of_python_and_numpy_are_put_back() -> None:
    class Drawn(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h * (1 + random.random() + float(np.random.rand()))

    model = nn.Sequential(Drawn())
    random.seed(0), np.random.seed(0)
    first = model(torch.ones(1))
    random.seed(0), np.random.seed(0)
    with undisturbed(model):
        model(torch.ones(1))
    assert torch.equal(model(torch.ones(1)), first)


def test_what_was_not_changed_is_the_same_object_and_iterators_are_left_alone() -> None:
    model = nn.Identity()
    model.held, model.numbers = SimpleNamespace(inner=[1, {"a": 2}]), itertools.count()
    inner = model.held.inner
    with undisturbed(model):
        model.held.inner = []
        next(model.numbers)
    assert model.held.inner is inner
    assert next(model.numbers) == 1


class Graph(nn.Module):
    """Two layers on a graph whose neighbours are a sparse matrix."""

    def __init__(self, layout: str, kept: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4)
        ring = torch.eye(8).roll(1, 0) + torch.eye(8)
        ring = {"coo": ring.to_sparse(), "csr": ring.to_sparse_csr(), "dense": ring}[layout]
        if kept:
            self.register_buffer("ring", ring)
        else:
            self.ring = ring

    def forward(self, x: Tensor) -> Tensor:
        return self.ring @ self.down((self.ring @ self.up(x)).relu())


@pytest.mark.parametrize("name", ["fa", "dfa", "tdca", "grapes:fa", "cwu:dfa"])
@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_matrix_of_neighbours_is_as_a_dense_one(name: str, layout: str, kept: bool) -> None:
    grads = []
    for each in (layout, "dense"):
        model = Graph(each, kept)
        rule = find_rule(name).build(model)
        for _ in range(2):
            rule.zero_grad()
            rule(*batch()).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(a, b) for a, b in zip(*grads, strict=True))
