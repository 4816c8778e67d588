"""`apical landscape`: from finished runs with trajectories to their loss surface, its figure and its numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from apical.bench.checkpoint import write_atomically
from apical.bench.compare import load_data
from apical.bench.distributed import pick_device, under_torchrun
from apical.bench.figures.landscape import draw
from apical.bench.folders import check_writable, refuse_used
from apical.bench.landscape import check_weights, evaluations, find, measure, plane_of, watched
from apical.bench.materials import build_model
from apical.bench.measure import probe_batch
from apical.bench.names import LOSSES
from apical.bench.progress import shown_path
from apical.bench.provenance import environment
from apical.bench.run_folder import FolderLock
from apical.bench.state import write_json
from apical.diagnostics.landscape import losses_at, points_at_once
from apical.errors import ConfigError

if TYPE_CHECKING:
    from apical.cli.flags.landscape import Landscape

SPANS = {"pca": 1.3, "random": 1.0}
"""Half-width of the surface where --span is not given."""

FILES = ("landscape.json", "landscape.png", "landscape.svg")


def run(flags: "Landscape", command: str) -> int:
    """Draw the runs on one surface; returns the exit status.

    Raises:
        ApicalError: an option or a folder is not usable, or the runs do not go together.
    """
    _check(flags)
    with FolderLock(flags.out).held("drawing", wait=0):
        _check(flags)  # again: its last holder may have written it since
        return _run(flags, command)


def _run(flags: "Landscape", command: str) -> int:
    runs, diverged = find(flags.runs)
    recipe, device = runs[0].recipe, pick_device(flags.device)
    dataset = load_data(recipe)
    model = build_model(recipe, dataset)
    check_weights(runs, model)
    plane = plane_of(runs, flags.plane, model)
    inputs, targets = probe_batch(dataset.train, flags.examples)
    model, inputs, targets = model.to(device), inputs.to(device), targets.to(device)
    losses, chunk = losses_at(model, LOSSES[recipe.loss], inputs, targets), points_at_once(model, inputs)
    span = SPANS[flags.plane] if flags.span is None else flags.span
    with _shown(evaluations(runs, flags.grid)) as advance:
        measured = measure(
            runs, watched(losses, advance), plane, grid=flags.grid, span=span, chunk=chunk, whole=flags.plane == "pca"
        )
    record = {
        "command": command,
        "plane": flags.plane,
        "data": recipe.data,
        "model": recipe.model,
        "loss": recipe.loss,
        "examples": len(inputs),
        "diverged": [str(path) for path in diverged],
        **measured,
        "environment": environment(str(device), torch.get_num_threads()),
    }
    _write(flags.out, record)
    _tell(record, flags.out)
    return 0


def _check(flags: "Landscape") -> None:
    if under_torchrun():
        raise ConfigError("apical landscape is single-process; do not run it under torchrun")
    if not flags.runs:
        raise ConfigError("apical landscape needs at least one folder of a run or a comparison")
    for option, value, least in (("--grid", flags.grid, 3), ("--examples", flags.examples, 2)):
        if value < least:
            raise ConfigError(f"{option} must be at least {least}, got {value}")
    if flags.span is not None and not 0 < flags.span < float("inf"):
        raise ConfigError(f"--span must be positive and finite, got {flags.span}")
    check_writable(flags.out)
    if not flags.overwrite:
        refuse_used(flags.out, "add --overwrite to replace the landscape in it")


def _write(out: Path, record: dict[str, Any]) -> None:
    drawing = draw(record)
    write_json(out / "landscape.json", record)
    write_atomically(out / "landscape.png", drawing.png)
    write_atomically(out / "landscape.svg", drawing.svg)


def _tell(record: dict[str, Any], out: Path) -> None:
    """Print the numbers that belong beside the figure."""
    console = Console()

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    for path in record["diverged"]:
        say(f"left out, because it diverged: {path}")
    for seed, same in record["same_start"].items():
        if not same:
            say(f"the runs with seed {seed} start from different weights")
    if record["explained_variance"] is not None:
        first, second = (100 * share for share in record["explained_variance"])
        say(f"the plane holds {first:.1f} % + {second:.1f} % of the snapshots' variance")
    table = Table(box=None, pad_edge=False)
    for name in ("rule", "seed", "loss at the end", "farthest from the plane", "start to end", "tortuosity"):
        table.add_column(name, justify="left" if name == "rule" else "right")
    for row in record["runs"]:
        numbers = (row["losses"][-1], max(row["distances"]), row["start_to_end"], row["tortuosity"])
        table.add_row(row["label"], str(row["seed"]), *("-" if number is None else f"{number:.4g}" for number in numbers))
    console.print(table)
    for line in record["barriers"]:
        height = "not finite" if line["height"] is None else f"{line['height']:.4g}"
        say(f"barrier, seed {line['seed']}, {line['from']} to {line['to']}: {height}")
    for name in FILES:
        say(f"{name.rpartition('.')[2]}: {shown_path(out / name)}")


@contextmanager
def _shown(total: int) -> Iterator[Any]:
    """A function to be told of finished evaluations: a bar, in a terminal only."""
    console = Console()
    if not console.is_terminal:
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("losses", total=total)
        yield lambda count: progress.advance(task, count)
