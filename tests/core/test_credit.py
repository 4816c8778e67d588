"""The contract: what `Credit.backward` accumulates, and what a rule leaves on a model."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical.core.credit import Credit, CreditRule
from apical.errors import ConfigError


def test_backward_sends_each_signal_through_its_own_root() -> None:
    """`sum_k <signal_k, root_k>` is what is differentiated; None means 1."""
    w = torch.tensor([2.0, 3.0], dtype=torch.double, requires_grad=True)
    vector, scalar = w**2, w.prod()
    signal = torch.tensor([10.0, -1.0], dtype=torch.double)
    Credit([vector, scalar], [signal, None], vector, scalar).backward()
    expected = torch.tensor([2 * 2 * 10.0 + 3.0, 2 * 3 * -1.0 + 2.0], dtype=torch.double)
    assert torch.equal(w.grad, expected)


def test_backward_accumulates_into_grad() -> None:
    w = torch.tensor([2.0], requires_grad=True)
    for _ in range(3):
        loss = (5 * w).sum()
        Credit([loss], [None], loss, loss).backward()
    assert w.grad.item() == 15.0


def test_logs_are_not_shared_between_credits() -> None:
    loss = torch.zeros(())
    one, two = (Credit([loss], [None], loss, loss) for _ in range(2))
    one.logs["x"] = loss
    assert two.logs == {}


class Half(CreditRule):
    """Half the gradient, by a hook."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, F.cross_entropy)
        self._hooks.append(model.register_forward_hook(lambda module, args, output: None))

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        output = self.model(inputs)
        loss = self.loss(output, targets)
        return Credit([loss], [torch.tensor(0.5)], output, loss)


def test_a_rule_of_ones_own() -> None:
    model, inputs, targets = nn.Linear(3, 2), torch.randn(4, 3), torch.arange(4) % 2
    F.cross_entropy(model(inputs), targets).backward()
    exact = model.weight.grad.clone()
    model.zero_grad()
    rule = Half(model)
    rule(inputs, targets).backward()
    assert torch.allclose(model.weight.grad, exact / 2)
    assert rule.feedback_weights() == {}
    assert model._forward_hooks
    assert rule.detach() is model
    assert not model._forward_hooks
    assert rule.detach() is model  # once more does no harm


@pytest.mark.parametrize("rule", [apical.Backprop, apical.FeedbackAlignment, apical.DirectFeedbackAlignment])
def test_the_loss_is_the_callers(rule: type[CreditRule]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    inputs, targets = torch.randn(4, 3), torch.randn(4, 2)
    credit = rule(model, F.mse_loss)(inputs, targets)
    assert torch.allclose(credit.loss, (model(inputs) - targets).square().mean())


@pytest.mark.parametrize("rule", [apical.FeedbackAlignment, apical.DirectFeedbackAlignment])
def test_a_detached_rule_refuses_to_work(rule: type[CreditRule]) -> None:
    each = rule(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    each.detach()
    with pytest.raises(ConfigError, match=r"detached.*make a new rule"):
        each(torch.randn(8, 4), torch.arange(8) % 3)
