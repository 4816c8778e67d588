"""`apical landscape`: compute the loss surface of finished runs with trajectories, its figure and its numbers."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from apical.bench.distributed import pick_device
from apical.bench.figures.landscape import draw
from apical.bench.folders import check_least
from apical.bench.landscape import check_weights, evaluations, find, measure, plane_of, watched
from apical.bench.materials import build_model, load_data
from apical.bench.measure import probe_batch
from apical.bench.names import LOSSES
from apical.bench.provenance import environment
from apical.bench.state import write_json
from apical.cli.terminal import bar, check_alone, held, say, say_files, show_table
from apical.diagnostics.landscape import losses_at, points_at_once
from apical.errors import ConfigError

if TYPE_CHECKING:
    from apical.cli.flags.landscape import Landscape

SPANS = {"pca": 1.3, "random": 1.0}
"""Half-width of the surface if --span is not given."""


def run(flags: "Landscape", command: str) -> int:
    """Plot the runs on one surface; return the exit status."""
    with held(flags.out, "drawing", partial(_check, flags)):
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
    with bar(evaluations(runs, flags.grid), "losses") as update:
        losses = watched(losses, lambda count: update(advance=count))
        measured = measure(runs, losses, plane, grid=flags.grid, span=span, chunk=chunk, whole=flags.plane == "pca")
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
    drawing = draw(record)
    write_json(flags.out / "landscape.json", record)
    drawing.write(flags.out)
    _tell(record)
    say_files(flags.out, ("landscape.json", "landscape.png", "landscape.svg"))
    return 0


def _check(flags: "Landscape") -> None:
    if not flags.runs:
        raise ConfigError("apical landscape needs at least one folder of a run or a comparison")
    check_least(flags, grid=3, examples=2)
    if flags.span is not None and not 0 < flags.span < float("inf"):
        raise ConfigError(f"--span must be positive and finite, got {flags.span}")
    check_alone("landscape", flags, "the landscape")


def _tell(record: dict[str, Any]) -> None:
    """Print the numbers that accompany the figure."""
    for path in record["diverged"]:
        say(f"left out because it diverged: {path}")
    for seed, same in record["same_start"].items():
        if not same:
            say(f"the runs with seed {seed} start from different weights")
    if record["explained_variance"] is not None:
        first, second = (100 * share for share in record["explained_variance"])
        say(f"the plane covers {first:.1f} % + {second:.1f} % of the snapshots' variance")
    lines = []
    for row in record["runs"]:
        numbers = (row["losses"][-1], max(row["distances"]), row["start_to_end"], row["tortuosity"])
        lines.append([row["label"], str(row["seed"]), *("-" if number is None else f"{number:.4g}" for number in numbers)])
    heads = ("rule", "seed", "loss at the end", "farthest from the plane", "start to end", "tortuosity")
    show_table(heads, lines, left=["rule"], whole=True)
    for line in record["barriers"]:
        height = "not finite" if line["height"] is None else f"{line['height']:.4g}"
        say(f"barrier, seed {line['seed']}, {line['from']} to {line['to']}: {height}")
