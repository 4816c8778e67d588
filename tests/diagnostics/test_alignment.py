"""Angles against hand values down to 1e-9 radians, and diagnostics that leave no trace."""

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import apical
from apical.core.credit import CreditRule
from apical.core.units import key
from apical.diagnostics.alignment import angle, gradient_alignment, gradients, layer_alignment, norm_ratio
from apical.errors import ConfigError


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("radians", [1e-9, 1e-7, 1e-4, 0.1, 1.0, math.pi / 2, 3.0, math.pi - 1e-7])
@pytest.mark.parametrize("size", [1.0, 1e-20, 1e20])
def test_angle_of_two_vectors_at_a_known_angle(radians: float, size: float) -> None:
    a = torch.tensor([1.0, 0.0], dtype=torch.double)
    b = size * torch.tensor([math.cos(radians), math.sin(radians)], dtype=torch.double)
    assert abs(angle(a, b) / math.degrees(radians) - 1) < 1e-6
    assert angle(a, b) == pytest.approx(angle(b, a), rel=1e-9)


def test_angle_at_the_ends() -> None:
    a = torch.randn(3, 4)
    assert angle(a, a) == 0.0
    assert angle(a, 5 * a) < 1e-6
    assert abs(angle(a, -2 * a) - 180.0) < 1e-6
    assert angle(torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]])) == pytest.approx(90.0, abs=1e-12)


def test_angle_is_of_the_whole_tensor() -> None:
    """cos = (1*1 + 2*0 + 2*0) / (3 * 1)."""
    a, b = torch.tensor([[1.0, 2.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert angle(a, b) == pytest.approx(math.degrees(math.acos(1 / 3)), abs=1e-9)


def test_norm_ratio() -> None:
    assert norm_ratio(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])) == 2.5
    assert norm_ratio(torch.zeros(3), torch.ones(3)) == 0.0


def test_zero_tensors_give_nan() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    assert math.isnan(angle(zero, one))
    assert math.isnan(angle(one, zero))
    assert math.isnan(angle(zero, zero))
    assert math.isnan(norm_ratio(one, zero))
    assert math.isnan(norm_ratio(zero, zero))


def net(dropout: float = 0.3) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout)),
        *(nn.Conv2d(4, 3, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 6), nn.ReLU(), nn.Linear(6, 4)),
    ).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(8, 2, 8, 8, dtype=torch.double, generator=generator), torch.arange(8) % 4


LAYERS = ["0", "4", "7", "9"]


def test_layer_alignment_by_hand() -> None:
    rule = apical.FeedbackAlignment(net())
    rule.feedback.get_buffer("4").copy_(-3 * rule.model[4].weight.detach())
    rule.feedback.get_buffer("9").copy_(0.5 * rule.model[9].weight.detach())
    result = layer_alignment(rule)
    assert list(result) == ["4", "7", "9"]
    assert result["4"]["weight_alignment"] == pytest.approx(180.0, abs=1e-6)
    assert result["4"]["norm_ratio"] == pytest.approx(3.0)
    assert result["9"]["weight_alignment"] == pytest.approx(0.0, abs=1e-6)
    assert result["9"]["norm_ratio"] == pytest.approx(0.5)
    assert 60 < result["7"]["weight_alignment"] < 120  # independent draws
    assert layer_alignment(apical.Backprop(net())) == {}


def test_gradient_alignment_of_backprop_is_zero_in_every_layer() -> None:
    result = gradient_alignment(apical.Backprop(net()), *batch())
    assert list(result) == LAYERS
    for values in result.values():
        assert values == {"gradient_alignment": 0.0, "gradient_norm_ratio": 1.0}


def test_gradient_alignment_of_feedback_alignment() -> None:
    """The last layer is exact, with the same dropout mask for both; the others are not, until B = W makes them so."""
    rule = apical.FeedbackAlignment(net())
    result = gradient_alignment(rule, *batch())
    assert result["9"]["gradient_alignment"] == pytest.approx(0.0, abs=1e-9)
    assert result["9"]["gradient_norm_ratio"] == pytest.approx(1.0, abs=1e-12)
    assert all(result[name]["gradient_alignment"] > 5 for name in ("0", "4", "7"))
    for name, layer in rule.layers.items():
        rule.feedback.get_buffer(key(name)).copy_(2 * layer.weight.detach())
    doubled = gradient_alignment(rule, *batch())
    for number, name in enumerate(reversed(LAYERS)):
        assert doubled[name]["gradient_alignment"] == pytest.approx(0.0, abs=1e-6)
        assert doubled[name]["gradient_norm_ratio"] == pytest.approx(2.0**number)


def test_gradients_are_those_of_training_mode_and_of_the_rule() -> None:
    """Also when the rule is in evaluation mode: BatchNorm uses the batch, and the rule's gradient is its own."""
    rule = apical.FeedbackAlignment(net(dropout=0.0))
    rule.eval()
    own, exact = gradients(rule, *batch())
    rule.train()
    rule(*batch()).backward()
    for name in LAYERS:
        assert torch.equal(own[name], rule.model.get_submodule(name).weight.grad)
    rule.detach()
    rule.zero_grad()
    apical.Backprop(rule.model)(*batch()).backward()
    for name in LAYERS:
        assert torch.allclose(exact[name], rule.model.get_submodule(name).weight.grad, rtol=0, atol=1e-12)


def test_last_layer_is_exact_also_when_the_rule_draws_random_numbers() -> None:
    result = gradient_alignment(apical.WeightMirror(net(), warmup=0), *batch())
    assert result["9"]["gradient_alignment"] == pytest.approx(0.0, abs=1e-9)


def test_frozen_layers_are_left_out() -> None:
    model = net()
    model[0].requires_grad_(False)
    assert list(gradient_alignment(apical.Backprop(model), *batch())) == LAYERS[1:]


RULES: dict[str, Callable[[nn.Module], CreditRule]] = {
    "bp": apical.Backprop,
    "fa": apical.FeedbackAlignment,
    "dfa": apical.DirectFeedbackAlignment,
    "brsf": partial(apical.SignSymmetry, variant="batchwise"),
    "kp": apical.KolenPollack,
    "wm": partial(apical.WeightMirror, warmup=2),
    "pfa": apical.ProductFeedbackAlignment,
    "pfa-fused": partial(apical.ProductFeedbackAlignment, form="fused"),
}


def step(rule: CreditRule, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    rule(*batch()).backward()
    optimizer.step()


@pytest.mark.parametrize("name", RULES)
def test_nothing_is_changed(name: str) -> None:
    """Weights, gradients, buffers, modes and random state; the next steps are bit-equal to an unwatched twin's."""
    torch.manual_seed(3)
    rule = RULES[name](net())
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    step(rule, optimizer)
    twin = copy.deepcopy(rule)
    its_optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    rule.model[1].eval()
    twin.model[1].eval()
    rule.model[9].bias.grad = None
    modes = [module.training for module in rule.modules()]
    state = copy.deepcopy(rule.state_dict())
    grads = [(p.grad, None if p.grad is None else p.grad.clone()) for p in rule.parameters()]
    rng = torch.get_rng_state()
    layer_alignment(rule)
    gradient_alignment(rule, *batch())
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in rule.modules()] == modes
    assert rule.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in rule.state_dict().items())
    for parameter, (grad, value) in zip(rule.parameters(), grads, strict=True):
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, value)
    for each, its in ((rule, optimizer), (twin, its_optimizer)):
        torch.manual_seed(7)
        for _ in range(3):
            step(each, its)
            if each is rule:
                gradient_alignment(rule, *batch())
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in rule.state_dict().items())


def test_modes_and_gradients_are_restored_after_an_error() -> None:
    rule = apical.FeedbackAlignment(net())
    rule(*batch()).backward()
    rule.eval()
    grads = [p.grad for p in rule.parameters()]
    with pytest.raises(ConfigError, match=r"the inputs are torch.float32"):
        gradient_alignment(rule, torch.randn(2, 3, 8, 8), torch.zeros(2).long())
    assert not any(module.training for module in rule.modules())
    assert all(p.grad is grad for p, grad in zip(rule.parameters(), grads, strict=True))


def test_diagnostics_under_no_grad() -> None:
    with torch.no_grad():
        result = gradient_alignment(apical.FeedbackAlignment(net()), *batch())
    assert result["9"]["gradient_alignment"] == pytest.approx(0.0, abs=1e-9)


def test_alignment_may_be_read_between_forward_and_backward() -> None:
    rule = apical.FeedbackAlignment(net())
    credit = rule(*batch())
    layer_alignment(rule)
    credit.backward()
