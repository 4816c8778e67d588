"""Tune and test tier after tier, MNIST and Fashion-MNIST in turn.

Run `python -m apical_papers.rates --out results`, with `--sweep rates-costly` for the slowest rules,
`--sweep rates-spiking` for spiking networks and `--sweep rates-memristor` for memristors; it continues where it was stopped.
Each step is an `apical sweep` of one data set with all rules so far.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import arg

from apical_papers.rates.recipe import DATA, SWEEPS, arguments


@dataclass(frozen=True)
class Options:
    """Tune all rules equally on MNIST and Fashion-MNIST."""

    out: Annotated[Path, arg(metavar="DIR")]
    """Folder that contains the sweeps."""
    sweep: Literal["rates", "rates-costly", "rates-spiking", "rates-memristor"] = "rates"
    """Which rules."""
    tiers: Annotated[int | None, arg(metavar="N")] = None
    """Number of groups of rules to run, starting with the cheapest; all by default."""


def main() -> int:
    """Run the sweeps; return the status of the first that fails."""
    options = tyro.cli(Options)
    rules: tuple[str, ...] = ()
    for tier in SWEEPS[options.sweep][: options.tiers]:
        rules += tier
        for data in DATA:
            command = arguments(data, rules, str(options.out / f"{options.sweep}-{data}"))
            status = subprocess.run([sys.executable, "-m", "apical", *command], check=False).returncode
            if status:
                return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
