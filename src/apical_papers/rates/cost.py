"""What one run of each rule takes in the setting of the table: seconds of processor time, measured over one epoch.

Run `python -m apical_papers.rates.cost --out results/rates-mnist/costs.json`.
"""

import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from tyro.conf import arg

from apical.bench.materials import load_data
from apical.bench.names import make_rule, resolve
from apical.bench.provenance import environment
from apical.bench.recipe import Recipe
from apical.bench.state import write_json
from apical.bench.sweep import once, train
from apical.data import Dataset
from apical.errors import ApicalError
from apical_papers.rates.recipe import DATA, EVERY, SETTING

MODULE = "apical_papers.rates.cost"


@dataclass(frozen=True)
class Options:
    """Measure what a run of each rule takes."""

    out: Annotated[Path, arg(metavar="FILE")]
    """File for the seconds."""
    rules: Annotated[tuple[str, ...], arg(metavar="RULE ...")] = EVERY
    """Rules to measure."""


def cost(rule: str, load: Callable[[Recipe], Dataset], folder: Path) -> dict[str, Any]:
    """Seconds of a run of all epochs, or why the rule does not take the network."""
    recipe = replace(SETTING, rule=rule, data=DATA[0], lr=(1e-3,), threads=1, probe=0, epochs=1)
    recipe, _ = resolve(recipe, len(load(recipe).train))
    started = time.process_time()
    try:
        train(recipe, folder, make_rule, MODULE, load=load)
    except ApicalError as error:
        return {"refused": str(error)}
    return {"seconds": SETTING.epochs * (time.process_time() - started)}


def main(arguments: list[str] | None = None) -> int:
    """Measure every rule, one after the other."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = tyro.cli(Options, args=arguments)
    torch.set_num_threads(1)
    load = once(load_data)
    with tempfile.TemporaryDirectory() as scratch:
        cost("bp", load, Path(scratch, "warm"))  # the first run pays for imports and caches
        costs = {rule: cost(rule, load, Path(scratch, str(number))) for number, rule in enumerate(options.rules)}
    command = shlex.join(["python", "-m", MODULE, *arguments])
    write_json(options.out, {"command": command, "environment": environment("cpu", 1), "rules": costs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
