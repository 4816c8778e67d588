"""The exact forms of product feedback alignment agree on convolutions of every kind."""

import pytest
import torch
from torch import Tensor, nn

import apical
from apical.core.units import key

PFA = apical.ProductFeedbackAlignment


def network() -> nn.Sequential:
    """Strided, grouped, dilated, circularly padded and transposed convolutions with BatchNorm; inputs (n, 2, 8, 8)."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.ReLU()),
        *(nn.Conv2d(6, 4, 3, padding=2, dilation=2, padding_mode="circular"), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.ConvTranspose2d(4, 4, 3, stride=2, groups=2, output_padding=1, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)),
    ).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6, 2, 8, 8, dtype=torch.double, generator=generator)
    return x, torch.randint(0, 5, (6,), generator=generator)


def make(form: str, **options: object) -> apical.ProductFeedbackAlignment:
    model = network()
    torch.manual_seed(1)
    return PFA(model, form=form, **options)


def gradients(rule: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in rule.named_parameters()}


OPTIONS = [{}, {"expansion": 1.5}, {"feedback": "orthogonal"}, {"density": 0.5}]
IDS = ["lambda-10", "lambda-1.5", "orthogonal", "sparse"]


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_fused_equals_literal(options: dict[str, object]) -> None:
    literal, fused = make("literal", **options), make("fused", **options)
    for rule in (literal, fused):
        rule(*batch(0)).backward()
    expected, found = gradients(literal), gradients(fused)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-12 * max(1.0, float(value.abs().max())), name


@pytest.mark.parametrize("options", OPTIONS[:3], ids=IDS[:3])
def test_closed_equals_literal_over_training(options: dict[str, object]) -> None:
    literal, closed = make("literal", **options), make("closed", **options)
    for rule in (literal, closed):
        optimizer = torch.optim.SGD(rule.parameters(), lr=0.05, momentum=0.9)
        for step in range(60):
            optimizer.param_groups[0]["lr"] = 0.05 if step < 30 else 0.01
            optimizer.param_groups[0]["weight_decay"] = 0.05 if step < 15 else 1e-3
            optimizer.zero_grad()
            rule(*batch(step)).backward()
            optimizer.step()
    for a, b in zip(literal.model.parameters(), closed.model.parameters(), strict=True):
        assert (a - b).abs().max() <= 1e-10 * max(1.0, float(a.detach().abs().max()))
    path = closed.feedback_weights()
    for name, value in literal.feedback_weights().items():
        assert (path[name] - value).abs().max() <= 1e-10 * max(1.0, float(value.abs().max())), name


def test_expansion_of_a_grouped_convolution_stays_within_its_groups() -> None:
    b = make("literal").expansion.get_buffer(key("3"))  # 6 output channels in 2 groups, 60 expanded
    assert b.shape == (6, 60)
    assert (b[:3, 30:] == 0).all()
    assert (b[3:, :30] == 0).all()
    assert (b[:3, :30] != 0).all()


def test_the_path_is_what_the_error_takes() -> None:
    """The error one convolution hands down is that of the same convolution carrying `B R`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, padding=1), nn.Flatten(), nn.Linear(80, 2)).double()
    rule = PFA(model)
    inputs, targets = torch.randn(2, 3, 4, 4, dtype=torch.double), torch.tensor([0, 1])
    rule(inputs, targets).backward()
    found = model[0].bias.grad.clone()
    rule.detach()
    hidden = model[0](inputs).detach().requires_grad_()
    upper = model[1](hidden).detach().requires_grad_()
    path = rule.feedback_weights()
    error = torch.softmax(model[3](upper.flatten(1)), dim=1)
    error = (error - nn.functional.one_hot(targets, 2)) / 2 @ path["3"]
    nn.functional.conv2d(hidden, path["1"], padding=1).backward(error.view_as(upper))
    assert torch.allclose(found, hidden.grad.sum(dim=(0, 2, 3)), rtol=0, atol=1e-12)
