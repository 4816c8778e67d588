"""Local roots: the gradient each hands over is the outer product, and nothing else."""

import pytest
import torch
from torch import Tensor, nn

from apical.core.chain import Chain, Stage
from apical.core.credit import Credit
from apical.core.local import block_roots, local_roots, outer

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "dense": (nn.Linear(5, 4), (5,)),
    "dense-no-bias": (nn.Linear(5, 4, bias=False), (5,)),
    "dense-rows": (nn.Linear(5, 4), (3, 5)),
    "conv1d": (nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 7)),
    "conv2d": (nn.Conv2d(2, 4, 3, padding=1, groups=2), (2, 5, 5)),
    "conv2d-no-bias": (nn.Conv2d(2, 3, 2, dilation=2, bias=False), (2, 5, 5)),
    "same": (nn.Conv2d(2, 3, 2, padding="same"), (2, 5, 5)),
    "circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
    "pooled": (nn.Sequential(nn.Tanh(), nn.Conv2d(2, 2, 1), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(2, 3, 2)), (2, 6, 6)),
}


def backward(stage: Stage, signal: Tensor, rates: Tensor, product: Tensor | None = None, scale: float | None = None) -> None:
    """Hand the gradients over, by the credit itself or by a multiple of its loss."""
    credit = Credit.of(local_roots(stage, signal, rates, product), signal, signal.detach().sum())
    credit.backward() if scale is None else (scale * credit.loss).backward()


def problem(name: str) -> tuple[Stage, Tensor, Tensor]:
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    stage = Chain(layer.double().requires_grad_(), shape).stages[-1]
    rates = torch.randn(3, *stage.input_shape, dtype=torch.double)
    return stage, rates, torch.randn(3, *stage.shape, dtype=torch.double)


def exact(stage: Stage, signal: Tensor, rates: Tensor) -> list[Tensor]:
    """What autograd makes of the signal at the layer's output."""
    return list(torch.autograd.grad((stage.layer(stage.seen(rates)) * signal).sum(), list(stage.layer.parameters())))


@pytest.mark.parametrize("name", LAYERS)
def test_root_writes_the_outer_product(name: str) -> None:
    stage, rates, signal = problem(name)
    stage.layer.zero_grad()
    expected = exact(stage, signal, rates)
    backward(stage, signal, rates)
    for parameter, each in zip(stage.layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, each, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(outer(stage, signal, rates), expected[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", LAYERS)
def test_known_product_serves_the_weight_and_the_signal_the_bias(name: str) -> None:
    stage, rates, signal = problem(name)
    stage.layer.zero_grad()
    product = torch.randn_like(stage.layer.weight)
    backward(stage, signal, rates, product)
    assert torch.equal(stage.layer.weight.grad, product)
    if stage.layer.bias is not None:
        torch.testing.assert_close(stage.layer.bias.grad, exact(stage, signal, rates)[1], rtol=1e-12, atol=1e-13)


def test_outer_product_of_dense_layers_is_written_out() -> None:
    stage, rates, signal = problem("dense")
    explicit = torch.stack([torch.outer(s, r) for s, r in zip(signal, rates, strict=True)]).sum(0)
    torch.testing.assert_close(outer(stage, signal, rates), explicit, rtol=1e-12, atol=1e-14)


def test_roots_scale_and_accumulate() -> None:
    stage, rates, signal = problem("conv2d")
    stage.layer.zero_grad()
    expected = exact(stage, signal, rates)
    backward(stage, signal, rates, scale=2.0)
    backward(stage, signal, rates)
    for parameter, each in zip(stage.layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, 3 * each, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("known", [False, True])
def test_frozen_parameters_are_left_out(known: bool) -> None:
    stage, rates, signal = problem("dense")
    expected = exact(stage, signal, rates)
    product = expected[0] if known else None
    for frozen in ("weight", "bias"):
        stage.layer.zero_grad()
        stage.layer.requires_grad_()
        getattr(stage.layer, frozen).requires_grad_(False)
        backward(stage, signal, rates, product)
        assert getattr(stage.layer, frozen).grad is None
        trained, index = ("bias", 1) if frozen == "weight" else ("weight", 0)
        torch.testing.assert_close(getattr(stage.layer, trained).grad, expected[index], rtol=1e-12, atol=1e-14)
    stage.layer.requires_grad_(False)
    assert not local_roots(stage, signal, rates, product)


def test_no_gradient_leaves_through_signal_or_rates() -> None:
    stage, rates, signal = problem("dense")
    rates.requires_grad_()
    signal.requires_grad_()
    backward(stage, signal, rates)
    assert rates.grad is None
    assert signal.grad is None


def test_a_gradient_is_handed_over_without_a_copy_and_by_the_loss_too() -> None:
    weight, gradient = nn.Parameter(torch.randn(3, 2)), torch.randn(3, 2)
    expected, place = gradient.clone(), gradient.data_ptr()
    credit = Credit.of([(weight, gradient)], torch.zeros(()), torch.zeros(()))
    del gradient
    credit.backward()
    assert weight.grad is not None
    assert weight.grad.data_ptr() == place
    (0.5 * Credit.of([(weight, expected.clone())], torch.zeros(()), torch.zeros(())).loss).backward()
    torch.testing.assert_close(weight.grad, 1.5 * expected)


@pytest.mark.parametrize("size", [1e-7, 1e4, 0.0])
def test_small_signals_survive_in_half_precision(size: float) -> None:
    """1e-7 has one binary digit in float16; a loss scaled afterwards would not bring the others back."""
    torch.manual_seed(0)
    layer, given, signal = nn.Linear(6, 5), torch.randn(16, 6), size * torch.rand(16, 5)
    with torch.autocast("cpu", torch.float16):
        made = layer(given)
    (weight, gradient), (bias, summed) = block_roots([(made, signal)], layer.parameters())
    assert weight is layer.weight
    assert bias is layer.bias
    torch.testing.assert_close(gradient, signal.T @ given, rtol=5e-3, atol=5e-3 * size)
    torch.testing.assert_close(summed, signal.sum(0), rtol=5e-3, atol=0)
