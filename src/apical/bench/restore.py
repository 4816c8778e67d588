"""Restore a checkpoint's state into rule and optimiser, and refuse states that do not belong there."""

import math
from typing import Any

import torch
from torch import Tensor

from apical.bench.passes import passes
from apical.bench.recipe import Recipe
from apical.bench.sums import Sums
from apical.bench.timing import StepTimer
from apical.core.credit import CreditRule
from apical.optim import InputAdam

COUNTS = ("step", "mu_product")
"""State that optimisers keep as one number per parameter; all other state has a number per entry or per input."""

NESTED = ("logs", "layers", "depths", "measured", "matrices")
"""Nested entries of an epoch's metrics; all others are single numbers."""


def check_place(recipe: Recipe, epoch: int, step: int, steps_per_epoch: int) -> None:
    """Raise an error for a position outside the recipe's training.

    Raises:
        ValueError: it is past the last epoch, or past the epoch's last step.
    """
    if epoch + bool(step) > recipe.epochs:
        raise ValueError(f"epoch {epoch + bool(step)} is past --epochs {recipe.epochs}")
    if step and step >= passes(recipe, epoch + 1, steps_per_epoch)[-1].end:
        raise ValueError(f"epoch {epoch + 1} has no step {step}")


def restore_rule(rule: CreditRule, state: dict[str, Any]) -> None:
    """Load the rule's state.

    Raises:
        ValueError: a parameter is not finite.
        RuntimeError, TypeError, AttributeError: names, shapes or types differ.
    """
    rule.load_state_dict(state)
    if name := not_finite(rule):
        raise ValueError(f"parameter {name} is not finite")


def not_finite(rule: CreditRule) -> str:
    """Return the name of a parameter that is not finite, if any; feedback in closed form has no values to check."""
    values = {name: parameter for name, parameter in rule.named_parameters() if parameter.numel()}
    return next((name for name, parameter in values.items() if not bool(torch.isfinite(parameter).all())), "")


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the optimiser's state.

    Raises:
        ValueError: an option or a moment differs in type or shape from that of the optimiser, or is not finite.
        KeyError, TypeError, AttributeError, RuntimeError: it is not the state of an optimiser.
    """
    before = [{**group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for old, group in zip(before, optimizer.param_groups, strict=True):
        for name, value in old.items():
            if name != "params" and not _alike(group[name], value):
                raise ValueError(f"option {name} is {group[name]!r}")
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor):
                by_input = name == "exp_avg_sq" and isinstance(optimizer, InputAdam) and parameter.dim() > 1
                shape = torch.Size((1, *parameter.shape[1:])) if by_input else parameter.shape
                if value.shape != (torch.Size() if name in COUNTS else shape) or not bool(torch.isfinite(value).all()):
                    raise ValueError(f"{name} is not finite or differs in shape from its parameter")
            elif not (_alike(value, 0.0) if name in COUNTS else value is None):
                raise ValueError(f"{name} is {value!r}")


def restore_partial(state: dict[str, Any], sums: Sums, timer: StepTimer, feedback_timer: StepTimer) -> tuple[int, float]:
    """Continue an epoch's sums and times; return the trajectory's number of snapshots, and the loss before training.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: something is missing or has the wrong type.
    """
    sums.restore(state)
    timer.restore(_numbers(state["times"]))
    feedback_timer.restore(_numbers(state.get("feedback_times", [])))
    snapshots, untrained = state.get("snapshots", 0), state.get("untrained", 0.0)
    if type(snapshots) is not int or snapshots < 0 or not _alike(untrained, 0.0):
        raise ValueError(f"snapshots {snapshots!r}, untrained {untrained!r}")
    return snapshots, untrained


def check_line(line: dict[str, Any], epoch: object) -> None:
    """Raise an error unless the line has the metrics of a finished epoch.

    Raises:
        ValueError, TypeError: it belongs to another epoch, lacks a measurement, or has one that is not a finite number.
    """
    if type(epoch) is not int or line.get("epoch") != epoch or not {"train_loss", "test_loss", "ms_per_step"} <= line.keys():
        raise ValueError(f"not those of epoch {epoch}")
    check_measurements(line)


def check_measurements(line: dict[str, Any]) -> None:
    """Raise an error for non-finite measurements, and for nested ones in place of a number or vice versa.

    Raises:
        ValueError: names the first.
    """
    for name, value in line.items():
        if isinstance(value, dict) != (name in NESTED):
            raise ValueError(f"{name} is {value!r}")
    check_leaves(line)


def check_leaves(values: dict[str, Any]) -> None:
    """Raise an error if a nested measurement is neither a finite number nor None.

    Raises:
        ValueError: names the first.
    """
    for name, value in values.items():
        if isinstance(value, dict):
            check_leaves(value)
        elif not isinstance(name, str) or not (value is None or _alike(value, 0.0)):
            raise ValueError(f"{name} is {value!r}")


def _numbers(values: Any) -> list[float]:
    if not isinstance(values, list) or not all(_alike(value, 0.0) for value in values):
        raise ValueError("times that are not numbers")
    return [float(value) for value in values]


def _alike(value: Any, model: Any) -> bool:
    """Return whether both are flags, both finite numbers, both sequences of these, both None, or the same word."""
    if isinstance(model, str):
        return bool(value == model)
    if isinstance(model, bool) or isinstance(value, bool) or model is None or value is None:
        return type(value) is type(model)
    if isinstance(model, list | tuple):
        return isinstance(value, list | tuple) and len(value) == len(model) and all(map(_alike, value, model))
    return isinstance(value, int | float) and isinstance(model, int | float) and math.isfinite(value)
