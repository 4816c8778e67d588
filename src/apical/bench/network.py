"""Measures of a network by the names that recipes and commands use, and the table of their results.

Each is a function of a model and some of its inputs, independent of the rule that trained it. A user's measure is a function
in a file, "FILE.py:FUNCTION", that returns numbers by name, or layers with numbers by name.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from apical import own_code
from apical.core.rest import undisturbed
from apical.diagnostics import channel as channels
from apical.diagnostics import coding as codes
from apical.diagnostics.learnability import learnability
from apical.diagnostics.persistence import persistence
from apical.errors import ApicalError, ConfigError, require_choice

Numbers = dict[str, dict[str, float | None]]
"""Maps each layer, or :data:`WHOLE`, to quantities and their numbers; None if not finite."""

WHOLE = "(network)"
SAMPLES = 256
"""Largest number of inputs given to a measure."""

FEW = 16
ENTRIES = 2**25
"""Largest number of entries of Jacobians held in memory."""


def of_persistence(model: nn.Module, inputs: Tensor) -> dict[str, dict[str, float]]:
    """Return the persistence of the weights, of shuffled weights, and the spread of the latter."""
    numbers = persistence(model)
    layers = {
        name: {"np": value, "np shuffled": numbers.shuffled[name][0], "spread": numbers.spread[name]}
        for name, value in numbers.layers.items()
    }
    whole = {key: fmean(row[key] for row in layers.values()) for key in ("np", "np shuffled", "spread")}
    if numbers.deep is not None and numbers.deep_shuffled is not None:
        mean, deviation = numbers.deep_shuffled
        whole |= {"dgp": numbers.deep, "dgp shuffled": mean, "dgp shuffled std": deviation}
    return {WHOLE: whole, **layers}


def of_coding(model: nn.Module, inputs: Tensor) -> dict[str, dict[str, float]]:
    """Return entropies and dimensions of the activities; the network's are per unit, means over hidden layers."""
    numbers = codes.coding(model, inputs)
    layers = {name: {key.replace("_", " "): float(value) for key, value in asdict(c).items()} for name, c in numbers.items()}
    hidden = [row for name, row in layers.items() if name != "output"] or list(layers.values())
    per_unit = ("gaussian nats", "marginal nats", "participation ratio", "effective rank")
    whole = {f"{key} per unit": fmean(row[key] / row["units"] for row in hidden) for key in per_unit}
    return {WHOLE: whole | {"dead": fmean(row["dead"] for row in hidden)}, **layers}


def of_learnability(model: nn.Module, inputs: Tensor) -> dict[str, dict[str, float]]:
    """Return the spectrum of the Jacobian in the weights, on a few inputs."""
    with torch.no_grad(), undisturbed(model):
        outputs = model.eval()(inputs[:1]).numel()
    size = outputs * sum(p.numel() for p in model.parameters() if p.requires_grad)
    few = inputs[: max(1, min(FEW, ENTRIES // max(1, size)))]
    if size > 4 * ENTRIES:
        raise ConfigError(f"the Jacobian of one sample has {size:,} entries, which is too many; measure a smaller network")
    numbers = learnability(model, few)
    values = numbers.singular_values
    return {
        WHOLE: {
            "samples": len(few),
            "outputs x samples": outputs * len(few),
            "rank": numbers.rank,
            "log10 condition": numbers.log10_condition,
            "largest": float(values[0]),
            "median": float(values.median()),
        }
    }


def of_channel(model: nn.Module, inputs: Tensor) -> dict[str, dict[str, float]]:
    """Return measures of the Jacobian in the input, and nats under both models of noise."""
    few = inputs[:FEW]
    end, every = (channels.channel(model, few, where=where) for where in ("end", "every"))
    return {
        WHOLE: {
            "largest": end.largest,
            "smallest": end.smallest,
            "log10 condition": end.log10_condition,
            "mean square": end.mean_square,
            "nats, noise at end": end.nats,
            "bound": end.bound,
            "nats, noise in every layer": every.nats,
        }
    }


Measurer = Callable[[nn.Module, Tensor], Mapping[str, Any]]
MEASURES: dict[str, Measurer] = {
    "persistence": of_persistence,
    "coding": of_coding,
    "learnability": of_learnability,
    "channel": of_channel,
}
"""The measures by name."""


def find_measure(name: str) -> Measurer:
    """Return the measure with a name, or a user's own function.

    Raises:
        ConfigError: the measure does not exist; the message gives the nearest name.
    """
    if own_code.is_code(name):
        measure = own_code.import_from(name, "measure", "my_measures.py:sharpness")
        if not callable(measure):
            raise ConfigError(f"measure {name} must be a function of a model and inputs, got {type(measure).__name__}")
        own: Measurer = measure
        return own
    require_choice("measure", name, MEASURES)
    return MEASURES[name]


def measured(names: Iterable[str], model: nn.Module, inputs: Tensor) -> dict[str, Numbers]:
    """Return the results by measure; the model is left unchanged.

    Args:
        names: see :func:`find_measure`; a user's own measure is named after its function.
        inputs: (samples, ...); each measure uses as many as it needs.

    Raises:
        ConfigError: a measure is unknown, or does not apply to this model; the message says why.
    """
    numbers = {}
    for name in names:
        measure = find_measure(name)
        try:
            with undisturbed(model, parameters=True):
                values = measure(model, inputs)
        except (ApicalError, RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
            reason = " ".join(str(error).split()).rstrip(".")[:300]
            raise ConfigError(f"{name} cannot be measured on this model: {reason}; drop {name}") from error
        numbers[short_name(name)] = _table(name, values)
    return numbers


def short_name(name: str) -> str:
    """Return the name of a measure in tables: its name, or that of the user's function."""
    return name.rpartition(":")[2]


def moments_of_training(epochs: int) -> dict[str, int]:
    """Return the epochs after which a run is measured, by their labels.

    >>> moments_of_training(5), moments_of_training(1)
    ({'before': 0, 'halfway': 3, 'after': 5}, {'before': 0, 'after': 1})
    """
    middle = (epochs + 1) // 2
    return {"before": 0, **({"halfway": middle} if middle < epochs else {}), "after": epochs}


def quantities(rows: Sequence[Mapping[str, float | None]]) -> list[str]:
    """Return the names of the quantities of several layers, each once."""
    return list(dict.fromkeys(key for row in rows for key in row))


def _table(name: str, values: Any) -> Numbers:
    if not isinstance(values, Mapping):
        raise ConfigError(f"measure {name} must return numbers by name (a dictionary), got {type(values).__name__}")
    flat = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    nested = {str(key): value for key, value in values.items() if isinstance(value, Mapping)}
    layers = {**({WHOLE: flat} if flat else {}), **nested}
    return {layer: {str(key): _number(name, key, value) for key, value in row.items()} for layer, row in layers.items()}


def _number(name: str, key: Any, value: Any) -> float | None:
    if type(value) is int:  # a count
        return value
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"measure {name}: {key!r} must be a number, got {type(value).__name__}") from None
    return number if math.isfinite(number) else None
