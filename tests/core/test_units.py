"""Every way a model can be refused, and that following the message's remedy makes it accepted and trained."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical.core.units import key, weighted_layers
from apical.errors import UnsupportedModelError


def net(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), *middle, nn.Linear(6, 4))


def refused(model: nn.Module, *words: str, exact: tuple[str, ...] = ()) -> str:
    keys = list(model.state_dict())
    with pytest.raises(UnsupportedModelError) as caught:
        weighted_layers(model, exact)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"
    assert list(model.state_dict()) == keys  # refused before anything is changed
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
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


def test_embedding_before_the_first_layer_is_trained_with_the_remedy_of_the_message() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    inputs, targets = torch.randint(0, 9, (32, 2)), torch.arange(32) % 4
    with pytest.raises(UnsupportedModelError, match="first_layer=True"):
        apical.FeedbackAlignment(model)(inputs, targets)
    rule = apical.FeedbackAlignment(model, first_layer=True)
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


def test_parametrised_weight_is_refused_or_trained_with_the_remedy() -> None:
    torch.manual_seed(0)
    model = net(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), nn.ReLU())
    refused(model, "'2.parametrizations.weight'", "exact=('2.parametrizations.weight',)")
    trains(model, exact=("2.parametrizations.weight",))


@pytest.mark.parametrize("lazy", [nn.LazyLinear(6), nn.LazyBatchNorm1d()], ids=lambda module: type(module).__name__)
def test_lazy_layer(lazy: nn.Module) -> None:
    torch.manual_seed(0)
    model = net(nn.Linear(6, 6), lazy, nn.Tanh())
    with pytest.raises(UnsupportedModelError, match=r"'3' is lazy.*one batch"):
        weighted_layers(model)
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
