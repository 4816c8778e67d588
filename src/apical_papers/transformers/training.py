"""Trainings of the studies: arms (a rule with its options), each at a learning rate, width and seed; saved one by one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apical.bench.cells import kept
from apical.bench.distributed import World
from apical.bench.materials import build_model, load_data
from apical.bench.measure import evaluate
from apical.bench.names import make_rule
from apical.bench.plain_loop import train
from apical.bench.provenance import environment
from apical.bench.recipe import Recipe
from apical.bench.state import read_json
from apical.data import Dataset
from apical.diagnostics.alignment import layer_alignment
from apical.errors import ApicalError
from apical_papers.transformers.recipes import LANGUAGE

HELD_OUT = 512
"""Number of training windows on which learning rates are chosen."""


@dataclass(frozen=True)
class Arm:
    """A rule with its options, or a control.

    Attributes:
        options: options of its constructor, each "key=value".
        decay: weight decay of the first quarter of the steps, if it differs from that of the others.
        head_only: only the read-out is trained.
    """

    rule: str
    options: tuple[str, ...] = ()
    decay: float | None = None
    head_only: bool = False


@dataclass(frozen=True)
class Setting:
    """One training.

    Attributes:
        seed: seed of weights and windows.
        width, blocks: size of the model.
    """

    arm: str
    lr: float
    seed: int
    width: int
    steps: int
    blocks: int = 2

    @property
    def file(self) -> str:
        """File in which it is saved."""
        return f"{self.arm.replace(' ', '-')}-w{self.width}-s{self.steps}-lr{self.lr:g}-seed{self.seed}.json"


def recipe_of(arm: Arm, setting: Setting) -> Recipe:
    """Return the recipe of a training: four epochs, so that decay can change after a quarter."""
    quarter = max(1, setting.steps // 4)
    schedule: dict[str, Any] = {}
    if arm.decay is not None:
        schedule = {"weight_decay": (arm.decay, *LANGUAGE.weight_decay), "weight_decay_epochs": (1,)}
    return replace(
        LANGUAGE,
        rule=arm.rule,
        rule_options=arm.options,
        model=f"gpt-{setting.blocks}x{setting.width}",
        lr=(setting.lr,),
        seed=setting.seed,
        epochs=4,
        epoch_steps=quarter,
        lr_cosine=4,
        lr_warmup=max(1, setting.steps // 20),
        validation=HELD_OUT,
        **schedule,
    )


def data() -> Dataset:
    """Return windows of text for training, for choosing rates, and for testing."""
    return load_data(replace(LANGUAGE, validation=HELD_OUT))


def kept_training(
    out: Path, arms: Mapping[str, Arm], dataset: Dataset, setting: Setting, *, retries: bool = True
) -> dict[str, Any]:
    """Return the result of a training, from its file if it exists; print a line when one finishes.

    Args:
        retries: also repeat refused trainings, which a later version may accept.
    """
    config = {
        "text": dataset.sha256,
        "arm": repr(arms[setting.arm]),
        **{k: v for k, v in vars(setting).items() if k != "arm" and v != getattr(Setting, k, None)},
    }
    path = out / "cells" / setting.file
    if retries and path.exists() and read_json(path).get("refused"):
        path.unlink()
    fresh = not path.exists()
    cell = kept(path, config, lambda: trained(arms[setting.arm], dataset, setting))
    if fresh:
        what = f"test loss {cell['test']:.4f}" if cell.get("test") is not None else f"refused: {cell['refused']}"
        print(f"{cell['seconds']:7.1f} s  {setting.arm:16s} lr {setting.lr:g}, seed {setting.seed}: {what}", flush=True)
    return cell


def trained(arm: Arm, dataset: Dataset, setting: Setting) -> dict[str, Any]:
    """Return nats per token on held-out and on test windows, the training loss curve, and angles of feedback to weights.

    If a rule refuses the model, or diverges, return its message instead.
    """
    recipe = recipe_of(arm, setting)
    torch.manual_seed(setting.seed)
    curve: list[float] = []
    angles: dict[str, dict[str, float]] = {}
    begun: dict[str, Tensor] = {}
    try:
        model = build_model(recipe, dataset)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not arm.head_only or name.startswith("head."))
        rule = make_rule(recipe, model, dataset.input_shape)

        def look(step: int, loss: Tensor) -> None:
            begun["loss"] = begun.get("loss", torch.zeros(())) + loss.detach()
            if step % _EVERY == 0:
                curve.append(float(begun.pop("loss")) / _EVERY)
            if step == 1:
                angles["first"] = _angles(rule)

        train(rule, recipe, dataset, look)
        angles["last"] = _angles(rule)
        alone = World(0, 1, torch.device("cpu"))
        losses = {
            part: evaluate(rule, split, "off", alone, counts_hits=False)[0]
            for part, split in (("held out", dataset.validation), ("test", dataset.test))
            if split is not None
        }
    except ApicalError as error:
        return {"refused": str(error), "test": None, "held out": None}
    return {**losses, "curve": curve, "angles": angles, "commit": environment("cpu", 1)["commit"]}


_EVERY = 20
"""Steps averaged for each point of the curve."""


def _angles(rule: Any) -> dict[str, float]:
    return {name: values["weight_alignment"] for name, values in layer_alignment(rule).items()}
