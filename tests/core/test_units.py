"""Every way a model can be refused, and that following the message's remedy makes it accepted and trained."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import apical
from apical.core.units import key, weighted_layers
from apical.errors import UnsupportedModelError
from apical.rules.node_importance import NodeImportance
from apical.testing import check_model


def net(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), *middle, nn.Linear(6, 4))


def refused(model: nn.Module, *words: str, exact: tuple[str, ...] = ()) -> str:
    keys, hooks = list(model.state_dict()), [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(UnsupportedModelError) as caught:
        weighted_layers(model, exact)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"
    assert list(model.state_dict()) == keys  # refused before anything is changed
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return str(caught.value)


def trains(model: nn.Module, exact: tuple[str, ...] = (), inputs: Tensor | None = None) -> None:
    rule = apical.FeedbackAlignment(model, exact=exact)
    rule(torch.randn(8, 6) if inputs is None else inputs, torch.arange(8) % 4).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_layers_of_every_kind_are_found_in_registration_order() -> None:
    parts = {
        "linear": nn.Linear(2, 2),
        "norm": nn.BatchNorm2d(2),
        "conv1": nn.Conv1d(2, 2, 1),
        "act": nn.PReLU(),
        "conv2": nn.Conv2d(2, 2, 1),
        "conv3": nn.Conv3d(2, 2, 1),
        "ln": nn.LayerNorm(2),
        "up1": nn.ConvTranspose1d(2, 2, 1),
        "up2": nn.ConvTranspose2d(2, 2, 1),
        "up3": nn.ConvTranspose3d(2, 2, 1),
        "table": nn.Embedding(3, 2),
    }
    layers = weighted_layers(nn.ModuleDict(parts))
    assert list(layers) == ["linear", "conv1", "conv2", "conv3", "up1", "up2", "up3"]
    assert all(layers[name] is parts[name] for name in layers)


LOCAL = [nn.BatchNorm1d(6), nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.RMSNorm(6), nn.PReLU()]


@pytest.mark.parametrize("module", LOCAL, ids=lambda module: type(module).__name__)
def test_scales_and_slopes_are_accepted_and_trained(module: nn.Module) -> None:
    torch.manual_seed(0)
    trains(net(nn.Linear(6, 6), module))


def test_embedding_before_the_first_layer_is_trained_through_that_layers_feedback() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    inputs, targets = torch.randint(0, 9, (32, 2)), torch.arange(32) % 4
    rule = apical.FeedbackAlignment(model)
    assert list(rule.layers) == ["2", "4"]
    rule(inputs, targets).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


class Tied(nn.Module):
    """Auto-encoder-like: the second layer carries the first layer's weight tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.up.weight = self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.up(F.relu(self.down(x)))))


def test_tied_parameter() -> None:
    torch.manual_seed(0)
    model = Tied()
    refused(model, "'up.weight'", "'down.weight'", "copy")
    model.up.weight = nn.Parameter(model.up.weight.detach().clone())
    trains(model)


def test_tied_parameter_may_be_declared_exact() -> None:
    assert list(weighted_layers(Tied(), ("up.weight",))) == ["down", "up", "head"]
    refused(Tied(), "'up.weight'", exact=("head.weight",))


def test_tied_embedding_and_head() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    model["head"].weight = model["table"].weight
    refused(model, "'head.weight'", "'table.weight'", "copy")


def test_shared_module() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    refused(net(shared, nn.ReLU(), shared), "'2'", "'4'", "its own module")
    trains(net(shared, nn.ReLU(), nn.Linear(6, 6)))


def test_shared_container() -> None:
    block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    message = refused(net(block, block), "its own module")
    assert "'2'" in message
    assert "'3'" in message


def test_shared_module_without_parameters_is_no_problem() -> None:
    torch.manual_seed(0)
    relu = nn.ReLU()
    trains(nn.Sequential(nn.Linear(6, 6), relu, nn.Linear(6, 6), relu, nn.Linear(6, 4)))


class Orphan(nn.Module):
    """A scale that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 4)
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gain * F.relu(self.first(x)))


def test_orphan_parameter() -> None:
    torch.manual_seed(0)
    refused(Orphan(), "'gain'", "Orphan", "exact=('gain',)")
    trains(Orphan(), exact=("gain",))


def test_orphan_parameter_deeper_down() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Sequential(nn.Identity(), Orphan()))
    refused(model, "'2.1.gain'", "exact=('2.1.gain',)")
    trains(model, exact=("2.1.gain",))


class Recurrent(nn.Module):
    """(batch, 6) -> (batch, 6) through a recurrent layer."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x.unsqueeze(1))[0].squeeze(1)


class Attention(nn.Module):
    """(batch, 6) -> (batch, 6) through self-attention over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Pair(nn.Module):
    """(batch, 6) -> (batch, 6) through a bilinear form of the input with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Bilinear(6, 6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, x)


UNKNOWN = {
    "2.cell": (lambda: Recurrent(nn.LSTM(6, 6, batch_first=True)), "LSTM"),
    "2.cell ": (lambda: Recurrent(nn.GRU(6, 6, batch_first=True)), "GRU"),
    "2.attention": (Attention, "MultiheadAttention"),
    "2.form": (Pair, "Bilinear"),
}


@pytest.mark.parametrize("where", UNKNOWN)
def test_unknown_layer(where: str) -> None:
    torch.manual_seed(0)
    make, kind = UNKNOWN[where]
    name = where.strip()
    refused(net(make()), repr(name), kind, f"exact=({name!r},)")
    model = net(make())
    rule = apical.FeedbackAlignment(model, exact=(name,))
    rule(torch.randn(8, 6), torch.arange(8) % 4).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert list(rule.layers) == ["3"]  # the layer of known kind above; nothing inside the exact module


class Scaled(nn.Module):
    """A parametrisation with a parameter and a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.hyper = nn.Linear(6, 6)

    def forward(self, weight: Tensor) -> Tensor:
        return self.gain * self.hyper(weight)


def pruned(layer: nn.Linear) -> nn.Linear:
    return prune.random_unstructured(layer, "weight", 0.5)


WEIGHTS = {
    "new weight norm": nn.utils.parametrizations.weight_norm,
    "new spectral norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "parametrisation with parameters": lambda layer: parametrize.register_parametrization(layer, "weight", Scaled()),
    "parametrised bias": lambda layer: parametrize.register_parametrization(layer, "bias", nn.Tanh()),
    "old weight norm": nn.utils.weight_norm,
    "old spectral norm": nn.utils.spectral_norm,
    "prune": pruned,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_parameters_behind_a_computed_weight_belong_to_the_layer(kind: str, shared: bool) -> None:
    model = net(WEIGHTS[kind](nn.Linear(6, 6)), nn.ReLU())
    assert list(weighted_layers(model, shared=shared)) == ["0", "2", "4"]
    assert weighted_layers(model, shared=shared)["2"] is model[2]


class Quantised(nn.Linear):
    """A layer with a module of its own that has a parameter."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.step = Orphan().to_empty(device="cpu")


def test_modules_within_a_layer_belong_to_it_but_layers_within_it_are_layers() -> None:
    assert list(weighted_layers(net(Quantised()))) == ["0", "2", "2.step.first", "2.step.last", "3"]


def test_parametrised_norm() -> None:
    norm = parametrize.register_parametrization(nn.LayerNorm(6), "weight", nn.Softplus())
    assert list(weighted_layers(net(norm))) == ["0", "3"]


def test_every_offender_is_named_at_once() -> None:
    model = nn.ModuleDict({"a": Orphan(), "b": Orphan(), "c": Recurrent(nn.LSTM(6, 6)), "d": Pair()})
    model["a"].offset = nn.Parameter(torch.zeros(6))
    model["e"], model["f"] = Tied(), Tied()
    model["again"] = model["e"]
    model["last"] = model["d"].form
    message = refused(
        model,
        "module 'again' is the same object as module 'e'",
        "module 'last' is the same object as module 'd.form'",
        "parameter 'e.up.weight' is shared with 'e.down.weight', parameter 'f.up.weight' is shared with 'f.down.weight'",
        "module 'c.cell' (LSTM) applies several weights in one call",
        "layer 'd.form' (Bilinear) is not supported",
        "parameters 'a.gain', 'a.offset', 'b.gain' are orphans: they belong directly to Orphan and to no layer; move them",
        "or pass exact=('c.cell', 'd.form', 'a.gain', 'a.offset', 'b.gain') to give them their exact derivative",
    )
    assert "again.down" not in message  # the outermost module says it all
    model = nn.ModuleDict({"a": model["a"], "b": model["b"], "c": model["c"], "d": model["d"]})
    assert len(weighted_layers(model, ("c.cell", "d.form", "a.gain", "a.offset", "b.gain"))) == 4


def test_unknown_names_in_exact_are_all_named() -> None:
    refused(net(), "'nowhere', 'nor.here'", exact=("nowhere", "0", "nor.here"))


@pytest.mark.parametrize("make", [Orphan, lambda: net(Pair())])
def test_rules_without_the_option_do_not_advise_it(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        weighted_layers(make(), None)
    assert "exact" not in str(caught.value)


def test_shared_modules_count_once_under_their_first_name() -> None:
    layer, block = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    model = net(layer, nn.ReLU(), layer, block, block)
    assert list(weighted_layers(model, shared=True)) == ["0", "2", "5.0", "7"]


def test_shared_parameters_are_allowed_between_layers_alone() -> None:
    assert list(weighted_layers(Tied(), shared=True)) == ["down", "up", "head"]
    model = nn.ModuleDict({"table": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    model["head"].weight = model["table"].weight
    assert list(weighted_layers(model, shared=True)) == ["head"]
    orphan = Orphan()
    orphan.gain = orphan.first.weight  # a function of the model's own may use it, which no rule would see
    with pytest.raises(UnsupportedModelError, match="'gain' is an orphan"):
        weighted_layers(orphan, shared=True)


def test_either_name_of_a_shared_module_may_be_exact() -> None:
    pair = Pair()
    for name in ("2", "3", "3.form"):
        assert list(weighted_layers(net(pair, pair), (name,), shared=True)) == ["0", "4"]


@pytest.mark.parametrize("lazy", [nn.LazyLinear(6), nn.LazyBatchNorm1d()], ids=lambda module: type(module).__name__)
def test_lazy_layer(lazy: nn.Module) -> None:
    torch.manual_seed(0)
    model = net(nn.Linear(6, 6), lazy, nn.Tanh())
    for rule in (apical.Backprop, apical.CounterCurrentLearning, partial(apical.FeedbackAlignment, exact=("3",))):
        with pytest.raises(UnsupportedModelError, match=r"'3' is lazy.*one batch"):
            rule(model)
    model(torch.randn(8, 6))
    trains(model)


def test_unknown_name_in_exact() -> None:
    refused(net(), "'nowhere'", "no such", exact=("nowhere",))


@pytest.mark.parametrize("model", [nn.Sequential(), nn.ReLU(), nn.Sequential(nn.BatchNorm1d(6), nn.ReLU())])
def test_no_layer(model: nn.Module) -> None:
    refused(model, type(model).__name__, "no Linear or convolution layer")


def test_everything_exact_leaves_no_layer() -> None:
    refused(net(), "no Linear or convolution layer", exact=("0", "2"))


def test_exact_covers_a_subtree_but_not_a_name_that_begins_alike() -> None:
    model = nn.ModuleDict({"block": nn.Sequential(nn.Linear(2, 2)), "block2": nn.Linear(2, 2), "blocks": nn.Linear(2, 2)})
    assert list(weighted_layers(model, ("block",))) == ["block2", "blocks"]


def test_exact_as_parameter_name_does_not_excuse_another_parameter() -> None:
    model = Orphan()
    model.offset = nn.Parameter(torch.zeros(6))
    refused(model, "'offset'", exact=("gain",))


def test_root_layer() -> None:
    model = nn.Linear(2, 3)
    assert list(weighted_layers(model)) == [""]
    assert weighted_layers(model)[""] is model


def test_keys_are_legal_and_distinct() -> None:
    holder = nn.Module()
    for name in ("", "a", "a.b", "a.b.c", "ab"):
        holder.register_buffer(key(name), torch.zeros(1))
    assert len(dict(holder.named_buffers())) == 5


def replace_layer(model: nn.Sequential) -> None:
    model[1][0] = nn.Linear(6, 6)


def replace_block(model: nn.Sequential) -> None:
    model[1] = nn.Sequential(nn.Linear(6, 6), nn.Tanh())


def append_layer(model: nn.Sequential) -> None:
    model.append(nn.Linear(4, 4))


def take_layer_out(model: nn.Sequential) -> None:
    model[1] = nn.Tanh()


ANYBODY: dict[str, Callable[[nn.Module], apical.CreditRule]] = {
    "fa": apical.FeedbackAlignment,
    "wm": apical.WeightMirror,
    "kp": apical.KolenPollack,
    "pfa": lambda model: apical.ProductFeedbackAlignment(model, form="literal"),
    "dfa": apical.DirectFeedbackAlignment,
    "tdca": apical.TopDownCreditAssignment,
    "grapes": lambda model: apical.Modulated(apical.Backprop(model), NodeImportance()),
    "solved": lambda model: apical.LocalSolve(apical.Backprop(model)),
    "dfc": apical.DeepFeedbackControl,
    "pc": apical.PredictiveCoding,
    "ccl": apical.CounterCurrentLearning,
}


def made(name: str) -> apical.CreditRule:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    rule = ANYBODY[name](nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), block, nn.Linear(6, 4)))
    rule(torch.randn(8, 6), torch.arange(8) % 4).backward()
    return rule


@pytest.mark.parametrize("change", [replace_layer, replace_block, append_layer, take_layer_out])
@pytest.mark.parametrize("name", ANYBODY)
def test_layers_that_are_others_than_the_rule_found_are_refused(name: str, change: Callable[[nn.Sequential], None]) -> None:
    """Backpropagation would train them, and hand its error on."""
    rule = made(name)
    change(rule.model)
    with pytest.raises(UnsupportedModelError, match=r"removed from|another function"):
        rule(torch.randn(8, 6), torch.arange(8) % 4)


@pytest.mark.parametrize(("name", "whole"), [("fa", False), ("dfa", True), ("dfc", True), ("ccl", True)])
def test_compiled_rules_refuse_them_too(name: str, whole: bool) -> None:
    """The graph would go on with the layer that is gone. One that may break shows the error itself, which takes seconds."""
    rule, inputs, targets = made(name), torch.randn(8, 6), torch.arange(8) % 4
    torch._dynamo.reset()
    compiled = torch.compile(rule, backend="eager", fullgraph=whole)
    compiled(inputs, targets).backward()
    replace_layer(rule.model)
    with pytest.raises(torch._dynamo.exc.Unsupported if whole else UnsupportedModelError, match="removed from"):
        compiled(inputs, targets)


@pytest.mark.parametrize("name", ["fa", "kp", "pfa", "grapes"])
def test_other_modules_may_come_and_go(name: str) -> None:
    rule, inputs, targets = made(name), torch.randn(8, 6), torch.arange(8) % 4
    rule.model[1][1] = nn.ReLU()
    rule.model.append(nn.Dropout(0.0))
    parametrize.register_parametrization(rule.model[1][0], "weight", nn.Identity())
    rule(inputs, targets).backward()
    copy.deepcopy(rule)(inputs, targets).backward()


class OwnLinear(nn.Module):
    """A dense layer that is no nn.Linear, as torch_geometric's; `kind` is what it does otherwise."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))
        self.kind = kind

    def forward(self, h: Tensor) -> Tensor:
        weight = self.weight.T if self.kind == "turned" else self.weight.tril() if self.kind == "masked" else self.weight
        h = torch.dropout(h, 0.5, self.training) if self.kind == "dropout" else h
        h = h @ weight.T + self.bias
        return torch.relu(h) if self.kind == "activation" else h


@pytest.mark.parametrize("kind", ["", "turned", "masked", "dropout", "activation"])
def test_types_of_dense_layers_that_could_be_registered_are_named(kind: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), OwnLinear(kind), nn.Linear(6, 3))
    before = torch.get_rng_state()
    with pytest.raises(UnsupportedModelError, match="orphans") as refusal:
        weighted_layers(model)
    assert (f"apical.register_layer({__name__}.OwnLinear)" in str(refusal.value)) is (kind == "")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_type_is_known_once_it_is_registered() -> None:
    class Known(OwnLinear):
        pass

    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Known(), nn.Tanh(), nn.Linear(6, 3)).double()
    with pytest.raises(UnsupportedModelError, match=r"apical\.register_layer"):
        apical.DirectFeedbackAlignment(model)
    apical.register_layer(Known)
    for rule in (apical.FeedbackAlignment, apical.DirectFeedbackAlignment):
        inputs = torch.randn(8, 4).double()
        paths = rule(model).placement(inputs)
        assert paths.path("2") in ("own feedback", "cut at '3'")
        check_model(rule(model), inputs, torch.arange(8) % 3, skip=("compiled",))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("whole", [True, False])
def test_the_remedy_for_scripted_modules_is_the_model_they_were_made_of(whole: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    traced = torch.jit.trace(model if whole else model[0], torch.rand(2, 3))
    with pytest.raises(UnsupportedModelError, match=r"module.* compiled by TorchScript.* give the rule the model that was"):
        apical.FeedbackAlignment(traced if whole else nn.Sequential(traced, *model[1:]))
    apical.FeedbackAlignment(model)
