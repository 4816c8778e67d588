"""The table of paths: what it says, how it prints, and that asking for it disturbs nothing."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

import apical
from apical.core.placement import Placement, Row
from apical.core.rest import undisturbed
from apical.errors import ConfigError


class Odd(nn.Module):
    """Batch norm, dropout, a counter, a frozen layer and one that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.frozen, self.idle, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.frozen.requires_grad_(False)
        self.calls = 0
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(len(x))
        hidden = self.drop(torch.relu(self.norm(self.first(x))))
        return self.last(torch.relu(self.frozen(hidden)))


def test_backprop_is_exact_frozen_or_without_credit() -> None:
    rows = apical.Backprop(Odd()).placement(torch.randn(5, 6))
    assert [(row.layer, row.kind, row.shape, row.path) for row in rows] == [
        ("first", "Linear", (8, 6), "exact"),
        ("norm", "BatchNorm1d", (8,), "exact (local)"),
        ("frozen", "Linear", (8, 8), "frozen"),
        ("idle", "Linear", (8, 8), "no credit"),
        ("last", "Linear", (4, 8), "exact"),
    ]
    assert rows.path("idle") == "no credit"
    with pytest.raises(KeyError):
        rows.path("absent")


def test_a_layer_trained_only_in_one_mode_has_credit() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.aux = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            return (self.body(x), self.aux(x)) if self.training else self.body(x)

    for training in (True, False):
        rule = apical.Backprop(Auxiliary().train(training))
        assert rule.placement(torch.randn(5, 6)).path("aux") == ("exact" if training else "no credit")


def test_asking_disturbs_nothing() -> None:
    torch.manual_seed(0)
    model = Odd()
    rule = apical.Backprop(model)
    rule(torch.randn(5, 6), torch.arange(5) % 4).backward()
    state = {name: value.clone() for name, value in rule.state_dict().items()}
    grads = {name: None if q.grad is None else q.grad.clone() for name, q in rule.named_parameters()}
    random, calls = torch.get_rng_state(), model.calls
    rule.placement(torch.randn(5, 6, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), random)
    assert (model.calls, model.seen) == (calls, [5])
    assert all(torch.equal(value, state[name]) for name, value in rule.state_dict().items())
    for name, parameter in rule.named_parameters():
        before = grads[name]
        assert (parameter.grad is None) == (before is None)
        assert before is None or torch.equal(parameter.grad, before)
    assert all(module.training for module in model.modules())


def test_undisturbed_restores_parameters_and_what_was_made() -> None:
    model = nn.Linear(3, 2)
    weight = model.weight.detach().clone()
    with undisturbed(model, parameters=True):
        model.weight.data.zero_()
        model.register_buffer("extra", torch.zeros(1))
        model.weight.grad = torch.ones_like(model.weight)
        handle = model.register_forward_hook(lambda *_: None)
    assert torch.equal(model.weight, weight)
    assert model.weight.grad is None
    assert "extra" not in model._buffers
    assert not model._forward_hooks
    handle.remove()


def test_repr_has_a_summary_once_it_is_known() -> None:
    rule = apical.Backprop(Odd())
    assert "placement" not in repr(rule)
    rule.placement(torch.randn(5, 6))
    assert "placement: 2 exact, 1 exact (local), 1 frozen, 1 no credit" in repr(rule)


def test_long_cells_wrap_and_are_never_cut() -> None:
    name = ".".join(["encoder"] * 12)
    path = "a feedback matrix that is shared with " + ", ".join(f"layer{i}" for i in range(12))
    text = str(Placement([Row(name, "Linear", (5, 4), path)]))
    assert max(map(len, text.splitlines())) <= 125
    columns = ["".join(line[:34].strip() for line in text.splitlines()[1:]), " ".join(text.split())]
    assert columns[0].replace(" ", "") == name
    assert all(word in text for word in path.split())


def test_parametrised_layers_are_one_row_with_their_effective_shape() -> None:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    )
    rule = apical.Backprop(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert [(row.layer, row.kind, row.shape) for row in rule.placement(torch.randn(2, 3))] == [
        ("0", "Linear", (4, 3)),
        ("1", "Linear", (4, 4)),
    ]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_detached_rule_has_no_placement() -> None:
    rule = apical.Backprop(nn.Linear(3, 2))
    rule.detach()
    with pytest.raises(ConfigError, match="detached"):
        rule.placement(torch.randn(2, 3))


class Frozen(OrderedDict[str, int]):
    """A configuration that cannot be written once it is made, as that of diffusers is."""

    def __setitem__(self, key: str, value: int) -> None:
        if "width" in self:
            raise TypeError("frozen")
        super().__setitem__(key, value)

    def update(self, *args: object, **kwargs: object) -> None:
        raise TypeError("frozen")


def test_undisturbed_leaves_containers_that_cannot_be_written() -> None:
    model = nn.Linear(2, 2)
    model.configuration, model.counts, model.seen = Frozen(width=2), {"calls": 1}, ["a"]  # type: ignore[assignment]
    with undisturbed(model):
        model.counts["calls"], model.counts["more"] = 2, 3  # type: ignore[operator]
        model.seen[0] = "b"  # type: ignore[operator]
    assert model.configuration == Frozen(width=2)
    assert model.counts == {"calls": 1}
    assert model.seen == ["a"]
