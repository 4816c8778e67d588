"""Which settings a sweep tries next: all of a grid, or what Optuna asks for; the same ones for the same seed."""

from collections.abc import Sequence
from typing import Any

from apical.bench.space import Axis, Settings
from apical.errors import ConfigError


class Grid:
    """Given settings, in their order."""

    def __init__(self, settings: Sequence[Settings]) -> None:
        self.left = list(settings)

    def ask(self, count: int) -> list[Settings]:
        """The next ones, at most `count`; empty when there are no more."""
        trials, self.left = self.left[:count], self.left[count:]
        return trials

    def tell(self, scores: Sequence[float | None]) -> None:
        """Scores of those asked for last; a grid does not care."""


class Optuna:
    """Optuna's samplers, asked and told in batches, so that the same seed and batch size ask for the same settings.

    Args:
        random: at random instead of by a tree-structured Parzen estimator.

    Raises:
        ConfigError: Optuna is not installed.
    """

    def __init__(self, axes: Sequence[Axis], trials: int, seed: int, *, random: bool) -> None:
        try:
            import optuna
        except ImportError as error:
            raise ConfigError(f"--search random and optuna need Optuna: pip install 'apical[sweep]' ({error})") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        samplers = optuna.samplers
        sampler = samplers.RandomSampler(seed=seed) if random else samplers.TPESampler(seed=seed, n_startup_trials=8)
        self.study = optuna.create_study(direction="maximize", sampler=sampler)
        self.axes, self.left = axes, trials
        self.asked: list[Any] = []
        self.failed = optuna.trial.TrialState.FAIL

    def ask(self, count: int) -> list[Settings]:
        """The next ones, at most `count`; empty when there are no more."""
        self.asked = [self.study.ask() for _ in range(min(count, self.left))]
        self.left -= len(self.asked)
        return [{axis.name: _suggested(trial, axis) for axis in self.axes} for trial in self.asked]

    def tell(self, scores: Sequence[float | None]) -> None:
        """Scores of those asked for last, None for one that diverged."""
        for trial, score in zip(self.asked, scores, strict=True):
            if score is None:
                self.study.tell(trial, state=self.failed)
            else:
                self.study.tell(trial, score)


def _suggested(trial: Any, axis: Axis) -> Any:
    if axis.values:
        return axis.values[trial.suggest_categorical(axis.name, list(range(len(axis.values))))]
    return trial.suggest_float(axis.name, axis.low, axis.high, log=axis.log)
