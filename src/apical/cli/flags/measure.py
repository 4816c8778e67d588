"""Options of `apical measure`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from apical.cli.flags.shown import shown


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Measure networks: persistence of weights, codes of activities, Jacobians in the weights and in the input.

    A MODEL is measured with its initial weights, a folder of `apical train` or `apical compare` before and after training.
    """

    targets: Positional[Annotated[tuple[str, ...], shown("MODEL|FOLDER ...")]]
    """Networks by name (`apical list models`) or your own (FILE.py:CLASS), and folders of runs or comparisons."""
    measure: Annotated[tuple[str, ...], shown("NAME ...", "(default: all)")] = ()
    """Measures: persistence, coding, learnability, channel, or your own FILE.py:FUNCTION of a model and its inputs."""
    data: Annotated[str, shown("NAME|FILE|FOLDER", "(default: digits)")] = "digits"
    """Data set from which a MODEL gets its inputs; a folder uses its own."""
    init: Annotated[str, shown("NAME", "(default: the model's own)")] = ""
    """Initial weights of a MODEL: xavier, xavier-normal, orthogonal, critical or looks-linear."""
    samples: Annotated[int, shown("N", "(default: 256)")] = 256
    """Training inputs to measure on, always the same; Jacobians use at most 16 of them."""
    seed: Annotated[int, shown("N", "(default: 0)")] = 0
    """Seed of the weights of a MODEL."""
    out: Annotated[Path | None, shown("DIR", "(default: print only)")] = None
    """Folder for measure.json and report.html; must be new or empty."""
    overwrite: Annotated[bool, arg(help_behavior_hint="")] = False
    """Replace what is in --out."""
