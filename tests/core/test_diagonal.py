"""Gains and norms that a user wrote are known by what they do: each number of a vector acts on its own unit alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical.core.diagonal import diagonal_kind
from apical.core.layers import is_local, is_norm
from apical.errors import UnsupportedModelError

N = 6


class Own(nn.Module):
    """A module of a user around a function of (input, gain, offset)."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.gain, self.offset = nn.Parameter(torch.ones(N)), nn.Parameter(torch.zeros(N))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.gain, self.offset)


def root_mean_square(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True).sqrt()


NORMS = {
    "layer norm": lambda x, gain, offset: F.layer_norm(x, (N,), gain, offset),
    "rms norm": lambda x, gain, offset: offset + gain * x / root_mean_square(x),
    "of channels": lambda x, gain, offset: F.group_norm(x, 2, gain, offset) if x.dim() == 4 else x[:, :1],
}
GAINS = {
    "gain": lambda x, gain, offset: gain * x + offset,
    "dynamic tanh": lambda x, gain, offset: gain * torch.tanh(0.5 * x) + offset,
}
SYNAPSES = {
    "a read-out, sent to all": lambda x, gain, offset: x + (x @ gain).unsqueeze(-1) + offset,
    "other places": lambda x, gain, offset: gain.roll(1) * x + offset,
    "competition": lambda x, gain, offset: gain.softmax(0) * x + offset,
    "outer product": lambda x, gain, offset: x @ torch.outer(gain, offset + 1),
    "another shape": lambda x, gain, offset: (gain * x + offset).sum(-1),
    "no use": lambda x, gain, offset: x + offset,
    "by chance": lambda x, gain, offset: gain * x + offset + torch.rand(()),
}


@pytest.mark.parametrize("name", [*NORMS, *GAINS, *SYNAPSES])
def test_kinds(name: str) -> None:
    module = Own({**NORMS, **GAINS, **SYNAPSES}[name])
    before = torch.get_rng_state()
    assert diagonal_kind(module) == ("norm" if name in NORMS else "gain" if name in GAINS else "")
    assert torch.equal(torch.get_rng_state(), before)
    assert is_local(module) is (name not in SYNAPSES)
    assert is_norm(module) is (name in NORMS)
    assert torch.equal(module.gain, torch.ones(N))


def model(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    own = Own({**NORMS, **GAINS, **SYNAPSES}[name])
    return nn.Sequential(nn.Linear(4, N), own, nn.Tanh(), nn.Linear(N, 3)).double()


@pytest.mark.parametrize("name", ["layer norm", "rms norm", "gain"])
def test_they_get_their_exact_derivative_behind_the_rules_own_error(name: str) -> None:
    net = model(name)
    rule = apical.FeedbackAlignment(net)
    feedback = rule.feedback_weights()["3"]
    x, y = torch.randn(5, 4).double(), torch.arange(5) % 3
    rule(x, y).backward()
    hidden = net[0](x)
    above = torch.tanh(net[1](hidden))
    delta = (net[3](above).softmax(1) - F.one_hot(y, 3)) / 5  # (batch, 3)
    expected = torch.autograd.grad(above, net[1].gain, delta @ feedback)[0]
    assert net[1].gain.grad is not None
    assert (net[1].gain.grad - expected).abs().max() < 1e-14


@pytest.mark.parametrize("name", ["competition", "a read-out, sent to all"])
def test_synapses_among_vectors_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'1\.gain', '1\.offset' are orphans"):
        apical.FeedbackAlignment(model(name))


def test_forward_forward_refuses_a_norm_of_ones_own() -> None:
    with pytest.raises(UnsupportedModelError, match="fixes the norm of activity"):
        apical.ForwardForward(model("layer norm"))


class Shaped(nn.Module):
    """A norm or gain whose parameters have the axes of the maps they are made for."""

    def __init__(self, shape: tuple[int, ...], function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.gain, self.offset = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 1 + self.gain.dim() and x.dim() != self.gain.dim():
            raise ValueError("another input")
        return self.function(x, self.gain, self.offset)


def channel_norm(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """That of vit-pytorch and of ConvNeXt, over the channels of each pixel."""
    return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) * gain + offset


def response_norm(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """That of ConvNeXt V2, on (batch, height, width, channels)."""
    length = x.norm(dim=(1, 2), keepdim=True)
    return gain * (x * length / length.mean(-1, keepdim=True)) + offset + x


@pytest.mark.parametrize(
    ("shape", "function", "kind"),
    [
        ((1, N, 1, 1), channel_norm, "norm"),
        ((1, 1, 1, N), response_norm, "gain"),
        ((N, 1, 1), lambda x, gain, offset: gain * x + offset, "gain"),
        ((1, 1, N), lambda x, gain, offset: gain * x + offset, "gain"),
        ((1, N, 1), lambda x, gain, offset: gain.flip(1) * x + offset, ""),
        ((1, N, 1, 1), lambda x, gain, offset: F.conv2d(x, gain).repeat(1, N, 1, 1) + offset, ""),
    ],
)
def test_parameters_with_axes_of_size_one(shape: tuple[int, ...], function: Any, kind: str) -> None:
    assert diagonal_kind(Shaped(shape, function)) == kind


@pytest.mark.parametrize("n", [2, 3, N])
def test_sizes_do_not_hide_the_units_axis(n: int) -> None:
    for shape in ((1, n, 1, 1), (1, 1, n), (1, 1, 1, n), (n, 1)):
        assert diagonal_kind(Shaped(shape, lambda x, gain, offset: gain * x + offset)) == "gain"
