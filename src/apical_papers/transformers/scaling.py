"""Loss against width, rule by rule: how fast does a language model improve with width under each rule?

Run `python -m apical_papers.transformers.scaling --out results/transformers-scaling`. At each width all rules take the same
steps on the same windows, so they use the same computation, which grows with the width equally for all. A power law of the
width, loss = a width^-b, is fitted to each seed's losses; the exponents have intervals over seeds. With few widths and short
trainings, this ranks rules at this size and says nothing about large models.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import arg

from apical.bench.finding import Row, difference, table
from apical.bench.program import about_study, keep_results, run_command
from apical.errors import ConfigError
from apical_papers.transformers.language import ARMS
from apical_papers.transformers.training import Setting, data, kept_training

NAMES = ("bp", "kp-mirror", "pfa-mirror", "fa", "dfa")
ABOUT = about_study(
    "Loss against width of a small language model",
    "Test loss in nats per character at each width, and the exponent of a power law, for five rules.",
    "Marks were written before the runs: wider nets gain less under fa and dfa than under bp. "
    "Reproduced means that the 95 % interval (Student's t, paired over seeds) lies on the better side of 0.",
)


@dataclass(frozen=True)
class Options:
    """Loss against width of a small language model."""

    out: Annotated[Path, arg(metavar="DIR")] = Path("results/transformers-scaling")
    seeds: Annotated[int, arg(metavar="K")] = 3
    """Number of seeds, for weights and windows."""
    steps: Annotated[int, arg(metavar="N")] = 200
    """Steps of each training, a multiple of 4."""
    widths: Annotated[tuple[int, ...], arg(metavar="N ...")] = (32, 64, 128)
    """Widths of the stream."""
    rate: Annotated[float, arg(metavar="RATE")] = 1e-2
    """Learning rate at width 64; at other widths it is scaled by 64 / width."""


def study(options: Options, command: str) -> dict[str, Any]:
    """Run missing trainings, then write results.json and report.html."""
    if options.steps % 4 or len(options.widths) < 2:
        raise ConfigError("--steps must be a multiple of 4, and --widths needs at least two values")
    dataset = data()
    cells = {
        (name, width): [
            kept_training(options.out, ARMS, dataset, Setting(name, options.rate * 64 / width, seed, width, options.steps))
            for seed in range(options.seeds)
        ]
        for width in options.widths
        for name in NAMES
    }
    losses = {
        name: [[cell["test"] for cell in cells[name, width]] for width in options.widths]
        for name in NAMES
        if all(cell["test"] is not None for width in options.widths for cell in cells[name, width])
    }
    exponents = {name: [exponent(options.widths, seed) for seed in zip(*rows, strict=True)] for name, rows in losses.items()}
    settings = {
        "data": dataset.about,
        "steps": options.steps,
        "seeds": options.seeds,
        "rate at width 64": options.rate,
    }
    by_width = table(
        "Test loss by width, and exponent",
        "Nats per character, mean over seeds with 95 % interval; exponent b of loss = a width^-b.",
        ["rule", *(f"width {width}" for width in options.widths), "exponent"],
        ([name, *losses[name], exponents[name]] for name in losses),
    )
    every = [cell for group in cells.values() for cell in group]
    return keep_results(options.out, command, ABOUT, settings, every, verdicts(exponents), [by_width])


def exponent(widths: Sequence[int], losses: Sequence[float]) -> float:
    """Return b of the least-squares fit of log loss = log a - b log width.

    >>> round(exponent([1, 10, 100], [4.0, 2.0, 1.0]), 4)
    0.301
    """
    return -float(np.polyfit(np.log(widths), np.log(losses), 1)[0])


def verdicts(exponents: Mapping[str, Sequence[float]]) -> list[Row]:
    """Judge whether a rule's exponent is below backpropagation's, for the rules that have one."""
    return [
        difference("scaling", name, "exponent minus that of bp", exponents[name], exponents["bp"], less=True)
        for name in ("fa", "dfa")
        if name in exponents and "bp" in exponents
    ]


main = partial(run_command, "apical_papers.transformers.scaling", Options, study)


if __name__ == "__main__":
    sys.exit(main())
