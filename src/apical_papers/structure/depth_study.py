"""Propagation of credit in deep chains, for rules and depths that `apical_papers.structure.study` leaves out.

Run `python -m apical_papers.structure.depth_study --out results/structure-depth --jobs 1`. The networks, the measure and
the mark of a tenth at depth 50 are that study's; the marks were written after inspecting seed 0 of one network.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from apical.bench.finding import Row, at_least
from apical.bench.program import Cells, Seeds, about_study, by_seed, run_command
from apical.errors import ConfigError
from apical_papers.structure import depth

FAR = ("brsf", "frsf", "kp", "wm", "dfc", "dfc-ss", "pc-one-step", "dtp-drl", "ddtp-rhl", "ddtp-control")

ABOUT = about_study(
    "Credit in deep chains: every other rule, also those that refuse some of the chains",
    "How much of a rule's credit arrives at the first layer of chains of 10, 50 and 200 layers, under the rules "
    "that the study of structure and depth leaves out, or asks at 10 and 50 layers alone. A rule that refuses a chain is "
    "shown with its reason.",
    "No paper has this table. Reproduced means that the 95 % interval (Student's t) lies on its better "
    "side, or the mean past the mark.",
)


@dataclass(frozen=True)
class Options(Seeds):
    """Depth, over further rules."""

    out: Annotated[Path, arg(metavar="DIR")] = Path("results/structure-depth")
    seeds: Annotated[int, arg(metavar="N")] = 3
    deepest: Annotated[int, arg(metavar="N")] = max(depth.DEPTHS)
    """Largest depth of chains to measure, out of 10, 50 and 200 layers."""


def _cell(seed: int, depths: Sequence[int]) -> dict[str, Any]:
    return {"depth": depth.measure(seed, depth.FURTHER, depths)}


def study(options: Options, command: str) -> dict[str, Any]:
    """Run the seeds that are not saved yet, then write results.json and report.html."""
    depths = [layers for layers in depth.DEPTHS if layers <= options.deepest]
    if not depths:
        raise ConfigError(f"--deepest must be at least {min(depth.DEPTHS)}")
    settings = {"deepest": max(depths), "width": depth.WIDTH}
    cell = partial(_cell, depths=depths)
    tables_of = partial(tables, depths=depths)
    return by_seed(options, command, cell, verdicts, tables_of, settings=settings, about=ABOUT)


def verdicts(cells: Cells) -> list[Row]:
    """Judge whether a tenth reaches the first layer on the isometry at depth 50."""
    what = "|x| at depth 50: gradient norm of layer 1 / L"
    ratios = {rule: depth.ratios(cells, depth.EXACT, rule, 50) for rule in FAR}
    return [at_least("depth", rule, what, values, 0.1) for rule, values in ratios.items() if values]


def tables(cells: Cells, depths: Sequence[int] = depth.DEPTHS) -> list[Row]:
    """Return a table for each network."""
    return [depth.table(cells, name, depth.FURTHER, depths) for name in depth.NETWORKS]


main = partial(run_command, "apical_papers.structure.depth_study", Options, study)


if __name__ == "__main__":
    sys.exit(main())
