"""Studies: the rows of a paper's table or figure, each with its recipe and the numbers it should reproduce."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from apical.bench.recipe import Recipe, from_json
from apical.bench.state import read_json
from apical.errors import ApicalError, ConfigError, require_choice


@dataclass(frozen=True)
class Published:
    """One published number for comparison.

    Attributes:
        metric: "accuracy" or "error" in percent, "loss" (of the split in `split`), or "angle" in degrees.
        tolerance: largest distance of a reproduction from it.
        tag: "fig", "paper" or "ours".
        layer: number of the layer from the input, for angles; 0 for the mean over layers.
        spread: standard deviation over seeds, if known.
        split: "train", "validation" or "test".
        select: "best-validation" uses the value at the best validation epoch up to `epoch`; None uses that of `epoch`.
    """

    metric: str
    epoch: int
    value: float
    tolerance: float
    tag: str
    layer: int | None = None
    spread: float | None = None
    split: str = "test"
    select: str | None = None


@dataclass(frozen=True)
class Claim:
    """A published order: after `epoch` epochs the metric of `rule` minus that of `other` is at least `least`."""

    rule: str
    other: str
    epoch: int
    least: float
    split: str = "test"
    metric: str = "accuracy"


@dataclass(frozen=True)
class Row:
    """One rule of a study: its recipe and its published numbers."""

    recipe: Recipe
    published: tuple[Published, ...] = ()


@dataclass(frozen=True)
class Study:
    """A set of comparable rows.

    Attributes:
        cost: approximate cost of one run.
        rows: short name of the rule -> row.
        default: row of any other rule, without published numbers.
    """

    title: str
    cost: str
    rows: dict[str, Row]
    default: Recipe
    claims: tuple[Claim, ...] = ()

    def row(self, rule: str) -> Row:
        """Return the row of a rule, or the study's default settings for a rule without a row."""
        return self.rows.get(rule) or Row(replace(self.default, rule=rule))


def rows_of(
    base: Recipe,
    rules: Iterable[str] | Mapping[str, Mapping[str, Any]],
    published: Mapping[str, tuple[Published, ...]] = MappingProxyType({}),
) -> dict[str, Row]:
    """Return the rows of rules, each with its published numbers and, if given, its own settings."""
    own = rules if isinstance(rules, Mapping) else {}
    return {rule: Row(replace(base, rule=rule, **own.get(rule, {})), published.get(rule, ())) for rule in rules}


def options_of(**options: Any) -> tuple[str, ...]:
    """Options of a rule's constructor as a recipe has them: "name=value"."""
    return tuple(f"{name}={value}" for name, value in options.items())


def from_file(path: Path) -> Study:
    """Read the study in a file {"title": ..., "rows": {rule: recipe}}, without published numbers.

    Raises:
        ConfigError: there is no such file, or it contains no recipes.
        CheckpointError: it is damaged.
    """
    if not path.is_file():
        raise ConfigError(f"--recipe {path}: there is no such file")
    content = read_json(path)
    rows = content.get("rows")
    if not isinstance(rows, dict) or not rows:
        raise ConfigError(f'--recipe {path}: the file has no recipes; it needs {{"title": ..., "rows": {{RULE: RECIPE}}}}')
    recipes = {rule: Row(_recipe(settings, f"--recipe {path}, {rule}")) for rule, settings in rows.items()}
    return Study(str(content.get("title", path.name)), "not known", recipes, next(iter(recipes.values())).recipe)


def _recipe(settings: Any, where: str) -> Recipe:
    if not isinstance(settings, dict):
        raise ConfigError(f"{where}: a recipe is an object of settings, not {settings!r}")
    names = [item.name for item in fields(Recipe)]
    for name in settings:
        require_choice(f"setting in {where}", name, names)
    try:
        return from_json(settings)
    except ApicalError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: a setting has the wrong kind of value ({error})") from error
