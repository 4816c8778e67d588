"""Non-convex functions, and top-down networks evolved to find their minima: the learner is the point x itself.

    x <- x - 0.1 tanh(T(s)),   60 steps, from random starts in [-3, 3]^d

T, a perceptron, sees one of two inputs s, of which neither holds a gradient:

    absolute   [x/3 ; l]                 where l = log(1 + f(x)) / log(1 + level), and level is the mean of f over the starts
    relative   [u ; tanh(10 df / level) ; l]     u = tanh(T) of the last step, df the change of f that it made

With "absolute" it can learn by heart where the minimum lies; so "relative" ones are evolved, and both are tested, on
functions whose minimum is shifted anew for every start. Each function is 0 at its minima. The learner's coordinates are
those of the function divided by a unit, so that the box of starts covers the usual domain; where the unit is 1, the usual
numbers hold. arXiv 2208.01416 names no function and no input (only its abstract could be read): all of this is our choice.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from apical.errors import ConfigError, unknown_name
from apical.evolution.perceptron import Perceptron, evaluate, tanh
from apical.evolution.seeds import seed_of

BOX = 3.0
"""Starts are uniform in [-BOX, BOX]^d."""


def rastrigin(z: Tensor) -> Tensor:
    """`sum 10 + z^2 - 10 cos 2 pi z`, (..., d) -> (...)."""
    return (10 + z.square() - 10 * torch.cos(2 * math.pi * z)).sum(-1)


def ackley(z: Tensor) -> Tensor:
    """`20 + e - 20 exp(-0.2 |z| / sqrt d) - exp(mean cos 2 pi z)`, (..., d) -> (...)."""
    distance = z.square().mean(-1).sqrt()
    return 20 + math.e - 20 * torch.exp(-0.2 * distance) - torch.exp(torch.cos(2 * math.pi * z).mean(-1))


def griewank(z: Tensor) -> Tensor:
    """`1 + sum z^2 / 4000 - prod cos(z_i / sqrt i)`, (..., d) -> (...)."""
    root = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype).sqrt()
    return 1 + z.square().sum(-1) / 4000 - torch.cos(z / root).prod(-1)


def schwefel(z: Tensor) -> Tensor:
    """`sum 418.98 - z sin sqrt|z|` within [-500, 500]^d, (..., d) -> (...); 0.02 times the squared excess is added outside.

    Without that, there are ever deeper minima outside the domain.
    """
    inside = z.clamp(-500, 500)
    terms = 418.9828872724338 - inside * torch.sin(inside.abs().sqrt())
    return (terms + 0.02 * (z - inside).square()).sum(-1)


def styblinski_tang(z: Tensor) -> Tensor:
    """`sum 39.17 + (z^4 - 16 z^2 + 5 z) / 2`, (..., d) -> (...)."""
    square = z.square()
    return (39.16616570377142 + (square.square() - 16 * square + 5 * z) / 2).sum(-1)


def rosenbrock(z: Tensor) -> Tensor:
    """`sum 100 (z_{i+1} - z_i^2)^2 + (1 - z_i)^2`, (..., d) -> (...); a bent valley, and for d = 2 a single minimum."""
    now, after = z[..., :-1], z[..., 1:]
    return (100 * (after - now.square()).square() + (1 - now).square()).sum(-1)


def himmelblau(z: Tensor) -> Tensor:
    """`(z_1^2 + z_2 - 11)^2 + (z_1 + z_2^2 - 7)^2`, (..., 2) -> (...); four minima of equal depth."""
    first, second = z.unbind(-1)
    return (first.square() + second - 11).square() + (first + second.square() - 7).square()


@dataclass(frozen=True)
class Function:
    """A function to minimise, in the learner's coordinates.

    Attributes:
        title: its name.
        of: the function itself, (..., d) -> (...), 0 at its minima.
        lowest: its global minima, in its own coordinates; a single number stands for a point with that number throughout.
        unit: its coordinates per learner's coordinate.
        multimodal: whether it has minima besides the global ones.
        plane: whether it is defined for d = 2 alone.
    """

    title: str
    of: Callable[[Tensor], Tensor]
    lowest: tuple[float | tuple[float, float], ...]
    unit: float = 1.0
    multimodal: bool = True
    plane: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Values (...) at learner's coordinates (..., d)."""
        return self.of(self.unit * x)

    def minima(self, dimension: int) -> Tensor:
        """Global minima (m, d) in learner's coordinates, in float64."""
        points = [list(p) if isinstance(p, tuple) else [p] * dimension for p in self.lowest]
        return torch.tensor(points, dtype=torch.double) / self.unit

    def level(self, dimension: int) -> float:
        """Mean value over the box of starts, from 4096 points that are always the same."""
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
"""By name. Himmelblau's minima are all global; Rosenbrock is the control without local minima."""


def function(name: str, dimension: int = 2) -> Function:
    """The function of a name.

    Raises:
        ConfigError: there is none, or it is not defined in so many dimensions.
    """
    if name not in FUNCTIONS:
        raise unknown_name("function", name, FUNCTIONS)
    found = FUNCTIONS[name]
    if dimension < 1 or (found.plane and dimension != 2) or (name == "rosenbrock" and dimension < 2):
        raise ConfigError(f"{found.title} is not defined in {dimension} dimensions")
    return found


Input = Literal["absolute", "relative"]


@dataclass(frozen=True)
class Setting:
    """What is evolved, and on which function.

    Attributes:
        function: its name.
        dimension: of the point, d.
        input: what the top-down network sees.
        shift: during evolution, minima are moved by uniform numbers in [-shift, shift]^d, anew for every start.
        steps: of the learner.
        rate: longest step per coordinate.
        starts: learners per individual and generation.
        hidden: units in each of the two hidden layers of the top-down network.
        seed: of starts, shifts and the first top-down network.
    """

    function: str = "rastrigin"
    dimension: int = 2
    input: Input = "absolute"
    shift: float = 0.0
    steps: int = 60
    rate: float = 0.1
    starts: int = 64
    hidden: int = 12
    seed: int = 0


class Minimisation:
    """The task of evolving, for :class:`apical.evolution.workers.Task`: fitness is minus the mean final value.

    Raises:
        ConfigError: the function is not known or not defined in so many dimensions, or a setting is not usable.
    """

    def __init__(self, setting: Setting) -> None:
        if min(setting.steps, setting.starts, setting.hidden) < 1 or setting.rate <= 0 or setting.shift < 0:
            raise ConfigError(f"steps, starts, hidden and rate must be positive, shift not negative; got {setting}")
        if setting.input not in ("absolute", "relative"):
            raise ConfigError(f'the input must be "absolute" or "relative", not {setting.input!r}')
        self.setting = setting
        self.function = function(setting.function, setting.dimension)
        seen = setting.dimension + (1 if setting.input == "absolute" else 2)
        self.network = Perceptron([seen, setting.hidden, setting.hidden, setting.dimension])
        self.start = self.network.start(seed_of(setting.seed, "teacher"))

    @cached_property
    def level(self) -> float:
        """The function's mean over the box of starts."""
        return self.function.level(self.setting.dimension)

    def walk(self, individuals: Tensor, starts: Tensor, shifts: Tensor) -> Tensor:
        """Where each individual of (P, D) takes each start: (steps + 1, P, S, d).

        Args:
            starts: (S, d).
            shifts: (S, d), how far each start's function is moved.
        """
        layers, moved = self.network.layers(individuals), shifts.T
        x = starts.T.expand(len(individuals), -1, -1).contiguous()  # (P, d, S): see `evaluate`
        path, f = [x], self._value(x - moved)
        u, change = torch.zeros_like(x), torch.zeros_like(f)
        for _ in range(self.setting.steps):
            u = tanh(evaluate(layers, self._seen(x, u, f, change)))
            x = x - self.setting.rate * u
            before, f = f, self._value(x - moved)
            change = f - before
            path.append(x)
        return torch.stack(path).transpose(2, 3)

    def _value(self, x: Tensor) -> Tensor:
        return self.function(x.transpose(1, 2))

    def _seen(self, x: Tensor, u: Tensor, f: Tensor, change: Tensor) -> Tensor:
        """The network's input (P, n, S) from position and last step (P, d, S), value and its change (P, S)."""
        scaled = (torch.log1p(f) / math.log1p(self.level))[:, None]
        if self.setting.input == "absolute":
            return torch.cat([x / BOX, scaled], 1)
        return torch.cat([u, tanh(change * (10 / self.level))[:, None], scaled], 1)

    def fitness(self, individuals: Tensor, generation: int) -> Tensor:
        """Minus the mean final value over the generation's starts, (P,)."""
        setting = self.setting
        seed = seed_of(setting.seed, "starts", generation)
        starts, shifts = draw(setting.starts, setting.dimension, setting.shift, seed)
        starts, shifts = starts.to(individuals.dtype), shifts.to(individuals.dtype)
        return -self.function(self.walk(individuals, starts, shifts)[-1] - shifts).mean(1)


def draw(count: int, dimension: int, shift: float, seed: int) -> tuple[Tensor, Tensor]:
    """Starts in the box and shifts of the function, both (count, d) in float64."""
    generator = torch.Generator().manual_seed(seed)
    uniform = 2 * torch.rand(2, count, dimension, generator=generator, dtype=torch.double) - 1
    return uniform[0] * BOX, uniform[1] * shift


def descend(
    function: Function, starts: Tensor, shifts: Tensor, method: Literal["gd", "adam"], rate: float, steps: int = 60
) -> Tensor:
    """The baselines: gradient descent or Adam along the true gradient from starts (S, d), (steps + 1, S, d)."""
    x = starts.clone().requires_grad_()
    optimizer = torch.optim.SGD([x], lr=rate) if method == "gd" else torch.optim.Adam([x], lr=rate)
    path = [starts]
    for _ in range(steps):
        optimizer.zero_grad()
        function(x - shifts).sum().backward()
        optimizer.step()
        path.append(x.detach().clone())
    return torch.stack(path)


def best_of_random(function: Function, starts: Tensor, shifts: Tensor, seed: int, steps: int = 60) -> Tensor:
    """The best (S, d) of each start and `steps` uniform points of the box: a control that learns nothing."""
    count, dimension = starts.shape
    points = draw(steps * count, dimension, 0.0, seed)[0].view(steps, count, dimension).to(starts.dtype)
    everything = torch.cat([starts[None], points])
    best = function(everything - shifts).argmin(0)
    return everything[best, torch.arange(count)]


def basin(function: Function, points: Tensor, shifts: Tensor, longest: float = 0.03, steps: int = 300) -> Tensor:
    """The minimum (S, d) that short steps straight downhill from points (S, d) lead to; only steps that lower f count."""
    x, length = points.clone(), points.new_full((len(points), 1), longest)
    value = function(x - shifts)
    for _ in range(steps):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(function(x - shifts).sum(), x)
        x = x.detach()
        there = x - length * gradient / gradient.norm(dim=1, keepdim=True).clamp_min(1e-30)
        found = function(there - shifts)
        lower = (found < value)[:, None]
        x, value = torch.where(lower, there, x), torch.minimum(found, value)
        length = torch.where(lower, (1.2 * length).clamp_max(longest), 0.5 * length)
    return x
