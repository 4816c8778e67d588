"""The command line: `apical compare | train | evolve | landscape | report | data | list`. Torch is imported only by commands
that compute.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, arg, subcommand

from apical.errors import ApicalError
from apical.experiment.recipe import Amp, ClipOver, Device, LossName, Optimizer, Recipe

DESCRIPTION = """Train PyTorch networks with credit-assignment rules other than backpropagation.

Start here (about a minute on two cores, no download):

    apical compare --out runs/demo

then open runs/demo/report.html. Choose rules, data and model:

    apical compare --rules bp fa pfa --data mnist --model mlp-512-512 --epochs 5 --seeds 3 --out runs/mnist

The settings of a paper: `apical compare --recipe pfa-mnist --out runs/pfa-mnist`. One rule alone: `apical train --rule
pfa --out runs/pfa`. Ctrl-C saves; the same command with --resume continues. What there is: `apical list rules`."""


def _arg(metavar: str, hint: str = "") -> Any:
    """How an option is shown; None as a default means that the recipe decides."""
    return arg(metavar=metavar, help_behavior_hint=hint)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Options that train and compare share; what is not given comes from --recipe or the defaults."""

    out: Annotated[Path, _arg("DIR", "(required)")]
    """Folder for the results; must be new or empty."""
    recipe: Annotated[str | None, _arg("NAME")] = None
    """Take the settings of a paper: pfa-mnist, dfc-mnist, ... (apical list recipes). Options given here go before it."""
    data: Annotated[str | None, _arg("NAME", "(default: digits)")] = None
    """Data set; see `apical list data`."""
    model: Annotated[str | None, _arg("NAME", "(default: mlp-256-256)")] = None
    """Network; see `apical list models`."""
    epochs: Annotated[int | None, _arg("N", "(default: 20)")] = None
    """Passes over the training images."""
    batch_size: Annotated[int | None, _arg("N", "(default: 32)")] = None
    """Images per step."""
    optimizer: Annotated[Optimizer | None, _arg("sgd|adam|adamw", "(default: sgd)")] = None
    """Optimiser."""
    lr: Annotated[tuple[float, ...] | None, _arg("RATE ...", "(default: 0.02)")] = None
    """Learning rates, one after the other."""
    lr_epochs: Annotated[tuple[int, ...] | None, _arg("N ...")] = None
    """Finished epochs after which the next learning rate starts."""
    lr_cosine: Annotated[int | None, _arg("EPOCHS", "(default: off)")] = None
    """Let the learning rate fall to --lr-min over so many epochs, along half a cosine."""
    lr_min: Annotated[float | None, _arg("RATE", "(default: 0)")] = None
    """Where --lr-cosine ends."""
    warmup_steps: Annotated[int | None, _arg("N", "(default: 0)")] = None
    """Steps at the start over which gradients grow to their full size."""
    centralise: Annotated[bool | None, _arg("True|False", "(default: False)")] = None
    """Subtract from each weight's gradient its mean over inputs (gradient centralisation)."""
    momentum: Annotated[float | None, _arg("X", "(default: 0.9)")] = None
    """Momentum of sgd, beta1 of adam."""
    beta2: Annotated[float | None, _arg("X", "(default: 0.999)")] = None
    """beta2 of adam."""
    eps: Annotated[float | None, _arg("X", "(default: 1e-8)")] = None
    """eps of adam."""
    clip: Annotated[float | None, _arg("NORM", "(default: off)")] = None
    """Largest norm of a step's gradient, of each weight tensor by itself and of all feedback weights together."""
    clip_over: Annotated[ClipOver | None, _arg("tensor|network", "(default: tensor)")] = None
    """Clip each weight tensor by itself, or the network as one."""
    weight_decay: Annotated[tuple[float, ...] | None, _arg("X ...", "(default: what suits the rule)")] = None
    """Weight decays, one after the other."""
    weight_decay_epochs: Annotated[tuple[int, ...] | None, _arg("N ...")] = None
    """Finished epochs after which the next weight decay starts."""
    loss: Annotated[LossName | None, _arg("cross_entropy|mse", "(default: cross_entropy)")] = None
    """Loss; mse for data whose targets are numbers."""
    feedback_lr: Annotated[float | None, _arg("RATE", "(default: as the forward weights)")] = None
    """Learning rate of feedback weights, where the rule learns them apart."""
    feedback_beta1: Annotated[float | None, _arg("X", "(default: as the forward weights)")] = None
    """Their momentum of sgd, beta1 of adam."""
    feedback_beta2: Annotated[float | None, _arg("X", "(default: as the forward weights)")] = None
    """Their beta2 of adam."""
    feedback_eps: Annotated[float | None, _arg("X", "(default: as the forward weights)")] = None
    """Their eps of adam."""
    feedback_weight_decay: Annotated[float | None, _arg("X", "(default: as the forward weights)")] = None
    """Their weight decay."""
    pretrain_epochs: Annotated[int | None, _arg("N", "(default: 0)")] = None
    """Passes before the first epoch in which only feedback weights learn."""
    pretrain_lr: Annotated[float | None, _arg("RATE", "(default: --feedback-lr)")] = None
    """Learning rate of the feedback weights in them."""
    feedback_passes: Annotated[int | None, _arg("N", "(default: 0)")] = None
    """Passes in each epoch in which only feedback weights learn; 0 learns them in the same steps as the forward weights."""
    feedback_fraction: Annotated[float | None, _arg("X", "(default: 1)")] = None
    """Share of the training batches that such a pass visits."""
    flip: Annotated[bool | None, _arg("True|False")] = None
    """Mirror training images at random."""
    crop: Annotated[int | None, _arg("PIXELS")] = None
    """Pad training images by so many pixels and crop at random."""
    validation: Annotated[int | None, _arg("N")] = None
    """Training images held out for validation."""
    train_limit: Annotated[int | None, _arg("N")] = None
    """Use only so many training images."""
    test_limit: Annotated[int | None, _arg("N")] = None
    """Use only so many test images."""
    drop_last: Annotated[bool | None, _arg("True|False", "(default: True)")] = None
    """Leave out the last, smaller batch of an epoch."""
    amp: Annotated[Amp | None, _arg("off|bf16")] = None
    """bf16: forward pass under bfloat16 autocast."""
    device: Annotated[Device | None, _arg("auto|cpu|cuda", "(default: auto)")] = None
    """Where to compute."""
    threads: Annotated[int | None, _arg("N", "(default: a fair share of the cores)")] = None
    """CPU threads per process."""
    probe: Annotated[int | None, _arg("N", "(default: 256)")] = None
    """Training images on which gradients are compared with backprop's after each epoch; 0 is off."""
    checkpoint_steps: Annotated[int | None, _arg("N", "(default: after each epoch)")] = None
    """Save also every N steps within an epoch."""
    trajectory: Annotated[int | None, _arg("N", "(default: off)")] = None
    """Keep the weights every N steps, and at start and end, for `apical landscape`."""
    teacher: Annotated[Path | None, _arg("FILE", "(default: one shipped for digits)")] = None
    """Top-down network of tdca, written by `apical evolve`."""
    resume: Annotated[bool, arg(help_behavior_hint="")] = False
    """Continue what is in --out."""
    overwrite: Annotated[bool, arg(help_behavior_hint="")] = False
    """Replace what is in --out."""

    def given(self) -> dict[str, Any]:
        """The recipe fields that were given."""
        known = Recipe.__dataclass_fields__
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name in known}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class CompareFlags:
    """Options that only compare has; a base of its own, so that they are listed first."""

    rules: Annotated[tuple[str, ...] | None, _arg("RULE ...", "(default: bp fa dfa usf kp pfa pfa-o)")] = None
    """Rules to compare; see `apical list rules`."""
    seeds: Annotated[int, _arg("K", "(default: 3)")] = 3
    """Seeds 0 to K - 1 of each rule."""
    jobs: Annotated[int, _arg("N", "(default: one per core)")] = 0
    """Seeds trained side by side."""
    rule_options: Annotated[tuple[str, ...] | None, _arg("[RULE:]KEY=VALUE ...")] = None
    """Options of one rule, such as pfa:expansion=4, or, without its name, of every rule that knows them."""


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """Options that only train has; a base of its own, so that they are listed first."""

    rule: Annotated[str, _arg("RULE", "(default: bp)")] = "bp"
    """Rule to train; see `apical list rules`."""
    rule_options: Annotated[tuple[str, ...] | None, _arg("KEY=VALUE ...")] = None
    """Options of the rule, such as expansion=4."""
    seed: Annotated[int | None, _arg("N", "(default: 0)")] = None
    """Seed of weights, data order and augmentation."""


@dataclass(frozen=True, kw_only=True)
class Compare(Flags, CompareFlags):
    """Train several rules with several seeds, write summary.json and report.html.

    The rules take turns, an epoch each, so that their times compare. Exit status 3 says that a run diverged.
    """


@dataclass(frozen=True, kw_only=True)
class Train(Flags, TrainFlags):
    """Train one rule; under torchrun, with several processes."""


@dataclass(frozen=True, kw_only=True)
class Evolve:
    """Evolve a top-down network that hands out credit (tdca); writes teacher.pt."""

    out: Annotated[Path, _arg("DIR", "(required)")]
    """Folder for the evolution; must be new or empty."""
    recipe: Annotated[str | None, _arg("NAME")] = None
    """Take the settings of a committed evolution: digits, ... Options given here go before it."""
    data: Annotated[tuple[str, ...] | None, _arg("NAME ...", "(default: digits)")] = None
    """Data sets of one image shape; tasks are drawn from them in turn."""
    model: Annotated[str | None, _arg("NAME", "(default: mlp-tanh-32)")] = None
    """Network of the learners; see `apical list models`."""
    generations: Annotated[int | None, _arg("N", "(default: 100)")] = None
    """Updates of the search distribution."""
    population: Annotated[int | None, _arg("N", "(default: 64)")] = None
    """Top-down networks per generation; even."""
    strategy: Annotated[Literal["pgpe", "pgpe-clipup", "cem"] | None, _arg("pgpe|pgpe-clipup|cem", "(default: pgpe)")] = None
    """Evolution strategy."""
    sigma: Annotated[float | None, _arg("X", "(default: 0.1)")] = None
    """Initial standard deviation of the search."""
    step: Annotated[float | None, _arg("X", "(default: 0.3)")] = None
    """Step size of its centre."""
    hidden: Annotated[int | None, _arg("N", "(default: 16)")] = None
    """Units in each hidden layer of the top-down network."""
    sites: Annotated[int | None, _arg("K", "(default: a credit per unit)")] = None
    """Credit diffusion: emission sites per hidden layer; the teacher then serves layers of any width."""
    ways: Annotated[int | None, _arg("N", "(default: all)")] = None
    """Classes per task, drawn anew for each."""
    examples: Annotated[int | None, _arg("N", "(default: 256)")] = None
    """Training images per task; 0 takes all."""
    tasks: Annotated[int | None, _arg("N", "(default: 1)")] = None
    """Tasks per generation."""
    starts: Annotated[Literal["fresh", "fixed"] | None, _arg("fresh|fixed", "(default: fresh)")] = None
    """Initial weights of the learners: new for every task, or always the same."""
    zeros: Annotated[bool | None, _arg("True|False", "(default: False)")] = None
    """Learners start with all weights zero."""
    quiet: Annotated[bool | None, _arg("True|False", "(default: False)")] = None
    """Start from a top-down network that gives no credit to hidden units."""
    held_out: Annotated[bool | None, _arg("True|False", "(default: False)")] = None
    """Judge learners by images they were not trained on."""
    steps: Annotated[int | None, _arg("N", "(default: 50)")] = None
    """Updates in a learner's lifetime."""
    lr: Annotated[float | None, _arg("RATE", "(default: 0.02)")] = None
    """Learning rate of the learners."""
    optimizer: Annotated[Literal["adam", "sgd"] | None, _arg("adam|sgd", "(default: adam)")] = None
    """Optimiser of the learners; sgd has momentum 0.9."""
    clip: Annotated[float | None, _arg("NORM", "(default: 1)")] = None
    """Largest norm of a learner's gradient; 0 is off."""
    batch_size: Annotated[int | None, _arg("N", "(default: all)")] = None
    """Images per update of a learner."""
    chunk: Annotated[int | None, _arg("N", "(default: 32)")] = None
    """Learners trained at once by a worker: more need more memory."""
    seed: Annotated[int | None, _arg("N", "(default: 0)")] = None
    """Seed of tasks, weights and populations."""
    ray: Annotated[str | None, _arg("local|ADDRESS", "(default: off)")] = None
    """Share the population among the workers of a Ray cluster: one started here, or one that runs (`ray start --head`)."""
    workers: Annotated[int | None, _arg("N", "(default: one per core)")] = None
    """Workers of --ray local."""
    resume: Annotated[bool, arg(help_behavior_hint="")] = False
    """Continue what is in --out."""
    overwrite: Annotated[bool, arg(help_behavior_hint="")] = False
    """Replace what is in --out."""


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """Draw the ways of finished runs over the loss surface they trained on; they need `--trajectory N`."""

    runs: Positional[Annotated[tuple[Path, ...], _arg("RUNS ...", "(required)")]]
    """Folders of runs or of comparisons, of one model, data set and loss."""
    out: Annotated[Path, _arg("DIR", "(required)")]
    """Folder for landscape.png, .svg and .json; must be new or empty."""
    plane: Annotated[Literal["pca", "random"], _arg("pca|random", "(default: pca)")] = "pca"
    """Plane through weight space: that of most of the snapshots' variance, or two filter-normalised random directions."""
    grid: Annotated[int, _arg("N", "(default: 41)")] = 41
    """Points of the surface on a side; also those of the straight lines on which barriers are measured."""
    span: Annotated[float | None, _arg("X", "(default: 1.3 for pca, 1 for random)")] = None
    """Half-width of the surface: over that of all snapshots (pca), or over the norms of the filters (random)."""
    examples: Annotated[int, _arg("N", "(default: 1000)")] = 1000
    """Training images, always the same, of which the loss is taken."""
    device: Annotated[Device, _arg("auto|cpu|cuda", "(default: auto)")] = "auto"
    """Where to compute."""
    overwrite: Annotated[bool, arg(help_behavior_hint="")] = False
    """Replace what is in --out."""


@dataclass(frozen=True)
class Report:
    """Write figures and report.html from what a folder holds."""

    folder: Positional[Path]
    """Folder of a comparison or of one run."""


@dataclass(frozen=True)
class DataFetch:
    """Download a data set, checked against its known checksum; an interrupted download continues."""

    name: Positional[Annotated[str, arg(metavar="NAME")]]
    """Data set."""


@dataclass(frozen=True)
class DataList:
    """Data sets and where they were found."""


@dataclass(frozen=True)
class Data:
    """Download a data set, or see which are here."""

    action: OmitArgPrefixes[
        Annotated[DataFetch, subcommand("fetch", prefix_name=False)]
        | Annotated[DataList, subcommand("list", prefix_name=False)]
    ]


@dataclass(frozen=True)
class List:
    """What there is: rules, models, data or recipes."""

    what: Positional[Literal["rules", "models", "data", "recipes"]]
    """What to list."""


Command = (
    Annotated[Compare, subcommand("compare", prefix_name=False)]
    | Annotated[Train, subcommand("train", prefix_name=False)]
    | Annotated[Evolve, subcommand("evolve", prefix_name=False)]
    | Annotated[Landscape, subcommand("landscape", prefix_name=False)]
    | Annotated[Report, subcommand("report", prefix_name=False)]
    | Annotated[Data, subcommand("data", prefix_name=False)]
    | Annotated[List, subcommand("list", prefix_name=False)]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for an error, 3 diverged, 128 + signal if interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parsed: Any = tyro.cli(
        Command,
        prog="apical",
        description=DESCRIPTION,
        args=arguments or ["--help"],
        config=(FlagCreatePairsOff,),
    )
    status = _status(parsed, shlex.join(["apical", *arguments]))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from apical.experiment.distributed import leave

        leave(status)
    return status


def _status(parsed: Any, command: str) -> int:
    try:
        return _run(parsed, command)
    except ApicalError as error:
        message = str(error)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        message = (error.strerror or str(error)) + where
    except KeyboardInterrupt:
        return 130
    # under torchrun every process says it: the first to end has the others killed, perhaps before they spoke
    print("apical: error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return 2


def _run(parsed: Any, command: str) -> int:
    from apical import commands  # imports torch

    if isinstance(parsed, Compare):
        return commands.compare(parsed, command)
    if isinstance(parsed, Train):
        return commands.train(parsed, command)
    if isinstance(parsed, Evolve):
        from apical import evolve_command

        return evolve_command.run(parsed, command)
    if isinstance(parsed, Landscape):
        from apical import landscape_command

        return landscape_command.run(parsed, command)
    if isinstance(parsed, Report):
        commands.write_report(parsed.folder)
    elif isinstance(parsed, Data) and isinstance(parsed.action, DataFetch):
        commands.fetch(parsed.action.name)
    else:
        commands.listing("data" if isinstance(parsed, Data) else parsed.what)
    return 0
