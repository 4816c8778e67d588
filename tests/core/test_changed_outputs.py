"""Outputs of layers that are changed in place, where they are views; and parameters that no module of the model holds."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.bench.names import find_rule
from apical.errors import UnsupportedModelError
from apical.testing import check_model

QUICK = ("compiled", "autocast", "lengths", "batch sizes")


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(8, 6, generator=torch.Generator().manual_seed(2)), torch.arange(8) % 4


def scaled(h: Tensor) -> Tensor:
    return h * 0.5


def scaled_in_place(h: Tensor) -> Tensor:
    return h.mul_(0.5)


def added(h: Tensor) -> Tensor:
    return torch.cat([h[..., :6] + 1, h[..., 6:]], -1)


def added_in_place(h: Tensor) -> Tensor:
    h[..., :6] += 1
    return h


class Tokens(nn.Module):
    """A layer on tokens, whose output (batch, tokens, units) is a view of a product of two dimensions."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.change, self.up, self.qkv, self.head = change, nn.Linear(6, 16), nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.change(self.qkv(self.up(x).view(len(x), 4, 4).tanh())).chunk(3, -1)
        mixed: Tensor = self.head(F.scaled_dot_product_attention(q, k, v).mean(1))
        return mixed


def update(name: str, model: nn.Module, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    rule = find_rule(name).build(model, **options)
    rule(*batch()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("ways", [(scaled, scaled_in_place), (added, added_in_place)], ids=["scaled", "added"])
@pytest.mark.parametrize("name", ["fa", "kp", "dfa", "tdca", "grapes:fa", "grapes:dfa", "matched:fa", "cwu:fa", "cwu:dfa"])
def test_in_place_is_as_out_of_place(name: str, ways: tuple[Any, Any]) -> None:
    expected, found = (update(name, Tokens(way)) for way in ways)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=key)


@pytest.mark.parametrize("name", ["dfa", "cwu:dfa", "grapes:dfa"])
def test_no_error_leaks_past_what_was_changed(name: str) -> None:
    check_model(find_rule(name).build(Tokens(scaled_in_place)), *batch(), skip=QUICK)


@pytest.mark.parametrize("name", ["fa", "dfa"])
def test_a_derivative_through_what_was_changed_is_refused(name: str) -> None:
    class Energy(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            given = self.up(x).view(len(x), 4, 4).tanh()
            energy = self.qkv(given).mul_(0.5).square().sum()
            (force,) = torch.autograd.grad(energy, given, create_graph=True)
            made: Tensor = self.head((given - force).mean(1))
            return made

    with pytest.raises(UnsupportedModelError, match="'qkv'"):
        update(name, Energy(scaled))


class Hidden(nn.Module):
    """A layer between two others that is in a list of Python's, so that the model does not hold it."""

    def __init__(self, way: Callable[[nn.Linear, Tensor], Tensor], trains: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.way = nn.Linear(6, 8), nn.Linear(8, 4), way
        self.between = [nn.Linear(8, 8).requires_grad_(trains)]

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.last(self.way(self.between[0], self.first(x).tanh()).tanh())
        return made


HELD: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "called": lambda layer, h: layer(h),
    "turned": lambda layer, h: h @ layer.weight.T,
    "masked": lambda layer, h: F.linear(h, layer.weight * (layer.weight.detach() > 0)),
}


@pytest.mark.parametrize("way", HELD)
@pytest.mark.parametrize("name", ["fa", "usf", "kp", "pfa", "wm", "grapes:fa", "cwu:fa"])
def test_layers_that_the_model_does_not_hold_are_refused(name: str, way: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"not among model.parameters\(\).*nn.ModuleList"):
        update(name, Hidden(HELD[way]))


@pytest.mark.parametrize("name", ["fa", "kp"])
def test_both_remedies_work(name: str) -> None:
    check_model(find_rule(name).build(Hidden(HELD["called"], trains=False)), *batch(), skip=QUICK)
    model = Hidden(HELD["called"])
    model.between = nn.ModuleList(model.between)  # type: ignore[assignment]
    check_model(find_rule(name).build(model), *batch(), skip=QUICK)
    check_model(find_rule(name).build(Hidden(lambda layer, h: h * layer.bias)), *batch(), skip=QUICK)  # no product


@pytest.mark.parametrize("name", ["fa", "kp", "pfa", "pfa-o", "wm", "dfa"])
def test_weights_can_be_swapped(name: str) -> None:
    """`torch.utils.swap_tensors` refuses tensors that something holds weakly."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    rule = find_rule(name).build(model)
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        rule(*batch()).backward()
        optimizer.step()
    torch.utils.swap_tensors(model[2].weight, nn.Parameter(torch.ones(8, 8)))
    assert bool((model[2].weight == 1).all())


class Weighed(nn.Module):
    """Reads the weights of attention beside its answer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.attend = nn.Linear(6, 16), nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).view(len(x), 4, 4).tanh()
        answer, weights = self.attend(h[:, :2], h, h)
        made: Tensor = self.head((answer * weights.square().sum(-1, keepdim=True)).mean(1))
        return made


@pytest.mark.parametrize("name", ["fa", "usf", "kp"])
def test_check_model_knows_that_attention_has_two_outputs(name: str) -> None:
    check_model(find_rule(name).build(Weighed()), *batch(), skip=QUICK)


@pytest.mark.parametrize("name", ["dfa", "tdca", "cwu:dfa", "ccl", "dtp", "pc", "ep", "local-both"])
@pytest.mark.filterwarnings("ignore")
def test_an_activation_in_torchscript_is_refused_by_name_where_hooks_are_needed(name: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), torch.jit.script(nn.Tanh()), nn.Linear(8, 4))
    with pytest.raises(UnsupportedModelError, match="'1' is compiled by TorchScript"):
        update(name, model)
    update("fa", model)  # its derivative is exact there
