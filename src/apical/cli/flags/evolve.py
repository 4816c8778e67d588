"""Options of `apical evolve`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from apical.bench.evolve.recipe import EvolutionRecipe
from apical.bench.recipe import CHECKSUMS
from apical.cli.flags.shown import settings_of, shown

if TYPE_CHECKING:

    class Settings:
        """A field for each setting of an evolution."""

else:
    Settings = settings_of(EvolutionRecipe, CHECKSUMS)


@dataclass(frozen=True, kw_only=True)
class EvolutionPlace:
    """Where results go and settings come from; a separate base, so that they are listed first."""

    out: Annotated[Path, shown("DIR", "(required)")]
    """Folder for the evolution; must be new or empty."""
    recipe: Annotated[str | None, shown("NAME")] = None
    """Settings of an evolution: digits, classes or mnist-residual. Options given on the command line override it."""


@dataclass(frozen=True, kw_only=True)
class Evolve(Settings, EvolutionPlace):
    """Evolve a top-down network that assigns credit (rule tdca); write teacher.pt."""

    ray: Annotated[str | None, shown("local|ADDRESS", "(default: off)")] = None
    """Distribute the population over a Ray cluster: one started here, or a running one (`ray start --head`)."""
    workers: Annotated[int | None, shown("N", "(default: one per core)")] = None
    """Workers of --ray local."""
    resume: Annotated[bool, arg(help_behavior_hint="")] = False
    """Continue what is in --out."""
    overwrite: Annotated[bool, arg(help_behavior_hint="")] = False
    """Replace what is in --out."""
