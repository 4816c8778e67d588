"""Parameters that lie in one storage, as `vector_to_parameters` leaves them; a layer on its own weight; names of layers."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.bench.names import find_rule
from apical.testing import check_model

EDGES = ["fa", "usf", "kp", "pfa", "wm"]
QUICK = ("compiled", "autocast", "lengths", "batch sizes")


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(8, 6, generator=torch.Generator().manual_seed(2)), torch.arange(8) % 4


class Queried(nn.Module):
    """Learned queries are what two layers get; they are square, as the layers' weights are."""

    def __init__(self, queries: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.queries = nn.Parameter(torch.randn(queries, 8))
        self.up, self.keys, self.values = nn.Linear(6, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.up(x).tanh() @ self.keys(self.queries).T
        made: Tensor = self.head(torch.softmax(scores, -1) @ self.values(self.queries))
        return made


def flat(model: nn.Module) -> nn.Module:
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()).detach(), model.parameters())
    assert len({parameter.untyped_storage()._cdata for parameter in model.parameters()}) == 1
    return model


def update(rule: Any) -> dict[str, Tensor]:
    rule.zero_grad()
    rule(*batch()).backward()
    return {name: p.grad.clone() for name, p in rule.model.named_parameters()}


@pytest.mark.parametrize("queries", [8, 5])
@pytest.mark.parametrize("name", [*EDGES, "dfa"])
def test_one_storage_is_as_many(name: str, queries: int) -> None:
    found = []
    for lay in (nn.Module.train, flat):
        torch.manual_seed(1)
        rule = find_rule(name).build(lay(Queried(queries)), exact=("queries",))
        found.append([update(rule) for _ in range(3)])
    for apart, together in zip(*found, strict=True):
        for key, value in apart.items():
            torch.testing.assert_close(together[key], value, msg=key)
    check_model(rule, *batch(), skip=QUICK)


class Reflexive(nn.Module):
    """A layer is given its own weight, beside the batch."""

    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.up, self.own, self.head = way, nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(self.up(x).tanh() + self.own(self.way(self.own.weight)).mean(0))
        return made


WAYS: dict[str, Callable[[Tensor], Tensor]] = {"itself": lambda w: w, "turned": lambda w: w.T, "a part": lambda w: w[:4]}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["fa", "usf"])
def test_a_layer_on_its_own_weight_in_equations(name: str, way: str) -> None:
    """`dW = delta^T W + delta B`: once as a weight, and once as an input, to which the error goes through feedback."""
    model, (x, y) = Reflexive(WAYS[way]), batch()
    rule = find_rule(name).build(model, first_layer=True)
    feedback = rule.feedback_weights()
    found = update(rule)
    given = WAYS[way](model.own.weight).detach()
    output = model.head(model.up(x).tanh() + model.own(given).mean(0))
    e = (torch.softmax(output, 1) - F.one_hot(y, 4)).detach() / len(x)
    delta = (e @ feedback["head"]).sum(0).expand(len(given), -1) / len(given)
    weight = model.own.weight.detach().clone().requires_grad_()
    (as_input,) = torch.autograd.grad(WAYS[way](weight), weight, delta @ feedback["own"])
    torch.testing.assert_close(found["own.weight"], delta.T @ given + as_input)


@pytest.mark.parametrize("name", [*EDGES, "dfa", "local-both", "mono-forward", "ff", "ccl", "csdp", "corinfomax"])
def test_layers_may_have_the_names_of_methods_of_dictionaries(name: str) -> None:
    """`keys` and `values` are what attention's projections are often called."""
    torch.manual_seed(0)
    layers = {"keys": nn.Linear(6, 8), "clear": nn.Hardtanh(0.0, 1.0), "values": nn.Linear(8, 4)}
    model = nn.Sequential()
    for key, layer in layers.items():
        model.add_module(key, layer)
    rule = find_rule(name).build(model)
    assert update(rule)["values.weight"].any()
    rule.load_state_dict(rule.state_dict())
    for key in rule.feedback_weights():
        assert key in layers
