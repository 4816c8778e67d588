"""The recipe of one training: a frozen dataclass whose fields determine the result, checked on creation. No torch here."""

import ast
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from apical.errors import ConfigError, unknown_name

Device = Literal["auto", "cpu", "cuda"]
Optimizer = Literal["sgd", "adam", "adamw", "nadam", "radam", "input-adam", "muon"]
Amp = Literal["off", "bf16"]
ClipOver = Literal["tensor", "network"]
LossName = Literal["cross_entropy", "squared", "mse", "token_cross_entropy"]
Tokens = Literal["characters", "bytes"]
DecayOn = Literal["all", "matrices"]

FEEDBACK_FIELDS = (
    "feedback_lr",
    "feedback_beta1",
    "feedback_beta2",
    "feedback_eps",
    "feedback_weight_decay",
    "pretrain_epochs",
    "pretrain_lr",
    "feedback_passes",
    "feedback_fraction",
)
"""Fields that matter only to rules that learn their feedback weights separately from the forward weights."""

CHECKSUMS = ("data_sha256", "model_sha256")
"""Fields that identify the user's own data and model; empty for named ones."""

FREE_FIELDS = ("epochs", "threads", "device", "checkpoint_steps")
"""Fields in which a resumed run may differ from the saved one (epochs only upwards)."""

_LATER: dict[str, Any] = {
    "context": 64,
    "tokens": "characters",
    "epoch_steps": 0,
    "lr_warmup": 0,
    "lr_final": 0.0,
    "decay_on": "all",
    "init": "",
    "compile": False,
}
"""Fields added to recipes after results had been saved under their hashes; hashes leave these values out."""
_BESIDE = ("threads", "device", "checkpoint_steps", "trajectory", "measure")
LARGEST = 1e30
"""Largest rate or decay: with larger ones, updates do not fit into float32."""
_PASSES = ("pretrain_epochs", "feedback_passes")
_COUNTS = ("lr_cosine", "lr_warmup", "epoch_steps", "warmup_steps", "checkpoint_steps", "trajectory")
_FORWARD = "as the forward weights"


class Option(NamedTuple):
    """How a setting is shown on the command line, where its type and default do not determine it.

    Attributes:
        metavar: placeholder of the value.
        default: the default in words.
    """

    metavar: str
    default: str = ""


@dataclass(frozen=True)
class Recipe:
    """All settings that determine the outcome of one training.

    The text below a field is also its help on the command line.

    Raises:
        ConfigError: a value is out of range; the message names the option.
    """

    rule: str = "bp"
    """Short name of the rule, as in `apical list rules`, or "path/to/file.py:Class" or "module:Class"."""
    rule_options: tuple[str, ...] = ()
    """Options of the rule's constructor, each "key=value" with a Python literal as value."""
    data: Annotated[str, Option("NAME|FILE|FOLDER")] = "digits"
    """Data set (`apical list data`), or your own: FILE.npz, .csv, .txt, a FOLDER of images, FILE.py:FUNCTION."""
    context: int = 64
    """Tokens in a window of a text, and in the sequences of copy and recall."""
    tokens: Tokens = "characters"
    """Tokens of a text: characters, with all but the 95 most common as one token, or bytes."""
    model: Annotated[str, Option("NAME|FILE.py:CLASS")] = "mlp-256-256"
    """Network (`apical list models`), or your own class or function that makes one; its code is run."""
    epochs: int = 20
    """Passes over the training images."""
    epoch_steps: Annotated[int, Option("N", "all images")] = 0
    """End a pass after this many steps; the next one draws again from all training images."""
    batch_size: int = 32
    """Images per step, summed over all processes."""
    optimizer: Optimizer = "sgd"
    """Optimiser; all but sgd and adam use decoupled weight decay, input-adam is apical.optim.InputAdam, muon uses adamw for
    parameters that are not matrices."""
    lr: Annotated[tuple[float, ...], Option("RATE ...", "0.02, or tuned for the rule")] = (0.02,)
    """Learning rate, or several in sequence (see --lr-epochs)."""
    lr_epochs: tuple[int, ...] = ()
    """Finished epochs after which the next learning rate starts."""
    lr_cosine: Annotated[int, Option("EPOCHS", "off")] = 0
    """Decrease the learning rate to --lr-min over this many epochs, along half a cosine."""
    lr_min: Annotated[float, Option("RATE")] = 0.0
    """Learning rate at the end of --lr-cosine."""
    lr_final: Annotated[float, Option("SHARE", "--lr-min")] = 0.0
    """Learning rate at the end of --lr-cosine, as a share of --lr."""
    lr_warmup: Annotated[int, Option("STEPS", "off")] = 0
    """Steps at the start over which the learning rate rises to --lr; --lr-cosine then acts per step instead of per epoch."""
    warmup_steps: int = 0
    """Steps at the start over which gradients grow to their full size: 1/N, 2/N, ... of it."""
    centralise: bool = False
    """Subtract from each weight gradient its mean over inputs (gradient centralisation)."""
    momentum: float = 0.9
    """Momentum of sgd, beta1 of the other optimisers."""
    beta2: float = 0.999
    """beta2 of all optimisers except sgd."""
    eps: Annotated[float, Option("X", "1e-8")] = 1e-8
    """eps of all optimisers except sgd."""
    clip: Annotated[float, Option("NORM", "off")] = 0.0
    """Clip gradients to this norm, for each weight tensor separately and for all feedback weights together."""
    clip_over: ClipOver = "tensor"
    """Clip each weight tensor separately, or the network as a whole."""
    weight_decay: Annotated[tuple[float, ...], Option("X ...", "what suits the rule")] = ()
    """Weight decay, or several in sequence (see --weight-decay-epochs)."""
    weight_decay_epochs: tuple[int, ...] = ()
    """Finished epochs after which the next weight decay starts."""
    decay_on: DecayOn = "all"
    """Parameters that decay: all forward weights, or only matrices and kernels, not biases, gains and embeddings."""
    loss: Annotated[LossName, Option("cross_entropy|squared|mse|token_cross_entropy", "by the targets")] = "cross_entropy"
    """Loss; cross_entropy is for labels, token_cross_entropy for sequences, mse for numeric targets, squared is half the
    squared distance to one-hot targets."""
    feedback_lr: Annotated[float | None, Option("RATE", _FORWARD)] = None
    """Learning rate of feedback weights, if the rule learns them separately."""
    feedback_beta1: Annotated[float | None, Option("X", _FORWARD)] = None
    """Momentum (sgd) or beta1 of the feedback weights."""
    feedback_beta2: Annotated[float | None, Option("X", _FORWARD)] = None
    """beta2 of the feedback weights, for all optimisers except sgd."""
    feedback_eps: Annotated[float | None, Option("X", _FORWARD)] = None
    """eps of the feedback weights, for all optimisers except sgd."""
    feedback_weight_decay: Annotated[float | None, Option("X", _FORWARD)] = None
    """Weight decay of the feedback weights, which has no schedule."""
    pretrain_epochs: int = 0
    """Passes before the first epoch in which only feedback weights learn. They count as part of the first epoch."""
    pretrain_lr: Annotated[float | None, Option("RATE", "--feedback-lr")] = None
    """Learning rate of the feedback weights in --pretrain-epochs."""
    feedback_passes: int = 0
    """Passes per epoch in which only feedback weights learn; with 0, they learn in the same steps as the forward weights."""
    feedback_fraction: float = 1.0
    """Share of the training batches used by a feedback pass, above 0 and at most 1."""
    flip: bool = False
    """Mirror training images at random."""
    crop: Annotated[int, Option("PIXELS", "off")] = 0
    """Pad training images by this many pixels and crop at random."""
    validation: int = 0
    """Training images held out for validation."""
    train_limit: int | None = None
    """Use only this many training images, a fixed random subset."""
    test_limit: int | None = None
    """Use only this many test images, a fixed random subset."""
    seed: int = 0
    """Seed of weights, data order and augmentation; the split of the data does not depend on it."""
    drop_last: bool = True
    """Leave out the last, smaller batch of an epoch."""
    amp: Amp = "off"
    """bf16: forward pass under bfloat16 autocast."""
    compile: bool = False
    """Compile the training step with torch.compile; on a CPU this requires a C++ compiler. The first step takes longer."""
    device: Device = "auto"
    """Device to compute on."""
    threads: Annotated[int, Option("N", "a fair share of the cores")] = 0
    """CPU threads per process."""
    probe: int = 256
    """Training images on which gradients are compared with backpropagation after each epoch; 0 is off."""
    checkpoint_steps: Annotated[int, Option("N", "after each epoch")] = 0
    """Also save every N steps within an epoch."""
    trajectory: Annotated[int, Option("N", "off")] = 0
    """Save the weights every N steps, and at start and end, for `apical landscape`."""
    init: Annotated[str, Option("NAME", "the model's own")] = ""
    """Initialise the weights differently: xavier, xavier-normal, orthogonal, critical or looks-linear."""
    measure: Annotated[tuple[str, ...], Option("NAME ...", "off")] = ()
    """Measure the network before, halfway through and after training: persistence, coding, learnability, channel, or
    FILE.py:FUNCTION. The report shows the numbers."""
    data_sha256: str = ""
    """Checksum of the content of the user's own data, sixteen hex digits; empty for named data."""
    model_sha256: str = ""
    """Checksum of the file that defines the user's own model, likewise."""

    def __post_init__(self) -> None:
        for option in ("epochs", "batch_size", "train_limit", "test_limit", "context"):
            value = getattr(self, option)
            if value is not None and value <= 0:
                raise ConfigError(f"{flag(option)} must be positive, got {value}")
        for option in ("crop", "validation", "threads", "probe", "seed", *_COUNTS, *_PASSES):
            if getattr(self, option) < 0:
                raise ConfigError(f"{flag(option)} must not be negative, got {getattr(self, option)}")
        for option, kind in _kinds().items():
            if get_origin(kind) is Literal and getattr(self, option) not in get_args(kind):
                raise unknown_name(flag(option), str(getattr(self, option)), get_args(kind))
        for option in ("momentum", "beta2", "feedback_beta1", "feedback_beta2"):
            value = getattr(self, option)
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"{flag(option)} must be in [0, 1), got {value}")
        for option in ("clip", "eps", "lr_min", "lr_final", "feedback_eps", "feedback_weight_decay"):
            _check_number(option, getattr(self, option), positive=False)
        for option in ("feedback_lr", "pretrain_lr", "feedback_fraction"):
            _check_number(option, getattr(self, option), positive=True)
        if self.feedback_fraction > 1:
            raise ConfigError(f"--feedback-fraction must be at most 1, got {self.feedback_fraction}")
        _check_schedule("lr", self.lr, self.lr_epochs, positive=True)
        if self.lr_cosine and len(self.lr) > 1:
            raise ConfigError("--lr-cosine starts from one learning rate; set --lr to one value")
        if self.lr_final and (not self.lr_cosine or self.lr_min or self.lr_final > 1):
            raise ConfigError("--lr-final is where --lr-cosine ends, a share of --lr up to 1; use it without --lr-min")
        _check_schedule("weight_decay", self.weight_decay, self.weight_decay_epochs, positive=False)
        parse_options(self.rule_options)

    def steps_per_epoch(self, examples: int) -> int:
        """Return the number of training steps in an epoch over `examples` images.

        Raises:
            ConfigError: there is no full batch, and the last batch is dropped.
        """
        if self.drop_last and self.batch_size > examples:
            raise ConfigError(
                f"--batch-size {self.batch_size} is larger than the {examples} training samples; "
                "use a smaller batch or keep the last batch (--drop-last False)"
            )
        steps = examples // self.batch_size if self.drop_last else math.ceil(examples / self.batch_size)
        return min(steps, self.epoch_steps or steps)

    @property
    def rule_name(self) -> str:
        """The rule's name in folders, tables and figures."""
        return rule_name(self.rule)

    @property
    def has_feedback_passes(self) -> bool:
        """Whether there are passes in which only feedback weights learn."""
        return bool(self.pretrain_epochs or self.feedback_passes)

    def check_targets(self, *, are_numbers: bool, are_tokens: bool = False) -> None:
        """Refuse a loss or an augmentation that does not fit the data's targets: class labels, numbers or tokens.

        Raises:
            ConfigError: names the option and the remedy.
        """
        if are_numbers and self.loss != "mse":
            raise ConfigError(f"the targets of {self.data} are numbers, not classes: add --loss mse")
        if not are_numbers and self.loss == "mse":
            raise ConfigError(f"--loss mse needs numbers as targets; those of {self.data} are classes: drop --loss mse")
        if are_tokens != (self.loss == "token_cross_entropy"):
            remedy = "add --loss token_cross_entropy" if are_tokens else "drop --loss token_cross_entropy"
            raise ConfigError(
                f"{self.data} {'has a' if are_tokens else 'has no'} target at each token of a sequence: {remedy}"
            )
        if are_numbers and (self.flip or self.crop):
            raise ConfigError(f"--flip and --crop would change the images of {self.data} but not their targets: drop them")

    def check_phases(self, *, two_phase: bool) -> None:
        """Refuse feedback passes for a rule without feedback weights that learn in them.

        Raises:
            ConfigError: names the option and the rule.
        """
        for option in _PASSES:
            if getattr(self, option) and not two_phase:
                raise ConfigError(
                    f"{flag(option)} {getattr(self, option)}: rule {self.rule_name!r} (with these options) has no "
                    "feedback weights to train separately; drop this option"
                )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as they are stored in JSON (tuples are lists)."""
        fields: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return fields

    def hash(self) -> str:
        """Return twelve hex digits of the fields that determine the result: all but :data:`_BESIDE`."""
        fields = {k: v for k, v in self.to_json().items() if k not in _BESIDE and not (k in CHECKSUMS and not v)}
        fields = {k: v for k, v in fields.items() if k not in _LATER or v != _LATER[k]}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


WRAPPERS = ("grapes", "matched", "cwu")
"""Prefixes allowed before a rule's name and a colon; :data:`apical.bench.names.AROUND` describes them."""


def rule_name(rule: str) -> str:
    """Return a rule's name in folders, tables and figures: its short name or, for one from a file, its class.

    >>> rule_name("pfa-o"), rule_name("my/rules.py:Mine"), rule_name("cwu:dfa")
    ('pfa-o', 'Mine', 'cwu-dfa')
    """
    outer, colon, inner = rule.partition(":")
    if colon and outer in WRAPPERS:
        return f"{outer}-{rule_name(inner)}"
    return rule.rpartition(":")[2]


def bare_rule(rule: str) -> str:
    """Return the name of the innermost rule of a composition.

    >>> bare_rule("matched:grapes:bp"), bare_rule("my/rules.py:Mine")
    ('bp', 'my/rules.py:Mine')
    """
    outer, colon, inner = rule.partition(":")
    return bare_rule(inner) if colon and outer in WRAPPERS else rule


def from_json(fields: dict[str, Any]) -> Recipe:
    """Return the recipe of a run's config.json; missing fields have their defaults.

    Raises:
        ConfigError: a value is out of range.
        TypeError: a value has the wrong type.
    """
    check_kinds(fields)
    settings = {name: value for name, value in fields.items() if name in Recipe.__dataclass_fields__}
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    return Recipe(**values)


def check_kinds(fields: dict[str, Any]) -> None:
    """Refuse values that do not have their fields' types, as stored in JSON; other names are ignored.

    Raises:
        TypeError: names the first such field and its value.

    >>> check_kinds({"lr": [0.1, "fast"]})
    Traceback (most recent call last):
        ...
    TypeError: lr is [0.1, 'fast']
    """
    for name, kind in _kinds().items():
        if name in fields and not _is_of(fields[name], kind):
            raise TypeError(f"{name} is {fields[name]!r}")


@cache
def _kinds() -> dict[str, Any]:
    """Return the type of each field."""
    return get_type_hints(Recipe)


def _is_of(value: Any, kind: Any) -> bool:
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return value in parts
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(_is_of(item, parts[0]) for item in value)
    if parts:  # a union
        return any(_is_of(value, part) for part in parts)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """Parse options "key=value" into a dictionary; values are Python literals, a bare word is a string.

    Raises:
        ConfigError: there is no "=" or no name, or a name is given twice.

    >>> parse_options(("expansion=4", "feedback=orthogonal"))
    {'expansion': 4, 'feedback': 'orthogonal'}
    """
    parsed: dict[str, Any] = {}
    for option in options:
        key, equals, text = option.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key.isidentifier():
            raise ConfigError(f"--rule-options takes key=value, got {option!r}")
        if key in parsed:
            raise ConfigError(f"--rule-options gives {key!r} twice")
        try:
            parsed[key] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            parsed[key] = text.strip()
    return parsed


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Return each field in which two configurations differ, "field: saved vs given", except the fields free to differ.

    A field missing from a configuration was added to recipes later, and has its default. The user's own data and models may
    have been moved.
    """
    defaults = Recipe().to_json()
    pairs = {name: (saved.get(name, value), current.get(name, value)) for name, value in defaults.items()}
    unlike = {name: pair for name, pair in pairs.items() if name not in FREE_FIELDS and pair[0] != pair[1]}
    for name in CHECKSUMS:
        what = name.partition("_")[0]
        places = [str(place).rpartition(":")[2] if what == "model" else "" for place in unlike.get(what, ())]
        if name not in unlike and current.get(name) and len(set(places)) == 1:
            del unlike[what]  # the same content, which was moved
        if name in unlike and what not in unlike:
            unlike[f"the content of {current.get(what)}, sha256"] = unlike.pop(name)
    return [f"{name}: {a} vs {b}" for name, (a, b) in unlike.items()]


def _check_number(option: str, value: float | None, *, positive: bool) -> None:
    if value is not None and (not 0 <= value <= LARGEST or (positive and value == 0)):
        kind = "positive" if positive else "zero or positive"
        raise ConfigError(f"{flag(option)} must be {kind} and at most {LARGEST:g}, got {value}")


def _check_schedule(option: str, values: tuple[float, ...], epochs: tuple[int, ...], *, positive: bool) -> None:
    for value in values:
        _check_number(option, value, positive=positive)
    if not values and (positive or epochs):
        raise ConfigError(f"{flag(option)} needs at least one value")
    if values and len(epochs) != len(values) - 1:
        raise ConfigError(
            f"{flag(option)} has {len(values)} value{'s' * (len(values) > 1)}, so {flag(option)}-epochs needs "
            f"{len(values) - 1}, got {len(epochs)}"
        )
    if any(epoch <= 0 for epoch in epochs) or list(epochs) != sorted(set(epochs)):
        raise ConfigError(f"{flag(option)}-epochs must be positive and increasing, got {' '.join(map(str, epochs))}")


def flag(option: str) -> str:
    """Return a field as an option of the command line: "--batch-size"."""
    return "--" + option.replace("_", "-")
