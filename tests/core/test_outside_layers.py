"""Weights multiplied outside their layers' calls, and other ways round a layer: seen, and right or refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical.bench.names import RULES
from apical.errors import ApicalError, UnsupportedModelError
from apical.testing.model import CHECKS, check_model

QUICK = sorted(CHECKS.keys() & {"compiled", "autocast", "batch sizes", "determinism"})


@pytest.fixture(autouse=True)
def _double() -> object:
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float)


class Net(nn.Module):
    """Layers a, b, c, a table e, and a forward of the test's."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.e = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 4), nn.Embedding(7, 8)
        self.way = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def batch(tokens: bool = False) -> tuple[Tensor, Tensor]:
    return torch.randint(0, 7, (5,)) if tokens else torch.randn(5, 6), torch.arange(5) % 4


class Tied(nn.Module):
    """Tokens; the table is also the read-out, by a function."""

    def __init__(self, read_out: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.e, self.l, self.read_out = nn.Embedding(7, 8), nn.Linear(8, 8), read_out

    def forward(self, x: Tensor) -> Tensor:
        return self.read_out(torch.tanh(self.l(self.e(x))), self.e.weight)


READ_OUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "matmul": lambda h, w: h @ w.T,
    "scaled": lambda h, w: F.linear(h, w * 8**-0.5),
    "einsum": lambda h, w: torch.einsum("bi,oi->bo", h, w),
}


@pytest.mark.parametrize("read_out", READ_OUTS.values(), ids=READ_OUTS)
@pytest.mark.parametrize("name", ["fa", "usf", "kp", "wm", "pfa"])
def test_an_embedding_that_multiplies_activities_is_refused(name: str, read_out: Any) -> None:
    rule = RULES[name].build(Tied(read_out), loss=F.cross_entropy, **RULES[name].options)
    with pytest.raises(UnsupportedModelError, match="weight of layer 'e' is also used outside"):
        rule(*batch(tokens=True))


@pytest.mark.parametrize("read_out", READ_OUTS.values(), ids=READ_OUTS)
def test_direct_feedback_takes_such_an_embedding_for_a_read_out(read_out: Any) -> None:
    """The layer below learns from B e, and the table by its exact gradient at the top."""
    model, (x, targets) = Tied(read_out), batch(tokens=True)
    rule = apical.DirectFeedbackAlignment(model)
    rule(x, targets)
    (b,) = rule.feedback.buffers()
    model.zero_grad()
    rule(x, targets).backward()
    h = model.e(x).detach()
    r = torch.tanh(model.l(h)).detach()
    logits = model.read_out(r, model.e.weight.detach()).requires_grad_()
    (error,) = torch.autograd.grad(F.cross_entropy(logits, targets), logits)
    delta = (error @ b) * (1 - r**2)
    torch.testing.assert_close(model.l.weight.grad, delta.T @ h, rtol=0, atol=1e-13)
    check_model(rule, x, targets, skip=QUICK)


FORWARDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "own weight again": lambda net, x: net.c(F.linear(net.b(torch.tanh(net.a(x))), net.b.weight.t()) @ net.b.weight.t()),
    "tied autoencoder": lambda net, x: net.c(
        F.linear(torch.tanh(F.linear(net.b(net.a(x)), net.b.weight.t())), net.a.weight.t())
    ),
    "masked": lambda net, x: net.c(F.linear(net.a(x), net.b.weight * (net.b.weight > 0))),
    "einsum": lambda net, x: net.c(torch.einsum("bi,oi->bo", net.a(x), net.b.weight)),
}


@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
def test_direct_feedback_cuts_between_a_weight_outside_and_the_layers(forward: Any) -> None:
    """With all feedback zero nothing learns but what multiplies last."""
    model, (x, targets) = Net(forward), batch()
    rule = apical.DirectFeedbackAlignment(model)
    rule(x, targets)
    for b in rule.feedback.buffers():
        b.zero_()
    rule(x, targets).backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert learning == {"c.weight", "c.bias"}


OTHERWISE: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "functional call": (
        lambda net, x: net.c(
            torch.tanh(torch.func.functional_call(net.b, {"weight": 2 * net.b.weight}, (torch.tanh(net.a(x)),)))
        ),
        "layer 'b' with another weight",
    ),
    "vmap": (lambda net, x: net.c(torch.tanh(torch.vmap(net.b)(torch.tanh(net.a(x))))), "layer 'b' inside a transform"),
}


@pytest.mark.parametrize(("forward", "words"), OTHERWISE.values(), ids=OTHERWISE)
@pytest.mark.parametrize("name", ["fa", "usf", "kp", "wm", "pfa"])
def test_layers_called_otherwise_are_refused(name: str, forward: Any, words: str) -> None:
    rule = RULES[name].build(Net(forward), loss=F.cross_entropy, exact=("e",), **RULES[name].options)
    with pytest.raises(UnsupportedModelError, match=words):
        rule(*batch())


def test_forward_called_by_its_name_is_a_call() -> None:
    model = Net(lambda net, x: net.c.forward(torch.tanh(net.b.forward(torch.tanh(net.a.forward(x))))))
    for make in (apical.FeedbackAlignment, apical.DirectFeedbackAlignment):
        check_model(make(model), *batch(), skip=QUICK)


class Options(nn.Linear):
    """Affine until its flag is set."""

    def __init__(self) -> None:
        super().__init__(8, 6)
        self.saturates = False

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, 1.5 * self.weight, self.bias)
        return torch.tanh(y) if self.saturates else y


@pytest.mark.parametrize("name", ["fa", "usf", "kp", "wm", "pfa"])
def test_a_layer_that_is_affine_no_more_is_refused_at_that_batch(name: str) -> None:
    model = Net(lambda net, x: net.c(torch.tanh(net.b(torch.tanh(net.a(x))))))
    model.b = Options()
    rule = RULES[name].build(model, loss=F.cross_entropy, **RULES[name].options)
    for _ in range(3):
        rule(*batch()).backward()
    model.b.saturates = True
    with pytest.raises(UnsupportedModelError, match=r"layer 'b'.*more than an affine map"):
        rule(*batch())


def test_a_weight_used_outside_later_is_seen_before_long() -> None:
    model = Net(lambda net, x: net.c(torch.tanh(net.b(torch.tanh(net.a(x))))))
    rule = apical.FeedbackAlignment(model)
    for _ in range(3):
        rule(*batch()).backward()
    model.way = lambda net, x: net.c(torch.tanh(net.b(torch.tanh(net.a(x)))) @ net.b.weight @ net.b.weight.T)
    with pytest.raises(UnsupportedModelError, match="used outside"):
        rule(*batch())  # the fourth: it is looked for at the first, second, fourth, eighth ... batch


@pytest.mark.parametrize("name", [name for name in RULES if name != "bp"][::6])
def test_complex_weights_are_refused(name: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8, dtype=torch.cdouble), nn.Tanh(), nn.Linear(8, 4, dtype=torch.cdouble))
    with pytest.raises(ApicalError, match="complex parameters"):
        RULES[name].build(model, loss=F.cross_entropy, **RULES[name].options)


def test_what_a_model_detaches_has_no_credit() -> None:
    model = Net(lambda net, x: net.c(torch.tanh(net.b(torch.tanh(net.a(x)).detach()))))
    rule = apical.DirectFeedbackAlignment(model)
    for _ in range(2):
        rule(*batch()).backward()
    assert model.a.weight.grad is None
    assert bool(model.b.weight.grad.any())
    assert {row.layer: row.path for row in rule.placement(batch()[0])}["a"] == "no credit"


@pytest.mark.parametrize("name", ["pc", "ccl", "local-both", "dfc-ss", "ep"])
def test_a_layer_without_gradients_is_refused_unless_frozen(name: str) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = torch.relu(self.a(x))
            return self.c(torch.relu(self.b(h)))

    entry, model = RULES[name], Half()
    with pytest.raises(UnsupportedModelError, match="module 'a' without gradients"):
        entry.build(model, loss=F.cross_entropy, **entry.options)
    model.a.requires_grad_(False)
    entry.build(model, loss=F.cross_entropy, **entry.options)(*batch()).backward()


@pytest.mark.parametrize("name", ["dfc-ss", "ep", "dtp", "dualprop", "pc", "dfa", "fa"])
@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_spectral_norm_takes_one_power_iteration_a_batch(name: str, norm: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 4))
    rule = RULES[name].build(model, loss=F.cross_entropy, **RULES[name].options)
    rule(*batch()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)  # as a step does
    before = [buffer.clone() for buffer in model.buffers()]
    rule(*batch()).backward()
    after = [buffer.clone() for buffer in model.buffers()]
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
    model(batch()[0])
    for buffer, value in zip(model.buffers(), after, strict=True):
        torch.testing.assert_close(buffer, value, rtol=0, atol=1e-14)
