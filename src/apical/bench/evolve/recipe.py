"""The recipe of one evolution: a frozen dataclass whose fields decide the top-down network that comes out. No torch here."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from apical.errors import ConfigError

FREE_FIELDS = ("generations",)
"""Fields in which a resumed evolution may differ from the saved one (upwards)."""


@dataclass(frozen=True, kw_only=True)
class EvolutionRecipe:
    """Everything that decides the outcome of one evolution.

    Attributes:
        data: names of the data sets that tasks are drawn from, in turn; of one image shape.
        model: names of the learners' networks; tasks take them in turn.
        generations: updates of the search distribution.
        strategy: name of the evolution strategy.
        population: individuals per generation.
        sigma: initial standard deviation.
        step: step size of the centre.
        decay: the step is multiplied by this after each generation.
        hidden: units in each hidden layer of the top-down network.
        sites: emission sites per hidden layer of the learner (credit diffusion); 0 gives every unit its own credit.
        relative: credit is relative to that of a right prediction, and shared by the units of a hidden layer.
        credit: the output's stands on the logits, or on the probabilities as in the authors' code.
        ways: classes per task, drawn anew each time; 0 takes all.
        examples: training images per task; 0 takes all.
        tasks: per generation.
        starts: fresh initial weights for every task, or always the same ("fixed").
        zeros: learners start with all weights zero.
        begin: teacher to start from: a file, the name of a shipped one, or "wired", which hands out the error and random
            feedback of it; empty draws one at random.
        quiet: the first top-down network gives no credit to hidden units.
        held_out: fitness is the likelihood of images that were not trained on.
        steps: updates in a lifetime.
        lr: learning rate in it.
        optimizer: adam or sgd (momentum 0.9).
        clip: largest norm of the gradient of all weights.
        batch_size: images per update; 0 takes all of the task's.
        chunk: learners trained at once by one worker; memory grows with it.
        seed: of everything random.
        data_sha256: of the content of each of the data sets where any is the user's own, as a training's recipe has it.
        model_sha256: of the files that define the networks, likewise.
    """

    data: tuple[str, ...] = ("digits",)
    model: tuple[str, ...] = ("mlp-tanh-32",)
    generations: int = 100
    strategy: Literal["pgpe", "pgpe-clipup", "cem"] = "pgpe"
    population: int = 64
    sigma: float = 0.1
    step: float = 0.3
    decay: float = 1.0
    hidden: int = 16
    sites: int = 0
    relative: bool = True
    credit: Literal["logits", "probabilities"] = "logits"
    ways: int = 0
    examples: int = 256
    tasks: int = 1
    starts: Literal["fresh", "fixed"] = "fresh"
    zeros: bool = False
    begin: str = ""
    quiet: bool = True
    held_out: bool = False
    steps: int = 50
    lr: float = 0.02
    optimizer: Literal["adam", "sgd"] = "adam"
    clip: float = 1.0
    batch_size: int = 0
    chunk: int = 33
    seed: int = 0
    data_sha256: tuple[str, ...] = ()
    model_sha256: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("generations", "population", "hidden", "tasks", "steps", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(self, name)}")
        for name in ("sites", "ways", "examples", "batch_size", "seed", "clip"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')} must not be negative; got {getattr(self, name)}")
        if not self.data or not self.model:
            raise ConfigError(f"--{'model' if self.data else 'data'} needs at least one name")

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON has them; without checksums where there are none."""
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {name: value for name, value in fields.items() if not (name.endswith("sha256") and not value)}
