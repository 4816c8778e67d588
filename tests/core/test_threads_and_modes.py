"""What surrounds a model and a rule: threads, inference mode, sparse batches, observers; and what users change later."""

import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical.errors import ConfigError, UnsupportedModelError
from apical.testing import check_model

EDGES_AND_CUTS = [
    apical.FeedbackAlignment,
    apical.SignSymmetry,
    apical.KolenPollack,
    apical.DirectFeedbackAlignment,
    apical.TopDownCreditAssignment,
]
CHAINS = [
    apical.DeepFeedbackControl,
    apical.EquilibriumPropagation,
    apical.DifferenceTargetPropagation,
    apical.DualPropagation,
    apical.SemiImplicit,
    apical.StrongDeepFeedbackControl,
]


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float)


def net(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), activation(), nn.Linear(8, 8), activation(), nn.Linear(8, 4))


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(8, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4


@pytest.mark.parametrize("make", EDGES_AND_CUTS)
def test_threads_take_turns(make: Any) -> None:
    """Two threads that train one model, by two rules of a kind, add up what one of them would."""
    layers = [module for _ in range(8) for module in (nn.Linear(8, 8), nn.Tanh())]
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), *layers, nn.Linear(8, 4))
    batches = [(torch.rand(4, 6), torch.arange(4)) for _ in range(24)]
    rules = [make(model), make(model)]
    for rule in rules:
        rule(*batches[0])  # what is drawn at the first batch is there
        rule.zero_grad()
    for each in (0, 1):
        for inputs, targets in batches[each::2]:
            rules[each](inputs, targets).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    errors: list[Exception] = []

    def work(each: int) -> None:
        try:
            for inputs, targets in batches[each::2]:
                rules[each](inputs, targets).backward()
        except Exception as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(each,)) for each in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    actual = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [*EDGES_AND_CUTS, *CHAINS, apical.Backprop, apical.CounterCurrentLearning])
def test_what_is_made_in_inference_mode_is_refused(make: Any) -> None:
    plain = net()
    with torch.inference_mode():
        model = net()
        with pytest.raises(ConfigError, match=r"inference_mode\(\).* create both outside"):
            make(plain)
    with pytest.raises(ConfigError, match=r"inference_mode\(\).* create both outside"):
        make(model)


@pytest.mark.filterwarnings("ignore:Sparse CS")
@pytest.mark.parametrize("layout", [Tensor.to_sparse, Tensor.to_sparse_csr])
@pytest.mark.parametrize("make", [*EDGES_AND_CUTS, *CHAINS, apical.ForwardForward, apical.CorInfoMax])
def test_sparse_batches_are_learned_from_or_refused_in_words(make: Any, layout: Callable[[Tensor], Tensor]) -> None:
    inputs, targets = batch()
    model = net()
    rule = make(model)
    if make not in EDGES_AND_CUTS:
        with pytest.raises(ConfigError, match=r"inputs are torch.sparse_.*inputs.to_dense\(\)"):
            rule(layout(inputs), targets)
        return
    rule(layout(inputs), targets).backward()
    sparse = [parameter.grad.to_dense().clone() for parameter in model.parameters()]
    rule.zero_grad()
    rule(inputs, targets).backward()
    torch.testing.assert_close(sparse, [parameter.grad for parameter in model.parameters()], rtol=1e-10, atol=1e-12)


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda z: self.b(torch.tanh(self.a(z))))(x)


@pytest.mark.parametrize("make", EDGES_AND_CUTS)
def test_layers_under_vmap_are_refused_by_name(make: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"layer '[ab]' inside a transform of torch.func.* on the batch itself"):
        make(Mapped())(*batch())


class NormFirst(nn.Linear):
    """Normalises its input in its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.layer_norm(x, x.shape[-1:]))


class MappedBetween(nn.Module):
    """One module within `vmap`, between two layers on the batch."""

    def __init__(self, inner: nn.Module, way: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.inner, self.c, self.way = nn.Linear(6, 8), inner, nn.Linear(8, 4), way

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(torch.vmap(partial(self.way, self.inner))(torch.tanh(self.a(x)))))  # type: ignore[no-any-return]


def _called(inner: Any, z: Tensor) -> Tensor:
    return inner(z)  # type: ignore[no-any-return]


def _attended(inner: Any, z: Tensor) -> Tensor:
    rows = z.view(2, 4)
    return inner(rows, rows, rows, need_weights=False)[0].flatten()  # type: ignore[no-any-return]


MAPPED = {
    "layer": (lambda: nn.Linear(8, 8), _called),
    "own forward": (lambda: NormFirst(8, 8), _called),
    "attention": (lambda: nn.MultiheadAttention(4, 2), _attended),
    "cell": (lambda: nn.GRUCell(8, 8), _called),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("inner", MAPPED)
def test_whatever_runs_under_vmap_is_refused_where_an_edge_cannot_be(inner: str, compiled: bool) -> None:
    """Inputs do not tell there that an error comes: it passed the weight itself, compiled at every kind of layer."""
    make, way = MAPPED[inner]
    rule: Any = apical.FeedbackAlignment(MappedBetween(make(), way))  # type: ignore[operator]
    if compiled:
        torch._dynamo.reset()
        rule = torch.compile(rule, backend="eager")
    with pytest.raises(UnsupportedModelError, match=r"layer 'inner' inside a transform of torch\.func"):
        rule(*batch())


@pytest.mark.parametrize("below", [False, True])
def test_the_first_layer_may_run_under_vmap_where_no_error_passes_it(below: bool) -> None:
    """It is the first that was registered; the error of one that is called before it would pass its weight."""
    model: Any = MappedBetween(nn.Linear(8, 8), _called)
    first = model.a
    del model.a
    model.a = first if below else nn.Identity()
    rule = apical.FeedbackAlignment(model)
    inputs, targets = batch()
    if below:
        with pytest.raises(UnsupportedModelError, match="layer 'inner' inside a transform"):
            rule(inputs, targets)
        return
    rule(torch.cat([inputs, inputs[:, :2]], 1), targets).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Observed(nn.Module):
    """An observer whose buffers are empty before its first batch, as those of quantisation-aware training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("least", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            least = x.amin(0)
            self.least.resize_(least.shape).copy_(least)
        return x


@pytest.mark.parametrize("make", [*EDGES_AND_CUTS, apical.Backprop])
def test_buffers_that_grow_are_put_back(make: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 8), Observed(), nn.Tanh(), nn.Linear(8, 4))
    rule = make(model)
    rule.placement(batch()[0])
    assert model[1].least.numel() == 0
    check_model(rule, *batch(), skip=("compiled",))
    assert model[1].least.numel() == 0
    rule(*batch()).backward()
    assert model[1].least.shape == (8,)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("make", CHAINS)
def test_an_activation_of_another_class_is_refused_by_chains(make: Any, in_place: bool) -> None:
    """They take its derivative, and a copy of it that works in place, from what it was."""
    model = net(lambda: nn.ReLU(inplace=in_place))
    rule = make(model)
    rule(*batch())
    model[1].__class__ = nn.Tanh
    with pytest.raises(UnsupportedModelError, match=r"'1' \(Tanh\) was given another forward or class"):
        rule(*batch())


class Twice(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("make", [*EDGES_AND_CUTS[:4], apical.ProductFeedbackAlignment])
def test_a_layer_of_another_class_computes_as_that_and_is_refused_or_trained(make: Any) -> None:
    """The plain model is what its classes say, with a rule attached to it, in evaluation and after it."""
    model, (inputs, targets) = net(nn.Tanh), batch()
    rule = make(model)
    rule(inputs, targets)
    before = model(inputs)
    model[2].__class__ = Twice
    expected = model[4](torch.tanh(2 * model[2].weight @ torch.tanh(model[0](inputs)).T + 2 * model[2].bias[:, None]).T)
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(model(inputs), expected)
    if make is apical.DirectFeedbackAlignment:  # it knows activations, and no layer's way back
        torch.testing.assert_close(rule(inputs, targets).output, expected)
    else:
        with pytest.raises(ConfigError, match=r"layer '2' was given another forward method or class .*make the rule after"):
            rule(inputs, targets)
    again = make(model)
    torch.testing.assert_close(again(inputs, targets).output, expected)
    check_model(again, inputs, targets, skip=("compiled",))
    again.detach()
    torch.testing.assert_close(rule.detach()(inputs), expected)


@pytest.mark.parametrize("alone", [True, False])
def test_a_compiled_rule_hears_the_outputs_that_the_loss_reads(alone: bool) -> None:
    """The error of an output that it does not read is no zero that a matrix would have a row for."""

    class Two(Mapped):
        def forward(self, x: Tensor) -> Any:
            h = torch.tanh(self.a(x))
            return {"read": self.b(h), "other": h.detach().sin() if alone else self.b(h.sin())}

    def gradients(compiled: bool) -> list[Any]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        rule = apical.DirectFeedbackAlignment(Two(), lambda output, targets: F.cross_entropy(output["read"], targets))
        step = torch.compile(rule, backend="aot_eager") if compiled else rule
        step(*batch()).backward()
        return [parameter.grad for parameter in rule.model.parameters()]

    torch.testing.assert_close(gradients(compiled=True), gradients(compiled=False), rtol=1e-12, atol=1e-14)
