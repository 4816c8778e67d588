"""Loss surfaces on planes through weight space, what lies between two solutions, and how straight a path to one is.

Two planes. The principal one holds the first two principal components of stacked weight trajectories, as in section 7 of
Li, Xu, Taylor, Studer and Goldstein, "Visualizing the loss landscape of neural nets", NeurIPS 2018 (arXiv 1712.09913). A
plane through such components can make any two paths look separated, so the distance of every snapshot from the plane belongs
beside the picture. The random one is spanned by two filter-normalised directions (their section 4): in every filter, that is
in the weights into one output unit or channel, a Gaussian direction is given the norm of the filter,

    d_ij <- d_ij |w_ij| / |d_ij|,

and it is zero in biases and in the parameters of normalisation layers.

A BatchNorm net computes the same function when the weights before a BatchNorm are scaled, but not with running statistics
that belong to other weights. Batch and instance norms therefore normalise each batch by its own statistics at every point,
as in training; everything else is in evaluation mode. The model is left as it was found, its running statistics too.

Weights are flat vectors (P,), in the order of `model.parameters()`; planes are in float64.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from apical.core.batch import require_rows
from apical.core.credit import Loss
from apical.core.rest import evaluating, kept_attributes
from apical.errors import ConfigError

Losses: TypeAlias = Callable[[Tensor], Tensor]
"""Weights of several networks (n, P) -> the loss of each (n,), float64."""

BATCH = 1000
"""Samples in one forward pass."""

FLOATS_AT_ONCE = {"cpu": 2**21, "cuda": 2**26}
"""So many weights and activations of a layer are held at a time; on a CPU, more would not stay in its caches."""

SMALL = 2**14
"""Activations of the widest layer up to which a CPU is faster with several networks together than one by one."""

_COLUMNS = 2**16
_RUNNING = nn.modules.batchnorm._NormBase  # batch and instance norms: those that can have running statistics
_NORMS = (_RUNNING, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, eq=False)
class Plane:
    """A plane through weight space; the weights at coordinates (x, y) are `origin + x axes[0] + y axes[1]`.

    Attributes:
        origin: (P,).
        axes: (2, P), independent but not always orthogonal.
        explained: shares of the snapshots' variance along the axes; None for planes that no snapshots decided.
    """

    origin: Tensor
    axes: Tensor
    explained: tuple[float, float] | None = None

    def points(self, coordinates: Tensor) -> Tensor:
        """Return the weights (n, P) at coordinates (n, 2)."""
        return self.origin + coordinates.to(self.axes) @ self.axes

    def coordinates(self, points: Tensor) -> Tensor:
        """Return the coordinates (n, 2) of the plane's nearest points to the weights (n, P)."""
        # (A A^T)^-1 A (w - w_0), for axes A (2, P) that need not be orthonormal
        along = torch.stack([self.axes @ (point.to(self.origin) - self.origin) for point in points])
        solved: Tensor = torch.linalg.solve(self.axes @ self.axes.T, along.T)
        return solved.T

    def distances(self, points: Tensor) -> Tensor:
        """Return the Euclidean distances (n,) of the weights (n, P) from the plane."""
        nearest = self.coordinates(points)
        gaps = [(point.to(self.origin) - self.points(at)).norm() for point, at in zip(points, nearest, strict=True)]
        return torch.stack(gaps)


class Barrier(NamedTuple):
    """The loss along the straight line between two weight vectors.

    Attributes:
        along: loss at equally spaced points, ends included, (steps + 1,).
        excess: `along` minus the linear interpolation of the losses at the ends, (steps + 1,).
        height: the largest excess; 0 where no point lies above the interpolation.
        at: where on the line that is, from 0 to 1.
    """

    along: Tensor
    excess: Tensor
    height: float
    at: float


def flat(model: nn.Module) -> Tensor:
    """Return a copy of all parameters as one vector (P,)."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def principal_plane(trajectories: Sequence[Tensor]) -> Plane:
    """Return the plane through the mean of all snapshots along their first two principal components, which are orthonormal.

    Each axis points the way in which the first trajectory ends from its start.

    Args:
        trajectories: snapshots (n_i, P) of one or several runs.

    Raises:
        ConfigError: the snapshots are on one line, or not finite.
    """
    total = sum(map(len, trajectories))
    size = trajectories[0].shape[1]
    gram = torch.zeros(total, total, dtype=torch.float64)
    for first in range(0, size, _COLUMNS):  # all snapshots as float64 together would take several times their memory
        centred, _ = _centred(trajectories, first)
        gram += centred @ centred.T
    if not torch.isfinite(gram).all():
        raise ConfigError("a snapshot has weights that are not finite")
    variances, components = torch.linalg.eigh(gram)
    if total < 3 or size < 2 or variances[-2] <= 1e-12 * variances[-1]:
        raise ConfigError("the snapshots are on one line and span no plane; take more of them, or another plane")
    weighting = components[:, -2:].flip(1).T / variances[-2:].flip(0).sqrt()[:, None]
    origin, axes = torch.empty(size, dtype=torch.float64), torch.empty(2, size, dtype=torch.float64)
    for first in range(0, size, _COLUMNS):
        centred, mean = _centred(trajectories, first)
        origin[first : first + _COLUMNS] = mean
        axes[:, first : first + _COLUMNS] = weighting @ centred
    axes = torch.linalg.qr(axes.T)[0].T.contiguous()  # orthonormal also where one variance is far smaller than the other
    forward = axes @ (trajectories[0][-1].double() - trajectories[0][0].double())
    axes[forward < 0] *= -1
    shares = variances[-2:].flip(0) / variances.sum()
    return Plane(origin, axes, (float(shares[0]), float(shares[1])))


def _centred(trajectories: Sequence[Tensor], first: int) -> tuple[Tensor, Tensor]:
    """Return some columns of all snapshots without their mean, and the mean."""
    stacked = torch.cat([snapshots[:, first : first + _COLUMNS] for snapshots in trajectories]).double()
    mean = stacked.mean(0)
    return stacked - mean, mean


def random_plane(model: nn.Module, generator: torch.Generator) -> Plane:
    """Return the plane through the weights along two filter-normalised random directions; 1 is the filters' length.

    Args:
        generator: on the CPU.

    Raises:
        ConfigError: the model has too few weights outside biases and normalisation layers.
    """
    axes = torch.stack([filter_normalised(model, generator) for _ in range(2)])
    gram = axes @ axes.T
    if gram.det() <= 1e-12 * gram.diagonal().prod():
        raise ConfigError("the model has no two independent directions outside biases and normalisation layers")
    return Plane(flat(model).double().cpu(), axes)


@torch.no_grad()
def filter_normalised(model: nn.Module, generator: torch.Generator) -> Tensor:
    """Return a Gaussian direction (P,) with the filters' norms; zero in biases, in norms and where nothing learns."""
    owners = {parameter: module for module in model.modules() for parameter in module.parameters(recurse=False)}
    parts = []
    for parameter in model.parameters():
        weight, owner = parameter.detach().double().cpu(), owners[parameter]
        if weight.dim() < 2 or isinstance(owner, _NORMS) or not parameter.requires_grad:
            parts.append(torch.zeros_like(weight).flatten())
            continue
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        parts.append((direction * _filter_norms(owner, weight) / _filter_norms(owner, direction)).flatten())
    return torch.cat(parts)


def _filter_norms(owner: nn.Module, weight: Tensor) -> Tensor:
    """Return the norm of each weight's filter, in the weight's shape."""
    shape = (len(weight), 1, -1, 1)  # an output, what leads to it
    if isinstance(owner, _TRANSPOSED):  # (in, out / groups, ...), the inputs of each group together
        shape = (owner.groups, len(weight) // owner.groups, weight.shape[1], -1)
        dims = (1, 3)
    else:
        dims = (2, 3)
    by_filter = weight.reshape(shape)
    norms: Tensor = by_filter.norm(dim=dims, keepdim=True)
    return norms.expand_as(by_filter).reshape(weight.shape)


def losses_at(
    model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor, *, batch: int = BATCH, vectorise: bool | None = None
) -> Losses:
    """Return the loss of `model` on fixed samples as a function of its weights.

    Networks of one call are evaluated together (`torch.func.vmap`) where that is quicker: mind the memory
    (:func:`points_at_once`). Models with running statistics are evaluated one by one, see the module's docstring.

    Args:
        model: left as it is found: weights, buffers, modes.
        loss: (output, targets) -> batch mean.
        inputs: (N, ...), on the model's device.
        targets: (N, ...).
        batch: samples per forward pass, at most; also those over which statistics are taken.
        vectorise: whether to evaluate networks together, if the model can be; None: on a GPU, or if the model is small.
    """
    require_rows("a loss landscape", inputs)
    parameters = dict(model.named_parameters())
    sizes = [parameter.numel() for parameter in parameters.values()]
    device = next(iter(parameters.values())).device
    pieces = math.ceil(len(inputs) / batch)
    batches = list(zip(inputs.tensor_split(pieces), targets.tensor_split(pieces), strict=True))  # none is tiny
    if vectorise is None:
        vectorise = device.type != "cpu" or _widest(model, inputs, batch) <= SMALL
    together = vectorise and not any(isinstance(module, _RUNNING) for module in model.modules())

    def one(point: Tensor, buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        parts = zip(parameters.items(), point.split(sizes), strict=True)
        weights = {name: part.view_as(old).to(old.dtype) for (name, old), part in parts}
        return loss(functional_call(model, {**buffers, **weights}, (x,)), y)

    def several(points: Tensor, buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor | None:
        try:
            with kept_attributes(model):  # what a transform leaves in them is of no use outside it
                values: Tensor = vmap(one, in_dims=(0, None, None, None))(points, buffers, x, y)
        except RuntimeError:  # something in the model, such as LSTM, has no rule for several networks
            return None
        return values

    @torch.no_grad()
    def losses(points: Tensor) -> Tensor:
        points = points.to(device)
        total = torch.zeros(len(points), dtype=torch.float64, device=device)
        with _own_statistics(model), kept_attributes(model, loss=loss):
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            for x, y in batches:
                values = several(points, buffers, x, y) if together else None
                if values is None:
                    values = torch.stack([one(point, buffers, x, y) for point in points])
                total += values.double() * len(x) / len(inputs)
        return total.cpu()

    return losses


@contextmanager
def _own_statistics(model: nn.Module) -> Iterator[None]:
    with evaluating(model):
        for module in model.modules():
            if isinstance(module, _RUNNING):
                module.training = True
        yield


def points_at_once(model: nn.Module, inputs: Tensor, batch: int = BATCH) -> int:
    """Return how many networks to evaluate together so that weights and the widest layer's activations stay in bounds."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    floats = FLOATS_AT_ONCE.get(inputs.device.type, FLOATS_AT_ONCE["cpu"])
    return max(1, floats // (weights + _widest(model, inputs, batch)))


@torch.no_grad()
def _widest(model: nn.Module, inputs: Tensor, batch: int) -> int:
    """Return the entries in the largest output of a module, in a forward pass of `batch` of the inputs."""
    widest = 0

    def look(module: nn.Module, args: object, output: object) -> None:
        nonlocal widest
        widest = max(widest, output.numel() if isinstance(output, Tensor) else 0)

    hooks = [module.register_forward_hook(look) for module in model.modules()]
    try:
        with evaluating(model), kept_attributes(model):
            model(inputs[:2])  # a batch normalisation may need two
    finally:
        for hook in hooks:
            hook.remove()
    return widest * min(batch, len(inputs)) // min(2, len(inputs))


def surface(losses: Losses, plane: Plane, x: Tensor, y: Tensor, chunk: int = 16) -> Tensor:
    """Return the loss on the grid of `x` (n,) and `y` (m,): (m, n), float64, `chunk` points at a time."""
    grid = torch.cartesian_prod(y.double(), x.double()).flip(1)
    return torch.cat([losses(plane.points(part)) for part in grid.split(chunk)]).view(len(y), len(x))


def losses_along(losses: Losses, trajectory: Tensor, chunk: int = 16) -> Tensor:
    """Return the loss (n,) at the weights (n, P) themselves, `chunk` at a time."""
    return torch.cat([losses(part) for part in trajectory.split(chunk)])


def barrier(losses: Losses, start: Tensor, end: Tensor, steps: int = 40, chunk: int = 16) -> Barrier:
    """Return how far losses on the line from `start` to `end`, both (P,), rise above their linear interpolation.

    Frankle, Dziugaite, Roy and Carbin, "Linear mode connectivity and the lottery ticket hypothesis", ICML 2020 (arXiv
    1912.05671), compare with the mean of the ends; against the interpolation no line that only descends has a barrier.

    Raises:
        ConfigError: `steps` is below 2: there is nothing between the ends.
    """
    if steps < 2:
        raise ConfigError(f"a line between two weight vectors needs at least 2 steps, got {steps}")
    fractions = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    start, end = start.double(), end.double()
    along = torch.cat([losses(torch.lerp(start, end, part[:, None].to(start))) for part in fractions.split(chunk)])
    excess = along - torch.lerp(along[0], along[-1], fractions)
    excess[[0, -1]] = 0.0  # not the rounding of the interpolation
    top = int(excess.argmax())
    return Barrier(along, excess, float(excess[top]), float(fractions[top]))


def travelled(trajectory: Tensor) -> float:
    """Return the length of the polygon through the snapshots (n, P); a lower bound for the path between them."""
    return math.fsum(float((b.double() - a.double()).norm()) for a, b in itertools.pairwise(trajectory))


def tortuosity(trajectory: Tensor) -> float:
    """Distance travelled over distance from start to end, of snapshots (n, P): 1 if straight, infinite if it comes back.

    It grows with the number of snapshots on a winding path: compare runs that were recorded alike.

    Raises:
        ConfigError: fewer than two snapshots, or all of them equal.
    """
    length = travelled(trajectory)
    if not length:
        raise ConfigError("a trajectory that does not move has no tortuosity")
    straight = float((trajectory[-1].double() - trajectory[0].double()).norm())
    return length / straight if straight else math.inf
