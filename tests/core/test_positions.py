"""Which errors a unit hears that has places itself: pixels hear their own pixel's, moments their own moment's."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical.errors import UnsupportedModelError

N = 3


def gradients(rule: Any, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    rule.model.zero_grad()
    rule(inputs, targets).backward()
    return [parameter.grad.clone() for parameter in rule.model.parameters()]


def close(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.allclose(a.flatten(), b.flatten(), rtol=1e-10, atol=1e-14) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
@pytest.mark.parametrize("rule", [apical.DirectFeedbackAlignment, apical.TopDownCreditAssignment])
def test_every_pixel_hears_its_own_error(rule: Any, kind: Any) -> None:
    """Convolutions of one pixel are a dense network of which each pixel is a sample."""
    torch.manual_seed(0)
    images = nn.Sequential(kind(4, 6, 1), nn.Tanh(), kind(6, 5, 1), nn.ReLU(), kind(5, 3, 1)).double()
    pixels = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    pixels.load_state_dict({name: p.view(p.shape[:2]) if p.dim() > 1 else p for name, p in images.state_dict().items()})
    size = (4, 4) if kind is nn.Conv2d else (7,)
    inputs, targets = torch.randn(N, 4, *size).double(), torch.randint(3, (N, *size))
    of_images, of_pixels = rule(images), rule(pixels)
    rows, classes = inputs.movedim(1, -1).flatten(0, -2), targets.flatten()
    of_images(inputs, targets)
    of_pixels(rows, classes)
    state = of_images.state_dict()
    of_pixels.load_state_dict({name: state[name].view(value.shape) for name, value in of_pixels.state_dict().items()})
    assert close(gradients(of_images, inputs, targets), gradients(of_pixels, rows, classes))


class Film(nn.Module):
    """A convolution on every moment by itself, whose map is a unit with moments and samples in front.

    Args:
        moments: T; of one image if the batch has no moments.
        first: (T, N, ...), else (N, T, ...).
        answers: whether it answers at each moment, or once by the mean.
    """

    def __init__(self, moments: int, first: bool, answers: bool) -> None:
        super().__init__()
        self.moments, self.first, self.answers = moments, first, answers
        self.conv, self.act, self.head = nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Linear(4 * 9, 5)

    def hidden(self, images: Tensor) -> Tensor:
        """(N, 2, 5, 5) -> the pre-activation, (T, N, 4, 3, 3) or (N, T, 4, 3, 3)."""
        times = torch.arange(1, self.moments + 1, dtype=images.dtype)
        film = torch.stack([images * t for t in times], 0 if self.first else 1)
        return self.conv(film.flatten(0, 1)).view(*film.shape[:2], 4, 3, 3)

    def forward(self, images: Tensor) -> Tensor:
        scores = self.head(self.act(self.hidden(images)).flatten(2))
        if not self.answers:
            return scores.mean(0 if self.first else 1)
        return scores.transpose(0, 1) if self.first else scores


@pytest.mark.parametrize("moments", [2, N, 4])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("answers", [True, False])
def test_maps_with_moments_and_samples_in_front(moments: int, first: bool, answers: bool) -> None:
    torch.manual_seed(0)
    model = Film(moments, first, answers).double()
    inputs = torch.randn(N, 2, 5, 5).double()
    targets = torch.randint(5, (N, moments) if answers else (N,))

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, -2), targets.flatten())

    rule = apical.DirectFeedbackAlignment(model, loss=loss)
    found = gradients(rule, inputs, targets)
    (b,) = rule.feedback.buffers()
    output = model(inputs).detach().requires_grad_()
    (error,) = torch.autograd.grad(loss(output, targets), output)
    hidden = model.hidden(inputs)
    if answers:  # each moment its own error, in equal parts for its pixels
        assert b.shape == (5, 4)
        signal = ((error.transpose(0, 1) if first else error) @ b)[..., None, None].expand(hidden.shape) / 9
    elif first:  # each moment alike, with a row of B for each neuron
        assert b.shape == (5, 4 * 9)
        signal = (error @ b).view(1, N, 4, 3, 3).expand(hidden.shape) / moments
    else:
        assert b.shape == (5, moments * 4 * 9)
        signal = (error @ b).view(hidden.shape)
    expected = torch.autograd.grad(torch.tanh(hidden), [*model.conv.parameters()], signal)
    exact = torch.autograd.grad(loss(model(inputs), targets), [*model.head.parameters()])
    assert close(found, [*expected, *exact])
    smaller = gradients(rule, inputs[:2], targets[:2])
    assert all(bool(gradient.any()) for gradient in smaller)


class Flat(Film):
    """The unit is the map in one row, of each moment."""

    def forward(self, images: Tensor) -> Tensor:
        scores = self.head(self.act(self.hidden(images).flatten(2)))
        return scores.mean(0 if self.first else 1)


@pytest.mark.parametrize("samples", [3, 4, 5])  # one of them as many as channels
@pytest.mark.parametrize("first", [True, False])
def test_maps_in_one_row_are_as_many_channels(samples: int, first: bool) -> None:
    torch.manual_seed(0)
    model, inputs, targets = (
        Flat(2, first, False).double(),
        torch.randn(samples, 2, 5, 5).double(),
        torch.arange(samples) % 5,
    )
    rule = apical.DirectFeedbackAlignment(model)
    found = gradients(rule, inputs, targets)
    (b,) = rule.feedback.buffers()
    assert b.shape == (5, 4 * 9)
    output = model(inputs).detach().requires_grad_()
    (error,) = torch.autograd.grad(F.cross_entropy(output, targets), output)
    hidden = model.hidden(inputs).flatten(2)
    signal = (error @ b).unsqueeze(0 if first else 1).expand(hidden.shape) / 2
    assert close(found[:2], list(torch.autograd.grad(torch.tanh(hidden), [*model.conv.parameters()], signal)))


class Scaled(nn.Module):
    """The layers are also called on the unit matrix, for the norms of their weights, as DoRA does it."""

    def __init__(self, detached: bool) -> None:
        super().__init__()
        self.up, self.a, self.b, self.head = (nn.Linear(*size) for size in ((6, 8), (6, 2), (2, 8), (8, 3)))
        self.detached = detached

    def forward(self, x: Tensor) -> Tensor:
        norm = (self.up.weight.detach() + self.b(self.a(torch.eye(6).to(x))).T).norm(dim=1)
        scale = norm.detach() if self.detached else norm
        return self.head(torch.relu((self.up(x) + self.b(self.a(x))) / scale))


@pytest.mark.parametrize("rule", [apical.DirectFeedbackAlignment, apical.TopDownCreditAssignment])
def test_units_that_are_not_made_of_the_batch(rule: Any) -> None:
    """Where they are detached nothing is told to them; else they are refused with the remedy, which works."""
    inputs, targets = torch.randn(N, 6).double(), torch.arange(N) % 3
    detached = rule(Scaled(True).double())
    gradients(detached, inputs, targets)
    assert detached.placement(inputs).path("a") == "cut at 'a#1'"
    with pytest.raises(UnsupportedModelError, match=r"unit at 'a' .* list its layers in exact"):
        rule(Scaled(False).double())(inputs, targets).backward()
    gradients(rule(Scaled(False).double(), exact=("a", "b")), inputs, targets)
