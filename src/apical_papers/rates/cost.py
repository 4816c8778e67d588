"""Cost of one run of each rule in the setting of the table: seconds of processor time, measured over a few steps.

Run `python -m apical_papers.rates.cost --out results/rates-mnist/costs.json`.
"""

import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
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

Load = Callable[[Recipe], Dataset]
MODULE = "apical_papers.rates.cost"
BATCHES = (1, 41)
"""Numbers of batches of two trainings, whose difference gives the cost of a step."""


@dataclass(frozen=True)
class Options:
    """Measure the cost of a run of each rule."""

    out: Annotated[Path, arg(metavar="FILE")]
    """Output file."""
    rules: Annotated[tuple[str, ...], arg(metavar="RULE ...")] = EVERY
    """Rules to measure."""


def cost(rule: str, loads: Sequence[Load], folder: Path) -> dict[str, Any]:
    """Return the seconds of a run of all epochs, or why the rule refuses the network.

    Args:
        loads: a loader for each entry of BATCHES, which caches its data.
    """
    spent = []
    for count, load in zip(BATCHES, loads, strict=True):
        recipe = replace(SETTING, rule=rule, data=DATA[0], lr=(1e-4,), threads=1, probe=0, epochs=1)
        recipe = replace(recipe, train_limit=count * SETTING.batch_size)
        recipe, _ = resolve(recipe, len(load(recipe).train))
        started = time.process_time()
        try:
            train(recipe, folder / str(count), make_rule, MODULE, load=load)
        except ApicalError as error:
            return {"refused": str(error)}
        spent.append(time.process_time() - started)
    step = (spent[1] - spent[0]) / (BATCHES[1] - BATCHES[0])
    steps = SETTING.epochs * ((SETTING.train_limit or 0) // SETTING.batch_size)
    return {"seconds": spent[0] + steps * step}


def main(arguments: list[str] | None = None) -> int:
    """Measure every rule in turn."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = tyro.cli(Options, args=arguments)
    torch.set_num_threads(1)
    loads = [once(load_data) for _ in BATCHES]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", MODULE, *arguments])
    costs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        cost("bp", loads, Path(scratch, "warm"))  # the first run includes imports and caches
        for rule in options.rules:
            costs[rule] = cost(rule, loads, Path(scratch, rule.replace(":", "-")))
            write_json(options.out, {"command": command, "environment": environment("cpu", 1), "rules": costs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
