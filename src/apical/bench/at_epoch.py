"""Compare runs at one epoch, finished or not: for comparisons that were stopped before their end.

    python -m apical.bench.at_epoch FOLDER... --epoch 62 --title "..." --about "..." --out results/name.json

Writes a list of rows, one per rule: how many seeds reached the epoch, and mean and standard deviation over them, at that
epoch and at the epoch of best validation up to it. `docs/generate.py` makes a page of it.
"""

import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from tyro.conf import Positional

from apical.bench.papers import studies
from apical.bench.report.records import Run, read
from apical.bench.run_folder import write_json
from apical.bench.study import Published
from apical.errors import ApicalError, ConfigError, require_choice


@dataclass(frozen=True)
class Options:
    """Compare runs at one epoch."""

    folders: Positional[tuple[Path, ...]]
    """Comparisons' folders."""
    epoch: int
    """The epoch."""
    out: Path
    """File to write."""
    rules: tuple[str, ...] = ()
    """Rules to show; all by default."""
    recipe: str = ""
    """Study whose published numbers are shown for comparison; the verdict says whether the runs are within tolerance."""
    title: str = "Runs at one epoch"
    """Heading of its page."""
    about: str = ""
    """Description for readers."""


def row(rule: str, runs: Sequence[Run], epoch: int, published: Sequence[Published] = ()) -> dict[str, Any]:
    """Return one rule's results at an epoch, in percent for classes, with the test accuracy published for it.

    Raises:
        ConfigError: no run of the rule reached the epoch.
    """
    reached = [run for run in runs if epoch in run.epochs]
    if not reached:
        raise ConfigError(f"no run of {rule} reached epoch {epoch}")
    key = "test_accuracy" if reached[0].records[-1].get("test_accuracy") is not None else "test_loss"
    there = [run.records[run.epochs.index(epoch)] for run in reached]
    best = [_best(run, epoch) for run in reached]
    recipe, around = reached[0].config, reached[0].environment
    number = next((item for item in published if item.metric == "accuracy" and item.split == "test"), None)
    beside: dict[str, Any] = {}
    if number is not None:
        records = best if number.select else there
        distance = 100 * statistics.mean(record[key] for record in records) - number.value
        spread = "" if number.spread is None else f" ± {number.spread:.2f}"
        beside = {
            "published": f"{number.value:.2f}{spread} at epoch {number.epoch}",
            "distance": f"{distance:+.2f}",
            "verdict": f"{'within' if abs(distance) <= number.tolerance else 'outside'} ± {number.tolerance:g}",
        }
    return {
        "rule": rule,
        "seeds": len(reached),
        "epoch": epoch,
        "of": recipe.get("epochs"),
        key.replace("_", " "): _spread([record[key] for record in there], key),
        "at the best validation epoch": _spread([record[key] for record in best], key),
        **beside,
        "model": recipe.get("model"),
        "batch": recipe.get("batch_size"),
        "device": around.get("device"),
        "commit": around.get("commit"),
    }


def _best(run: Run, epoch: int) -> Any:
    records = [record for number, record in zip(run.epochs, run.records, strict=True) if number <= epoch]
    measured = [record for record in records if record.get("validation_loss") is not None]
    return min(measured, key=lambda record: float(record["validation_loss"])) if measured else records[-1]


def _spread(values: Sequence[float], key: str) -> str:
    scale, places = (100.0, 2) if key == "test_accuracy" else (1.0, 5)
    scaled = [scale * value for value in values]
    text = f"{statistics.mean(scaled):.{places}f}"
    return text if len(scaled) < 2 else f"{text} ± {statistics.stdev(scaled):.{places}f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = tyro.cli(Options, prog="python -m apical.bench.at_epoch", args=arguments)
    try:
        if options.recipe:
            require_choice("recipe", options.recipe, studies())
        study = studies().get(options.recipe)
        comparisons = [read(folder) for folder in options.folders]
        rows = [
            row(rule, comparison.of(rule), options.epoch, study.row(rule).published if study else ())
            for comparison in comparisons
            for rule in comparison.rules
            if not options.rules or rule in options.rules
        ]
    except ApicalError as error:
        print(f"apical: error: {error}", file=sys.stderr)
        return 2
    command = shlex.join(["python", "-m", "apical.bench.at_epoch", *arguments])
    write_json(options.out, {"title": options.title, "about": options.about, "command": command, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
