"""Rules of the feedback-alignment family on weights that somebody puts in for one call."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import apical
from apical.core.effective import measured_weight
from apical.errors import ConfigError, UnsupportedModelError

RULES: dict[str, Callable[..., Any]] = {
    "fa": apical.FeedbackAlignment,
    "signs": apical.SignSymmetry,
    "mirror": partial(apical.WeightMirror, warmup=3, rate=0.0),
    "kp": apical.KolenPollack,
    "pfa": partial(apical.ProductFeedbackAlignment, expansion=2),
    "pfa literal": partial(apical.ProductFeedbackAlignment, expansion=2, form="literal"),
}
each_rule = pytest.mark.parametrize("make", RULES.values(), ids=RULES)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(7, 5, generator=generator, dtype=torch.double), torch.arange(7) % 3


def build(make: Callable[..., Any], model: nn.Module) -> Any:
    torch.manual_seed(2)
    return make(model)


@each_rule
def test_weights_of_a_functional_call_are_those_that_count(make: Any) -> None:
    """As if the module had them: the signs of sign symmetry too, and the gradient of KP's and PFA's feedback."""
    expected, rule = build(make, net()), build(make, net())
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in rule.named_parameters()}
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter.copy_(weights[name])
    expected(*batch()).backward()
    leaves = {name: value.requires_grad_() for name, value in weights.items()}
    torch.func.functional_call(rule, leaves, batch()).loss.backward()
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(leaves[name].grad, parameter.grad, rtol=1e-12, atol=1e-13)


@each_rule
def test_transforms_are_refused(make: Any) -> None:
    rule = build(make, net())
    weights = {name: p.detach().clone() for name, p in rule.named_parameters()}
    with pytest.raises(ConfigError, match=r"transforms of torch.func .*backward\(\)"):
        torch.func.grad(lambda w: torch.func.functional_call(rule, w, batch()).loss)(weights)


@each_rule
def test_a_model_that_moves_to_another_precision_without_its_rule(make: Any) -> None:
    """The feedback stays as it is; it is the same rule up to its rounding."""
    wide, moved = build(make, net().float()), build(make, net().float())
    wide.double()
    moved.model.double()
    for rule in (wide, moved):
        rule(*batch()).backward()
    for own, expected in zip(moved.model.parameters(), wide.model.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad, rtol=1e-5, atol=1e-6)


NORMED: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 6),
    "convolution": lambda: nn.Conv2d(4, 6, 3),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
}


@pytest.mark.parametrize("kind", NORMED)
def test_measuring_a_spectrally_normed_weight_takes_no_power_iteration(kind: str) -> None:
    torch.manual_seed(0)
    layer = parametrizations.spectral_norm(NORMED[kind]().double())
    before = {name: value.clone() for name, value in layer.named_buffers()}
    measured = measured_weight(layer)
    assert all(torch.equal(value, before[name]) for name, value in layer.named_buffers())
    assert torch.allclose(measured, layer.weight, rtol=1e-12, atol=1e-14)  # the next call's


@pytest.mark.parametrize("name", RULES)
def test_making_a_rule_moves_no_buffers(name: str) -> None:
    model = net()
    parametrizations.spectral_norm(model[2])
    before = {key: value.clone() for key, value in model.named_buffers()}
    rule = build(RULES[name], model)
    assert all(torch.equal(value, before[key]) for key, value in model.named_buffers())
    rule(*batch()).backward()
    plain = net()
    parametrizations.spectral_norm(plain[2])
    plain(batch()[0])
    for key, value in plain.named_buffers():
        assert torch.equal(value, model.get_buffer(key)), key


class Severed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class Blind(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class Numbered(nn.Linear):
    def forward(self, number: int, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class Numbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(5, 5), Numbered(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(1, self.first(x))  # type: ignore[no-any-return]


ODD: dict[str, Callable[[], nn.Module]] = {
    "severed": lambda: nn.Sequential(nn.Linear(5, 5), Severed(5, 3)),
    "blind": lambda: nn.Sequential(nn.Linear(5, 5), Blind(5, 3)),
    "numbered": Numbers,
}


@pytest.mark.parametrize("kind", ODD)
@each_rule
def test_layers_that_no_feedback_can_stand_in_for_are_refused_by_name(make: Any, kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"layer '(1|layer)'"):
        build(make, ODD[kind]().double())(*batch())


class OverTime(nn.Linear):
    """Twice the weight, on (batch, steps, features) and nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        samples, steps, features = x.shape
        rows = nn.functional.linear(x.reshape(samples * steps, features), 2 * self.weight, self.bias)
        return rows.view(samples, steps, -1)


@pytest.mark.parametrize("name", ["fa", "signs", "kp", "pfa"])
def test_a_layer_that_takes_sequences_alone_has_the_feedback_of_its_weight(name: str) -> None:
    """Feedback alignment with the weight applied is backpropagation; others are it with their own feedback."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), OverTime(4, 3), nn.Flatten()).double()
    x, y = torch.randn(6, 2, 5, dtype=torch.double), torch.arange(6)
    rule = build(RULES[name], model)
    if name == "fa":
        rule.set_feedback("2", 2 * model[2].weight.detach())
    rule(x, y).backward()
    credit = model[0].weight.grad.clone()
    feedback = rule.feedback_weight("2")
    h = torch.tanh(model[0](x))
    delta = torch.autograd.grad(nn.functional.cross_entropy(output := model[2:](h), y), output)[0].view(6, 2, 3)
    below = (delta @ feedback) * (1 - h**2)
    torch.testing.assert_close(credit, torch.einsum("bti,btj->ij", below, x), rtol=1e-11, atol=1e-13)
    if name == "signs":
        assert torch.equal(feedback.sign(), model[2].weight.sign())
