"""The trainings behind figure 3 of deep feedback control: which rules, by which recipe, and when they are measured.

The recipes are those of the study `dfc-student-teacher` (the released toy configuration). Two departures of this figure:

* DFA and BP use the study's step of feedback control, not a separate learning rate. The released DFA is a target method with
  the same nudge, whose gradient is `2 lambda / batch` times the plain one: learning rate 1 there is 7.8e-4 here. `dfa-fast`
  is DFA with the study's own learning rate.
* `dfc-ssa-noise` learns its feedback from simulated noise, as the authors do; the others from the expectation of that rule.
"""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from apical import data
from apical.bench.distributed import World
from apical.bench.loop import Training
from apical.bench.measure import probe_batch
from apical.bench.names import make_rule, merged, resolve
from apical.bench.recipe import Recipe
from apical.bench.run_folder import RunFolder
from apical.data import Dataset
from apical.diagnostics.gauss_newton import requested_change
from apical.errors import DivergenceError
from apical.rules.feedback_control.deep_feedback_control import DeepFeedbackControl
from apical_papers.dfc.recipes import BATCH, FIXED, STUDIES, TRAINED
from apical_papers.dfc.toy.metrics import Probe, twin, update_angle

STUDY = "dfc-student-teacher"
NUDGE = 0.05 / BATCH
"""Nudge lambda per sample."""

SHOWN = (*TRAINED, *FIXED, "dfa", "bp")
"""The curves of the figure; the other two runs are checks."""

NOISE, FAST = "dfc-ssa-noise", "dfa-fast"


@dataclass(frozen=True)
class Plan:
    """How much to train.

    Attributes:
        epochs: passes in which the forward weights learn.
        samples: training samples.
        seeds: seeds of the initial weights and the order of the data.
        probe: number of training samples in the fixed batch used for all measurements.
        noise_epochs: epochs of the one run whose feedback learns from simulated noise, which is slow.
        pretrain_epochs: feedback passes before the first epoch.
    """

    epochs: int
    samples: int
    seeds: tuple[int, ...]
    probe: int = BATCH
    noise_epochs: int = 10
    pretrain_epochs: int = 50

    def jobs(self) -> list[tuple[str, int]]:
        """Return every (name, seed) to train."""
        return [(name, seed) for seed in self.seeds for name in (*SHOWN, FAST)] + [(NOISE, self.seeds[0])]


@dataclass
class History:
    """One training.

    Attributes:
        epochs: epochs after which it was measured; 0 is before the forward weights learn, after pre-training.
        values: measure -> one value per epoch, including the losses (training loss from epoch 1 on).
        before: Condition 2 of the random feedback weights, before pre-training.
        simulated: angles in degrees of the simulated DFC update to that of DFC-SSA and to the closed form, at the end.
        failure: why it ended early.
    """

    epochs: list[int] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)
    before: float | None = None
    simulated: dict[str, float] | None = None
    failure: str | None = None

    def add(self, epoch: int, values: dict[str, float]) -> None:
        """Append the measures of one epoch."""
        self.epochs.append(epoch)
        for key, value in values.items():
            self.values.setdefault(key, []).append(value)


def plain(history: History) -> dict[str, Any]:
    """Convert the history for JSON, which has no NaN or infinity."""
    values = {
        key: [value if math.isfinite(value) else str(value) for value in numbers] for key, numbers in history.values.items()
    }
    return {**asdict(history), "values": values}


def restored(saved: Mapping[str, Any]) -> History:
    """Invert :func:`plain`."""
    values = {key: [float(value) for value in numbers] for key, numbers in saved["values"].items()}
    return History(**{item.name: saved[item.name] for item in fields(History)} | {"values": values})


def load(plan: Plan, name: str = "student-teacher") -> Dataset:
    """Return the task, with the paper's 1,000 validation samples held out."""
    return data.load(name, validation=1000, train_limit=plan.samples)


def recipe(name: str, plan: Plan, seed: int) -> Recipe:
    """Return the recipe of one training, before the rule's defaults are filled in."""
    rule = {NOISE: "dfc-ssa", FAST: "dfa"}.get(name, name)
    settings = STUDIES[STUDY].row(rule).recipe
    settings = replace(settings, seed=seed, epochs=plan.epochs, batch_size=min(BATCH, plan.samples), device="cpu", threads=1)
    if settings.pretrain_epochs:
        settings = replace(settings, pretrain_epochs=plan.pretrain_epochs)
    if name == NOISE:
        options = merged(settings.rule_options, ("learn=noise",))
        settings = replace(settings, rule_options=options, epochs=min(plan.noise_epochs, plan.epochs))
    if name in ("dfa", "bp"):
        settings = replace(settings, lr=(2 * NUDGE,), clip=settings.clip / (2 * NUDGE))
    return settings


def train(name: str, plan: Plan, seed: int, dataset: Dataset) -> History:
    """Train one rule and measure it after every epoch; if it diverges, stop early and record this."""
    history = History()
    try:
        with tempfile.TemporaryDirectory() as folder:
            training = begin(recipe(name, plan, seed), dataset, Path(folder))
            probe = Probe(training.rule, *probe_batch(dataset.train, plan.probe), NUDGE)
            follow(training, probe, history)
            if name == "dfc" and seed == plan.seeds[0]:
                history.simulated = simulated(probe)
    except DivergenceError as error:
        history.failure = str(error)
    return history


def begin(settings: Recipe, dataset: Dataset, folder: Path) -> Training:
    """Return the training of a recipe at epoch 0, in a temporary folder."""
    resolved, notes = resolve(settings, len(dataset.train))
    training = Training(resolved, dataset, make_rule, RunFolder(folder / "run"), World(0, 1, torch.device("cpu")))
    training.start(resume=False, command="dfc_toy", notes=notes, environment={})
    return training


def follow(training: Training, probe: Probe, history: History) -> None:
    """Train to the end; measure before pre-training, after it, and after every epoch."""

    def look(epoch: int) -> None:
        losses = {key: training.line[key] for key in ("train_loss", "test_loss") if training.line[key] is not None}
        history.add(epoch, probe() | losses)

    on_step = None
    if training.recipe.pretrain_epochs:
        history.before = probe.condition_two()
        on_step = after_pretraining(training, lambda: look(0))
    else:
        look(0)
    while training.epoch < training.recipe.epochs:
        training.train_epoch(on_step)
        look(training.epoch)


def after_pretraining(training: Training, act: Callable[[], None]) -> Callable[[int], None]:
    """Return a callback for the steps of a training that acts once, when the feedback weights are pre-trained."""
    last = max(item.end for item in training.passes if item.kind == "pretrain")

    def on_step(step: int) -> None:
        if training.epoch == 0 and step == last:
            act()

    return on_step


def simulated(probe: Probe) -> dict[str, float]:
    """Return angles in degrees of the simulated DFC update to that of DFC-SSA and to DFC's closed form."""
    assert isinstance(probe.rule, DeepFeedbackControl)
    rules = [probe.rule, twin(probe.rule, "ssa"), twin(probe.rule, "dfc", "simulate")]
    closed, linear, walked = (requested_change(rule, probe.inputs, probe.targets)[0] for rule in rules)
    return {"ssa": update_angle(walked, linear), "closed_form": update_angle(walked, closed)}


def curves(histories: Sequence[History]) -> dict[str, object]:
    """Return mean and sample standard deviation over the seeds (0 for one) of every measure, epoch by epoch."""
    whole = [history for history in histories if history.failure is None]
    if not whole:
        return {"n": 0, "epochs": [], "metrics": {}}
    epochs = whole[0].epochs
    metrics = {}
    for key in whole[0].values:
        table = torch.tensor([history.values[key] for history in whole], dtype=torch.float64)
        spread = table.std(0) if len(whole) > 1 else torch.zeros_like(table[0])
        metrics[key] = {
            "epochs": epochs[len(epochs) - table.shape[1] :],
            "mean": table.mean(0).tolist(),
            "std": spread.tolist(),
        }
    return {"n": len(whole), "epochs": epochs, "metrics": metrics}
