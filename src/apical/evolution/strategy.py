"""Evolution strategies of EvoTorch behind an ask-and-tell interface.

The default is PGPE (parameter-exploring policy gradients, Sehnke et al. 2010) with the settings of TDCA's released code:
mirrored pairs, centred ranks, a standard deviation per parameter with step 0.1, at most 20 % change per generation, decay
0.999 and floor 1e-4, and a centre moved by momentum 0.9 along

    d = sum_k (r_k^+ - r_k^-) eps_k,   v = 0.9 v + 0.1 d,   mu = mu + 0.1 v

which is a sum, so it grows with the population. EvoTorch takes the mean over pairs of half of it, hence the factors below.
To update the standard deviations, the released code subtracts the centre's own rank; here the mean rank, which is zero, is
subtracted. The two differ only in noise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from apical.errors import ConfigError

Name = Literal["pgpe", "pgpe-clipup", "cem"]
NAMES: tuple[Name, ...] = ("pgpe", "pgpe-clipup", "cem")


@dataclass(frozen=True)
class Strategy:
    """Settings of an evolution strategy.

    Attributes:
        name: "pgpe", "pgpe-clipup" (the centre is moved by ClipUp, Toklu et al. 2020) or "cem" (cross entropy).
        population: individuals per generation; even, for mirrored pairs.
        sigma: initial standard deviation.
        step: step size of the centre ("pgpe": as in the released code; "pgpe-clipup": its maximum speed is twice that).
        decay: factor on the step after each generation ("cem" has no decay).
    """

    name: Name = "pgpe"
    population: int = 64
    sigma: float = 0.1
    step: float = 0.1
    decay: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ConfigError(f"strategy must be one of {', '.join(NAMES)}; got {self.name!r}")
        if self.population < 4 or self.population % 2:
            raise ConfigError(f"the population must be even and at least 4, for mirrored pairs; got {self.population}")
        if self.sigma <= 0 or self.step <= 0:
            raise ConfigError(f"sigma and step must be positive; got {self.sigma} and {self.step}")
        if not 0 < self.decay <= 1:
            raise ConfigError(f"the decay of the step must be above 0 and at most 1; got {self.decay}")


SIGMA_DECAY, SIGMA_FLOOR = 0.999, 1e-4


class Search:
    """A strategy in progress, around a centre (D,).

    All randomness derives from the seed passed to :meth:`ask`, so a search resumes exactly from :meth:`state`.

    Raises:
        ConfigError: EvoTorch is not installed.
    """

    def __init__(self, strategy: Strategy, start: Tensor) -> None:
        try:
            from evotorch.algorithms import functional
        except ImportError as error:
            raise ConfigError(f"evolution needs EvoTorch: pip install 'apical[evolution]' ({error})") from error
        self.strategy = strategy
        self._ask: Callable[..., Tensor]
        self._tell: Callable[..., Any]
        if strategy.name == "cem":
            self._ask, self._tell = functional.cem_ask, functional.cem_tell
            self._state: Any = functional.cem(
                center_init=start,
                parenthood_ratio=0.5,
                objective_sense="max",
                stdev_init=strategy.sigma,
                stdev_min=SIGMA_FLOOR,
            )
            return
        self._ask, self._tell = functional.pgpe_ask, functional.pgpe_tell
        plain = strategy.name == "pgpe"
        self._state = functional.pgpe(
            center_init=start,
            center_learning_rate=0.1 * strategy.step * strategy.population if plain else strategy.step,
            stdev_learning_rate=0.05,
            objective_sense="max",
            optimizer="sgd" if plain else "clipup",
            optimizer_config={"momentum": 0.9},
            stdev_init=strategy.sigma,
            stdev_min=SIGMA_FLOOR,
            stdev_max_change=0.2,
        )

    @property
    def center(self) -> Tensor:
        """Mean of the search distribution (D,)."""
        holder = self._state if self.strategy.name == "cem" else self._state.optimizer_state
        center: Tensor = holder.center
        return center

    @property
    def sigma(self) -> Tensor:
        """Its standard deviations (D,)."""
        sigma: Tensor = self._state.stdev
        return sigma

    def ask(self, seed: int) -> Tensor:
        """Return a population (population, D)."""
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return self._ask(self._state, popsize=self.strategy.population)

    def tell(self, population: Tensor, fitness: Tensor) -> None:
        """Update the search from the fitness (population,), higher being better; non-finite values count as worst."""
        self._state = self._tell(self._state, population, finite(fitness).to(population.dtype))
        if self.strategy.name != "cem":
            decayed = torch.where(self.sigma > SIGMA_FLOOR, self.sigma * SIGMA_DECAY, self.sigma)
            mover = self._state.optimizer_state
            slower = mover._replace(center_learning_rate=mover.center_learning_rate * self.strategy.decay)
            self._state = self._state._replace(stdev=decayed, optimizer_state=slower)

    def state(self) -> dict[str, Any]:
        """Return tensors and numbers for :meth:`restore`."""
        return _to_dict(self._state)

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state` of a search with the same strategy.

        Raises:
            ValueError: the state belongs to another strategy, or is damaged.
        """
        self._state = _from_dict(self._state, state)


def finite(fitness: Tensor) -> Tensor:
    """Return the fitness with non-finite values replaced by one below all finite values.

    >>> finite(torch.tensor([1.0, float("nan"), 3.0]))
    tensor([1., 0., 3.])
    """
    good = fitness.isfinite()
    worst = fitness[good].min() - 1 if bool(good.any()) else fitness.new_zeros(())
    return torch.where(good, fitness, worst)


def _to_dict(state: Any) -> dict[str, Any]:
    return {
        name: _to_dict(value) if hasattr(value, "_fields") else value
        for name, value in state._asdict().items()
        if isinstance(value, Tensor) or hasattr(value, "_fields")
    }


def _from_dict(state: Any, saved: Any) -> Any:
    own = _to_dict(state)
    if not isinstance(saved, dict) or saved.keys() != own.keys():
        raise ValueError("its state belongs to another strategy")
    changed = {}
    for name, value in saved.items():
        if isinstance(own[name], dict):
            changed[name] = _from_dict(getattr(state, name), value)
            continue
        if not isinstance(value, Tensor) or value.shape != own[name].shape or value.dtype != own[name].dtype:
            raise ValueError(f"its {name} has a different type or shape")
        changed[name] = value
    return state._replace(**changed)
