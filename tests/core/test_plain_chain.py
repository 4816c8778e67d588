"""Plain chains by hand: the same bits as on the general path, which whatever is changed or hooked on a model brings back."""

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any
from weakref import ref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode

import apical
from apical.core.checkpointing import SEES_HOOKS
from apical.core.plain_chain import PlainChain
from apical.errors import ConfigError, UnsupportedModelError

pytestmark = pytest.mark.skipif(not SEES_HOOKS, reason="this PyTorch hides saved-tensor hooks: no pass is made by hand")

RULES: dict[str, Callable[[nn.Module], apical.CreditRule]] = {
    "fa": apical.FeedbackAlignment,
    "usf": apical.SignSymmetry,
    "frsf": partial(apical.SignSymmetry, variant="fixed"),
    "brsf": partial(apical.SignSymmetry, variant="batchwise"),
    "current": partial(apical.SignSymmetry, scale="current"),
    "kp": apical.KolenPollack,
    "kp-explicit": partial(apical.KolenPollack, form="explicit"),
    "pfa": apical.ProductFeedbackAlignment,
    "pfa-o": partial(apical.ProductFeedbackAlignment, feedback="orthogonal"),
    "pfa-literal": partial(apical.ProductFeedbackAlignment, form="literal"),
    "wm": partial(apical.WeightMirror, warmup=5),
    "dfa": apical.DirectFeedbackAlignment,
}
EXPLICIT = {"kp-explicit", "pfa-literal"}

MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "flattened": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)
    ),
    "nested": lambda: nn.Sequential(
        nn.Linear(12, 1, bias=False), nn.Sigmoid(), nn.Sequential(nn.Linear(1, 9), nn.ReLU(inplace=True)), nn.Linear(9, 3)
    ),
    "wide": lambda: nn.Sequential(nn.Linear(12, 70), nn.ReLU(), nn.Linear(70, 80), nn.ReLU(), nn.Linear(80, 3)),
    "one layer": lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 3)),
}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[PlainChain]:
    """The chain of every pass that is made by hand."""
    passes: list[PlainChain] = []
    run = PlainChain.run

    def noted(self: PlainChain, *args: Any, **kwargs: Any) -> Tensor:
        passes.append(self)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(PlainChain, "run", noted)
    return passes


def trained(make: Callable[[nn.Module], apical.CreditRule], model: nn.Module, batch: int, steps: int = 14) -> list[Tensor]:
    """The rule's state after some steps, the last loss, output and gradients."""
    rule = make(model)
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for _ in range(steps):
        inputs, targets = torch.randn(batch, 12, dtype=dtype), torch.randint(3, (batch,))
        optimizer.zero_grad()
        credit = rule(inputs, targets)
        credit.backward()
        optimizer.step()
    state = [value for value in rule.state_dict().values() if isinstance(value, Tensor)]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [*state, *gradients, credit.loss.detach(), credit.output.detach()]


@pytest.mark.parametrize(("batch", "dtype"), [(1, torch.float64), (2, torch.float32), (33, torch.float32)])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", RULES)
def test_the_same_bits_as_on_the_general_path(
    name: str, kind: str, batch: int, dtype: torch.dtype, taken: list[PlainChain], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    by_hand = trained(RULES[name], MODELS[kind]().to(dtype), batch)
    # of fourteen passes the 1st, 2nd, 4th and 8th take the general path; one sample through one neuron always does
    explicit = name in EXPLICIT and kind != "one layer"
    assert bool(taken) is not (explicit or (kind == "nested" and batch == 1))
    monkeypatch.setattr(PlainChain, "parameters", lambda self, rule, inputs: None)
    passes = len(taken)
    torch.manual_seed(0)
    general = trained(RULES[name], MODELS[kind]().to(dtype), batch)
    assert len(taken) == passes
    assert all(torch.equal(a, b) for a, b in zip(by_hand, general, strict=True))


def warm(name: str, taken: list[PlainChain], kind: str = "flattened") -> tuple[apical.CreditRule, Any, Tensor, Tensor]:
    """A rule whose last pass was made by hand, its model in float64, and a batch."""
    torch.manual_seed(1)
    model = MODELS[kind]().double()
    rule = RULES[name](model)
    inputs, targets = torch.randn(6, 12, dtype=torch.float64), torch.randint(3, (6,))
    for _ in range(9):  # the next look at all is at the 16th
        rule(inputs, targets).backward()
    taken.clear()
    rule(inputs, targets)
    assert len(taken) == 1
    taken.clear()
    model.zero_grad()
    return rule, model, inputs, targets


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def is_hidden(name: str) -> bool:
    return name.startswith(("1.", "3."))


@pytest.mark.parametrize("name", ["fa", "usf", "dfa"])
def test_gradients_follow_the_equations(name: str, taken: list[PlainChain]) -> None:
    """`delta_l = (K_{l+1}^T delta_{l+1}) * phi'(a_l)`, or `B_l^T e` in its place; `dW_l = delta_l h_{l-1}^T`."""
    rule, model, x, y = warm(name, taken)
    rule(x, y).backward()
    assert taken
    with torch.no_grad():
        a1 = x @ model[1].weight.T + model[1].bias
        h1 = a1.clamp(min=0)
        a2 = h1 @ model[3].weight.T + model[3].bias
        h2 = a2.tanh()
        e = ((h2 @ model[5].weight.T + model[5].bias).softmax(1) - F.one_hot(y, 3)) / len(x)
        if name == "dfa":
            down2, down1 = (e @ dict(rule.feedback.named_buffers())[unit] for unit in ("4", "2"))
            d2 = down2 * (1 - h2**2)
        else:
            k = rule.feedback_weights()
            d2 = (e @ k["5"]) * (1 - h2**2)
            down1 = d2 @ k["3"]
        d1 = down1 * (a1 > 0)
    for layer, delta, h in ((1, d1, x), (3, d2, h1), (5, e, h2)):
        assert torch.allclose(model[layer].weight.grad, delta.T @ h, rtol=0, atol=1e-14)
        assert torch.allclose(model[layer].bias.grad, delta.sum(0), rtol=0, atol=1e-14)


class Same(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class Doubled(nn.Linear):
    def forward(self, h: Tensor) -> Tensor:
        return 2 * super().forward(h)


@contextmanager
def hooked_everywhere() -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        yield
    finally:
        handle.remove()


def changes(model: Any) -> dict[str, Callable[[], Any]]:
    """What users do to a model or around a step, none of which a pass by hand may miss."""

    def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return 2 * output

    return {
        "forward hook": lambda: model[3].register_forward_hook(doubled),
        "pre-hook": lambda: model[3].register_forward_pre_hook(lambda module, args: (2 * args[0],)),
        "hook on an activation": lambda: model[2].register_forward_hook(doubled),
        "hook on the model": lambda: model.register_forward_hook(doubled),
        "backward hook": lambda: model.register_full_backward_hook(lambda module, into, out: None),
        "forward of an activation": lambda: setattr(model[2], "forward", lambda v: v.clamp(min=0) * 2),
        "another activation": lambda: model.__setitem__(2, nn.ELU()),
        "class of an activation": lambda: setattr(model[4], "__class__", nn.Softsign),
        "hooks put in at once": lambda: setattr(model[3], "_forward_hooks", {7: doubled}),
        "frozen": lambda: model[3].weight.requires_grad_(False),
        "frozen bias": lambda: model[1].bias.requires_grad_(False),
        "flatten": lambda: setattr(model[0], "end_dim", 1),
    }


@pytest.mark.parametrize("change", changes(None))
@pytest.mark.parametrize("name", ["fa", "usf", "dfa"])
def test_what_is_changed_on_a_model_is_not_missed(name: str, change: str, taken: list[PlainChain]) -> None:
    rule, model, x, y = warm(name, taken)
    changes(model)[change]()
    try:
        loss = rule(x, y).loss
    except (ConfigError, UnsupportedModelError):
        return  # named by the general path
    assert not taken
    assert torch.equal(loss.detach(), F.cross_entropy(model(x), y).detach())


@pytest.mark.parametrize("name", ["fa", "dfa"])
def test_layers_that_compute_otherwise_are_not_missed(name: str, taken: list[PlainChain]) -> None:
    for change in (
        lambda layer: parametrize.register_parametrization(layer, "weight", Halved()),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: setattr(layer, "__class__", Doubled),
        lambda layer: setattr(layer, "forward", lambda h: F.linear(h, 2 * layer.weight, layer.bias)),
    ):
        rule, model, x, y = warm(name, taken)
        change(model[3])
        try:
            loss = rule(x, y).loss
        except (ConfigError, UnsupportedModelError):
            continue
        assert not taken
        assert torch.equal(loss.detach(), F.cross_entropy(model(x), y).detach())


@pytest.mark.parametrize("name", ["fa", "dfa"])
@pytest.mark.parametrize(
    "around",
    [
        hooked_everywhere,
        Same,
        lambda: torch.autograd.graph.save_on_cpu(),
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        torch.no_grad,
    ],
)
def test_contexts_are_not_missed(name: str, around: Callable[[], Any], taken: list[PlainChain]) -> None:
    rule, model, x, y = warm(name, taken)
    model.float()
    rule.float()
    with around():
        rule(x.float(), y)
        assert not taken
    rule(x.float(), y)
    assert len(taken) == 1


def test_inputs_that_ask_for_more_take_the_general_path(taken: list[PlainChain]) -> None:
    rule, _, x, y = warm("fa", taken)
    asking = x.clone().requires_grad_()
    with pytest.raises(UnsupportedModelError, match="first_layer"):
        rule(asking, y)
    subclass = x.as_subclass(type("Named", (Tensor,), {}))
    assert torch.equal(rule(subclass, y).loss.detach().as_subclass(Tensor), rule(x, y).loss.detach())
    assert len(taken) == 1
    rule, _, x, y = warm("dfa", taken)
    rule(x.clone().requires_grad_(), y)
    assert not taken


@pytest.mark.parametrize("name", ["fa", "usf"])
def test_weights_that_move_before_the_backward_pass_are_refused(name: str, taken: list[PlainChain]) -> None:
    rule, model, x, y = warm(name, taken)
    for tensor in (model[3].weight, x):
        credit = rule(x, y)
        assert taken
        with torch.no_grad():
            tensor.mul_(2)
        with pytest.raises(RuntimeError, match="modified in place"):
            credit.backward()


@pytest.mark.parametrize("name", ["fa", "dfa"])
def test_graphs_are_kept_on_demand_alone(name: str, taken: list[PlainChain]) -> None:
    rule, model, x, y = warm(name, taken)
    rule(x, y).backward()
    once = gradients(model)
    model.zero_grad()
    credit = rule(x, y)
    credit.backward(retain_graph=True)
    credit.backward()
    assert all(torch.equal(g, 2 * once[n]) for n, g in gradients(model).items())
    with pytest.raises(RuntimeError, match="second time"):
        credit.backward()
    assert len(taken) == 2


@pytest.mark.parametrize("name", ["fa", "dfa"])
def test_some_gradients_alone(name: str, taken: list[PlainChain]) -> None:
    rule, model, x, y = warm(name, taken)
    rule(x, y).backward()
    whole = gradients(model)
    names = ["5.bias", "3.weight", "1.bias"]
    wanted = [model.get_parameter(n) for n in names]
    for count in (1, 2, 3):
        some = torch.autograd.grad(rule(x, y).loss, wanted[:count])
        assert all(torch.equal(g, whole[n]) for n, g in zip(names, some, strict=False))
    assert len(taken) == 4
    scaled = torch.autograd.grad(3 * rule(x, y).loss + wanted[0].sum(), wanted)
    assert torch.allclose(scaled[0], 3 * whole[names[0]] + 1)
    assert torch.allclose(scaled[2], 3 * whole[names[2]])
    with pytest.raises(ConfigError, match="create_graph"):
        torch.autograd.grad(rule(x, y).loss, wanted, create_graph=True)


@pytest.mark.parametrize("name", ["fa", "dfa"])
def test_copies_go_by_hand_on_their_own_model(name: str, taken: list[PlainChain]) -> None:
    rule, model, x, y = warm(name, taken)
    for copied in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        taken.clear()
        with torch.no_grad():
            copied.model[1].weight.mul_(2)
        for _ in range(5):
            copied.zero_grad()
            copied(x, y).backward()
        assert taken
        assert torch.equal(copied(x, y).loss.detach(), F.cross_entropy(copied.model(x), y).detach())
        assert model[1].weight.grad is None


@pytest.mark.parametrize("name", ["fa", "dfa"])
def test_losses_are_looked_at(name: str, taken: list[PlainChain]) -> None:
    rule, model, x, y = warm(name, taken)
    with pytest.raises(ConfigError, match="the loss does not take outputs"):
        rule(x, torch.randint(3, (5,)))
    with pytest.warns(RuntimeWarning, match="NaN"):
        rule(x * float("nan"), y)
    taken.clear()
    rule.loss = lambda output, targets: output.detach().sum() + targets.sum() * model[1].weight.sum()
    if name == "dfa":
        with pytest.raises(ConfigError, match="does not depend on the output"):
            rule(x, y)
    rule.loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    loss = rule(x, y).loss
    assert not taken or name == "fa"  # a loss not met before; the edges' pass comes before it
    assert torch.equal(loss.detach(), F.cross_entropy(model(x), y, label_smoothing=0.1).detach())


def test_a_detached_rule_is_refused(taken: list[PlainChain]) -> None:
    for name in ("fa", "dfa"):
        rule, _, x, y = warm(name, taken)
        rule.detach()
        with pytest.raises(ConfigError, match="detached"):
            rule(x, y)


def test_hooks_of_another_rule_keep_the_general_path(taken: list[PlainChain]) -> None:
    """Which has nothing to do with them: the hooks of a rule act during its own calls."""
    rule, model, x, y = warm("fa", taken)
    rule(x, y).backward()
    alone = gradients(model)
    other = apical.DirectFeedbackAlignment(model)
    other(x, y)
    model.zero_grad()
    taken.clear()
    rule(x, y).backward()
    assert not taken
    assert all(torch.equal(g, alone[n]) for n, g in gradients(model).items())


@pytest.mark.parametrize("name", ["fa", "dfa"])
def test_functions_in_the_place_of_pytorchs_are_not_missed(
    name: str, taken: list[PlainChain], monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, model, x, y = warm(name, taken)
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda h, weight, bias=None: linear(h.round(), weight, bias))
    loss = rule(x, y).loss
    assert not taken
    assert torch.equal(loss.detach(), F.cross_entropy(model(x), y).detach())


@pytest.mark.parametrize("name", ["fa", "dfa"])
def test_hooks_that_are_gone_by_now_stand_in_no_way(name: str, taken: list[PlainChain]) -> None:
    """The trainer counts operations of its first batches by hooks."""
    model = MODELS["flattened"]()
    rule, x, y = RULES[name](model), torch.randn(4, 12), torch.randint(3, (4,))
    hooks = [module.register_forward_hook(lambda *_: None) for module in model]
    for _ in range(5):
        rule(x, y)
    assert not taken
    for hook in hooks:
        hook.remove()
    for _ in range(5):
        rule(x, y)
    assert taken


def test_the_control_without_signals_is_not_missed(taken: list[PlainChain]) -> None:
    rule, _, x, y = warm("dfa", taken)
    rule.silent = True
    rule(x, y)
    assert not taken


class OwnWay(apical.FeedbackAlignment):
    """Sends no error down."""

    def call_layer(self, site: Any, *args: Any, **kwargs: Any) -> Any:
        return super().call_layer(site, *(a.detach() for a in args), **kwargs)


class OwnFeedback(apical.SignSymmetry):
    """Thrice the weights."""

    def feedback_of(self, name: str) -> Any:
        return (lambda shape, weight: 3 * weight), (self.layers[name].weight.detach(),)


class OwnError(apical.DirectFeedbackAlignment):
    """Units hear the error twice as loud."""

    def signal(self, cut: Any, errors: Tensor) -> Tensor:
        return super().signal(cut, 2 * errors)


class OwnInputs(apical.DirectFeedbackAlignment):
    """Hears inputs of its own."""

    def run(self, inputs: Tensor) -> Any:
        return super().run(inputs + 1)


@pytest.mark.parametrize("kind", [OwnWay, OwnFeedback, OwnError, OwnInputs])
def test_rules_with_a_way_of_their_own_take_it(kind: type[apical.CreditRule], taken: list[PlainChain]) -> None:
    """Whatever a class of the user's overrides acts in the seventh batch as in the first."""
    torch.manual_seed(0)
    model = MODELS["flattened"]()
    rule, x, y = kind(model), torch.randn(4, 12), torch.randint(3, (4,))
    steps = []
    for _ in range(7):
        model.zero_grad()
        rule(x, y).backward()
        steps.append(gradients(model))
    assert not taken
    assert all(torch.equal(g, steps[0][n]) for step in steps for n, g in step.items())
    if kind is OwnWay:
        assert not any(bool(g.any()) for n, g in steps[0].items() if is_hidden(n))


@pytest.mark.parametrize(("name", "method"), [("usf", "feedback_of"), ("fa", "feedback_of"), ("dfa", "signal")])
def test_methods_that_are_replaced_on_a_rule_are_not_missed(name: str, method: str, taken: list[PlainChain]) -> None:
    rule, _, x, y = warm(name, taken)
    setattr(rule, method, getattr(rule, method))
    rule(x, y)
    assert not taken


@pytest.mark.parametrize("when", ["before", "while it trains"])
@pytest.mark.parametrize(("name", "method"), [("usf", "feedback_of"), ("fa", "feedback_of"), ("dfa", "signal")])
def test_methods_that_are_replaced_on_a_class_are_not_missed(
    name: str, method: str, when: str, taken: list[PlainChain], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = RULES[name]
    kind = next(k for k in (make.func if isinstance(make, partial) else make).__mro__ if method in k.__dict__)
    original, calls = getattr(kind, method), []

    @wraps(original)
    def counted(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    rule, _, x, y = warm(name, taken)
    with monkeypatch.context() as patch:
        patch.setattr(kind, method, counted)
        if when == "before":
            rule = make(MODELS["flattened"]().double())
            for _ in range(7):
                rule(x, y).backward()
        calls.clear()
        rule(x, y).backward()
        assert calls
        assert not taken
    if when != "before":
        for _ in range(2):  # one of them may be due for a look
            rule(x, y)
        assert taken


@pytest.mark.parametrize("name", ["fa", "dfa"])
def test_activities_are_let_go_of_in_the_backward_pass(name: str, taken: list[PlainChain]) -> None:
    rule, _, x, y = warm(name, taken)
    credit = rule(x, y)
    node = credit.loss.grad_fn
    while not hasattr(node, "inputs"):
        node = node.next_functions[0][0]
    hidden = [ref(h) for h in node.inputs[1:]]
    assert all(h() is not None for h in hidden)
    credit.backward()
    gc.collect()
    assert taken
    assert all(h() is None for h in hidden)


def test_weights_under_functional_call(taken: list[PlainChain]) -> None:
    rule, model, x, y = warm("dfa", taken)
    others = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    loss = torch.func.functional_call(rule, {f"model.{n}": p for n, p in others.items()}, (x, y)).loss
    assert not taken
    expected = F.cross_entropy(torch.func.functional_call(model, others, (x,)), y)
    assert torch.equal(loss.detach(), expected.detach())
