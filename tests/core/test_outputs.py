"""Models with several outputs: each learns by its own error, and hidden units hear all that the loss reads."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical.errors import ConfigError, UnsupportedModelError
from apical.losses import token_cross_entropy


@pytest.fixture(autouse=True)
def _double() -> object:
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float)


class Auxiliary(nn.Module):
    """Two heads at different depths, as GoogLeNet's, in training; one in evaluation."""

    def __init__(self, kind: Any, extra: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 7)
        self.main, self.side, self.kind, self.extra = nn.Linear(7, 4), nn.Linear(8, 3), kind, extra

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.a(x))
        g = torch.tanh(self.b(h))
        if not self.training:
            return self.main(g)
        outputs = {"main": self.main(g), "side": self.side(h)}
        if self.extra:
            outputs |= {"features": h, "labels": x.argmax(1)}
        return outputs if self.kind is dict else self.kind(outputs.values())


def loss_of(output: Any, targets: Tensor) -> Tensor:
    if isinstance(output, Tensor):
        return F.cross_entropy(output, targets)
    main, side = (output["main"], output["side"]) if isinstance(output, dict) else output[:2]
    return F.cross_entropy(main, targets) + 0.3 * F.mse_loss(side, torch.ones_like(side))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 6), torch.arange(5) % 4


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("kind", [dict, tuple, list])
def test_direct_feedback_of_two_heads_in_equations(kind: Any, extra: bool) -> None:
    model, (x, targets) = Auxiliary(kind, extra), batch()
    rule = apical.DirectFeedbackAlignment(model, loss_of)
    rule(x, targets).backward()
    with torch.no_grad():
        h = torch.tanh(model.a(x))
        g = torch.tanh(model.b(h))
        e_main = (torch.softmax(model.main(g), 1) - F.one_hot(targets, 4)) / 5
        e_side = 0.3 * 2 * (model.side(h) - 1) / 15
        e = torch.cat([e_main, e_side], 1)
        b1, b2 = rule.feedback.get_buffer("F/tanh"), rule.feedback.get_buffer("F/tanh#1")
        assert b1.shape == (7, 8)
        assert b2.shape == (7, 7)
        d1, d2 = e @ b1 * (1 - h**2), e @ b2 * (1 - g**2)
    for layer, error, below in ((model.a, d1, x), (model.b, d2, h), (model.main, e_main, g), (model.side, e_side, h)):
        assert torch.allclose(layer.weight.grad, error.T @ below, atol=1e-12)
        assert torch.allclose(layer.bias.grad, error.sum(0), atol=1e-12)


@pytest.mark.parametrize("kind", [dict, tuple])
def test_trainers_take_the_loss_of_several_outputs(kind: Any) -> None:
    x, targets = batch()
    results = []
    for way in ("plain", "loss", "compiled"):
        torch.manual_seed(1)
        rule = apical.DirectFeedbackAlignment(Auxiliary(kind), loss_of)
        call = torch.compile(rule, backend="aot_eager") if way == "compiled" else rule
        credit = call(x, targets)
        credit.backward() if way == "plain" else (2 * credit.loss).backward()
        factor = 1 if way == "plain" else 2
        results.append([p.grad / factor for p in rule.model.parameters()])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.allclose(one, two, atol=1e-12)


def test_validation_with_another_set_of_outputs() -> None:
    rule = apical.DirectFeedbackAlignment(Auxiliary(tuple), loss_of)
    rule(*batch()).backward()
    rule.eval()
    with torch.no_grad():
        assert rule(*batch()).output.shape == (5, 4)


def test_a_loss_of_one_of_several_outputs_is_refused_as_a_second_root() -> None:
    rule = apical.DirectFeedbackAlignment(Auxiliary(dict), loss_of)
    credit = rule(*batch())
    with pytest.raises(ConfigError, match="does not travel"):
        (credit.loss + credit.output["side"].square().mean()).backward()


def test_a_hidden_units_output_is_no_output() -> None:
    """Its exact error would be lost at the cut."""
    rule = apical.DirectFeedbackAlignment(Auxiliary(dict, True), lambda o, t: loss_of(o, t) + o["features"].square().mean())
    with pytest.raises(UnsupportedModelError, match=r"output of a hidden unit.*detach"):
        rule(*batch())


def test_top_down_credit_takes_one_output_and_refuses_two() -> None:
    class One(nn.Sequential):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": super().forward(x)}

    found = []
    for named in (True, False):
        torch.manual_seed(1)
        model = (One if named else nn.Sequential)(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        loss = (lambda o, t: F.cross_entropy(o["logits"], t)) if named else F.cross_entropy
        torch.manual_seed(2)
        rule = apical.TopDownCreditAssignment(model, loss)
        torch.manual_seed(3)
        rule(torch.ones(4, 6), torch.arange(4)).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with pytest.raises(UnsupportedModelError, match="2 outputs"):
        apical.TopDownCreditAssignment(Auxiliary(tuple), loss_of)(*batch())


class Viewed(nn.Module):
    """Tokens; the output is a view of the read-out's."""

    def __init__(self, view: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.view = nn.Linear(5, 6), nn.Linear(6, 4), view

    def forward(self, x: Tensor) -> Any:
        return self.view(self.b(torch.tanh(self.a(x))))


def in_halves(output: Any, targets: Tensor) -> Tensor:
    return token_cross_entropy(output[0], targets % 2) + token_cross_entropy(output[1], targets % 2)


VIEWS: dict[str, tuple[Callable[[Tensor], Any], Any]] = {
    "transposed": (lambda y: y.transpose(1, 2), F.cross_entropy),
    "chunks": (lambda y: y.chunk(2, -1), in_halves),
    "last place": (lambda y: y[:, -1], lambda output, targets: F.cross_entropy(output, targets[:, -1])),
    "expanded and transposed": (lambda y: y[:, :1].expand(-1, 3, -1).mT, F.cross_entropy),
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_compiled_rule_with_cuts_takes_outputs_that_are_views(view: str) -> None:
    torch._dynamo.reset()
    x, targets = torch.randn(2, 3, 5), torch.arange(6).view(2, 3) % 4
    for make in (apical.DirectFeedbackAlignment, apical.TopDownCreditAssignment)[: 1 + (view == "transposed")]:
        model = Viewed(VIEWS[view][0])
        rule = make(model, VIEWS[view][1])
        rule(x, targets).backward()
        model.zero_grad()
        rule(x, targets).backward()
        eager = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        torch.compile(rule, backend="aot_eager")(x, targets).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, eager[name], rtol=0, atol=1e-13)
