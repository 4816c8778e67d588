"""Diagnostics leave a user's model as it was: counters, states that are no buffers, and what Python and NumPy draw."""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical import Backprop, DirectFeedbackAlignment, FeedbackAlignment
from apical.core.credit import Credit, CreditRule
from apical.diagnostics.alignment import gradient_alignment, layer_alignment
from apical.diagnostics.channel import channel
from apical.diagnostics.coding import coding
from apical.diagnostics.gauss_newton import (
    gauss_newton_alignment,
    gauss_newton_direction,
    gauss_newton_update,
    minimum_norm_alignment,
)
from apical.diagnostics.interference import interference
from apical.diagnostics.landscape import flat, losses_at
from apical.diagnostics.learnability import learnability
from apical.diagnostics.memory import held_bytes, step_bytes
from apical.diagnostics.plausibility import examine
from apical.errors import UnsupportedModelError

INPUTS = torch.randn(12, 6, dtype=torch.double, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(12) % 3


class Odd(nn.Module):
    """Four layers, and a factor that depends on what the forward method has kept or draws."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.kind, self.calls = kind, 0
        self.mean: Tensor = torch.zeros(8, dtype=torch.double)
        self.kept: list[Tensor] = []
        self.own, self.numpy = random.Random(0), np.random.default_rng(0)

    def factor(self, h: Tensor) -> Any:
        if self.kind == "counter":
            self.calls += 1
            return 1 + 0.1 * self.calls
        if self.kind == "assigned":
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
            return 1 + self.mean
        if self.kind == "weight":
            with torch.no_grad():
                self.b.weight.mul_(0.9)
            return 1
        if self.kind == "list":
            self.kept.append(h.detach())
            return 1 + 0.1 * len(self.kept)
        draws = {"python": random.random, "numpy": np.random.rand, "own": self.own.random, "own numpy": self.numpy.random}
        return 1 + float(draws[self.kind]())

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.c(torch.tanh(self.b(h * self.factor(h))))

    def state(self) -> list[Any]:
        """Everything that a pass may move."""
        moved = [t.tolist() for t in (self.mean, *self.kept, *self.parameters(), *self.buffers())]
        drawn = [
            random.getstate(),
            np.random.get_state()[1].tolist(),
            np.random.get_state()[2],
            torch.get_rng_state().tolist(),
        ]
        grads = [None if p.grad is None else p.grad.tolist() for p in self.parameters()]
        return [self.calls, moved, drawn, grads, self.own.getstate(), self.numpy.bit_generator.state, self.training]


KINDS = ("counter", "assigned", "list", "weight", "python", "numpy", "own", "own numpy")
LOOKS: dict[str, Callable[[CreditRule], Any]] = {
    "alignment": lambda rule: gradient_alignment(rule, INPUTS, TARGETS),
    "feedback": layer_alignment,
    "gauss-newton": lambda rule: gauss_newton_alignment(rule, INPUTS, TARGETS),
    "interference": lambda rule: interference(rule, INPUTS, TARGETS),
    "held": lambda rule: held_bytes(rule, INPUTS, TARGETS),
    "step": lambda rule: step_bytes(rule, INPUTS, TARGETS),
    "learnability": lambda rule: learnability(rule.model, INPUTS[:2], rule),
    "coding": lambda rule: coding(rule.model, INPUTS),
    "channel": lambda rule: channel(rule.model, INPUTS[:2]),
    "landscape": lambda rule: losses_at(rule.model, rule.loss, INPUTS, TARGETS)(flat(rule.model)[None]),
    "audit": lambda rule: examine(rule, INPUTS, TARGETS, Backprop(copy.deepcopy(rule.model))),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_left_as_it_was(kind: str, look: str) -> None:
    for rule_type in (FeedbackAlignment, DirectFeedbackAlignment):
        rule = rule_type(Odd(kind).double())
        rule(INPUTS, TARGETS).backward()
        before = rule.model.state()
        LOOKS[look](rule)
        assert rule.model.state() == before


@pytest.mark.parametrize("kind", KINDS)
def test_backpropagation_is_at_no_angle_to_itself(kind: str) -> None:
    """Both gradients belong to one and the same function, also where each pass would be another."""
    torch.manual_seed(0)
    rule = Backprop(Odd(kind).double())
    assert all(layer["gradient_alignment"] < 1e-3 for layer in gradient_alignment(rule, INPUTS, TARGETS).values())


def test_a_loss_and_a_rule_of_ones_own_keep_their_states() -> None:
    """The loss is as it was; a rule may keep what belongs to what it made at its first batch."""
    calls: list[int] = []

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        calls.append(len(calls))
        return F.cross_entropy(output, targets) * (1 + len(calls))

    class Own(Backprop):
        made = 0

        def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
            self.made += 1
            return super().forward(inputs, targets)

    rule = Own(Odd("counter").double(), loss)
    before = list(calls)
    angles = gradient_alignment(rule, INPUTS, TARGETS)
    assert all(abs(layer["gradient_norm_ratio"] - 1) < 1e-9 for layer in angles.values())
    assert calls == before
    assert rule.made == 1


@pytest.mark.parametrize("look", [*LOOKS, "minimum norm", "direction"])
def test_a_loss_that_counts_is_left_as_it_was(look: str) -> None:
    calls: list[int] = []

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        calls.append(len(calls))
        return ((output - F.one_hot(targets, 3)) ** 2).mean() if output.dim() > 1 else output.mean()

    rule = Backprop(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double(), loss)
    rule(INPUTS, TARGETS)
    before = list(calls)
    others = {
        "minimum norm": lambda rule: minimum_norm_alignment(rule, INPUTS, TARGETS),
        "direction": lambda rule: gauss_newton_direction(rule.model, loss, INPUTS, TARGETS),
    }
    (LOOKS | others)[look](rule)
    assert calls == before


def test_a_loss_that_is_a_module_keeps_its_state() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.seen = 0, []

        def forward(self, output: Tensor, targets: Tensor) -> Tensor:
            self.calls += 1
            self.seen.append(self.calls)
            return F.cross_entropy(output, targets) * (1 + self.calls)

    loss = Growing()
    angles = gradient_alignment(Backprop(Odd("counter").double(), loss), INPUTS, TARGETS)
    assert all(abs(layer["gradient_norm_ratio"] - 1) < 1e-9 for layer in angles.values())
    assert (loss.calls, loss.seen) == (0, [])


def test_a_look_first_changes_no_training() -> None:
    """What a rule makes at its first batch stays, whoever showed it that batch."""

    def trained(look: bool) -> list[Tensor]:
        torch.manual_seed(0)
        rule = DirectFeedbackAlignment(Odd("counter").double())
        if look:
            gradient_alignment(rule, INPUTS, TARGETS)
        optimizer = torch.optim.SGD(rule.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            rule(INPUTS, TARGETS).backward()
            optimizer.step()
        return list(rule.model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(trained(True), trained(False), strict=True))


def test_lazy_layers_are_made_by_the_first_look() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3)).double()
    coding(model, INPUTS)
    assert [(type(layer), layer.in_features) for layer in (model[0], model[2])] == [(nn.Linear, 6), (nn.Linear, 8)]
    model(INPUTS)


def test_gauss_newton_takes_a_state_as_it_stands() -> None:
    """A network that keeps a mean in evaluation mode: its update is that of the function with the mean of now."""
    torch.manual_seed(0)
    model, delta = Odd("assigned").double(), torch.randn(12, 3, dtype=torch.double)

    class Frozen(Odd):
        def factor(self, h: Tensor) -> Any:
            return 1 + 0.1 * h.detach().mean(0)

    same = Frozen("assigned").double()
    same.load_state_dict(model.state_dict())
    ours = gauss_newton_update(model, INPUTS[:1], delta[:1])
    for name, change in gauss_newton_update(same, INPUTS[:1], delta[:1]).items():
        torch.testing.assert_close(ours[name], change, rtol=1e-10, atol=1e-12)


class Writes(Odd):
    """Keeps its mean in place, which transforms of torch.func refuse."""

    def factor(self, h: Tensor) -> Any:
        self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return 1 + self.mean


def test_gauss_newton_of_what_torch_func_cannot_follow() -> None:
    """Of one sample with the state as it stands: that of the network that assigns the same mean."""
    torch.manual_seed(0)
    model, delta = Writes("written").double(), torch.randn(12, 3, dtype=torch.double)
    same = Odd("assigned").double()
    same.load_state_dict(model.state_dict())
    before = model.state()
    ours = gauss_newton_update(model, INPUTS, delta)
    assert model.state() == before
    one_by_one = [gauss_newton_update(same, INPUTS[i : i + 1], delta[i : i + 1]) for i in range(12)]
    for name, change in ours.items():
        torch.testing.assert_close(change, sum(each[name] for each in one_by_one) / 12, rtol=1e-10, atol=1e-12)
    with pytest.raises(UnsupportedModelError, match=r"Writes has no Gauss-Newton direction, because torch.func .*in-place"):
        gauss_newton_direction(model, F.cross_entropy, INPUTS, TARGETS)
    assert model.state() == before


def test_gauss_newton_of_prelu_is_that_of_leaky_relu() -> None:
    """PyTorch's own rule for PReLU in batches of samples fails."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.PReLU(), nn.Linear(8, 3)).double()
    leaky = nn.Sequential(model[0], nn.LeakyReLU(0.25), model[2])
    names, delta = ["0.weight", "0.bias", "2.weight", "2.bias"], torch.randn(12, 3, dtype=torch.double)
    for name, change in gauss_newton_update(leaky, INPUTS, delta).items():
        torch.testing.assert_close(
            gauss_newton_update(model, INPUTS, delta, names=names)[name], change, rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("rule_type", [Backprop, FeedbackAlignment, DirectFeedbackAlignment])
def test_batch_normalisation_of_vectors_is_audited(rule_type: type[CreditRule]) -> None:
    """One sample has no statistics of a batch: it is taken with the running ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    exact = Backprop(copy.deepcopy(model))
    rule = rule_type(model)
    before = [b.clone() for b in model.buffers()]
    found = examine(rule, INPUTS, TARGETS, exact)
    assert found.layers == ["0", "3"]
    assert max(found.presynaptic.values()) < 1e-9  # a local update is a multiple of the layer's own input
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


class Skips(nn.Module):
    """Leaves a block out by chance."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.draw = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), draw

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.c(h + torch.relu(self.b(h)) if self.draw() < 0.5 else h)


@pytest.mark.parametrize(
    "draw", [random.random, np.random.rand, lambda: torch.rand(()).item()], ids=["python", "numpy", "torch"]
)
def test_stochastic_depth_is_audited_as_one_of_its_networks(draw: Callable[[], float]) -> None:
    for seed in range(4):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        rule = FeedbackAlignment(Skips(draw).double())
        found = examine(rule, INPUTS, TARGETS, Backprop(copy.deepcopy(rule.model)))
        assert found.layers in (["a", "b", "c"], ["a", "c"])
        assert set(found.learns) <= set(found.layers)
