"""Type checks of a report's input: each check raises TypeError or KeyError, which names the faulty value."""

from collections.abc import Mapping
from typing import Any

_TEXTS = {"rule", "status", "message", "error", "config_hash"}
_COUNTS = {"seed", "epochs", "parameters", "n_train", "n_test", "steps_per_epoch"}


def check_config(config: Mapping[str, Any]) -> None:
    """Check a run's config.json; values that are only shown may have any type."""
    if type(config.get("seed", 0)) is not int:
        raise TypeError(f"seed is {config['seed']!r}")
    _check_command(config)


def check_result(result: Mapping[str, Any]) -> None:
    """Check a run's result.json."""
    for name, value in result.items():
        kinds = str if name in _TEXTS else int if name in _COUNTS else int | float
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise TypeError(f"{name} is {value!r}")


def check_plan(plan: Mapping[str, Any]) -> None:
    """Of compare.json."""
    _check_command(plan)
    for name, kind in (("rules", str), ("seeds", int)):
        values = plan.get(name) or []
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise TypeError(f"{name} is {values!r}")
    recipes = plan.get("recipes") or {}
    for recipe in (plan.get("recipe") or {}, *_members(recipes, "recipes")):
        if not isinstance(recipe, dict):
            raise TypeError(f"a recipe is {recipe!r}")
        check_config(recipe)
    for numbers in _members(plan.get("published") or {}, "published"):
        for number in _rows(numbers, "published"):
            _check_number(number, {"metric": str, "epoch": int, "value": int | float, "tolerance": int | float})
            if number["metric"] not in ("accuracy", "error", "loss", "angle"):
                raise TypeError(f"metric is {number['metric']!r}")
            if number["metric"] == "angle" and (type(number["layer"]) is not int or number["layer"] < 0):
                raise TypeError(f"layer is {number['layer']!r}")
    for claim in _rows(plan.get("claims") or [], "claims"):
        _check_number(claim, {"rule": str, "other": str, "epoch": int, "least": int | float})


def _check_number(number: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    texts = {name: str for name in ("tag", "split", "metric", "select") if number.get(name) is not None}
    for name, kind in {**kinds, **texts}.items():
        if not isinstance(number[name], kind) or isinstance(number[name], bool):
            raise TypeError(f"{name} is {number[name]!r}")


def _check_command(record: Mapping[str, Any]) -> None:
    command = record.get("command") or ""
    if not isinstance(command, str | list):
        raise TypeError(f"command is {command!r}")


def _members(value: Any, name: str) -> list[Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{name} is {value!r}")
    return list(value.values())


def _rows(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise TypeError(f"{name} is {value!r}")
    return value
