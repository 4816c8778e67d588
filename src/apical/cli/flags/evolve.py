"""Options of `apical evolve`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from apical.cli.flags.shown import shown

Strategy = Literal["pgpe", "pgpe-clipup", "cem"]


@dataclass(frozen=True, kw_only=True)
class Evolve:
    """Evolve a top-down network that hands out credit (tdca); writes teacher.pt."""

    out: Annotated[Path, shown("DIR", "(required)")]
    """Folder for the evolution; must be new or empty."""
    recipe: Annotated[str | None, shown("NAME")] = None
    """Take the settings of an evolution: digits or mnist-residual. Options given on the command line override it."""
    data: Annotated[tuple[str, ...] | None, shown("NAME|FILE|FOLDER ...", "(default: digits)")] = None
    """Data sets of one image shape, or your own; tasks are drawn from them in turn."""
    model: Annotated[tuple[str, ...] | None, shown("NAME|FILE.py:CLASS ...", "(default: mlp-tanh-32)")] = None
    """Networks of the learners, or your own, which tasks take in turn; see `apical list models`."""
    generations: Annotated[int | None, shown("N", "(default: 100)")] = None
    """Updates of the search distribution."""
    population: Annotated[int | None, shown("N", "(default: 64)")] = None
    """Top-down networks per generation; even."""
    strategy: Annotated[Literal["pgpe", "pgpe-clipup", "cem"] | None, shown("pgpe|pgpe-clipup|cem", "(default: pgpe)")] = (
        None
    )
    """Evolution strategy."""
    sigma: Annotated[float | None, shown("X", "(default: 0.1)")] = None
    """Initial standard deviation of the search."""
    step: Annotated[float | None, shown("X", "(default: 0.3)")] = None
    """Step size of its centre."""
    decay: Annotated[float | None, shown("X", "(default: 1)")] = None
    """The step is multiplied by this after each generation."""
    hidden: Annotated[int | None, shown("N", "(default: 16)")] = None
    """Units in each hidden layer of the top-down network."""
    sites: Annotated[int | None, shown("K", "(default: a credit per unit)")] = None
    """Credit diffusion: emission sites per hidden layer; the teacher then serves layers of any width."""
    relative: Annotated[bool | None, shown("True|False", "(default: True)")] = None
    """Credit relative to that of a right prediction: a learner that is right is left alone."""
    credit: Annotated[Literal["logits", "probabilities"] | None, shown("logits|probabilities", "(default: logits)")] = None
    """Where the output's credit stands; probabilities as in the authors' code."""
    ways: Annotated[int | None, shown("N", "(default: all)")] = None
    """Classes per task, drawn anew for each."""
    examples: Annotated[int | None, shown("N", "(default: 256)")] = None
    """Training images per task; 0 takes all."""
    tasks: Annotated[int | None, shown("N", "(default: 1)")] = None
    """Tasks per generation."""
    starts: Annotated[Literal["fresh", "fixed"] | None, shown("fresh|fixed", "(default: fresh)")] = None
    """Initial weights of the learners: new for every task, or always the same."""
    zeros: Annotated[bool | None, shown("True|False", "(default: False)")] = None
    """Learners start with all weights zero."""
    begin: Annotated[str | None, shown("FILE", "(default: a random one)")] = None
    """Start from this teacher: a file, the name of a shipped one, or "wired": the error, with random feedback of it."""
    quiet: Annotated[bool | None, shown("True|False", "(default: True)")] = None
    """Start from a top-down network that gives no credit to hidden units."""
    held_out: Annotated[bool | None, shown("True|False", "(default: False)")] = None
    """Judge learners by images they were not trained on."""
    steps: Annotated[int | None, shown("N", "(default: 50)")] = None
    """Updates in a learner's lifetime."""
    lr: Annotated[float | None, shown("RATE", "(default: 0.02)")] = None
    """Learning rate of the learners."""
    optimizer: Annotated[Literal["adam", "sgd"] | None, shown("adam|sgd", "(default: adam)")] = None
    """Optimiser of the learners; sgd has momentum 0.9."""
    clip: Annotated[float | None, shown("NORM", "(default: 1)")] = None
    """Largest norm of a learner's gradient; 0 is off."""
    batch_size: Annotated[int | None, shown("N", "(default: all)")] = None
    """Images per update of a learner."""
    chunk: Annotated[int | None, shown("N", "(default: 33)")] = None
    """Learners trained at once by a worker: more need more memory."""
    seed: Annotated[int | None, shown("N", "(default: 0)")] = None
    """Seed of tasks, weights and populations."""
    ray: Annotated[str | None, shown("local|ADDRESS", "(default: off)")] = None
    """Share the population among the workers of a Ray cluster: one started here, or one that runs (`ray start --head`)."""
    workers: Annotated[int | None, shown("N", "(default: one per core)")] = None
    """Workers of --ray local."""
    resume: Annotated[bool, arg(help_behavior_hint="")] = False
    """Continue what is in --out."""
    overwrite: Annotated[bool, arg(help_behavior_hint="")] = False
    """Replace what is in --out."""
