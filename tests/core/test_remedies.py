"""What a refusal advises, done to the letter: options are read from the message, and the rule then trains."""

import ast
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import apical
from apical.errors import ApicalError

FA, KP, DFA = apical.FeedbackAlignment, apical.KolenPollack, apical.DirectFeedbackAlignment
VALUE = r"\(.*?\)|'[^']*'|\"[^\"]*\"|True|False"
OPTION = re.compile(
    rf"\b(?:pass|use|with|or) (exact|sites|units|form|first_layer|attention|variant|source|output|local)=({VALUE})"
)


class Of(nn.Module):
    """A model of these modules and parameters, with a function for its forward."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight))


class Rectified(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Turned(nn.Linear):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_out, n_in, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def three(run: Callable[[Any, Tensor], Any], middle: nn.Module | None = None) -> Of:
    return Of(run, a=nn.Linear(6, 5), b=middle or nn.Linear(5, 5), c=nn.Linear(5, 3))


def below(model: Any, x: Tensor) -> Tensor:
    return torch.tanh(model.a(x))


def functional(m: Any, x: Tensor) -> Any:
    return m.c(torch.func.functional_call(m.b, {"weight": 2 * m.b.weight, "bias": m.b.bias}, (below(m, x),)))


def derivative(m: Any, x: Tensor) -> Any:
    h = below(m, x)
    return m.c(h * torch.autograd.grad(m.b(h).square().sum(), h, create_graph=True)[0])


def matrix() -> Of:
    own = nn.Parameter(torch.randn(5, 5))
    return Of(lambda m, x: m.c(F.linear(below(m, x), m.own)), a=nn.Linear(6, 5), own=own, c=nn.Linear(5, 3))


def generated() -> Of:
    """Parameters that other parameters make: a hypernetwork."""
    hyper = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5))
    parts = {"a": nn.Linear(6, 5), "c": nn.Linear(5, 3), "hyper": hyper, "code": nn.Parameter(torch.randn(2, 4))}
    return Of(lambda m, x: m.c(below(m, x) + m.hyper(m.code).mean(0)), **parts)


def tied(*layers: nn.Linear) -> nn.Sequential:
    layers[1].weight = layers[0].weight
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), layers[0], nn.Tanh(), layers[1], nn.Tanh(), nn.Linear(5, 3))


def tied_part() -> Of:
    def run(m: Any, x: Tensor) -> Any:
        h = torch.tanh(m.below(x))
        return m.c(m.cell(torch.tanh(m.a(h)), h))

    model = Of(run, below=nn.Linear(6, 5), a=nn.Linear(5, 5), cell=nn.RNNCell(5, 5), c=nn.Linear(5, 3))
    model.cell.weight_hh = model.a.weight
    return model


def pruned() -> Of:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    prune.l1_unstructured(attention, "in_proj_weight", 0.3)

    def run(m: Any, x: Tensor) -> Any:
        h = m.a(x)[:, None]
        return m.c(m.attention(h, h, h)[0][:, 0])

    return Of(run, a=nn.Linear(6, 8), attention=attention, c=nn.Linear(8, 3))


def plain(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), *(between or (nn.Tanh(),)), nn.Linear(5, 3))


def with_last(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), layer)


def images() -> nn.Sequential:
    return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], dict[str, Any]]] = {
    "first": (lambda: Of(lambda m, x: m.c(below(m, x)), c=nn.Linear(5, 3), a=nn.Linear(6, 5)), FA, {}),
    "another weight": (partial(three, functional), FA, {}),
    "vmap": (partial(three, lambda m, x: m.c(torch.vmap(m.b)(below(m, x)))), FA, {}),
    "weight alone": (partial(three, lambda m, x: m.c(F.linear(below(m, x), m.b.weight))), FA, {}),
    "derivative": (partial(three, derivative), FA, {}),
    "not affine": (lambda: with_last(Cosine(5, 3)), FA, {}),
    "not affine, wm": (lambda: with_last(Cosine(5, 3)), apical.WeightMirror, {}),
    "turned": (lambda: with_last(Turned(5, 3)), FA, {}),
    "pruned": (pruned, FA, {}),
    "checkpoint": (
        partial(three, lambda m, x: m.c(checkpoint(m.b, below(m, x), use_reentrant=False)), Rectified(5, 5)),
        FA,
        {},
    ),
    "orphan": (matrix, FA, {}),
    "orphan, dfa": (matrix, DFA, {}),
    "generated": (generated, DFA, {}),
    "tied part": (tied_part, KP, {}),
    "tied, closed": (lambda: tied(nn.Linear(5, 5), nn.Linear(5, 5)), KP, {"form": "closed"}),
    "tied, more than affine": (lambda: tied(Rectified(5, 5), Rectified(5, 5)), KP, {}),
    "no activation": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), DFA, {"units": "activation"}),
    "no blocks": (plain, DFA, {"units": "block"}),
    "no head": (
        lambda: Of(lambda m, x: 2 * m.c(below(m, x)), a=nn.Linear(6, 5), c=nn.Linear(5, 3)),
        DFA,
        {"source": "head"},
    ),
    "no attention": (plain, FA, {"attention": "fixed"}),
    "images": (images, partial(apical.DifferenceTargetPropagation, input_shape=(6,)), {}),
    "narrow": (
        lambda: nn.Sequential(nn.Linear(6, 2), nn.Tanh(), nn.Linear(2, 3)),
        apical.LocalClassifiers,
        {"local": "both"},
    ),
}


def train(make: Callable[[], nn.Module], rule: Callable[..., Any], options: dict[str, Any]) -> set[str]:
    """The layers that have moved after a few steps."""
    torch.manual_seed(0)
    made = rule(make(), **options)
    before = {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        made(torch.rand(8, 6), torch.arange(8) % 3).backward()
        optimizer.step()
    after = dict(made.model.named_parameters())
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def advised(message: str) -> list[dict[str, Any]]:
    """Each option that a message names, with the value it names."""
    return [{name: ast.literal_eval(value)} for name, value in OPTION.findall(message)]


def joined(given: dict[str, Any], advice: dict[str, Any]) -> dict[str, Any]:
    """Both, where names in `exact` add up."""
    exact = (*given.get("exact", ()), *advice.get("exact", ()))
    return {**given, **advice, **({"exact": exact} if exact else {})}


@pytest.mark.parametrize("name", CASES)
def test_what_a_refusal_advises_works(name: str) -> None:
    make, rule, options = CASES[name]
    waiting, done = [options], 0
    for depth in range(3):  # one may lead to the next, whose names come beside those from before
        left, waiting = waiting, []
        for given in left:
            try:
                moved = train(make, rule, given)
            except ApicalError as error:
                waiting += [joined(given, own) for own in advised(str(error))] or pytest.fail(f"{error} has no remedy")
            else:
                assert depth > 0, "it was not refused"
                assert {n for n in moved if n.endswith("weight")}, given
                done += 1
    assert done
    assert not waiting, f"{waiting} are refused too"
