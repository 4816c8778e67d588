"""Complex nudges through pooling in every place, against the energy of complex states differentiated by autograd."""

import cmath
from collections.abc import Callable
from math import pi

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical.core.pooling import SoftmaxPool2d
from apical.core.sigmoids import DoubleSiLU, ShiftedSigmoid
from apical.errors import UnsupportedModelError

Map = Callable[[Tensor], Tensor]


def windows(z: Tensor, size: int, stride: int) -> Tensor:
    return z.unfold(2, size, stride).unfold(3, size, stride).flatten(4)


def mean_of_windows(z: Tensor) -> Tensor:
    return windows(z, 2, 2).mean(-1)


def softmax_of_windows(z: Tensor) -> Tensor:
    each = windows(z, 2, 2)
    return (each * each.exp()).sum(-1) / each.exp().sum(-1)


def padded_mean(z: Tensor) -> Tensor:
    """AvgPool2d(3, 2, padding=1), with the zeros counted."""
    return windows(F.pad(z, (1, 1, 1, 1)), 3, 2).sum(-1) / 9


def halved_to_eight(z: Tensor) -> Tensor:
    """AdaptiveAvgPool2d(8) of sides 16 and 8."""
    return mean_of_windows(z) if z.shape[-1] == 16 else z


def identity(z: Tensor) -> Tensor:
    return z


# Modules between layer and activation of both convolutions, before the second one, and before the read-out.
NETWORKS: dict[str, tuple[list[nn.Module], list[nn.Module], list[nn.Module], Map, Map, Map]] = {
    "between": ([nn.AvgPool2d(2)], [], [], mean_of_windows, identity, identity),
    "before": ([], [nn.AvgPool2d(2)], [], identity, mean_of_windows, identity),
    "padded": ([nn.AvgPool2d(3, 2, padding=1)], [], [], padded_mean, identity, identity),
    "adaptive between": ([nn.AdaptiveAvgPool2d(8)], [], [], halved_to_eight, identity, identity),
    "adaptive before": ([], [nn.AdaptiveAvgPool2d(8)], [], identity, mean_of_windows, identity),
    "before the read-out": ([nn.AvgPool2d(2)], [], [nn.AvgPool2d(2)], mean_of_windows, identity, mean_of_windows),
    "average, then softmax": (
        [nn.AvgPool2d(2), SoftmaxPool2d(2)],
        [],
        [],
        lambda z: softmax_of_windows(mean_of_windows(z)),
        identity,
        identity,
    ),
    "softmax, then average": (
        [SoftmaxPool2d(2), nn.AvgPool2d(2)],
        [],
        [],
        lambda z: mean_of_windows(softmax_of_windows(z)),
        identity,
        identity,
    ),
}


def build(name: str, activation: nn.Module) -> tuple[nn.Sequential, int, int]:
    """The network for images 16 x 16, side of its first state, side of its second."""
    between, before, top, *_ = NETWORKS[name]
    torch.manual_seed(0)
    conv1, conv2 = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)
    body = [conv1, *between, activation, *before, conv2, *between, activation, *top]
    x = torch.zeros(1, 1, 16, 16)
    first = nn.Sequential(conv1, *between)(x)
    second = nn.Sequential(*body[: len(body) - len(top)])(x)
    features = nn.Sequential(*body)(x).numel()
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(features, 3)).double(), first.shape[-1], second.shape[-1]


@pytest.mark.parametrize("points", [3, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_pooling_settles_by_the_complex_energy(name: str, points: int) -> None:
    model, side1, side2 = build(name, ShiftedSigmoid() if points == 4 else DoubleSiLU())
    between, before, top = NETWORKS[name][3:]
    torch.manual_seed(1)
    x, y, beta, kind = torch.rand(3, 1, 16, 16).double(), torch.arange(3), 0.3, torch.complex128
    rule = apical.EquilibriumPropagation(
        model, estimator="holomorphic", points=points, beta=beta, free_steps=7, nudged_steps=4, input_shape=(1, 16, 16)
    )
    rule(x, y).backward()
    conv1, conv2, reader = (m for m in model if isinstance(m, nn.Conv2d | nn.Linear))
    act, label = rule.chain.stages[0].activation, F.one_hot(y, 3).double()

    def conv(layer: nn.Conv2d, s: Tensor) -> Tensor:
        return F.conv2d(s, layer.weight.to(kind), layer.bias.to(kind), padding=1)

    def phi(s: list[Tensor], nudge: complex) -> Tensor:
        total = (s[0] * between(conv(conv1, x.to(kind)))).sum() + (s[1] * between(conv(conv2, before(s[0])))).sum()
        logits = top(s[1]).flatten(1) @ reader.weight.T.to(kind) + reader.bias
        return total - nudge * (logits.exp().sum(1).log() - (logits * label).sum(1)).sum()

    def settle(s: list[Tensor], steps: int, nudge: complex) -> list[Tensor]:
        for _ in range(steps):
            leaves = [each.detach().requires_grad_() for each in s]
            moves = torch.autograd.grad(phi(leaves, nudge), leaves, torch.ones((), dtype=kind))
            s = [act(move.conj()) for move in moves]  # autograd gives the conjugate of a derivative
        return s

    zeros = [torch.zeros(3, 3, side1, side1, dtype=kind), torch.zeros(3, 2, side2, side2, dtype=kind)]
    free = settle(zeros, 7, 0)
    objective = torch.zeros((), dtype=kind)
    for p in range(points):
        nudge = beta * cmath.exp(2j * pi * p / points)
        objective = objective - phi(settle(free, 4, nudge), nudge) / nudge / points / 3
    parameters = list(model.parameters())
    for parameter, expected in zip(parameters, torch.autograd.grad(objective.real, parameters), strict=True):
        assert expected.abs().max() > 1e-6
        assert (parameter.grad - expected).abs().max() < 1e-12


@pytest.mark.parametrize("cycles", [0, 1])
@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("name", ["between", "adaptive between", "softmax, then average"])
def test_every_form_runs_in_single_precision_and_agrees_with_double(name: str, directed: bool, cycles: int) -> None:
    grads = []
    for dtype in (torch.float64, torch.float32):
        model, *_ = build(name, ShiftedSigmoid())
        torch.manual_seed(1)
        rule = apical.EquilibriumPropagation(
            model.float(),
            estimator="holomorphic",
            points=4,
            cycles=cycles,
            weights="directed" if directed else "symmetric",
            free_steps=5,
            nudged_steps=4,
            input_shape=(1, 16, 16),
        ).to(dtype)
        x = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(2))
        rule(x.to(dtype), torch.arange(3)).backward()
        grads.append([p.grad.double() for p in rule.parameters()])
    for double, single in zip(*grads, strict=True):
        assert (double - single).norm() < 3e-3 * double.norm()  # going round, what is alike in all phases cancels in the end


@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(2), nn.AdaptiveMaxPool2d(4), nn.LPPool2d(2.0, 2), nn.FractionalMaxPool2d(2, 4)]
)
@pytest.mark.parametrize("between", [True, False])
def test_pooling_that_is_not_analytic_is_refused_by_name(pool: nn.Module, between: bool) -> None:
    front = [pool, ShiftedSigmoid()] if between else [ShiftedSigmoid(), pool]
    model = nn.Sequential(
        *(nn.Conv2d(1, 3, 3, padding=1), *front, nn.Conv2d(3, 2, 3), ShiftedSigmoid(), nn.Flatten(), nn.Linear(8, 3))
    )
    with pytest.raises(UnsupportedModelError, match=type(pool).__name__):
        apical.EquilibriumPropagation(model, estimator="holomorphic", input_shape=(1, 8, 8))


def test_an_activation_that_takes_complex_numbers_but_is_not_analytic_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Softsign(), nn.Linear(6, 3))
    with pytest.raises(UnsupportedModelError, match=r"'0' \(Softsign\) is not analytic"):
        apical.EquilibriumPropagation(model, estimator="holomorphic", bounded=False)
    apical.EquilibriumPropagation(model, estimator="holomorphic", points=2)(torch.randn(2, 4), torch.arange(2)).backward()


def test_pooling_behind_the_read_out_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Sigmoid(), nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1))
    with pytest.raises(
        UnsupportedModelError, match="'2' is the read-out, not a state, so AdaptiveAvgPool2d cannot follow it"
    ):
        apical.EquilibriumPropagation(model, input_shape=(1, 8, 8))


def unrolled(model: nn.Sequential, last_state: int, x: Tensor, y: Tensor, steps: int = 60) -> list[Tensor]:
    """Gradients of the settled answer's loss by autograd; the modules up to `last_state` make the first layer's states."""
    first, reader = model[: last_state + 1], model[last_state + 1 :]
    layer, *between = [module for module in first if not isinstance(module, nn.Tanh)]
    s = torch.tanh(x.new_zeros(first(x).shape))
    middle = [module for module in between if isinstance(module, nn.Linear)]
    if not middle:
        s = first(x)
    else:  # two layers of states, whose potentials are W_1 x + b_1 + W_2^T s_2 and W_2 s_1 + b_2
        s = torch.zeros(len(x), *model[:2](x).shape[1:])
        t = torch.zeros(first(x).shape)
        for _ in range(steps):
            v, w = layer(x) + t @ middle[0].weight, middle[0](s)
            s, t = torch.tanh(v), torch.tanh(w)
        s = t
    return list(torch.autograd.grad(F.cross_entropy(reader(s), y), list(model.parameters())))


READ_OUTS: dict[str, tuple[Callable[[], list[nn.Module]], int]] = {
    "max": (lambda: [nn.Conv2d(2, 3, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 3)], 1),
    "max, padded": (lambda: [nn.Conv2d(2, 3, 3), nn.Tanh(), nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(27, 3)], 1),
    "softmax": (lambda: [nn.Conv2d(2, 3, 3), nn.Tanh(), SoftmaxPool2d(2), nn.Flatten(), nn.Linear(27, 3)], 1),
    "activation": (lambda: [nn.Flatten(1, -1), nn.Linear(128, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh()], 2),
    "rows": (lambda: [nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 8), nn.Tanh(), nn.Flatten(), nn.Linear(128, 3)], 3),
}


@pytest.mark.parametrize("estimator", ["five-point", "holomorphic"])
@pytest.mark.parametrize("name", READ_OUTS)
def test_read_outs_nudge_the_states_that_they_read(name: str, estimator: str) -> None:
    """Pooling before the read-out that is another map at every state, an activation behind it, layers on rows of vectors."""
    torch.set_default_dtype(torch.double)
    try:
        torch.manual_seed(0)
        layers, last_state = READ_OUTS[name]
        model = nn.Sequential(*layers())
        for parameter in model.parameters():
            parameter.data.mul_(0.4)
        x, y = torch.rand(4, 2, 8, 8), torch.arange(4) % 3
        options: dict[str, object] = {"beta": 0.05, "points": 8} if estimator == "holomorphic" else {"beta": 1e-4}
        options |= {"output": "read-out", "input_shape": (2, 8, 8), "free_steps": 60, "nudged_steps": 60}
        if estimator == "holomorphic" and "max" in name:
            with pytest.raises(UnsupportedModelError, match="not support complex states"):
                apical.EquilibriumPropagation(model, estimator=estimator, **options)
            return
        apical.EquilibriumPropagation(model, estimator=estimator, **options)(x, y).backward()
        head = [nn.Flatten(1, -1)] if isinstance(model[0], nn.Flatten) else []
        own, place = (model[1:], last_state - 1) if head else (model, last_state)
        for parameter, exact in zip(model.parameters(), unrolled(own, place, x.flatten(1) if head else x, y), strict=True):
            torch.testing.assert_close(parameter.grad, exact, rtol=1e-7, atol=1e-9)
    finally:
        torch.set_default_dtype(torch.float)
