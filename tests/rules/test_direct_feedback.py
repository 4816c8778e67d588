"""Direct feedback alignment in one backward pass: the loss is the root, and the output hands its error to the units."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical.errors import ConfigError


@pytest.fixture
def rule() -> apical.DirectFeedbackAlignment:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return apical.DirectFeedbackAlignment(model)


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 4).double(), torch.arange(8) % 3


def expected(rule: apical.DirectFeedbackAlignment, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    """`dW_l = ((B_l e) * f'(a_l)) h_{l-1}^T` with `e = (p - y) / N`, weights and biases in order."""
    first, _, second, _, last = rule.model
    one, two = (rule.feedback.get_buffer(name) for name in ("1", "3"))
    with torch.no_grad():
        h1 = torch.tanh(first(inputs))
        h2 = torch.tanh(second(h1))
        e = (last(h2).softmax(1) - F.one_hot(targets, 3)) / len(inputs)
        d1, d2 = (e @ one) * (1 - h1**2), (e @ two) * (1 - h2**2)
        return [d1.T @ inputs, d1.sum(0), d2.T @ h1, d2.sum(0), e.T @ h2, e.sum(0)]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_loss_is_the_one_root_and_any_multiple_of_it_moves_every_unit_by_its_equation(
    rule: apical.DirectFeedbackAlignment, scale: float
) -> None:
    credit = rule(*batch())
    assert len(credit.roots) == 1
    assert credit.roots[0] is credit.loss
    (scale * credit.loss).backward()
    for parameter, gradient in zip(rule.model.parameters(), expected(rule, *batch()), strict=True):
        torch.testing.assert_close(parameter.grad, scale * gradient, rtol=1e-12, atol=1e-14)


def test_signals_are_made_in_the_backward_pass_one_after_the_other(
    rule: apical.DirectFeedbackAlignment, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule(*batch())
    asked: list[str] = []
    signal = rule.signal

    def noted(cut: Any, errors: Tensor) -> Tensor:
        asked.append(cut.name)
        # the unit above has its gradient by now, so that no two signals exist at once
        assert cut.name == "3" or rule.model[2].weight.grad is not None
        return signal(cut, errors)

    monkeypatch.setattr(rule, "signal", noted)
    credit = rule(*batch())
    assert not asked
    credit.backward()
    assert asked == ["3", "1"]


def test_a_penalty_in_the_loss_has_its_exact_gradient_beside_the_rules() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    weight = model[0].weight
    rule = apical.DirectFeedbackAlignment(model, loss=lambda o, t: F.cross_entropy(o, t) + weight.square().sum())
    rule(*batch()).backward()
    torch.testing.assert_close(weight.grad, expected(rule, *batch())[0] + 2 * weight.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("penalty", [False, True])
def test_a_loss_that_does_not_depend_on_the_output_is_refused(penalty: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    term = model[0].weight.square().sum if penalty else lambda: 0.0
    rule = apical.DirectFeedbackAlignment(model, loss=lambda o, t: F.cross_entropy(o.detach(), t) + term())
    with pytest.raises(ConfigError, match="does not depend on the output"):
        rule(*batch())


@pytest.mark.parametrize("source", ["output", "factored"])
def test_a_state_from_before_the_first_batch_brings_back_its_seed(source: Any) -> None:
    inputs, targets = batch()

    def made(seed: int) -> apical.DirectFeedbackAlignment:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3)).double()
        return apical.DirectFeedbackAlignment(model, source=source)

    early, late = made(0), made(1)
    state = copy.deepcopy(early.state_dict())
    for _ in range(5):  # until passes go by hand
        late(inputs, targets).backward()
    late.load_state_dict(state)
    for _ in range(4):
        for rule in (early, late):
            rule.zero_grad()
            rule(inputs, targets).backward()
        for one, other in zip(early.parameters(), late.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)


def test_matrices_of_a_loaded_state_stand_in_the_order_they_were_saved_in() -> None:
    def made() -> apical.DirectFeedbackAlignment:
        torch.manual_seed(0)
        hidden = [layer for _ in range(8) for layer in (nn.Linear(4, 4), nn.Tanh())]
        return apical.DirectFeedbackAlignment(nn.Sequential(*hidden, nn.Linear(4, 3)).double())

    saved, loaded = made(), made()
    saved(*batch()).backward()
    loaded.load_state_dict(saved.state_dict())
    assert list(loaded.state_dict()) == list(saved.state_dict())
