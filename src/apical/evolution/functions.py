"""Non-convex functions to minimise, gradient-based baselines, and random search.

Each function is 0 at its global minima. The learner's coordinates are those of the function divided by a unit, so that the
box of starts covers the usual domain; with a unit of 1, they are the usual coordinates. The abstract of arXiv 2208.01416,
the only part available, names no function: the choice of functions and starts is ours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from apical.errors import ConfigError, require_choice

BOX = 3.0
"""Starts are uniform in [-BOX, BOX]^d."""


def rastrigin(z: Tensor) -> Tensor:
    """Return `sum 10 + z^2 - 10 cos 2 pi z`, (..., d) -> (...)."""
    return (10 + z.square() - 10 * torch.cos(2 * math.pi * z)).sum(-1)


def ackley(z: Tensor) -> Tensor:
    """Return `20 + e - 20 exp(-0.2 |z| / sqrt d) - exp(mean cos 2 pi z)`, (..., d) -> (...)."""
    d = z.shape[-1]
    distance = (z.square().sum(-1) / d).sqrt()
    return 20 + math.e - 20 * torch.exp(-0.2 * distance) - torch.exp(torch.cos(2 * math.pi * z).sum(-1) / d)


def griewank(z: Tensor) -> Tensor:
    """Return `1 + sum z^2 / 4000 - prod cos(z_i / sqrt i)`, (..., d) -> (...)."""
    root = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype).sqrt()
    return 1 + z.square().sum(-1) / 4000 - torch.cos(z / root).prod(-1)


def schwefel(z: Tensor) -> Tensor:
    """Return `sum 418.98 - z sin sqrt|z|` in [-500, 500]^d, (..., d) -> (...), plus 0.02 times the squared excess outside.

    Without this penalty, minima outside the domain get ever deeper.
    """
    inside = z.clamp(-500, 500)
    terms = 418.9828872724338 - inside * torch.sin(inside.abs().sqrt())
    return (terms + 0.02 * (z - inside).square()).sum(-1)


def styblinski_tang(z: Tensor) -> Tensor:
    """Return `sum 39.17 + (z^4 - 16 z^2 + 5 z) / 2`, (..., d) -> (...)."""
    square = z.square()
    return (39.16616570377142 + (square.square() - 16 * square + 5 * z) / 2).sum(-1)


def rosenbrock(z: Tensor) -> Tensor:
    """Return `sum 100 (z_{i+1} - z_i^2)^2 + (1 - z_i)^2`, (..., d) -> (...); a curved valley, with one minimum for d = 2."""
    now, after = z[..., :-1], z[..., 1:]
    return (100 * (after - now.square()).square() + (1 - now).square()).sum(-1)


def himmelblau(z: Tensor) -> Tensor:
    """Return `(z_1^2 + z_2 - 11)^2 + (z_1 + z_2^2 - 7)^2`, (..., 2) -> (...); four minima of equal depth."""
    first, second = z.unbind(-1)
    return (first.square() + second - 11).square() + (first + second.square() - 7).square()


@dataclass(frozen=True)
class Function:
    """A function to minimise, in the learner's coordinates.

    Attributes:
        title: its name.
        of: the function itself, (..., d) -> (...), 0 at its global minima.
        lowest: its global minima, in its own coordinates; a single number is a point with all coordinates equal to it.
        unit: its coordinates per unit of the learner's coordinates.
        multimodal: whether it has non-global minima.
        plane: whether it is defined only for d = 2.
    """

    title: str
    of: Callable[[Tensor], Tensor]
    lowest: tuple[float | tuple[float, float], ...]
    unit: float = 1.0
    multimodal: bool = True
    plane: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Return values (...) at learner's coordinates (..., d)."""
        return self.of(self.unit * x)

    def minima(self, dimension: int) -> Tensor:
        """Return the global minima (m, d) in learner's coordinates, in float64."""
        points = [list(p) if isinstance(p, tuple) else [p] * dimension for p in self.lowest]
        return torch.tensor(points, dtype=torch.double) / self.unit

    def level(self, dimension: int) -> float:
        """Return the mean value over the box of starts, from 4096 fixed points."""
        generator = torch.Generator().manual_seed(0)
        points = (2 * torch.rand(4096, dimension, generator=generator, dtype=torch.double) - 1) * BOX
        return float(self(points).mean())


FUNCTIONS: dict[str, Function] = {
    "rastrigin": Function("Rastrigin", rastrigin, (0.0,)),
    "ackley": Function("Ackley", ackley, (0.0,)),
    "himmelblau": Function(
        "Himmelblau",
        himmelblau,
        (
            (3.0, 2.0),
            (-2.805118086952745, 3.131312518250573),
            (-3.779310253377747, -3.283185991286170),
            (3.584428340330492, -1.848126526964404),
        ),
        plane=True,
    ),
    "griewank": Function("Griewank", griewank, (0.0,), unit=5.0),
    "schwefel": Function("Schwefel", schwefel, (420.9687463599820,), unit=500 / 3),
    "styblinski-tang": Function("Styblinski-Tang", styblinski_tang, (-2.903534027771177,)),
    "rosenbrock": Function("Rosenbrock", rosenbrock, (1.0,), multimodal=False),
}
"""Functions by name. Himmelblau's minima are all global; Rosenbrock is the control without local minima."""


def function(name: str, dimension: int = 2) -> Function:
    """Return the function of a name.

    Raises:
        ConfigError: the name is unknown, or the function is not defined in this number of dimensions.
    """
    require_choice("function", name, FUNCTIONS)
    benchmark = FUNCTIONS[name]
    if dimension < 1 or (benchmark.plane and dimension != 2) or (name == "rosenbrock" and dimension < 2):
        raise ConfigError(f"{benchmark.title} is not defined in {dimension} dimensions")
    return benchmark


def draw(count: int, dimension: int, shift: float, seed: int) -> tuple[Tensor, Tensor]:
    """Draw starts in the box and shifts of the function, both (count, d) in float64."""
    generator = torch.Generator().manual_seed(seed)
    uniform = 2 * torch.rand(2, count, dimension, generator=generator, dtype=torch.double) - 1
    return uniform[0] * BOX, uniform[1] * shift


Method = Literal["gd", "momentum", "adam", "capped"]
METHODS: tuple[Method, ...] = ("gd", "momentum", "adam", "capped")


def descend(
    function: Function,
    starts: Tensor,
    shifts: Tensor,
    method: Method,
    rate: float | Tensor,
    *,
    steps: int = 60,
    cap: float = 0.5,
) -> Tensor:
    """Run a baseline that follows the true gradient g from starts (S, d): (steps + 1, S, d).

    Args:
        method: gradient descent; the same with momentum 0.9; Adam; or "capped", a hand-built top-down network: it sends
            `T = (rate / cap) g`, so that a step is `cap tanh(T)`, at most `cap` per coordinate.
        rate: step size; a tensor (R, 1, 1) runs R paths from each start, (steps + 1, R, S, d).
    """
    x = starts + torch.zeros_like(torch.as_tensor(rate, dtype=starts.dtype))
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    path = [x]
    for step in range(1, steps + 1):
        (g,) = torch.autograd.grad(function(x.requires_grad_() - shifts).sum(), x)
        x = x.detach()
        if method == "capped":
            x = x - cap * torch.tanh(rate / cap * g)
        elif method == "adam":
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g.square()
            x = x - rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        else:
            first = g + 0.9 * first if method == "momentum" else g
            x = x - rate * first
        path.append(x)
    return torch.stack([x.detach() for x in path])


def best_of_random(function: Function, starts: Tensor, shifts: Tensor, seed: int, steps: int = 60) -> Tensor:
    """Return the best (S, d) of each start and `steps` uniform points in the box: a control without learning."""
    count, dimension = starts.shape
    points = draw(steps * count, dimension, 0.0, seed)[0].view(steps, count, dimension).to(starts.dtype)
    everything = torch.cat([starts[None], points])
    best = function(everything - shifts).argmin(0)
    return everything[best, torch.arange(count)]
