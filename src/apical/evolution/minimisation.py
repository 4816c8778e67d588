"""Evolve top-down networks to find minima of non-convex functions; the learner is the point x itself.

    x <- x - cap tanh(T(s)),   60 steps, from random starts in [-3, 3]^d

T sees neither the gradient nor the position of the point, only the effect of its own steps, so it cannot memorise the
minimum, which is also shifted at random for every start. There are three kinds:

    stateless   a perceptron of       s = [u ; tanh(10 df / level) ; l]
    recurrent   an Elman network of   s = [u ; x* - x ; tanh(10 df / level) ; tanh(10 (f - f*) / level) ; l ; t]
    coordinate  the same network for every coordinate: it moves one at a time, for `turn` steps each; its memory and its
                best point start with each turn; f and level are divided by d

with u = tanh(T) of the last step, df the resulting change of f, x* and f* the best point so far and its value, t the time
from -1 to 1, level the mean of f over the starts, and l = log(1 + f) / log(1 + level). Memory and a larger cap depart from
the released code, whose top-down networks have neither. That code is for classification; the paper's networks for functions
are unknown (only its abstract was available).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from apical.errors import ConfigError
from apical.evolution.functions import draw, function
from apical.evolution.perceptron import Perceptron, evaluate, recur, tanh
from apical.evolution.seeds import seed_of

Kind = Literal["stateless", "recurrent", "coordinate"]
KINDS: tuple[Kind, ...] = ("stateless", "recurrent", "coordinate")


@dataclass(frozen=True)
class Setting:
    """What is evolved, and on which function.

    Attributes:
        function: name of the function.
        dimension: dimension d of the point.
        kind: kind of top-down network.
        cap: largest step per coordinate.
        shift: minima are shifted by uniform numbers in [-shift, shift]^d, drawn for every start.
        steps: steps of the learner.
        turn: steps of one coordinate before the next is moved; only for kind "coordinate".
        starts: learners per individual and generation.
        hidden: units in each hidden layer of the top-down network; a stateless one has two such layers.
        seed: seed of starts, shifts and the initial top-down network.
    """

    function: str = "rastrigin"
    dimension: int = 2
    kind: Kind = "recurrent"
    cap: float = 0.5
    shift: float = 1.5
    steps: int = 60
    turn: int = 6
    starts: int = 64
    hidden: int = 16
    seed: int = 0


class Minimisation:
    """The evolution task, a :class:`apical.evolution.workers.Task`: fitness is minus the mean final value.

    Raises:
        ConfigError: the function is unknown or not defined in this number of dimensions, or a setting is invalid.
    """

    def __init__(self, setting: Setting) -> None:
        counts = (setting.steps, setting.starts, setting.hidden, setting.turn)
        if min(counts) < 1 or setting.cap <= 0 or setting.shift < 0:
            raise ConfigError(f"steps, starts, hidden, turn and cap must be positive, shift at least 0; got {setting}")
        if setting.kind not in KINDS:
            raise ConfigError(f"the kind must be one of {', '.join(KINDS)}; got {setting.kind!r}")
        self.setting = setting
        self.function = function(setting.function, setting.dimension)
        d = 1 if setting.kind == "coordinate" else setting.dimension
        sizes = [d + 2, setting.hidden, setting.hidden, d]
        if setting.kind != "stateless":
            sizes = [2 * d + 4 + setting.hidden, setting.hidden, d]
        self.network = Perceptron(sizes)
        self.start = self.network.start(seed_of(setting.seed, "teacher"))
        self._share = setting.dimension if setting.kind == "coordinate" else 1

    @cached_property
    def level(self) -> float:
        """Mean of the function over the box of starts; divided by d for kind "coordinate"."""
        return self.function.level(self.setting.dimension) / self._share

    def walk(self, individuals: Tensor, starts: Tensor, shifts: Tensor) -> Tensor:
        """Return the path of each individual of (P, D) from each start: (steps + 1, P, S, d).

        Args:
            starts: (S, d), or separate ones for each individual, (P, S, d).
            shifts: shift of the function for each start, of the same shape.
        """
        return torch.stack([x.clone() for x in self._points(individuals, starts, shifts)]).transpose(2, 3)

    def _points(self, individuals: Tensor, starts: Tensor, shifts: Tensor) -> Iterator[Tensor]:
        """Yield the points of each step, (P, d, S); the next step overwrites them."""
        setting, layers, moved = self.setting, self.network.layers(individuals), shifts.transpose(-1, -2)
        turn = setting.turn if setting.kind == "coordinate" else setting.steps
        x = starts.transpose(-1, -2).expand(len(individuals), -1, -1).clone()  # starts last: see `evaluate`
        nothing = x.new_zeros(len(x), setting.hidden, x.shape[2])
        f = self._value(x - moved)
        yield x
        for step in range(setting.steps):
            number, clock = divmod(step, turn)
            if clock == 0:
                i = number % setting.dimension
                part = x[:, i : i + 1] if setting.kind == "coordinate" else x
                best, lowest, memory = part.clone(), f, nothing
                u, change = torch.zeros_like(part), torch.zeros_like(f)
            scaled = torch.log1p(f) / math.log1p(self.level)
            if setting.kind == "stateless":
                sent = evaluate(layers, torch.cat([u, *_rows(self._small(change), scaled)], 1))
            else:
                time = torch.full_like(f, 2 * clock / max(turn - 1, 1) - 1)
                rows = _rows(self._small(change), self._small(f - lowest), scaled, time)
                sent, memory = recur(layers, torch.cat([u, best - part, *rows], 1), memory)
            u = tanh(sent)
            part -= setting.cap * u
            before, f = f, self._value(x - moved)
            change = f - before
            best = torch.where((f < lowest)[:, None], part, best)
            lowest = torch.minimum(f, lowest)
            yield x

    def _value(self, x: Tensor) -> Tensor:
        return self.function(x.transpose(1, 2)) / self._share

    def _small(self, difference: Tensor) -> Tensor:
        return tanh(difference * (10 / self.level))

    def fitness(self, individuals: Tensor, generation: int) -> Tensor:
        """Return minus the mean final value over the generation's starts, (P,)."""
        return together([self], individuals[None], generation)[0]


def together(tasks: Sequence[Minimisation], populations: Tensor, generation: int) -> Tensor:
    """Return fitness (S, P) of a population (P, D) for S tasks that differ in their seed; a single walk is cheaper."""
    task, setting, P = tasks[0], tasks[0].setting, populations.shape[1]
    seeds = [seed_of(item.setting.seed, "starts", generation) for item in tasks]
    drawn = zip(*(draw(setting.starts, setting.dimension, setting.shift, seed) for seed in seeds), strict=True)
    starts, shifts = (torch.stack(item).to(populations.dtype).repeat_interleave(P, 0) for item in drawn)
    *_, last = task._points(populations.flatten(0, 1), starts, shifts)
    return -task.function(last.transpose(1, 2) - shifts).mean(1).view(len(tasks), P)


def _rows(*values: Tensor) -> list[Tensor]:
    return [value[:, None] for value in values]  # (P, S) to (P, 1, S)
