"""Loss landscapes against what mathematics says they are."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apical.diagnostics.landscape import (
    FLOATS_AT_ONCE,
    Plane,
    barrier,
    filter_normalised,
    flat,
    losses_along,
    losses_at,
    points_at_once,
    principal_plane,
    random_plane,
    surface,
    tortuosity,
    travelled,
)
from apical.errors import ConfigError

DOUBLE = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=DOUBLE)


def snapshots(coordinates: Tensor, size: int = 50, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Points (n, size) at `coordinates` (n, 2) of a plane, and the plane's orthonormal axes (2, size)."""
    axes = torch.linalg.qr(normal(size, 2, seed=seed))[0].T
    return normal(size, seed=seed + 1) + coordinates @ axes, axes


WAY = torch.tensor([[0, 0], [3, 1], [5, 3], [8, 2], [9, 4]], dtype=DOUBLE)
OTHER = torch.tensor([[0, 0], [-1, 4], [-3, 4], [-6, 1]], dtype=DOUBLE)


def test_a_planar_trajectory_lies_in_its_principal_plane() -> None:
    points, axes = snapshots(torch.cat([WAY, OTHER]))
    first, second = points[: len(WAY)], points[len(WAY) :]
    plane = principal_plane([first, second])
    assert plane.distances(points).max() < 1e-12
    torch.testing.assert_close(plane.points(plane.coordinates(points)), points, rtol=0, atol=1e-12)
    torch.testing.assert_close(plane.axes @ plane.axes.T, torch.eye(2, dtype=DOUBLE), rtol=0, atol=1e-12)
    torch.testing.assert_close(plane.origin, points.mean(0))
    spread = torch.linalg.svdvals(torch.cat([WAY, OTHER]) - torch.cat([WAY, OTHER]).mean(0)).square()
    assert plane.explained == pytest.approx((spread / spread.sum()).tolist())
    assert torch.linalg.matrix_rank(torch.cat([axes, plane.axes]), atol=1e-9) == 2
    for way in (first, first.flip(0)):  # the same components, whose signs are free
        places = principal_plane([way, second]).coordinates(way)
        assert (places[-1] > places[0]).all()


def test_what_leaves_the_plane_is_told() -> None:
    """Snapshots with a third, smaller variance: their distances are those of the singular value decomposition."""
    points = normal(8, 30, seed=5) * 0.1 + snapshots(torch.cat([WAY, OTHER])[:8], 30)[0]
    plane = principal_plane([points])
    u, s, _ = torch.linalg.svd(points - points.mean(0), full_matrices=False)
    torch.testing.assert_close(plane.distances(points), (u[:, 2:] * s[2:]).norm(dim=1))
    torch.testing.assert_close(plane.coordinates(points).abs(), (u[:, :2] * s[:2]).abs())
    assert plane.explained == pytest.approx((s.square() / s.square().sum())[:2].tolist())


def test_columns_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    points = normal(6, 37)
    whole = principal_plane([points[:4], points[4:]])
    monkeypatch.setattr("apical.diagnostics.landscape._COLUMNS", 5)
    parts = principal_plane([points[:4], points[4:]])
    torch.testing.assert_close(parts.axes, whole.axes)
    torch.testing.assert_close(parts.origin, whole.origin)


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (normal(2, 9), "on one line"),
        (torch.arange(5.0)[:, None] * torch.ones(9), "on one line"),
        (torch.ones(4, 9), "on one line"),
        (torch.full((4, 9), math.nan), "not finite"),
    ],
)
def test_snapshots_without_a_plane_are_refused(points: Tensor, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        principal_plane([points])


def test_coordinates_on_axes_that_are_not_orthogonal() -> None:
    axes = torch.stack([normal(20, seed=1), normal(20, seed=1) + 0.1 * normal(20, seed=2)])
    plane = Plane(normal(20, seed=7), axes)
    places = normal(5, 2, seed=8)
    torch.testing.assert_close(plane.coordinates(plane.points(places)), places, rtol=1e-8, atol=1e-8)
    off = torch.linalg.qr(torch.cat([axes, normal(1, 20, seed=9)]).T)[0][:, 2]
    torch.testing.assert_close(plane.distances(plane.points(places) + 3 * off), torch.full((5,), 3.0, dtype=DOUBLE))


def test_the_surface_of_a_quadratic_loss_is_that_quadratic() -> None:
    curvature = normal(12, 12) @ normal(12, 12).T
    slope, plane = normal(12, seed=2), Plane(normal(12, seed=3), normal(2, 12, seed=4))

    def losses(points: Tensor) -> Tensor:
        return 0.5 * ((points @ curvature) * points).sum(1) + points @ slope

    x, y = torch.linspace(-2, 1, 7, dtype=DOUBLE), torch.linspace(0, 3, 4, dtype=DOUBLE)
    found = surface(losses, plane, x, y, chunk=5)
    a = plane.axes @ curvature @ plane.axes.T
    b = plane.axes @ (curvature @ plane.origin + slope)
    c = losses(plane.origin[None])[0]
    for i, v in enumerate(y):
        for j, u in enumerate(x):
            expected = 0.5 * (a[0, 0] * u * u + 2 * a[0, 1] * u * v + a[1, 1] * v * v) + b[0] * u + b[1] * v + c
            assert found[i, j] == pytest.approx(float(expected), rel=1e-12)


class Mixed(nn.Module):
    """Every kind of parameter that directions treat in a way of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 6, 2, groups=2)
        self.layer = nn.LayerNorm([6, 3])
        self.linear = nn.Linear(3, 5)
        self.frozen = nn.Linear(3, 5).requires_grad_(False)


def test_filters_of_a_direction_are_as_long_as_the_models() -> None:
    torch.manual_seed(0)
    model = Mixed().double()
    direction = filter_normalised(model, seeded())
    sizes = [parameter.numel() for parameter in model.parameters()]
    parts = {name: part for (name, _), part in zip(model.named_parameters(), direction.split(sizes), strict=True)}
    moved = {"conv.weight", "up.weight", "linear.weight"}
    for name, parameter in model.named_parameters():
        part = parts[name].view_as(parameter)
        if name not in moved:
            assert not part.any(), name
            continue
        outputs = []
        if name == "up.weight":  # output channel 3 g + o sees the inputs 2 g and 2 g + 1
            for g in range(2):
                outputs += [(slice(2 * g, 2 * g + 2), o) for o in range(3)]
        else:
            outputs = [(o, slice(None)) for o in range(len(parameter))]
        for where in outputs:
            assert float(part[where].norm()) == pytest.approx(float(parameter[where].detach().norm()), rel=1e-12)
    assert not torch.equal(direction, filter_normalised(model, seeded(1)))


def test_a_random_plane_goes_through_the_weights() -> None:
    model = nn.Linear(4, 3).double()
    plane = random_plane(model, seeded())
    assert torch.equal(plane.origin, flat(model))
    assert plane.explained is None
    with pytest.raises(ConfigError, match="no two independent directions"):
        random_plane(nn.BatchNorm1d(4), seeded())
    with pytest.raises(ConfigError, match="no two independent directions"):
        random_plane(nn.Linear(1, 1), seeded())


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()


def bn_net() -> nn.Sequential:
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(4, eps=1e-13)
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3)).double()


TARGETS = torch.randint(3, (10,), generator=seeded(4))


@pytest.mark.parametrize("batch", [1000, 4])
def test_networks_together_have_the_losses_of_each_alone(batch: int) -> None:
    model, inputs = net(), normal(10, 6)
    plane = random_plane(model, seeded())
    ticks = torch.linspace(-1, 1, 5, dtype=DOUBLE)
    together = surface(losses_at(model, F.cross_entropy, inputs, TARGETS, batch=batch, vectorise=True), plane, ticks, ticks)
    alone = surface(losses_at(model, F.cross_entropy, inputs, TARGETS, batch=batch, vectorise=False), plane, ticks, ticks)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)
    plain = copy.deepcopy(model).eval()
    for i, y in enumerate(ticks):
        for j, x in enumerate(ticks):
            nn.utils.vector_to_parameters(plane.origin + x * plane.axes[0] + y * plane.axes[1], plain.parameters())
            assert together[i, j] == pytest.approx(F.cross_entropy(plain(inputs), TARGETS).item(), abs=1e-10)


@pytest.mark.parametrize("make", [net, bn_net])
def test_the_model_is_left_as_it_was(make: Callable[[], nn.Sequential]) -> None:
    model = make()
    model.train()
    model[-1].eval()
    inputs = normal(10, 6) if make is net else normal(10, 1, 6, 6)
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    losses = losses_at(model, F.cross_entropy, inputs, TARGETS)
    ticks = torch.linspace(-1, 1, 3)
    assert surface(losses, random_plane(model, seeded()), ticks, ticks, points_at_once(model, inputs)).isfinite().all()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_scale_before_a_batchnorm_does_not_matter() -> None:
    """And the loss is that of a training pass without dropout, whatever the running statistics are."""
    model, inputs = bn_net(), normal(10, 1, 6, 6)
    losses = losses_at(model, F.cross_entropy, inputs, TARGETS)
    weights = flat(model)
    scaled = weights.clone()
    scaled[: 4 * 9 + 4] *= 7  # the convolution
    with torch.no_grad():
        model[1].running_mean += 5  # type: ignore[operator]
        training = copy.deepcopy(model).train()
        training[3].eval()
        expected = float(F.cross_entropy(training(inputs), TARGETS))
    assert losses(torch.stack([weights, scaled])).tolist() == pytest.approx([expected, expected], abs=1e-10)


def test_statistics_are_those_of_each_batch() -> None:
    model, inputs = bn_net(), normal(10, 1, 6, 6)
    training = copy.deepcopy(model).train()
    training[3].eval()
    with torch.no_grad():
        halves = [F.cross_entropy(training(inputs[part]), TARGETS[part]) for part in (slice(0, 5), slice(5, 10))]
    found = losses_at(model, F.cross_entropy, inputs, TARGETS, batch=7)(flat(model)[None])
    assert found.item() == pytest.approx(float(sum(halves)) / 2, abs=1e-12)


def test_memory_bounds_the_networks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = net(), normal(10, 6)
    weights, widest = 6 * 8 + 8 + 8 * 3 + 3, 8 * 10
    monkeypatch.setitem(FLOATS_AT_ONCE, "cpu", 5 * (weights + widest))
    assert points_at_once(model, inputs) == 5
    assert points_at_once(model, inputs, batch=1) == 5 * (weights + widest) // (weights + 8)
    sizes = []

    def losses(points: Tensor) -> Tensor:
        sizes.append(len(points))
        return points.sum(1)

    ticks = torch.linspace(0, 1, 4, dtype=DOUBLE)
    surface(losses, Plane(normal(3), normal(2, 3)), ticks, ticks, chunk=5)
    losses_along(losses, normal(7, 3), chunk=5)
    assert sizes == [5, 5, 5, 1, 5, 2]


def double_well(points: Tensor) -> Tensor:
    """(w^2 - 1)^2 + 0.3 w in the first weight: wells near -1 and 1, and at -1 and 1 exactly 2 * 0.3 apart."""
    w = points[:, 0]
    return (w.square() - 1).square() + 0.3 * w


def test_the_barrier_of_a_double_well() -> None:
    start, end = torch.tensor([-1.0, 4.0]), torch.tensor([1.0, 0.0])
    found = barrier(double_well, start, end, steps=40, chunk=7)
    assert found.height == pytest.approx(1.0, abs=1e-12)
    assert found.at == 0.5
    fractions = torch.linspace(-1, 1, 41, dtype=DOUBLE)
    torch.testing.assert_close(found.excess, (fractions.square() - 1).square(), rtol=0, atol=1e-12)
    assert found.along[0] == pytest.approx(-0.3, abs=1e-6)


def test_a_valley_has_no_barrier() -> None:
    found = barrier(lambda points: points.square().sum(1), torch.tensor([-1.0]), torch.tensor([2.0]), steps=10)
    assert found.height == 0.0
    assert (found.excess <= 0).all()
    with pytest.raises(ConfigError, match="at least 2 steps"):
        barrier(double_well, torch.zeros(1), torch.ones(1), steps=1)


def test_tortuosity_of_known_paths() -> None:
    line = torch.linspace(0, 1, 6)[:, None] * normal(9).float()
    assert tortuosity(line) == pytest.approx(1.0, abs=1e-6)
    angles = torch.linspace(0, math.pi, 2001, dtype=DOUBLE)
    half = torch.stack([angles.cos(), angles.sin()], 1)
    assert travelled(half) == pytest.approx(math.pi, rel=1e-6)
    assert tortuosity(half) == pytest.approx(math.pi / 2, rel=1e-6)
    assert tortuosity(torch.tensor([[0.0], [1.0], [0.0]])) == math.inf
    with pytest.raises(ConfigError, match="does not move"):
        tortuosity(torch.ones(3, 2))
