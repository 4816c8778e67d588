"""Search space of a sweep: values and ranges of recipe fields and rule options, written as text."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from apical.bench.materials import located
from apical.bench.names import constructor_options, find_rule, merged
from apical.bench.recipe import Recipe, parse_options, rule_name
from apical.errors import ConfigError, require_choice, unknown_name

Settings = dict[str, Any]
"""Selected values by name."""

FIXED = (
    *("rule", "rule_options", "data", "loss", "epochs", "validation", "train_limit", "test_limit", "seed"),
    *("device", "threads", "probe", "trajectory", "checkpoint_steps", "data_sha256", "model_sha256"),
)
"""Recipe fields that are the same in all trials of a sweep."""


@dataclass(frozen=True)
class Axis:
    """One searched setting.

    Attributes:
        name: name of a recipe field or of a rule's option.
        values: values to choose from; empty for a range.
        log: whether the range is sampled logarithmically.
    """

    name: str
    values: tuple[Any, ...] = ()
    low: float = math.nan
    high: float = math.nan
    log: bool = False


def parse(text: str) -> tuple[str, Axis]:
    """Parse "[RULE:]KEY=VALUES" into the rule, empty for all rules, and the axis.

    Raises:
        ConfigError: it cannot be parsed.

    >>> parse("lr=0.01,0.1")
    ('', Axis(name='lr', values=(0.01, 0.1), low=nan, high=nan, log=False))
    >>> parse("pfa:expansion=log(1,100)")
    ('pfa', Axis(name='expansion', values=(), low=1.0, high=100.0, log=True))
    """
    left, equals, right = text.partition("=")
    owner, _, name = left.rpartition(":")
    name = name.strip().replace("-", "_")
    if not equals or not name or not right.strip():
        raise ConfigError(f"--space {text}: write KEY=VALUE,VALUE or KEY=log(LOW,HIGH) or KEY=uniform(LOW,HIGH)")
    if match := re.fullmatch(r"\s*(log|uniform)\(([^,]+),([^,]+)\)\s*", right):
        kind, low, high = match.groups()
        try:
            bounds = float(low), float(high)
        except ValueError as error:
            raise ConfigError(f"--space {text}: {kind}({low},{high}) needs two numbers") from error
        if not (math.isfinite(bounds[0]) and bounds[0] < bounds[1] < math.inf) or (kind == "log" and bounds[0] <= 0):
            raise ConfigError(f"--space {text}: {kind} needs LOW < HIGH" + (", LOW > 0" if kind == "log" else ""))
        return owner, Axis(name, (), *bounds, log=kind == "log")
    values = [parse_options((f"{name}={value}",))[name] for value in right.split(",")]
    if len(set(map(repr, values))) != len(values):
        raise ConfigError(f"--space {text}: a value occurs twice")
    return owner, Axis(name, tuple(values))


def space(rules: Sequence[str], texts: Sequence[str]) -> dict[str, list[Axis]]:
    """Return the axes of each rule.

    Raises:
        ConfigError: an axis is for a rule that is not swept, or for a setting that no rule has, or occurs twice.
    """
    names = {rule_name(rule): rule for rule in rules}
    recipe_fields = {item.name for item in fields(Recipe)} - set(FIXED)
    axes: dict[str, list[Axis]] = {rule: [] for rule in rules}
    for text in texts:
        owner, axis = parse(text)
        if owner:
            require_choice("rule in --space", owner, names)
        if axis.name in FIXED:
            raise ConfigError(f"--space {text}: {axis.name} is the same in all trials; set it as an option instead")
        takers = [
            rule
            for rule in ([names[owner]] if owner else rules)
            if axis.name in recipe_fields or axis.name in constructor_options(find_rule(rule))
        ]
        if not takers:
            options = {option for rule in rules for option in constructor_options(find_rule(rule))}
            raise unknown_name("setting in --space", axis.name, recipe_fields | options)
        for rule in takers:
            if any(other.name == axis.name for other in axes[rule]):
                raise ConfigError(f"--space has {axis.name} twice for {rule_name(rule)}")
            axes[rule].append(axis)
    return axes


def grid(axes: Sequence[Axis]) -> list[Settings]:
    """Return all combinations.

    Raises:
        ConfigError: a range has no grid.
    """
    for axis in axes:
        if not axis.values:
            raise ConfigError(f"--space {axis.name} is a range, but a grid needs values; or use --search random or optuna")
    combinations = itertools.product(*(axis.values for axis in axes))
    return [dict(zip((axis.name for axis in axes), values, strict=True)) for values in combinations]


def edges(trials: Sequence[Mapping[str, Any]], best: Mapping[str, int]) -> dict[str, list[str]]:
    """Return by rule the numeric settings whose best value is the lowest or highest tried: a better one may lie outside.

    Args:
        trials: trials with their rule, number and settings, as in sweep.json.
        best: number of the best trial, by rule.

    >>> tried = [{"rule": "bp", "number": i, "settings": {"lr": lr}} for i, lr in enumerate((0.01, 0.1, 1.0))]
    >>> edges(tried, {"bp": 0}), edges(tried, {"bp": 1})
    ({'bp': ['lr at its lowest']}, {'bp': []})
    """
    messages: dict[str, list[str]] = {}
    for rule, number in best.items():
        settings = {trial["number"]: trial["settings"] for trial in trials if trial["rule"] == rule}
        messages[rule] = []
        for name, value in settings[number].items():
            values = {setting[name] for setting in settings.values()}
            if len(values) > 1 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
                ends = {min(values): "lowest", max(values): "highest"}
                messages[rule] += [f"{name} at its {ends[value]}"] if value in ends else []
    return messages


def applied(recipe: Recipe, settings: Settings) -> Recipe:
    """Return the recipe with the selected settings.

    Raises:
        ConfigError: a value is not usable.

    >>> applied(Recipe(rule="pfa"), {"lr": 0.1, "expansion": 4}).rule_options
    ('expansion=4',)
    """
    before = {item.name: getattr(recipe, item.name) for item in fields(Recipe)}
    changed: dict[str, Any] = {}
    options: list[str] = []
    for name, value in settings.items():
        if name in before and name not in FIXED:
            changed[name] = _typed(name, before[name], value)
            if name == "model":
                changed |= located({name: str(value)})
            if name in ("lr", "weight_decay"):
                changed[f"{name}_epochs"] = ()
        else:
            options.append(f"{name}={value!r}")
    try:
        return replace(recipe, **changed, rule_options=merged(recipe.rule_options, options))
    except TypeError as error:
        raise ConfigError(f"--space {', '.join(settings)}: {error}") from error


def _typed(name: str, before: Any, value: Any) -> Any:
    """Convert the value to the type of the recipe's field: schedules are tuples, counts are integers."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(before, int | float | tuple) and not isinstance(before, bool) and not number:
        raise ConfigError(f"--space {name}: {value!r} is not a number")
    if isinstance(before, tuple):
        return (float(value),)
    if isinstance(before, bool) or not isinstance(before, int | float):
        return value
    if isinstance(before, int):
        if float(value) != int(value):
            raise ConfigError(f"--space {name}: {value} is not a whole number")
        return int(value)
    return float(value)


class Grid:
    """A fixed list of settings, in order."""

    def __init__(self, settings: Sequence[Settings]) -> None:
        self.left = list(settings)

    def ask(self, count: int) -> list[Settings]:
        """Return the next settings, at most `count`; empty if there are none left."""
        trials, self.left = self.left[:count], self.left[count:]
        return trials

    def tell(self, scores: Sequence[float | None]) -> None:
        """Receive the scores of the last batch; a grid ignores them."""


class Optuna:
    """Optuna's samplers, used in batches, so that the same seed and batch size give the same settings.

    Args:
        random: sample at random instead of with a tree-structured Parzen estimator.

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
        """Return the next settings, at most `count`; empty if there are none left."""
        self.asked = [self.study.ask() for _ in range(min(count, self.left))]
        self.left -= len(self.asked)
        return [{axis.name: _suggested(trial, axis) for axis in self.axes} for trial in self.asked]

    def tell(self, scores: Sequence[float | None]) -> None:
        """Receive the scores of the last batch, None for a trial that diverged."""
        for trial, score in zip(self.asked, scores, strict=True):
            if score is None:
                self.study.tell(trial, state=self.failed)
            else:
                self.study.tell(trial, score)


def _suggested(trial: Any, axis: Axis) -> Any:
    if axis.values:
        return axis.values[trial.suggest_categorical(axis.name, list(range(len(axis.values))))]
    return trial.suggest_float(axis.name, axis.low, axis.high, log=axis.log)
