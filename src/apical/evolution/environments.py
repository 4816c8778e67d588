"""Control tasks by the thousand: the equations of gymnasium's classic environments, for arrays of states.

All episodes are steps of the same arrays, each with its own settings, so a thousand cost little more than one. States and
observations have their components first: (n, N) for N episodes. Results are those of gymnasium's environments, step for
step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from apical.errors import unknown_name

Array = npt.NDArray[Any]
Settings = Mapping[str, Array]


@dataclass(frozen=True)
class Environment:
    """A task, as functions of arrays.

    Attributes:
        actions: how many there are.
        settings: name -> its usual value.
        begin: from a generator and a number of episodes to first states (n, episodes).
        observe: from states to observations, which are divided by `scale` where a top-down network sees them.
        step: from states, actions (N,) and settings (N,) to states, rewards and whether episodes ended.
        scale: size of each component of an observation.
    """

    actions: int
    settings: Mapping[str, float]
    begin: Callable[[np.random.Generator, int], Array]
    observe: Callable[[Array], Array]
    step: Callable[[Array, Array, Settings], tuple[Array, Array, Array]]
    scale: tuple[float, ...]


def _begin_cart_pole(generator: np.random.Generator, episodes: int) -> Array:
    return generator.uniform(-0.05, 0.05, (episodes, 4)).T


def _step_cart_pole(state: Array, action: Array, settings: Settings) -> tuple[Array, Array, Array]:
    """Barto, Sutton and Anderson 1983, without friction: Euler steps of 0.02 s; `length` is half the pole's."""
    x, v, theta, omega = state
    mass, length = settings["masspole"], settings["length"]
    total = settings["masscart"] + mass
    cos, sin = np.cos(theta), np.sin(theta)
    push = (np.where(action == 1, 1.0, -1.0) * settings["force_mag"] + mass * length * omega * omega * sin) / total
    turning = (settings["gravity"] * sin - cos * push) / (length * (4 / 3 - mass * cos * cos / total))
    moving = push - mass * length * turning * cos / total
    after = np.stack([x + 0.02 * v, v + 0.02 * moving, theta + 0.02 * omega, omega + 0.02 * turning])
    ended = (np.abs(after[0]) > 2.4) | (np.abs(after[2]) > 12 * np.pi / 180)
    return after, np.ones(len(x)), ended


def _begin_pendulum(generator: np.random.Generator, episodes: int) -> Array:
    return generator.uniform([-np.pi, -1.0], [np.pi, 1.0], (episodes, 2)).T


def _step_pendulum(state: Array, action: Array, settings: Settings) -> tuple[Array, Array, Array]:
    """Steps of 0.05 s with a torque of -2, 0 or 2: gymnasium's Pendulum, which takes any between; it never ends."""
    theta, omega = state
    torque = (action - 1.0) * 2.0
    mass, length, gravity = settings["m"], settings["l"], settings["g"]
    angle = (theta + np.pi) % (2 * np.pi) - np.pi
    cost = angle**2 + 0.1 * omega**2 + 0.001 * torque**2
    omega = np.clip(omega + (3 * gravity / (2 * length) * np.sin(theta) + 3 / (mass * length**2) * torque) * 0.05, -8, 8)
    return np.stack([theta + 0.05 * omega, omega]), -cost, np.zeros(len(theta), dtype=bool)


def _same(state: Array) -> Array:
    return state


def _observe_pendulum(state: Array) -> Array:
    return np.stack([np.cos(state[0]), np.sin(state[0]), state[1]])


ENVIRONMENTS = {
    "cart-pole": Environment(
        2,
        {"length": 0.5, "force_mag": 10.0, "gravity": 9.8, "masscart": 1.0, "masspole": 0.1},
        _begin_cart_pole,
        _same,
        _step_cart_pole,
        (1.0, 1.0, 0.2, 1.0),
    ),
    "pendulum": Environment(
        3,
        {"m": 1.0, "l": 1.0, "g": 10.0},
        _begin_pendulum,
        _observe_pendulum,
        _step_pendulum,
        (1.0, 1.0, 4.0),
    ),
}
"""By name. Settings are lengths in m (cart-pole: half the pole's), masses in kg, forces in N and gravity in m/s²."""


def environment(name: str) -> Environment:
    """The environment of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in ENVIRONMENTS:
        raise unknown_name("environment", name, ENVIRONMENTS)
    return ENVIRONMENTS[name]
