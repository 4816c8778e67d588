"""Gymnasium environments by the hundred: individuals x episodes of one kind, each individual with its own settings.

CartPole-v1 runs in gymnasium's vectorised version, whose settings are set to arrays; any other environment with discrete
actions and a vector of observations runs one after the other (`gymnasium.make_vec`), with settings as attributes of each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from apical.errors import ConfigError

Array = npt.NDArray[Any]

CART_POLE = "CartPole-v1"
CART_POLE_SETTINGS = ("length", "force_mag", "gravity", "masscart", "masspole")
"""Half the pole's length (m), force (N), gravity (m/s^2), masses of cart and pole (kg)."""


class Environments:
    """All individuals' episodes, in step.

    Args:
        name: gymnasium's.
        individuals: P.
        episodes: E, for each of them.
        steps: after so many, an episode ends.
        settings: name of an attribute of the environment -> its value for each individual, (P,).

    Attributes:
        observations, actions: how many numbers an observation has, and how many actions there are.

    Raises:
        ConfigError: gymnasium is not installed, does not know the environment, or cannot change such a setting; or the
            environment's actions are not discrete, or its observations not vectors.
    """

    def __init__(
        self, name: str, individuals: int, episodes: int, steps: int, settings: Mapping[str, Array] | None = None
    ) -> None:
        try:
            import gymnasium
        except ImportError as error:
            raise ConfigError(f"reinforcement learning needs gymnasium: pip install 'apical[rl]' ({error})") from error
        self.name, self.individuals, self.episodes, self.steps = name, individuals, episodes, steps
        count = individuals * episodes
        each = {key: np.repeat(np.asarray(value, dtype=float), episodes) for key, value in (settings or {}).items()}
        self.vector: Any
        if name == CART_POLE:
            from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv

            self.vector = CartPoleVectorEnv(count, max_episode_steps=steps)
            _set_cart_poles(self.vector, each)
        else:
            try:
                self.vector = gymnasium.make_vec(name, count, vectorization_mode="sync", max_episode_steps=steps)
            except gymnasium.error.Error as error:
                raise ConfigError(f"gymnasium cannot make {name!r}: {error}") from error
            _set_attributes(self.vector.envs, each, name)
        actions, observations = self.vector.single_action_space, self.vector.single_observation_space
        if not isinstance(actions, gymnasium.spaces.Discrete) or len(observations.shape or ()) != 1:
            raise ConfigError(
                f"{name} needs discrete actions and observations that are vectors; it has {actions}, {observations}"
            )
        self.actions, self.observations = int(actions.n), int(observations.shape[0])
        self._offset = int(actions.start)

    def reset(self, seeds: Sequence[int]) -> Array:
        """First observations (P, E, n).

        Args:
            seeds: of everything random in the environments. Individuals are in as many groups of equal size, one after the
                other; those of a group begin in the same E states.
        """
        E, repeats = self.episodes, self.individuals // len(seeds)
        if self.name == CART_POLE:
            self.vector.reset(seed=seeds[0] % 2**32)
            low, high = self.vector.low, self.vector.high
            states = np.stack([np.random.default_rng(seed).uniform(low, high, (E, 4)) for seed in seeds])
            self.vector.state = np.repeat(states, repeats, 0).reshape(-1, 4).T.copy()
            return self._shaped(self.vector.state.T.astype(np.float32))
        each = np.stack([np.random.default_rng(seed).integers(2**31, size=E) for seed in seeds])
        observations, _ = self.vector.reset(seed=[int(s) for s in np.repeat(each, repeats, 0).flatten()])
        return self._shaped(observations)

    def step(self, actions: Array) -> tuple[Array, Array, Array]:
        """Observations (P, E, n), rewards and whether the episode ended (P, E), after actions (P, E).

        An environment whose episode has ended goes on with a new one; what it then returns is not for anybody.
        """
        observations, rewards, terminated, truncated, _ = self.vector.step(actions.reshape(-1) + self._offset)
        return self._shaped(observations), self._shaped(rewards), self._shaped(terminated | truncated)

    def close(self) -> None:
        """End the environments."""
        self.vector.close()

    def _shaped(self, values: Array) -> Array:
        return values.reshape(self.individuals, self.episodes, *values.shape[1:])


def _set_cart_poles(vector: Any, settings: Mapping[str, Array]) -> None:
    unknown = sorted(set(settings) - set(CART_POLE_SETTINGS))
    if unknown:
        raise ConfigError(f"CartPole has no setting {unknown[0]!r}; it has {', '.join(CART_POLE_SETTINGS)}")
    for key, values in settings.items():
        setattr(vector, key, values)
    vector.total_mass = vector.masspole + vector.masscart
    vector.polemass_length = vector.masspole * vector.length


def _set_attributes(environments: Any, settings: Mapping[str, Array], name: str) -> None:
    for key, values in settings.items():
        for environment, value in zip(environments, values, strict=True):
            if not isinstance(getattr(environment.unwrapped, key, None), int | float):
                raise ConfigError(f"{name} has no number {key!r} that could be set")
            setattr(environment.unwrapped, key, float(value))
