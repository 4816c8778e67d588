"""Weights that functions apply, and weights in lists and dictionaries: the same rule as with modules, or refused by name."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical.errors import UnsupportedModelError
from apical.testing import check_model


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float)


def called(layer: Any, x: Tensor) -> Tensor:
    return layer(x)  # type: ignore[no-any-return]


def functional(layer: Any, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, layer.weight, layer.bias, padding=1)
    return F.linear(x, layer.weight, layer.bias)


def by_its_type(layer: Any, x: Tensor) -> Tensor:
    return type(layer).forward(layer, x)  # type: ignore[no-any-return]


def multiplied(layer: Any, x: Tensor) -> Tensor:
    return functional(layer, x) if isinstance(layer, nn.Conv2d) else x @ layer.weight.T + layer.bias


class Net(nn.Module):
    def __init__(self, apply: Callable[[Any, Tensor], Tensor], which: str, maps: bool) -> None:
        super().__init__()
        kinds = (
            [nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)] if maps else [nn.Linear(6, 8), nn.Linear(8, 7)]
        )
        self.a, self.b = kinds
        self.c = nn.Linear(4 * 16 if maps else 7, 3)
        self.act = nn.Tanh()
        self.apply_, self.which = apply, which

    def forward(self, x: Tensor) -> Tensor:
        run = {name: self.apply_ if name in self.which else called for name in "abc"}
        h = self.act(run["b"](self.b, self.act(run["a"](self.a, x))))
        return run["c"](self.c, h.flatten(1))


@pytest.mark.parametrize("maps", [False, True], ids=["dense", "maps"])
@pytest.mark.parametrize("which", ["a", "b", "ab", "abc"])
@pytest.mark.parametrize("apply", [functional, by_its_type, multiplied])
@pytest.mark.parametrize("make", [apical.DirectFeedbackAlignment, apical.TopDownCreditAssignment])
def test_units_end_at_activations_whoever_applies_the_weights(
    make: Any, apply: Callable[[Any, Tensor], Tensor], which: str, maps: bool
) -> None:
    """Same units, same signals, same gradients as with layers that are called, in training and in the checks."""
    gradients = []
    inputs = torch.randn(5, 2, 4, 4) if maps else torch.randn(5, 6)
    targets = torch.arange(5) % 3
    for way in (called, apply):
        torch.manual_seed(3)
        rule = make(Net(way, which, maps))
        assert rule.hidden_units(inputs) == ["act", "act#1"]
        rule(inputs, targets).backward()
        gradients.append([parameter.grad for parameter in rule.model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    if which == "ab":
        check_model(rule, inputs, targets, skip=("compiled",))


class Listed(nn.Module):
    """Weights in a list, in a dictionary, or in a list within a dictionary."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        one, two = torch.randn(7, 6) / 2, torch.randn(5, 7) / 2
        self.read = nn.Linear(5, 3)
        self.held: Any
        if kind == "list":
            self.held = nn.ParameterList([one, two])
        elif kind == "dictionary":
            self.held = nn.ParameterDict({"0": one, "1": two})
        else:
            self.held = nn.ParameterDict({"w": nn.ParameterList([one, two])})
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        held = self.held if self.kind == "list" else self.held["w"] if self.kind == "both" else list(self.held.values())
        return self.read(torch.tanh(F.linear(torch.tanh(F.linear(x, held[0])), held[1])))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["list", "dictionary", "both"])
def test_sites_in_lists_and_dictionaries_are_layers(kind: str) -> None:
    model, x, targets = Listed(kind), torch.randn(8, 6), torch.arange(8) % 3
    names = tuple(f"held.w.{i}" if kind == "both" else f"held.{i}" for i in range(2))
    rule = apical.FeedbackAlignment(model, sites=names)
    rule(x, targets).backward()
    weights, feedback = [dict(model.named_parameters())[name] for name in names], rule.feedback_weights()
    with torch.no_grad():
        h = torch.tanh(x @ weights[0].T)
        g = torch.tanh(h @ weights[1].T)
        error = (torch.softmax(model.read(g), 1) - F.one_hot(targets, 3)) / 8
        above = (error @ feedback["read"]) * (1 - g * g)
        below = (above @ feedback[names[1]]) * (1 - h * h)
    torch.testing.assert_close(weights[1].grad, above.T @ h, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(weights[0].grad, below.T @ x, rtol=1e-10, atol=1e-13)
    for make in (apical.SignSymmetry, apical.KolenPollack, apical.ProductFeedbackAlignment):
        check_model(make(Listed(kind), sites=names), x, targets, skip=("compiled",))


class Turned(nn.Module):
    """Multiplies by a matrix that it keeps as (n_in, n_out), or as (n_out, n_in)."""

    def __init__(self, kind: str, n_out: int, turns: bool) -> None:
        super().__init__()
        self.kind, self.turns = kind, turns
        self.weight = nn.Parameter(torch.randn(6, n_out) if turns else torch.randn(n_out, 6))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight if self.turns else self.weight.T
        if self.kind == "einsum":
            return torch.einsum("...i,io->...o", x, w)
        if self.kind == "left":
            return (w.T @ x.transpose(-1, -2)).transpose(-1, -2)
        return torch.addmm(torch.zeros(w.shape[1]), x, w) if self.kind == "addmm" else x @ w


@pytest.mark.parametrize("n_out", [4, 6])
@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("kind", ["matmul", "einsum", "left", "addmm"])
def test_a_site_that_is_kept_as_n_in_by_n_out_is_refused(kind: str, axes: int, n_out: int) -> None:
    inputs = torch.randn(8, 5) if axes == 2 or kind == "addmm" else torch.randn(8, 3, 5)
    targets = torch.arange(8) % 3

    def net(turns: bool) -> nn.Sequential:
        layers = (nn.Linear(5, 6), nn.Tanh(), Turned(kind, n_out, turns), nn.Tanh(), nn.Flatten())
        return nn.Sequential(*layers, nn.Linear(n_out * (inputs.numel() // 40), 3))

    rule = apical.ProductFeedbackAlignment(net(True), sites=("2.weight",))
    with pytest.raises(UnsupportedModelError, match=r"'2.weight', which Turned applies as a matrix \(n_in, n_out\)"):
        rule(inputs, targets)
    for remedied in (
        apical.ProductFeedbackAlignment(net(False), sites=("2.weight",)),
        apical.ProductFeedbackAlignment(net(True), exact=("2.weight",)),
    ):
        remedied(inputs, targets).backward()
        assert remedied.model[2].weight.grad.any()


def test_lists_that_are_not_named_are_orphans_and_sites_are_advised_where_they_are_an_option() -> None:
    names = r"parameters 'held.0', 'held.1' are orphans.*exact=\('held.0', 'held.1'\)"
    with pytest.raises(UnsupportedModelError, match=rf"{names}.*sites=\('held.0', 'held.1'\)"):
        apical.FeedbackAlignment(Listed("list"))
    for make in (apical.DirectFeedbackAlignment, apical.TopDownCreditAssignment):
        with pytest.raises(UnsupportedModelError, match=names) as caught:
            make(Listed("list"))
        assert "sites" not in str(caught.value)


def test_sites_of_one_module_come_in_the_order_of_registration() -> None:
    """Not in that of a set, which is another in every process."""
    model = nn.Module()
    names = [f"w{i}" for i in (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)]
    for name in names:
        model.register_parameter(name, nn.Parameter(torch.randn(3, 3)))
    assert list(apical.FeedbackAlignment(model, sites=names).layers) == names


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor | None = None


class Plain:
    def __init__(self, logits: Tensor) -> None:
        self.parts = {"logits": [logits]}


class Answering(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.a, self.b, self.idle, self.kind = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(3, 3), kind

    def forward(self, x: Tensor) -> Any:
        return self.kind(self.b(torch.tanh(self.a(x))))


@pytest.mark.parametrize("kind", [Answer, Plain])
@pytest.mark.parametrize("make", [apical.Backprop, apical.FeedbackAlignment, apical.KolenPollack])
def test_placement_sees_outputs_in_objects_of_any_kind(make: Any, kind: Any) -> None:
    rule = make(Answering(kind), lambda o, y: F.cross_entropy(o.logits if kind is Answer else o.parts["logits"][0], y))
    placement = rule.placement(torch.randn(4, 6))
    exact = make is apical.Backprop
    assert [row.path for row in placement] == [
        "exact" if exact else "no layer below",
        "exact" if exact else "own feedback",
        "no credit",
    ]
    check_model(rule, torch.randn(8, 6), torch.arange(8) % 3, skip=("compiled",))
