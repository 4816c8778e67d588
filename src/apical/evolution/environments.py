"""Control tasks in large batches: the equations of Gymnasium's classic environments, for arrays of states.

All episodes advance in the same arrays, each with its own settings, so a thousand cost little more than one. States and
observations have their components first: (n, N) for N episodes. Results equal those of Gymnasium's environments at every
step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from apical.errors import require_choice

Array = npt.NDArray[Any]
Settings = Mapping[str, Array]


@dataclass(frozen=True)
class Environment:
    """A control task as functions on arrays.

    Attributes:
        actions: number of actions.
        settings: name -> default value.
        begin: maps a generator and a number of episodes to initial states (n, episodes).
        observe: maps states to observations, which are divided by `scale` as inputs to a top-down network.
        step: maps states, actions (N,) and settings (N,) to states, rewards and whether episodes ended.
        scale: size of each component of an observation.
    """

    actions: int
    settings: Mapping[str, float]
    begin: Callable[[np.random.Generator, int], Array]
    observe: Callable[[Array], Array]
    step: Callable[[Array, Array, Settings], tuple[Array, Array, Array]]
    scale: tuple[float, ...]


def _rows(*rows: Array) -> Array:
    """Do the same as np.stack, which is slower than the arithmetic on arrays this short."""
    stacked = np.empty((len(rows), len(rows[0])), rows[0].dtype)
    for number, row in enumerate(rows):
        stacked[number] = row
    return stacked


def _begin_cart_pole(generator: np.random.Generator, episodes: int) -> Array:
    return generator.uniform(-0.05, 0.05, (episodes, 4)).T


def _step_cart_pole(state: Array, action: Array, settings: Settings) -> tuple[Array, Array, Array]:
    """Advance Barto, Sutton and Anderson 1983 without friction by an Euler step of 0.02 s; `length` is half the pole's."""
    _, v, theta, omega = state
    mass, length = settings["masspole"], settings["length"]
    total, moment = settings["masscart"] + mass, mass * length
    cos, sin = np.cos(theta), np.sin(theta)
    push = ((2 * action - 1) * settings["force_mag"] + moment * omega * omega * sin) / total
    turning = (settings["gravity"] * sin - cos * push) / (length * (4 / 3 - mass * cos * cos / total))
    after = state + 0.02 * _rows(v, push - moment * turning * cos / total, omega, turning)
    ended = (np.abs(after[0]) > 2.4) | (np.abs(after[2]) > 12 * np.pi / 180)
    return after, np.ones_like(v), ended


def _begin_pendulum(generator: np.random.Generator, episodes: int) -> Array:
    return generator.uniform([-np.pi, -1.0], [np.pi, 1.0], (episodes, 2)).T


def _step_pendulum(state: Array, action: Array, settings: Settings) -> tuple[Array, Array, Array]:
    """Advance Gymnasium's Pendulum by 0.05 s with a torque of -2, 0 or 2 instead of any in between; it never ends."""
    theta, omega = state
    torque = (action - 1.0) * 2.0
    mass, length, gravity = settings["m"], settings["l"], settings["g"]
    angle = (theta + np.pi) % (2 * np.pi) - np.pi
    cost = angle**2 + 0.1 * omega**2 + 0.001 * torque**2
    omega = omega + (3 * gravity / (2 * length) * np.sin(theta) + 3 / (mass * length**2) * torque) * 0.05
    omega = np.minimum(np.maximum(omega, -8), 8)
    return _rows(theta + 0.05 * omega, omega), -cost, np.zeros(len(theta), dtype=bool)


def _begin_acrobot(generator: np.random.Generator, episodes: int) -> Array:
    return generator.uniform(-0.1, 0.1, (episodes, 4)).T


def _step_acrobot(state: Array, action: Array, settings: Settings) -> tuple[Array, Array, Array]:
    """Advance Sutton and Barto 2018, section 11.3: a torque of -1, 0 or 1 at the elbow, one Runge-Kutta step of 0.2 s.

    Each step has reward -1 until the tip is a metre above the shoulder, which ends the episode.
    """
    m1, m2, length = settings["LINK_MASS_1"], settings["LINK_MASS_2"], settings["LINK_LENGTH_1"]
    torque, own, arm = action - 1, 0.25 * m2 + 1, 0.5 * m2 * length  # centres of mass half-way, moments of inertia 1
    first, fall2, fall1 = 0.25 * m1 + 1 + own + m2 * length * length, 4.9 * m2, 9.8 * (0.5 * m1 + m2 * length)

    def velocity(s: Array) -> Array:
        angle, bend, omega, turn = s
        across, along = arm * np.sin(bend), arm * np.cos(bend)
        d1, d2 = first + 2 * along, own + along
        phi2 = fall2 * np.sin(angle + bend)
        phi1 = fall1 * np.sin(angle) + phi2 - across * turn * (turn + 2 * omega)
        ratio = d2 / d1
        bending = (torque + ratio * phi1 - across * omega * omega - phi2) / (own - d2 * ratio)
        return _rows(omega, turn, -(d2 * bending + phi1) / d1, bending)

    k1 = velocity(state)
    k2 = velocity(state + 0.1 * k1)
    k3 = velocity(state + 0.1 * k2)
    k4 = velocity(state + 0.2 * k3)
    angle, bend, omega, turn = state + 0.2 / 6 * (k1 + 2 * (k2 + k3) + k4)
    ended = -np.cos(angle) - np.cos(angle + bend) > 1.0
    angle, bend = ((turned + np.pi) % (2 * np.pi) - np.pi for turned in (angle, bend))
    omega, turn = (np.minimum(np.maximum(w, -most * np.pi), most * np.pi) for w, most in ((omega, 4), (turn, 9)))
    return _rows(angle, bend, omega, turn), ended.astype(angle.dtype) - 1, ended


def _observe_acrobot(state: Array) -> Array:
    angle, bend, omega, turn = state
    return _rows(np.cos(angle), np.sin(angle), np.cos(bend), np.sin(bend), omega, turn)


def _same(state: Array) -> Array:
    return state


def _observe_pendulum(state: Array) -> Array:
    return _rows(np.cos(state[0]), np.sin(state[0]), state[1])


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
    "acrobot": Environment(
        3,
        {"LINK_MASS_1": 1.0, "LINK_MASS_2": 1.0, "LINK_LENGTH_1": 1.0},
        _begin_acrobot,
        _observe_acrobot,
        _step_acrobot,
        (1.0, 1.0, 1.0, 1.0, 2.0, 4.0),
    ),
}
"""By name. Settings are lengths in m (cart-pole: half the pole's), masses in kg, forces in N and gravity in m/s²."""


def environment(name: str) -> Environment:
    """Return the environment of a name.

    Raises:
        ConfigError: the name is unknown.
    """
    require_choice("environment", name, ENVIRONMENTS)
    return ENVIRONMENTS[name]
