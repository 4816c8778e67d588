"""What users do to a model beside training it: hooks, transforms, surgery after the rule was made; right, or refused."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import apical
from apical.bench.names import RULES, find_rule
from apical.errors import ApicalError, ConfigError, UnsupportedModelError
from apical.testing import check_model

EDGES = ["fa", "usf", "kp", "pfa", "wm"]
CUTS = ["dfa", "tdca"]
CHAINS = ["dfc-ss", "strong-dfc", "dtp", "ep", "corinfomax", "dualprop", "sibp"]
BLOCKS = ["ccl", "pc", "pc-incremental", "local-both", "ff"]
AROUND = ["grapes:fa", "cwu:dfa"]
EVERY = [*EDGES, *CUTS, *CHAINS, *BLOCKS, *AROUND]
QUICK = ("compiled", "autocast", "lengths", "batch sizes")


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float)


def net(name: str = "fa") -> nn.Sequential:
    torch.manual_seed(0)
    phi: Callable[[], nn.Module] = partial(nn.Hardtanh, 0.0, 1.0) if name.startswith(("corinfomax", "csdp")) else nn.Tanh
    return nn.Sequential(nn.Linear(6, 8), phi(), nn.Linear(8, 8), phi(), nn.Linear(8, 4))


def make(name: str, model: nn.Module | None = None, **options: Any) -> apical.CreditRule:
    torch.manual_seed(1)
    return find_rule(name).build(net(name) if model is None else model, **options)


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(8, 6, generator=torch.Generator().manual_seed(2)), torch.arange(8) % 4


def update(rule: apical.CreditRule, *given: Tensor) -> dict[str, Tensor]:
    """Gradients of one call from fixed random numbers."""
    rule.zero_grad()
    rule.restart()
    torch.manual_seed(3)
    rule(*(given or batch())).backward()
    return {name: p.grad.clone() for name, p in rule.named_parameters() if p.grad is not None}


def require_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-13, msg=name)


def prepared(name: str, model: nn.Module | None = None) -> apical.CreditRule:
    """A rule that has had a batch."""
    rule = make(name, model)
    update(rule)
    return rule


@pytest.mark.parametrize("how", ["backward", "loss"])
@pytest.mark.parametrize("name", [*RULES, *AROUND])
def test_hooks_on_parameters_are_called_once(name: str, how: str) -> None:
    if name == "mupc":
        pytest.skip("takes models of its own")
    updates, calls = [], []
    for hooked in (False, True):
        rule = make(name)
        for parameter in rule.parameters() if hooked else ():
            if parameter.requires_grad and parameter.numel():
                parameter.register_hook(lambda grad: (calls.append(1), 2 * grad)[1])
        torch.manual_seed(3)
        credit = rule(*batch())
        credit.backward() if how == "backward" else credit.loss.backward()
        updates.append({key: p.grad for key, p in rule.named_parameters() if p.grad is not None})
    require_equal(updates[1], {key: 2 * grad for key, grad in updates[0].items()})
    assert len(calls) >= 2


def reversing(module: nn.Module, given: Any, errors: Any) -> Any:
    return (-given[0],)


@pytest.mark.parametrize("name", [*EDGES, *AROUND[:1]])
def test_a_backward_hook_changes_the_error_that_travels_on(name: str) -> None:
    expected, rule = update(prepared(name)), prepared(name)
    rule.model[3].register_full_backward_hook(reversing)  # type: ignore[index,operator]
    hooked = update(rule)
    for key, grad in expected.items():
        below = any(f"model.{place}." in key for place in (0, 2))
        if "feedback" not in key and "plastic" not in key:
            torch.testing.assert_close(hooked[key], -grad if below else grad)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", [*CUTS, *CHAINS, "cwu:dfa"])
def test_backward_hooks_that_nothing_would_call_are_refused(name: str, first: bool) -> None:
    model = net(name)
    rule = None if first else prepared(name, model)
    model[3].register_full_backward_hook(reversing)
    with pytest.raises(UnsupportedModelError, match=r"module '3'.* has a backward hook"):
        update(make(name, model) if rule is None else rule)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", [*CUTS, *CHAINS, *BLOCKS, *AROUND])
@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_transforms_are_refused_in_words(name: str, transform: str) -> None:
    rule = prepared(name)
    rule.restart()
    weights = {key: p.detach().clone() for key, p in rule.named_parameters() if p.numel()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        made: Tensor = torch.func.functional_call(rule, weights, (x, y)).loss
        return made

    mapped = torch.func.vmap(lambda weights, a, b: loss(weights, a[None], b[None]), in_dims=(None, 0, 0))
    with pytest.raises(ConfigError, match=r"transforms of torch.func .*backward\(\)"):
        (torch.func.grad(loss) if transform == "grad" else mapped)(weights, *batch())


@pytest.mark.parametrize("name", EVERY)
def test_forward_mode_derivatives_are_right_or_refused(name: str) -> None:
    rule, (x, y) = prepared(name), batch()
    rule.restart()
    tangent = torch.rand_like(x)
    with forward_ad.dual_level():
        try:
            made = forward_ad.unpack_dual(rule(forward_ad.make_dual(x, tangent), y).loss).tangent
        except ConfigError as error:
            assert name not in EDGES
            assert "forward-mode" in str(error)  # noqa: PT017
            return
    exact = torch.func.jvp(lambda a: F.cross_entropy(rule.model(a), y), (x,), (tangent,))[1]
    torch.testing.assert_close(made, exact)


@pytest.mark.parametrize("name", CUTS)
def test_a_penalty_on_the_output_by_the_inputs_is_refused_in_words(name: str) -> None:
    x, y = batch()
    output = make(name)(x.requires_grad_(), y).output
    with pytest.raises(ConfigError, match=r"a loss made of credit.output"):
        torch.autograd.grad(output.sum(), x, create_graph=True)


@pytest.mark.parametrize("name", [*CUTS, *CHAINS, *BLOCKS])
def test_a_derivative_of_the_output_by_the_weights_is_refused_in_words(name: str) -> None:
    rule = make(name)
    output = rule(*batch()).output
    with pytest.raises(ConfigError, match=r"a loss made of credit.output"):
        torch.autograd.grad(output.sum(), list(rule.model.parameters()), allow_unused=True)


@pytest.mark.parametrize("name", EVERY)
def test_a_rule_keeps_its_model(name: str) -> None:
    rule = make(name)
    with pytest.raises(ConfigError, match="make a new rule"):
        rule.model = nn.Sequential(rule.model)
    rule.model = rule.model


@pytest.mark.parametrize("name", EVERY)
def test_a_loss_that_is_replaced_is_the_loss(name: str) -> None:
    loss = nn.CrossEntropyLoss() if name == "strong-dfc" else Halved()
    rule, expected = prepared(name), make(name, loss=loss)
    rule.loss = loss
    expected.load_state_dict(rule.state_dict())
    assert rule.loss is loss
    if name not in ("wm", "cwu:dfa"):  # these have learned from the first batch
        require_equal(update(rule), update(expected))


class Halved(nn.Module):
    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output, targets) / 2


@pytest.mark.parametrize("name", EVERY)
def test_weights_of_another_shape_are_refused_by_name(name: str) -> None:
    rule = prepared(name)
    head: Any = rule.model[4]  # type: ignore[index]
    head.weight, head.bias = nn.Parameter(torch.rand(5, 8)), nn.Parameter(torch.rand(5))
    with pytest.raises(UnsupportedModelError, match="layer '4' has a weight of another shape"):
        update(rule)


@pytest.mark.parametrize("name", ["kp", "pfa"])
def test_layers_tied_later_are_refused_where_their_feedback_learns(name: str) -> None:
    model = nn.Sequential(*net()[:4], nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    rule = prepared(name, model)
    model[4].weight = model[2].weight
    with pytest.raises(UnsupportedModelError, match="layers '2' and '4' share a weight"):
        update(rule)


@pytest.mark.parametrize("samples", [8, 64])
@pytest.mark.parametrize("form", ["auto", "explicit", "literal", "fused"])
def test_feedback_of_a_frozen_layer_learns_though_nothing_below_does(form: str, samples: int) -> None:
    """`dR = r h^T`, r = B^T delta: with more samples than outputs as with fewer, and at every step."""
    rule: Any = make("pfa", form=form)
    model = rule.model
    for layer in (model[0], model[2]):
        layer.requires_grad_(False)
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.1, weight_decay=0.01)
    x, y = torch.rand(samples, 6), torch.arange(samples) % 4
    for _ in range(3):
        optimizer.zero_grad()
        rule(x, y).backward()
        below = torch.tanh(model[0](x))
        h = torch.tanh(model[2](below))
        errors = (torch.softmax(model[4](h), 1) - F.one_hot(y, 4)) / samples
        delta = (errors @ rule.feedback_weight("4")) * (1 - h**2)
        r = delta @ rule.expansion.get_buffer("2")
        torch.testing.assert_close(rule.plastic["2"].grad, (r.T @ below).detach())
        optimizer.step()


def test_a_model_without_numbers() -> None:
    """Feedback made for it has none either."""
    with torch.device("meta"):
        model = net()
    with pytest.warns(RuntimeWarning, match="meta device.*make the rule once the model has values"):
        apical.FeedbackAlignment(model)


@pytest.mark.filterwarnings("ignore:the model is on the meta device")
def test_weights_without_numbers_cannot_be_mirrored() -> None:
    with torch.device("meta"):
        model = net()
    with pytest.raises(ConfigError, match="meta device"):
        apical.WeightMirror(model)


@pytest.mark.parametrize("name", EVERY)
def test_the_default_device_is_not_the_rules(name: str) -> None:
    """What a rule draws and looks at is on the device of its generator or of the model."""
    elsewhere, model, given = torch.device("meta"), net(name), batch()  # where nothing can be
    with nullcontext() if name == "ccl" else elsewhere:  # whose second network is made there, and moved
        rule = make(name, model)
    with elsewhere:
        mine = update(rule, *given)
    require_equal(mine, update(make(name, net(name))))


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (0.0, 0.5)])
def test_corinfomax_refuses_another_box(bounds: tuple[float, float]) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Hardtanh(*bounds), nn.Linear(8, 4))
    with pytest.raises(UnsupportedModelError, match=r"layer '0'.*range"):
        apical.CorInfoMax(model)


CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], None]]] = {
    "slope": (nn.LeakyReLU, lambda module: setattr(module, "negative_slope", 0.7)),
    "alpha": (nn.ELU, lambda module: setattr(module, "alpha", 0.3)),
    "class": (nn.Tanh, lambda module: setattr(module, "__class__", nn.Sigmoid)),
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("name", [*EDGES, *CUTS, *CHAINS, *BLOCKS, *AROUND])
def test_an_activation_that_changes_is_learned_through_as_it_is(name: str, kind: str) -> None:
    """As by a rule of the changed model; counter-current learning's second network has the same activations."""
    phi, change = CHANGES[kind]

    def model(changed: bool) -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(6, 8), phi(), nn.Linear(8, 8), phi(), nn.Linear(8, 4))
        if changed:
            change(layers[1])
        return layers

    try:
        rule = prepared(name, model(False))
        change(rule.model[1])  # type: ignore[index]
        mine = update(rule)
    except UnsupportedModelError as error:
        assert "'0'" in str(error) or "'1'" in str(error)  # noqa: PT017
        return
    expected = prepared(name, model(True))
    expected.load_state_dict(rule.state_dict())
    require_equal(update(rule) if name == "wm" else mine, update(expected))


class KeywordsAlone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = net()

    def forward(self, *, x: Tensor) -> Tensor:
        made: Tensor = self.layers(x)
        return made


@pytest.mark.parametrize("name", ["bp", *EDGES, *CUTS, *AROUND])
def test_a_forward_that_takes_no_single_argument_is_refused_in_words(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"its forward does not take one argument.*wrap it"):
        check_model(make(name, KeywordsAlone()), *batch())


@dataclass
class Inputs:
    x: Tensor


class OfInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = net()

    def forward(self, inputs: Any) -> Tensor:
        made: Tensor = self.layers(inputs.x if isinstance(inputs, Inputs) else inputs)
        return made


@pytest.mark.parametrize("name", [*EDGES, *CUTS])
def test_inputs_that_are_an_object(name: str) -> None:
    plain, (x, y) = make(name, OfInputs()), batch()
    expected = update(plain)
    rule = make(name, OfInputs())
    torch.manual_seed(3)
    rule(Inputs(x), y).backward()
    require_equal({key: p.grad for key, p in rule.named_parameters() if p.grad is not None}, expected)


class Graph(nn.Module):
    """A network on a graph of eight nodes: no batch may be smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 0]]))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        made: Tensor = self.b(h + torch.zeros_like(h).index_add(0, self.edges[1], h[self.edges[0]]))
        return made


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(9, 8, sparse=True), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        made: Tensor = self.b(torch.tanh(self.a(self.table(tokens))))
        return made


@pytest.mark.parametrize("name", [*EDGES, *CUTS, *AROUND])
def test_graphs_and_sparse_gradients(name: str) -> None:
    x, y = batch()
    check_model(make(name, Graph()), x, y, skip=QUICK)
    check_model(make(name, Sparse()), torch.arange(8) % 9, y, skip=QUICK)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.phi, self.b = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        ragged = torch.nested.nested_tensor([row[: 1 + i % 3] for i, row in enumerate(x)], layout=torch.jagged)
        return torch.stack([part.mean(0) for part in self.b(self.phi(self.a(ragged))).unbind()])


@pytest.mark.parametrize("name", [*EDGES, *CUTS])
def test_nested_tensors_inside(name: str) -> None:
    inputs, targets = torch.rand(8, 3, 6), batch()[1]
    try:
        check_model(make(name, Nested()), inputs, targets, skip=QUICK)
    except ApicalError as error:
        assert name in CUTS
        assert "at 'phi' outputs a nested tensor" in str(error)  # noqa: PT017


@pytest.mark.parametrize("samples", [1, 8])
def test_check_model_of_dual_propagation_on_linear_pieces(samples: int) -> None:
    """There it is backpropagation, as its page says."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Identity(), nn.Linear(8, 4))
    x, y = batch()
    report = check_model(make("dualprop", model), x[:samples], y[:samples], skip=QUICK)
    assert "finite differences" in report.skipped["not backprop"]
