"""Each row of a unit hears the error of its own sample, however the model moves rows of the batch."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical.core.rows import Rows
from apical.errors import UnsupportedModelError

ORDER = torch.tensor([3, 0, 5, 1, 4, 2])


@pytest.fixture(autouse=True)
def _double() -> object:
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float)


class Model(nn.Module):
    """A unit between two moves of rows; `into` and `back` are given the layer's input and output."""

    def __init__(self, into: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.head, self.into, self.back = nn.Linear(4, 6), nn.Linear(6, 3), into, back

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.back(torch.tanh(self.a(self.into(x)))))


def put_back(h: Tensor) -> Tensor:
    out = torch.empty_like(h)
    out[ORDER] = h
    return out


def copy_back(h: Tensor) -> Tensor:
    return torch.zeros_like(h).index_copy(0, ORDER, h)


# Of a batch of 6 with 5 places of 4 inputs: how rows move, how they come back, and the sample of each row of the unit.
MOVES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]] = {
    "shuffled": (lambda x: x[ORDER, 0], lambda h: h[torch.argsort(ORDER)], ORDER),
    "put back": (lambda x: x[ORDER][:, 0], put_back, ORDER),
    "copied back": (lambda x: x.index_select(0, ORDER)[:, 0], copy_back, ORDER),
    "by keyword": (lambda x: torch.index_select(input=x, dim=0, index=ORDER)[:, 0], copy_back, ORDER),
    "flipped": (lambda x: x[:, 0].flip(0), lambda h: h.flip(0), torch.arange(6).flip(0)),
    "folded": (
        lambda x: x.reshape(-1, 4),
        lambda h: h.view(6, 5, 6).mean(1),
        torch.arange(6).repeat_interleave(5),
    ),
    "windows": (  # two of two places by two, of places 4, as Swin parts its maps
        lambda x: x[:, :4].view(6, 2, 2, 1, 4).permute(0, 2, 1, 3, 4).contiguous().view(-1, 4),
        lambda h: h.view(6, 4, 6).mean(1),
        torch.arange(6).repeat_interleave(4),
    ),
    "moments first": (
        lambda x: x.transpose(0, 1).reshape(-1, 4),
        lambda h: h.view(5, 6, 6).mean(0),
        torch.arange(6).repeat(5),
    ),
    "stacked": (
        lambda x: torch.cat([x[:, 0], x[:, 1]]),
        lambda h: h.chunk(2)[0] - h.chunk(2)[1],
        torch.arange(6).repeat(2),
    ),
    "some": (
        lambda x: x[:, 0][torch.tensor([1, 4])],
        lambda h: h.new_zeros(6, 6).index_add(0, torch.tensor([1, 4]), h),
        torch.tensor([1, 4]),
    ),
    "masked": (
        lambda x: x[:, 0][torch.arange(6) > 3],
        lambda h: torch.cat([h.new_zeros(4, 6), h]),
        torch.tensor([4, 5]),
    ),
    "none": (lambda x: x[:0, 0], lambda h: F.pad(h, (0, 0, 0, 6)), torch.arange(0)),
}


@pytest.mark.parametrize("name", MOVES)
def test_direct_feedback_in_equations(name: str) -> None:
    """n rows of one sample hear 1/n of `B e` each."""
    into, back, owners = MOVES[name]
    model, x, targets = Model(into, back), torch.randn(6, 5, 4), torch.arange(6) % 3
    rule = apical.DirectFeedbackAlignment(model)
    for _ in range(2):
        model.zero_grad()
        rule(x, targets).backward()
    with torch.no_grad():
        below = into(x)
        h = torch.tanh(model.a(below))
        e = (torch.softmax(model.head(back(h)), 1) - F.one_hot(targets, 3)) / 6
        (b,) = rule.feedback.buffers()
        assert b.shape == (3, 6)
        n = torch.bincount(owners, minlength=6)[owners].unsqueeze(1)
        delta = e[owners] @ b / n * (1 - h**2)
    assert torch.allclose(model.a.weight.grad, delta.T @ below, atol=1e-12)
    assert torch.allclose(model.a.bias.grad, delta.sum(0), atol=1e-12)
    apical.TopDownCreditAssignment(model)(x, targets).backward()


class Gate(nn.Module):
    """A gate with one number per sample, (batch,) or (batch, 1)."""

    def __init__(self, squeezes: bool) -> None:
        super().__init__()
        self.a, self.gate, self.head, self.squeezes = nn.Linear(4, 6), nn.Linear(6, 1), nn.Linear(6, 3), squeezes

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        score = self.gate(h)
        gate = score.squeeze(1).sigmoid().unsqueeze(1) if self.squeezes else score.sigmoid()
        return self.head(h * gate)


@pytest.mark.parametrize("rule", [apical.DirectFeedbackAlignment, apical.TopDownCreditAssignment])
def test_a_unit_of_one_number_per_sample_has_a_signal_for_each(rule: Callable[..., apical.CreditRule]) -> None:
    gradients = []
    for squeezes in (True, False):
        torch.manual_seed(0)
        taught = rule(Gate(squeezes))
        for count in (6, 3, 1):
            taught(torch.randn(count, 4), torch.arange(count) % 3).backward()
        gradients.append([parameter.grad for parameter in taught.model.parameters()])
    for squeezed, plain in zip(*gradients, strict=True):
        assert torch.allclose(squeezed, plain, rtol=0, atol=1e-12)


class OneByOne(nn.Module):
    """Calls a layer on single samples."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.stack([torch.tanh(self.layer(sample)) for sample in x])
        return self.head(h.flatten(2).mean(2) if h.dim() > 2 else h)


@pytest.mark.parametrize("count", [1, 5, 6])
@pytest.mark.parametrize(("layer", "shape"), [(nn.Linear(4, 6), (4,)), (nn.Conv1d(2, 6, 3), (2, 6))], ids=["dense", "map"])
def test_layers_that_are_called_on_single_samples_are_refused(layer: nn.Module, shape: tuple[int, ...], count: int) -> None:
    for rule in (apical.DirectFeedbackAlignment, apical.TopDownCreditAssignment):
        with pytest.raises(UnsupportedModelError, match="'layer' is called on a single sample"):
            rule(OneByOne(layer.double()))(torch.randn(count, *shape), torch.arange(count) % 3)


def test_moments_first_where_there_are_as_many_as_samples() -> None:
    """(time, batch, channels) has the shape of (batch, time, channels) then."""
    model = Model(lambda x: x.transpose(0, 1), lambda h: h.mean(0))
    x, targets = torch.randn(6, 6, 4), torch.arange(6) % 3
    rule = apical.DirectFeedbackAlignment(model)
    rule(x, targets).backward()
    with torch.no_grad():
        h = torch.tanh(model.a(x))
        e = (torch.softmax(model.head(h.mean(1)), 1) - F.one_hot(targets, 3)) / 6
        (b,) = rule.feedback.buffers()
        delta = (e @ b).unsqueeze(1) / 6 * (1 - h**2)
    assert torch.allclose(model.a.weight.grad, torch.einsum("btk,bti->ki", delta, x), atol=1e-12)


class Experts(nn.Module):
    """Top-2 routing, as Mixtral's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.head = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 6)) for _ in range(3))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.softmax(self.gate(x), -1).topk(2, -1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        share, chosen = self.route(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, rank = torch.where(chosen == number)
            out.index_add_(0, row, expert(x[row]) * share[row, rank, None])
        return self.head(x + out)


def test_routed_experts_in_equations() -> None:
    """An expert's hidden unit hears `B e` of the samples that were routed to it, whichever they are in a batch."""
    model = Experts()
    rule = apical.DirectFeedbackAlignment(model)
    for _ in range(4):
        x, targets = torch.randn(6, 4), torch.arange(6) % 3
        model.zero_grad()
        rule(x, targets).backward()
        with torch.no_grad():
            e = (torch.softmax(model(x), 1) - F.one_hot(targets, 3)) / 6
            h = F.relu(model.stem(x))
            chosen = model.route(h)[1]
            for number, expert in enumerate(model.experts):
                row = torch.where(chosen == number)[0]
                if len(row):
                    b = rule.feedback.get_buffer(f"experts/{number}/1")
                    delta = e[row] @ b * (1 - torch.tanh(expert[0](h[row])) ** 2)
                    assert torch.allclose(expert[0].weight.grad, delta.T @ h[row], atol=1e-12)


def test_labels_follow_shapes() -> None:
    x = torch.randn(4, 3, 2)
    with Rows(x) as rows:
        y = x.permute(1, 0, 2) * 2
        z = (y.reshape(12, 2) @ torch.ones(2, 5)).view(3, 4, 5)[1:]
        picked = torch.stack([z[0, 2], z[1, 1]])
    assert rows.of(x) is None
    for tensor, axis, owners in ((y, 1, [0, 1, 2, 3]), (z, 1, [0, 1, 2, 3]), (picked, 0, [2, 1])):
        at, labels = rows.of(tensor)
        assert at == axis
        assert labels.tolist() == owners


def test_answers_and_units_folded_alike_need_no_look_up() -> None:
    """Rows tell the places there, so nothing is followed after the first batch; where only units are folded it must be."""
    x = torch.randn(6, 5, 4)
    for back, targets, followed in (
        (lambda h: h, torch.arange(30) % 3, False),
        (MOVES["folded"][1], torch.arange(6) % 3, True),
    ):
        rule = apical.DirectFeedbackAlignment(Model(MOVES["folded"][0], back))
        rule(x, targets).backward()
        assert rule._cutting.moves_rows == followed
