"""Activations that work in place, called as statements: units end there for whoever holds the tensor, in any graph."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical.bench.names import find_rule
from apical.core.cut import CutRule
from apical.errors import UnsupportedModelError
from apical.testing import check_model

QUICK = ("compiled", "autocast", "lengths", "batch sizes")


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)
    torch._dynamo.reset()


class Net(nn.Module):
    """Three layers, with functions between them."""

    def __init__(self, *acts: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.relu = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4), nn.ReLU(inplace=True)
        self.acts = acts

    def forward(self, x: Tensor) -> Tensor:
        for layer, act in zip((self.a, self.b), self.acts, strict=True):
            x = layer(x)
            act(x)  # whatever it returns
        made: Tensor = self.c(x)
        return made


class ByModule(Net):
    def __init__(self) -> None:
        super().__init__(self._act, self._act)

    def _act(self, x: Tensor) -> None:
        self.relu(x)


def shifted(x: Tensor) -> None:
    x.add_(1.0).mul_(0.5).tanh_()


def copied(x: Tensor) -> None:
    x.copy_(torch.tanh(x))


WAYS: dict[str, Callable[[], Net]] = {
    "methods": lambda: Net(Tensor.relu_, Tensor.tanh_),
    "after arithmetic": lambda: Net(Tensor.relu_, shifted),
    "functions": lambda: Net(lambda x: F.relu(x, inplace=True), lambda x: F.leaky_relu(x, 0.1, inplace=True)),
    "modules": ByModule,
    "copies": lambda: Net(Tensor.relu_, copied),
}


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(8, 6, generator=torch.Generator().manual_seed(2)), torch.arange(8) % 4


def gradients(rule: Any) -> dict[str, Tensor]:
    rule.zero_grad()
    torch.manual_seed(3)
    rule(*batch()).backward()
    return {name: p.grad.clone() for name, p in rule.named_parameters() if p.grad is not None}


def by_hand(rule: Any) -> dict[str, Tensor]:
    """Direct feedback alignment in equations: `delta_l = (e B_l) * f'(a_l)`, `dW_l = delta_l^T h_{l-1}`."""
    model, (x, y) = rule.model, batch()
    first, second = rule.feedback.buffers()
    below = model.a(x)
    a1 = below.detach().clone().requires_grad_()
    h1 = a1 * 1
    model.acts[0](h1)
    a2 = model.b(h1.detach()).detach().clone().requires_grad_()
    h2 = a2 * 1
    model.acts[1](h2)
    e = (torch.softmax(model.c(h2), 1) - F.one_hot(y, 4)).detach() / len(x)
    d1 = torch.autograd.grad(h1, a1, e @ first)[0]
    d2 = torch.autograd.grad(h2, a2, e @ second)[0]
    weights = {"a": d1.T @ x, "b": d2.T @ h1.detach(), "c": e.T @ h2.detach()}
    return {f"model.{name}.weight": gradient for name, gradient in weights.items()}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_direct_feedback_in_equations(way: str, compiled: bool) -> None:
    """Compiled, too, from the first batch; an error that went on past the cut would be backpropagation's."""
    rule = apical.DirectFeedbackAlignment(WAYS[way]())
    call: Any = torch.compile(rule, backend="aot_eager") if compiled else rule
    torch.manual_seed(3)
    call(*batch()).backward()
    for name, expected in by_hand(rule).items():
        torch.testing.assert_close(rule.get_parameter(name).grad, expected, rtol=1e-10, atol=1e-13, msg=name)


@pytest.mark.parametrize("way", ["after arithmetic", "modules"])
def test_no_error_goes_on_past_a_cut(way: str) -> None:
    rule = apical.TopDownCreditAssignment(WAYS[way]())
    check_model(rule, *batch(), skip=QUICK)
    expected = gradients(rule)
    compiled: Any = torch.compile(rule, backend="aot_eager")
    rule.zero_grad()
    torch.manual_seed(3)
    compiled(*batch()).backward()
    for name, p in rule.named_parameters():
        torch.testing.assert_close(p.grad, expected.get(name), rtol=1e-10, atol=1e-13, msg=name)


class Viewed(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).view(-1, 8)
        x.relu_()
        made: Tensor = self.c(torch.tanh(self.b(x)))
        return made


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", [apical.DirectFeedbackAlignment, apical.TopDownCreditAssignment])
def test_a_view_that_is_changed_and_goes_on_is_refused(kind: Callable[[nn.Module], CutRule], compiled: bool) -> None:
    rule = kind(Viewed())
    call: Any = torch.compile(rule, backend="aot_eager") if compiled else rule
    with pytest.raises(UnsupportedModelError, match=r"at 'F.relu_' works in place on a view"):
        call(*batch())


@pytest.mark.compiles
@pytest.mark.parametrize("act", [torch.relu_, F.leaky_relu_, torch.tanh_])
def test_what_a_compiled_graph_does_not_tell_of_is_refused(act: Callable[[Tensor], Tensor]) -> None:
    """There the layers would become one, whose error is exact."""
    rule = apical.DirectFeedbackAlignment(Net(act, Tensor.sigmoid_))
    gradients(rule)
    compiled: Any = torch.compile(rule, backend="aot_eager")
    with pytest.raises(UnsupportedModelError, match=rf"does not tell of F.{act.__name__}, use modules"):
        compiled(*batch())


class Kept(torch.autograd.Function):
    """A product that keeps its result for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """`x W^T`."""
        result = x @ weight.T
        ctx.save_for_backward(x, weight, result)
        return result

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, Tensor]:
        """`delta W` and `delta^T x`."""
        x, weight, _ = ctx.saved_tensors
        return delta @ weight, delta.T @ x


class ByFunction(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Kept.apply(x, self.weight)  # type: ignore[no-any-return, no-untyped-call]


class Rectifying(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def saturating() -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.register_forward_hook(lambda _, inputs, output: torch.tanh(output))
    return layer


@pytest.mark.parametrize(
    "make", [lambda: ByFunction(8, 8), lambda: Rectifying(8, 8), saturating], ids=["function", "method", "hook"]
)
@pytest.mark.parametrize("name", ["fa", "kp", "grapes:bp", "grapes:fa", "matched:kp"])
def test_a_layers_output_that_is_kept_for_the_backward_pass_is_not_changed(name: str, make: Callable[[], nn.Linear]) -> None:
    """Edges and gains are put on outputs in place, which ended in an error of autograd's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), make(), nn.Tanh(), nn.Linear(8, 4))
    rule = find_rule(name).build(model)
    for _ in range(2):
        rule(torch.randn(5, 6), torch.arange(5) % 4).backward()
    assert model[0].weight.grad is not None
