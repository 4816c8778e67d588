"""Learnability: the Jacobian by autograd, kernels of rules against theory, and the Lorenz system's sizes."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import apical
from apical.diagnostics.learnability import learnability, rank_by_width, rule_updates, smallest_width, weight_jacobian
from apical.errors import ConfigError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def test_jacobian_row_by_row() -> None:
    model, x = network(), torch.randn(3, 4).double()
    found = weight_jacobian(model, x)
    for sample in range(3):
        for output in range(3):
            grads = torch.autograd.grad(model(x)[sample, output], list(model.parameters()))
            assert (found[sample, output] - torch.cat([g.flatten() for g in grads])).abs().max() < 1e-14


class Cube(torch.autograd.Function):
    """Which `torch.func` cannot take apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 3 * x.square() * grad


class Cubed(nn.Module):
    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.body, self.by_hand = network(), by_hand

    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(self.body(x)) if self.by_hand else self.body(x) ** 3  # type: ignore[no-any-return]


def test_functions_without_a_rule_for_batches() -> None:
    x = torch.randn(3, 4).double()
    assert (weight_jacobian(Cubed(True), x) - weight_jacobian(Cubed(False), x)).abs().max() < 1e-12


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(self.q(x), x, x)


def test_attention_without_a_word_of_its_kernels() -> None:
    torch.manual_seed(0)
    model, x = Attends().double(), torch.randn(2, 1, 3, 2).double()
    output = model(x)
    (grad,) = torch.autograd.grad(output[1].flatten()[3], model.q.weight)
    assert (weight_jacobian(model, x)[1, 3, :4] - grad.flatten()).abs().max() < 1e-12


def test_backpropagation_has_the_tangent_kernel() -> None:
    model, x = network(), torch.randn(3, 4).double()
    plain, bp = learnability(model, x), learnability(model, x, apical.Backprop(model))
    expected = plain.singular_values.square()
    assert (bp.kernel.real - expected).abs().max() < 1e-12
    assert torch.equal(plain.kernel.real, expected)
    assert bp.unlearned == 0
    assert plain.rank == 9


def test_the_spectrum_of_a_linear_map() -> None:
    """J = [x, 1] for each output: the singular values of [X, 1], as often as there are outputs."""
    torch.manual_seed(0)
    x = torch.randn(6, 3).double()
    x[:, 2] = x[:, 0] - 2 * x[:, 1]  # so that the rank is 3, not 4
    values = np.linalg.svd(np.column_stack([x.numpy(), np.ones(6)]), compute_uv=False)
    found = learnability(nn.Linear(3, 2).double(), x)
    assert found.singular_values[:8].numpy() == pytest.approx(np.repeat(values, 2), rel=0, abs=1e-14)
    assert found.rank == 6
    assert found.log10_condition == pytest.approx(math.log10(values[0] / values[2]), abs=1e-12)


def test_direct_feedback_through_the_true_weights_is_backpropagation() -> None:
    model, x = network(), torch.randn(3, 4).double()
    rule = apical.DirectFeedbackAlignment(model)
    rule(x, torch.tensor([0, 1, 2])).backward()
    rule.zero_grad()
    random = learnability(model, x, rule)
    rule.set_feedback("1", model[2].weight.detach())
    true = learnability(model, x, rule)
    assert (true.kernel.real - true.singular_values.square()).abs().max() < 1e-12
    hidden, last = np.split(weight_jacobian(model, x).flatten(0, 1).numpy(), [25], axis=1)
    rule.set_feedback("1", -model[2].weight.detach())
    wrong = learnability(model, x, rule)
    eigenvalues = np.linalg.eigvalsh(last @ last.T - hidden @ hidden.T)[::-1]
    assert wrong.kernel.real.numpy() == pytest.approx(eigenvalues, rel=0, abs=1e-12)
    assert wrong.unlearned == (eigenvalues < 0).mean() > 0
    assert (random.kernel - true.kernel).abs().max() > 1e-3
    assert all(parameter.grad is None for parameter in model.parameters())
    assert rule.loss is nn.functional.cross_entropy


def test_updates_are_the_rules_own() -> None:
    model, x = network(), torch.randn(2, 4).double()
    rule = apical.FeedbackAlignment(model)
    updates = rule_updates(rule, x, 3)
    error = torch.tensor([[0.3, -1.0, 2.0]]).double()
    rule.loss = lambda output, target: (output * error).sum()
    rule(x[:1], torch.zeros(1)).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert ((error @ updates[0])[0] - expected).abs().max() < 1e-12


class Lorenz(nn.Module):
    """The seven terms of the system, each with its coefficient."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.tensor([-10.0, 10.0, 28.0, -1.0, -1.0, 1.0, -8 / 3]).double())

    def forward(self, state: Tensor) -> Tensor:
        x, y, z = state.unbind(-1)
        c = self.c
        return torch.stack([c[0] * x + c[1] * y, c[2] * x + c[3] * y + c[4] * x * z, c[5] * x * y + c[6] * z], -1)


class Products(nn.Module):
    """A x + c + G ((P x) * (R x)) with h product nodes."""

    def __init__(self, h: int) -> None:
        super().__init__()
        self.linear, self.g = nn.Linear(3, 3), nn.Linear(h, 3, bias=False)
        self.p, self.r = nn.Linear(3, h, bias=False), nn.Linear(3, h, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x) + self.g(self.p(x) * self.r(x))
        return result


class Quadratic(nn.Module):
    """Every monomial up to the second order, to each component."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.stack([x[..., i] * x[..., j] for i in range(3) for j in range(i, 3)], -1)
        result: Tensor = self.read(torch.cat([x, pairs], -1))
        return result


def test_sizes_for_the_lorenz_system() -> None:
    torch.manual_seed(0)
    states = 10 * torch.randn(40, 3).double()
    assert learnability(Lorenz(), states).rank == 7
    assert learnability(Quadratic(), states).rank == 30
    for rank, dimension in ((30, 3), (7, 3), (24, 3), (17, 4), (3, 3)):
        width, numbers = smallest_width(rank, dimension), (2 * dimension + 1)
        assert width * numbers + dimension >= rank
        assert not width or (width - 1) * numbers + dimension < rank
    two = Products(2).double()
    with torch.no_grad():
        two.linear.weight.copy_(torch.tensor([[-10, 10, 0], [28, -1, 0], [0, 0, -8 / 3]]))
        two.linear.bias.zero_()
        two.p.weight.copy_(torch.tensor([[1.0, 0, 0], [1, 0, 0]]))
        two.r.weight.copy_(torch.tensor([[0.0, 0, 1], [0, 1, 0]]))
        two.g.weight.copy_(torch.tensor([[0.0, 0], [-1, 0], [0, 1]]))
        assert (two(states) - Lorenz()(states)).abs().max() < 1e-12
    # quadratic forms of the components: one product node makes multiples of one form, and the system's span two dimensions
    forms = torch.zeros(3, 3, 3)
    forms[1, 0, 2] = forms[1, 2, 0] = -0.5
    forms[2, 0, 1] = forms[2, 1, 0] = 0.5
    assert torch.linalg.matrix_rank(forms.flatten(1)) == 2


def test_rank_by_width_ends_at_the_inputs() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(10, 3)
    ranks = rank_by_width(lambda h: nn.Sequential(nn.Linear(3, h), nn.Tanh(), nn.Linear(h, 1)), (1, 2, 8), inputs)
    assert ranks == {1: 6, 2: 10, 8: 10}


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="no parameter"):
        learnability(nn.Linear(2, 2).requires_grad_(False), torch.randn(2, 2))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            apical.CorInfoMax,
            "CorInfoMax has no kernel, because a kernel is computed from updates for arbitrary errors: it learns",
        ),
        (
            apical.DeepFeedbackControl,
            "DeepFeedbackControl has no kernel, because a kernel is computed from updates for arbitrary errors: deep",
        ),
        (
            apical.ForwardForward,
            "ForwardForward has no kernel, because a kernel is computed from updates for arbitrary errors: it learns",
        ),
    ],
)
def test_a_rule_that_is_not_driven_by_the_error_has_no_kernel(kind: Callable[..., apical.CreditRule], said: str) -> None:
    """CorInfoMax reads the unit of error as a label to settle at, which would have passed for an update."""
    model, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(3, 4)
    with pytest.raises(ConfigError, match=said):
        learnability(model, x, kind(model))


def test_a_rule_around_another_model_is_refused() -> None:
    """Its updates would be multiplied with the Jacobian of weights that it does not have."""
    x = torch.randn(2, 4).double()
    with pytest.raises(ConfigError, match="the rule has another model"):
        learnability(network(), x, apical.FeedbackAlignment(network()))
