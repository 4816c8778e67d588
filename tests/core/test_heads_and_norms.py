"""Cuts of models with several heads, side inputs and units of norms alone: each is told from the others by its calls."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical.testing import check_model

QUICK = ("compiled", "autocast", "lengths", "batch sizes")
BOTH = [apical.DirectFeedbackAlignment, apical.TopDownCreditAssignment]
BEHIND = {apical.DirectFeedbackAlignment: "exact", apical.TopDownCreditAssignment: "the output's credit"}


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float)


class Heads(nn.Module):
    """An actor and a critic: the first head has an activation, the second is called after it."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.a, self.b, self.mean, self.value, self.joined = (
            nn.Linear(6, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 3),
            nn.Linear(8, 1),
            joined,
        )

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = torch.tanh(self.b(torch.tanh(self.a(x))))
        mean, value = torch.tanh(self.mean(h)), self.value(h)
        return torch.cat([mean, value], 1) if self.joined else (mean, value)


def test_an_activation_of_one_head_before_another_head_in_equations() -> None:
    model, x, y = Heads(joined=True), torch.rand(8, 6), torch.rand(8, 4)
    rule = apical.DirectFeedbackAlignment(model, F.mse_loss)
    rule(x, y).backward()
    exact = torch.autograd.grad(F.mse_loss(model(x), y), [*model.mean.parameters(), *model.value.parameters()])
    for parameter, expected in zip([*model.mean.parameters(), *model.value.parameters()], exact, strict=True):
        torch.testing.assert_close(parameter.grad, expected)
    h1 = torch.tanh(model.a(x))
    h2 = torch.tanh(model.b(h1))
    e = 2 * (model(x) - y) / y.numel()
    below, above = rule.feedback.buffers()
    torch.testing.assert_close(model.b.weight.grad, (((e @ above) * (1 - h2**2)).T @ h1).detach())
    torch.testing.assert_close(model.a.weight.grad, (((e @ below) * (1 - h1**2)).T @ x).detach())


@pytest.mark.parametrize(("kind", "joined"), [*((kind, True) for kind in BOTH), (BOTH[0], False)])
def test_heads_in_any_order(kind: type[apical.DirectFeedbackAlignment], joined: bool) -> None:
    def loss(output: Tensor | tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return F.cross_entropy(output if isinstance(output, Tensor) else torch.cat(output, 1), y)

    report = check_model(kind(Heads(joined), loss), torch.rand(8, 6), torch.arange(8) % 4, skip=QUICK)
    assert {row.layer: row.path for row in report.placement}["mean"] == BEHIND[kind]


class Timed(nn.Module):
    """A block that is shifted by an embedding of the time: calls on side inputs, without a graph, come first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.shift = nn.Linear(4, 8), nn.Linear(8, 4)
        self.a, self.b, self.c = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.register_buffer("waves", torch.tensor([1.0, 2.0]))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        phase = batch["time"][:, None] * self.waves[:2]
        shift = self.shift(F.silu(self.embed(torch.cat([phase.sin(), phase.cos()], 1))))[:, :, None, None]
        h = F.silu(self.a(batch["x"]) + shift)
        made: Tensor = self.c(torch.cat([h + self.b(F.silu(h + shift)), h], 1))
        return made


@pytest.mark.parametrize("kind", BOTH)
def test_calls_on_side_inputs_are_counted_alike(kind: type[apical.DirectFeedbackAlignment]) -> None:
    x = {"x": torch.randn(4, 1, 6, 6), "time": torch.rand(4)}
    check_model(kind(Timed(), F.mse_loss), x, torch.randn(4, 1, 6, 6), skip=QUICK)


class Dense(nn.Module):
    """Pre-activation blocks that share their activation module: behind it, units hold a norm and no layer."""

    def __init__(self, grows: bool) -> None:
        super().__init__()
        widths = [4, 6] if grows else [4, 4]
        self.first, self.head, self.relu, self.grows = (
            nn.Conv2d(1, 4, 3),
            nn.Linear(8 if grows else 4, 4),
            nn.ReLU(inplace=True),
            grows,
        )
        self.norms = nn.ModuleList(nn.GroupNorm(2, width) for width in widths)
        self.layers = nn.ModuleList(nn.Conv2d(width, 2 if grows else 4, 3, padding=1) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            new = layer(self.relu(norm(h)))
            h = torch.cat([h, new], 1) if self.grows else h + new
        made: Tensor = self.head(self.relu(h).mean((2, 3)))
        return made


@pytest.mark.parametrize("grows", [False, True])
def test_units_of_norms_alone_have_feedback_of_their_own(grows: bool) -> None:
    """One activation module behind different norms is no recurrent unit, of one width or of several."""
    rule = apical.DirectFeedbackAlignment(Dense(grows))
    check_model(rule, torch.randn(4, 1, 6, 6), torch.arange(4), skip=QUICK)
    rule(torch.randn(4, 1, 6, 6), torch.arange(4))
    units = [unit for unit in rule.hidden_units(torch.randn(4, 1, 6, 6)) if unit.startswith("relu")]
    assert len(units) == 3
    assert [rule.first_use(unit) for unit in units] == units


class Prototypes(nn.Module):
    """Class scores are products with what a layer makes of a table: that is the topmost weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.make, self.table = (
            nn.Linear(6, 8),
            nn.Linear(8, 8),
            nn.Linear(5, 8),
            nn.Parameter(torch.randn(4, 5)),
        )

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = F.relu(self.b(F.relu(self.a(x)))) @ self.make(self.table).T
        return made


@pytest.mark.parametrize("kind", BOTH)
def test_a_weight_that_a_layer_makes_has_a_unit_below(kind: type[apical.DirectFeedbackAlignment]) -> None:
    rule = kind(Prototypes(), exact=("table",))
    paths = {row.layer: row.path for row in check_model(rule, torch.rand(8, 6), torch.arange(8) % 4, skip=QUICK).placement}
    assert (paths["a"], paths["b"], paths["make"]) == ("cut at 'F.relu'", "cut at 'F.relu#1'", BEHIND[kind])
