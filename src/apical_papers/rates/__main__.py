"""Tune and test tier after tier, MNIST and Fashion-MNIST in turn.

Run `python -m apical_papers.rates --out results`, with `--sweep rates-costly` for the rules that take longest, with
`--sweep rates-spiking` for spiking networks and `--sweep rates-memristor` for memristors; it goes on where it was
stopped. Each step is an `apical sweep` of one data set with all rules so far.
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
    """Tune every rule alike on MNIST and Fashion-MNIST."""

    out: Annotated[Path, arg(metavar="DIR")]
    """Folder of the sweeps."""
    sweep: Literal["rates", "rates-costly", "rates-spiking", "rates-memristor"] = "rates"
    """Which rules."""
    tiers: Annotated[int | None, arg(metavar="N")] = None
    """How many groups of rules, from the cheapest; all by default."""


def main() -> int:
    """Run the sweeps; returns the status of the first that fails."""
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
