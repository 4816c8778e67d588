"""Models that differentiate on their way forward: through a rule's layer that is no derivative, so it is refused."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical.bench.names import find_rule
from apical.errors import UnsupportedModelError
from apical.testing import check_model

RULES = ["fa", "usf", "kp", "pfa", "wm", "dfa", "tdca", "grapes:fa"]
QUICK = ("compiled", "autocast", "lengths", "batch sizes")


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float)
    torch._dynamo.reset()


class Denoising(nn.Module):
    """A step down an energy of its own layers, or of the inputs alone, before a network."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.energy, self.a, self.b, self.way = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 4), way

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            energy = (leaf**4).sum() if self.way == "inputs" else torch.tanh(self.energy(leaf)).square().sum()
            if self.way == "backward":
                energy.backward(inputs=[leaf])
                slope = leaf.grad
            else:
                slope = torch.autograd.grad(energy, leaf, create_graph=self.way == "graph")[0]
        made: Tensor = self.b(torch.tanh(self.a(x - 0.1 * slope)))
        return made if self.way != "inputs" else made + 0 * self.energy(x).sum(1, keepdim=True)


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(8, 6), torch.arange(8) % 4


def make(name: str, model: nn.Module) -> apical.CreditRule:
    options = {"first_layer": True} if name in ("fa", "usf", "kp", "pfa", "wm") else {}
    return find_rule(name).build(model, **options)


@pytest.mark.parametrize(("way", "compiled"), [("grad", False), ("graph", False), ("backward", False), ("grad", True)])
@pytest.mark.parametrize("name", ["fa", "kp", "dfa", "tdca"])
def test_a_derivative_through_a_layer_is_refused_by_name(name: str, way: str, compiled: bool) -> None:
    """The model would answer something else than alone, with feedback in the place of the layer's weight."""
    rule = make(name, Denoising(way))
    call: Any = torch.compile(rule, backend="aot_eager") if compiled else rule
    with pytest.raises(UnsupportedModelError, match=r"takes a derivative through layer 'energy' in its own forward pass"):
        call(*batch())


@pytest.mark.parametrize("name", RULES)
def test_a_derivative_that_passes_no_layer_is_free(name: str) -> None:
    check_model(make(name, Denoising("inputs")), *batch(), skip=QUICK)


@pytest.mark.parametrize("name", ["fa", "kp", "pfa", "wm"])
def test_an_exact_layer_may_be_differentiated(name: str) -> None:
    model = Denoising("grad")
    rule = find_rule(name).build(model, exact=("energy",), first_layer=True)
    check_model(rule, *batch(), skip=QUICK)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.b(F.relu(self.a(x)))
        return F.linear(F.relu(F.linear(z, self.b.weight.T)), self.a.weight.T)


@pytest.mark.parametrize("name", ["fa", "usf", "kp", "pfa"])
def test_compiled_from_the_first_batch_a_weight_used_outside_is_refused(name: str) -> None:
    """The error of the decoder would pass the encoder's own weight."""
    rule = find_rule(name).build(Tied(), loss=F.mse_loss)
    compiled: Any = torch.compile(rule, backend="aot_eager")
    with pytest.raises(UnsupportedModelError, match=r"layers 'b', 'a' are also used outside the layers, by linear"):
        compiled(torch.rand(8, 6), torch.rand(8, 6))


def test_the_look_at_a_model_leaves_one_whole_graph() -> None:
    """And takes no batch's statistics twice."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    rule = apical.FeedbackAlignment(model)
    torch.compile(rule, backend="aot_eager", fullgraph=True)(*batch()).backward()  # type: ignore[operator]
    assert model[1].num_batches_tracked == 1


def test_a_rule_is_exported() -> None:
    """Where the model runs on tensors without numbers, nobody looks at it."""
    rule, given = apical.FeedbackAlignment(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))), batch()
    exported = torch.export.export(rule, given).module()
    torch.testing.assert_close(exported(*given).loss, F.cross_entropy(rule.model(given[0]), given[1]))
