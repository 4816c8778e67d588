"""Options of `apical compare` and `apical train`."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from apical.bench.recipe import CHECKSUMS, LossName, Recipe
from apical.cli.flags.shown import settings_of, shown

_ELSEWHERE = {"rule", "rule_options", "seed", *CHECKSUMS}
"""Fields of a recipe that are not options of every command."""


if TYPE_CHECKING:

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """The settings that code accesses by name."""

        data: str | None = None
        model: str | None = None
        epochs: int | None = None
        loss: LossName | None = None

else:
    Settings = settings_of(Recipe, _ELSEWHERE)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where results go and settings come from; a separate base, so that they are listed first."""

    out: Annotated[Path, shown("DIR", "(required)")]
    """Folder for the results; must be new or empty."""
    recipe: Annotated[str | None, shown("NAME")] = None
    """Take the settings of a paper (apical list recipes). Options given on the command line override it."""


@dataclass(frozen=True, kw_only=True)
class Flags(Settings, Place):
    """Options that train and compare share; options not given come from --recipe or the defaults."""

    teacher: Annotated[Path | None, shown("FILE", "(default: one shipped)")] = None
    """Top-down network of tdca: a file written by `apical evolve`, or digits (ten classes) or classes (any number)."""
    tensorboard: Annotated[bool, arg(help_behavior_hint="")] = False
    """Also write each epoch's metrics as TensorBoard events, into events/ of each run."""
    resume: Annotated[bool, arg(help_behavior_hint="")] = False
    """Continue what is in --out."""
    overwrite: Annotated[bool, arg(help_behavior_hint="")] = False
    """Replace what is in --out."""

    def settings(self) -> dict[str, Any]:
        """The recipe fields that the command line sets."""
        names = Recipe.__dataclass_fields__
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name in names}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class CompareFlags:
    """Options that only compare has; a separate base, so that they are listed first."""

    rules: Annotated[tuple[str, ...] | None, shown("RULE ...", "(default: bp fa dfa usf kp pfa pfa-o)")] = None
    """Rules to compare; see `apical list rules`. FILE.py:CLASS or MODULE:CLASS names your own rule; its code is run."""
    seeds: Annotated[int, shown("K", "(default: 3)")] = 3
    """Seeds 0 to K - 1 of each rule."""
    jobs: Annotated[int, shown("N", "(default: one per core)")] = 0
    """Seeds trained in parallel."""
    ray: Annotated[str | None, shown("local|ADDRESS", "(default: off)")] = None
    """Train seeds on a Ray cluster: one started here, or a running one (`ray start --head`) that sees --out as shared."""
    rule_options: Annotated[tuple[str, ...] | None, shown("[RULE:]KEY=VALUE ...")] = None
    """Options of one rule, such as pfa:expansion=4, or, without a rule's name, of every rule that has them. Your own rule is
    named by its class."""


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """Options that only train has; a separate base, so that they are listed first."""

    rule: Annotated[str, shown("RULE", "(default: bp)")] = "bp"
    """Rule to train; see `apical list rules`. FILE.py:CLASS or MODULE:CLASS names your own rule; its code is run."""
    rule_options: Annotated[tuple[str, ...] | None, shown("KEY=VALUE ...")] = None
    """Options of the rule, such as expansion=4."""
    seed: Annotated[int | None, shown("N", "(default: 0)")] = None
    """Seed of weights, data order and augmentation."""


@dataclass(frozen=True, kw_only=True)
class Compare(Flags, CompareFlags):
    """Train several rules with several seeds; write summary.json and report.html.

    The rules take turns, one epoch each, so that their times are comparable. Exit status 3 means that a run diverged.
    """


@dataclass(frozen=True, kw_only=True)
class Train(Flags, TrainFlags):
    """Train one rule; under torchrun, with several processes."""
