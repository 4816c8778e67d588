"""The recipe of one evolution: a frozen dataclass whose fields determine the resulting top-down network. No torch here."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from apical.bench.folders import check_least
from apical.bench.recipe import Option
from apical.errors import ConfigError

FREE_FIELDS = ("generations",)
"""Fields in which a resumed evolution may differ from the saved one (upwards)."""

ADDED = {"output": "evolved", "settled": 1, "by_class": False}
"""Values that older recipes, which lack these fields, used."""


@dataclass(frozen=True, kw_only=True)
class EvolutionRecipe:
    """All settings that determine the outcome of one evolution.

    The text below a field is also its help on the command line.
    """

    data: Annotated[tuple[str, ...], Option("NAME|FILE|FOLDER ...")] = ("digits",)
    """Data sets of one image shape, or your own; tasks use them in turn."""
    model: Annotated[tuple[str, ...], Option("NAME|FILE.py:CLASS ...")] = ("mlp-tanh-32",)
    """Networks of the learners, or your own; tasks use them in turn; see `apical list models`."""
    generations: int = 100
    """Updates of the search distribution."""
    population: int = 64
    """Top-down networks per generation; even."""
    strategy: Literal["pgpe", "pgpe-clipup", "cem"] = "pgpe"
    """Evolution strategy."""
    sigma: float = 0.1
    """Initial standard deviation of the search."""
    step: float = 0.3
    """Step size of the centre of the search distribution."""
    decay: float = 1.0
    """Factor by which the step size is multiplied after each generation."""
    hidden: int = 16
    """Units in each hidden layer of the top-down network."""
    sites: Annotated[int, Option("K", "one credit per unit")] = 0
    """Credit diffusion: emission sites per hidden layer; the teacher then works for layers of any width."""
    relative: bool = True
    """Credit relative to that of a correct prediction: a learner whose prediction is correct is not changed."""
    credit: Literal["logits", "probabilities"] = "logits"
    """Quantity to which the output's credit applies; probabilities as in the authors' code."""
    output: Literal["evolved", "error"] = "evolved"
    """Source of the output's credit: the top-down network, or the error, so that only hidden credit is evolved."""
    by_class: bool = False
    """Evolve one small network that sees one class at a time; its teacher works for any number of classes."""
    ways: Annotated[int, Option("N", "all")] = 0
    """Classes per task, redrawn for each task; with --by-class, tasks have 2 up to this many."""
    examples: int = 256
    """Training images per task; 0 uses all."""
    tasks: int = 1
    """Tasks per generation."""
    starts: Literal["fresh", "fixed"] = "fresh"
    """Initial weights of the learners: new for every task, or always the same."""
    zeros: bool = False
    """Learners start with all weights zero."""
    begin: Annotated[str, Option("FILE", "a random one")] = ""
    """Start from this teacher: a file, the name of a shipped one, or "wired": the error and random feedback of it."""
    quiet: bool = True
    """Start from a top-down network that sends no credit to hidden units."""
    held_out: bool = False
    """Evaluate learners on images they were not trained on."""
    settled: Annotated[int, Option("N")] = 1
    """Evaluate learners by their mean loss over this many last updates, so that an oscillating loss counts."""
    steps: int = 50
    """Updates in a learner's lifetime."""
    lr: Annotated[float, Option("RATE")] = 0.02
    """Learning rate of the learners."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Optimiser of the learners; sgd has momentum 0.9."""
    clip: Annotated[float, Option("NORM")] = 1.0
    """Maximum norm of a learner's gradient; 0 disables clipping."""
    batch_size: Annotated[int, Option("N", "all")] = 0
    """Images per update of a learner."""
    chunk: int = 33
    """Learners that a worker trains at the same time; more need more memory."""
    seed: int = 0
    """Seed of tasks, weights and populations."""
    data_sha256: tuple[str, ...] = ()
    """Checksum of each data set if any is the user's own, as in a training's recipe."""
    model_sha256: tuple[str, ...] = ()
    """Checksums of the files that define the networks, likewise."""

    def __post_init__(self) -> None:
        check_least(self, **dict.fromkeys(("generations", "population", "hidden", "tasks", "settled", "steps", "chunk"), 1))
        check_least(self, **dict.fromkeys(("sites", "ways", "examples", "batch_size", "seed", "clip"), 0))
        if not self.data or not self.model:
            raise ConfigError(f"--{'model' if self.data else 'data'} needs at least one name")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as they are stored in JSON; without checksums if there are none."""
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {name: value for name, value in fields.items() if not (name.endswith("sha256") and not value)}
