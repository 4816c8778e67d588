"""Options of `apical landscape`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from apical.bench.recipe import Device
from apical.cli.flags.shown import shown


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """Plot the training paths of finished runs on their loss surface. Requires runs made with `--trajectory N`."""

    runs: Positional[Annotated[tuple[Path, ...], shown("RUNS ...", "(required)")]]
    """Folders of runs or comparisons, all with the same model, data set and loss."""
    out: Annotated[Path, shown("DIR", "(required)")]
    """Folder for landscape.png, .svg and .json; must be new or empty."""
    plane: Annotated[Literal["pca", "random"], shown("pca|random", "(default: pca)")] = "pca"
    """Plane through weight space: the first two principal components of the snapshots, or two filter-normalised random
    directions."""
    grid: Annotated[int, shown("N", "(default: 41)")] = 41
    """Points per side of the surface; also points on the straight lines along which barriers are measured."""
    span: Annotated[float | None, shown("X", "(default: 1.3 for pca, 1 for random)")] = None
    """Half-width of the surface, relative to that of all snapshots (pca) or to the norms of the filters (random)."""
    examples: Annotated[int, shown("N", "(default: 1000)")] = 1000
    """Training images on which the loss is computed, always the same."""
    device: Annotated[Device, shown("auto|cpu|cuda", "(default: auto)")] = "auto"
    """Where to compute."""
    overwrite: Annotated[bool, arg(help_behavior_hint="")] = False
    """Replace what is in --out."""
