"""Options of `apical compare` and `apical train`."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from apical.bench.recipe import Amp, ClipOver, Device, LossName, Optimizer, Recipe
from apical.cli.flags.shown import shown


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Options that train and compare share; what is not given comes from --recipe or the defaults."""

    out: Annotated[Path, shown("DIR", "(required)")]
    """Folder for the results; must be new or empty."""
    recipe: Annotated[str | None, shown("NAME")] = None
    """Take the settings of a paper (apical list recipes). Options given on the command line override it."""
    data: Annotated[str | None, shown("NAME|FILE|FOLDER", "(default: digits)")] = None
    """Data set (`apical list data`), or your own: FILE.npz, FILE.csv, a FOLDER of images, FILE.py:FUNCTION."""
    model: Annotated[str | None, shown("NAME|FILE.py:CLASS", "(default: mlp-256-256)")] = None
    """Network (`apical list models`), or your own class or function that makes one; its code is run."""
    epochs: Annotated[int | None, shown("N", "(default: 20)")] = None
    """Passes over the training images."""
    batch_size: Annotated[int | None, shown("N", "(default: 32)")] = None
    """Images per step."""
    optimizer: Annotated[Optimizer | None, shown("sgd|adam|adamw", "(default: sgd)")] = None
    """Optimiser."""
    lr: Annotated[tuple[float, ...] | None, shown("RATE ...", "(default: 0.02)")] = None
    """Learning rates, one after the other."""
    lr_epochs: Annotated[tuple[int, ...] | None, shown("N ...")] = None
    """Finished epochs after which the next learning rate starts."""
    lr_cosine: Annotated[int | None, shown("EPOCHS", "(default: off)")] = None
    """Let the learning rate fall to --lr-min over so many epochs, along half a cosine."""
    lr_min: Annotated[float | None, shown("RATE", "(default: 0)")] = None
    """Where --lr-cosine ends."""
    warmup_steps: Annotated[int | None, shown("N", "(default: 0)")] = None
    """Steps at the start over which gradients grow to their full size."""
    centralise: Annotated[bool | None, shown("True|False", "(default: False)")] = None
    """Subtract from each weight's gradient its mean over inputs (gradient centralisation)."""
    momentum: Annotated[float | None, shown("X", "(default: 0.9)")] = None
    """Momentum of sgd, beta1 of adam."""
    beta2: Annotated[float | None, shown("X", "(default: 0.999)")] = None
    """beta2 of adam."""
    eps: Annotated[float | None, shown("X", "(default: 1e-8)")] = None
    """eps of adam."""
    clip: Annotated[float | None, shown("NORM", "(default: off)")] = None
    """Largest norm of a step's gradient, of each weight tensor by itself and of all feedback weights together."""
    clip_over: Annotated[ClipOver | None, shown("tensor|network", "(default: tensor)")] = None
    """Clip each weight tensor by itself, or the network as one."""
    weight_decay: Annotated[tuple[float, ...] | None, shown("X ...", "(default: what suits the rule)")] = None
    """Weight decays, one after the other."""
    weight_decay_epochs: Annotated[tuple[int, ...] | None, shown("N ...")] = None
    """Finished epochs after which the next weight decay starts."""
    loss: Annotated[LossName | None, shown("cross_entropy|squared|mse", "(default: by the targets)")] = None
    """Loss: cross_entropy where none is given, mse where targets are numbers."""
    feedback_lr: Annotated[float | None, shown("RATE", "(default: as the forward weights)")] = None
    """Learning rate of feedback weights, where the rule learns them apart."""
    feedback_beta1: Annotated[float | None, shown("X", "(default: as the forward weights)")] = None
    """Their momentum of sgd, beta1 of adam."""
    feedback_beta2: Annotated[float | None, shown("X", "(default: as the forward weights)")] = None
    """Their beta2 of adam."""
    feedback_eps: Annotated[float | None, shown("X", "(default: as the forward weights)")] = None
    """Their eps of adam."""
    feedback_weight_decay: Annotated[float | None, shown("X", "(default: as the forward weights)")] = None
    """Their weight decay."""
    pretrain_epochs: Annotated[int | None, shown("N", "(default: 0)")] = None
    """Passes before the first epoch in which only feedback weights learn."""
    pretrain_lr: Annotated[float | None, shown("RATE", "(default: --feedback-lr)")] = None
    """Learning rate of the feedback weights in them."""
    feedback_passes: Annotated[int | None, shown("N", "(default: 0)")] = None
    """Passes in each epoch in which only feedback weights learn; 0 learns them in the same steps as the forward weights."""
    feedback_fraction: Annotated[float | None, shown("X", "(default: 1)")] = None
    """Share of the training batches that such a pass visits."""
    flip: Annotated[bool | None, shown("True|False")] = None
    """Mirror training images at random."""
    crop: Annotated[int | None, shown("PIXELS")] = None
    """Pad training images by so many pixels and crop at random."""
    validation: Annotated[int | None, shown("N")] = None
    """Training images held out for validation."""
    train_limit: Annotated[int | None, shown("N")] = None
    """Use only so many training images."""
    test_limit: Annotated[int | None, shown("N")] = None
    """Use only so many test images."""
    drop_last: Annotated[bool | None, shown("True|False", "(default: True)")] = None
    """Leave out the last, smaller batch of an epoch."""
    amp: Annotated[Amp | None, shown("off|bf16")] = None
    """bf16: forward pass under bfloat16 autocast."""
    device: Annotated[Device | None, shown("auto|cpu|cuda", "(default: auto)")] = None
    """Where to compute."""
    threads: Annotated[int | None, shown("N", "(default: a fair share of the cores)")] = None
    """CPU threads per process."""
    probe: Annotated[int | None, shown("N", "(default: 256)")] = None
    """Training images on which gradients are compared with backprop's after each epoch; 0 is off."""
    checkpoint_steps: Annotated[int | None, shown("N", "(default: after each epoch)")] = None
    """Save also every N steps within an epoch."""
    trajectory: Annotated[int | None, shown("N", "(default: off)")] = None
    """Keep the weights every N steps, and at start and end, for `apical landscape`."""
    teacher: Annotated[Path | None, shown("FILE", "(default: one shipped for digits)")] = None
    """Top-down network of tdca, written by `apical evolve`."""
    tensorboard: Annotated[bool, arg(help_behavior_hint="")] = False
    """Also write each epoch's metrics as TensorBoard events, into events/ of each run."""
    resume: Annotated[bool, arg(help_behavior_hint="")] = False
    """Continue what is in --out."""
    overwrite: Annotated[bool, arg(help_behavior_hint="")] = False
    """Replace what is in --out."""

    def settings(self) -> dict[str, Any]:
        """The recipe fields that the command line sets."""
        names = Recipe.__dataclass_fields__
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name in names}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class CompareFlags:
    """Options that only compare has; a base of its own, so that they are listed first."""

    rules: Annotated[tuple[str, ...] | None, shown("RULE ...", "(default: bp fa dfa usf kp pfa pfa-o)")] = None
    """Rules to compare; see `apical list rules`. FILE.py:CLASS or MODULE:CLASS is a rule of your own; its code is run."""
    seeds: Annotated[int, shown("K", "(default: 3)")] = 3
    """Seeds 0 to K - 1 of each rule."""
    jobs: Annotated[int, shown("N", "(default: one per core)")] = 0
    """Seeds trained side by side."""
    ray: Annotated[str | None, shown("local|ADDRESS", "(default: off)")] = None
    """Train seeds on a Ray cluster: one started here, or one that runs (`ray start --head`) and sees --out as shared."""
    rule_options: Annotated[tuple[str, ...] | None, shown("[RULE:]KEY=VALUE ...")] = None
    """Options of one rule, such as pfa:expansion=4, or, without its name, of every rule that knows them. A rule of your own
    goes by its class."""


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """Options that only train has; a base of its own, so that they are listed first."""

    rule: Annotated[str, shown("RULE", "(default: bp)")] = "bp"
    """Rule to train; see `apical list rules`. FILE.py:CLASS or MODULE:CLASS is a rule of your own; its code is run."""
    rule_options: Annotated[tuple[str, ...] | None, shown("KEY=VALUE ...")] = None
    """Options of the rule, such as expansion=4."""
    seed: Annotated[int | None, shown("N", "(default: 0)")] = None
    """Seed of weights, data order and augmentation."""


@dataclass(frozen=True, kw_only=True)
class Compare(Flags, CompareFlags):
    """Train several rules with several seeds, write summary.json and report.html.

    The rules take turns, an epoch each, so that their times compare. Exit status 3 says that a run diverged.
    """


@dataclass(frozen=True, kw_only=True)
class Train(Flags, TrainFlags):
    """Train one rule; under torchrun, with several processes."""
