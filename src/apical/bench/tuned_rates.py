"""Tuned learning rates, for the settings in which they were tuned."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from apical.bench.recipe import Recipe, bare_rule

_RATES = {
    "bp": (0.05, 0.05, 0.05),
    "fa": (0.005, 0.005, 0.005),
    "dfa": (0.005, 0.005, 0.002),
    "usf": (0.02, 0.05, 0.002),
    "frsf": (0.1, 0.05, 0.02),
    "brsf": (0.02, 0.02, 0.002),
    "kp": (0.1, 0.02, 0.05),
    "wm": (0.02, 0.005, 0.01),
    "pfa": (0.05, 0.05, 0.05),
    "pfa-o": (0.1, 0.02, 0.02),
    "ccl": (0.2, 0.5, 0.2),
    "tdca": (0.05, 0.02, 0.005),
    "local-pred": (0.1, 0.02, 0.05),
    "local-sim": (0.02, 0.1, 0.1),
    "mono-forward": (0.1, 0.05, 0.01),
    "ff": (0.002, 0.001, 0.001),
    "scff": (0.5, 0.02, 0.05),
    "dualprop": (0.05, 0.02, 0.002),
    "dtp": (0.005, 0.02, 0.005),
    "ddtp-linear": (0.01, 0.02, 0.01),
    "dfc-ssa": (0.05, 0.02, 0.005),
    "pc-error": (0.005, 0.05, 0.002),
    "grapes:bp": (None, 0.02, 0.005),
    "matched:bp": (None, 0.02, 0.005),
    "pc-one-step": (None, 0.02, 0.002),
    "ccl-readout": (None, 0.05, 0.01),
    "ff-readout": (None, 0.02, 0.005),
    "tdca-silent": (None, 0.02, 0.1),
    "pc": (None, 0.2, 0.01),
    "local-both": (None, 0.1, 0.1),
    "sibp": (None, 0.05, 0.05),
    "cwu:bp": (None, 0.05, 0.02),
    "dfc": (None, 0.02, 0.005),
    "dtp-drl": (None, 0.02, 0.01),
    "kp-mirror": (None, 0.05, 0.005),
    "pfa-mirror": (None, 0.02, 0.005),
    "pfa-o-mirror": (None, 0.02, 0.02),
    "ccl-free": (None, 0.2, 0.2),
    "ccl-frozen": (None, 0.5, 0.2),
    "ddtp-control": (None, 0.02, 0.01),
    "dfc-fixed": (None, 0.02, 0.005),
    "dfc-ssa-fixed": (None, 0.02, 0.005),
    "dfc-ss": (None, 0.02, 0.02),
    "dfc-ss-fixed": (None, 0.02, 0.005),
    "ddtp-rhl": (None, 0.01, 0.01),
    "ep-one-sided": (None, 0.01, 0.005),
    "corinfomax": (None, 0.05, 0.02),
    "ep": (None, 0.01, 0.01),
    "pc-incremental": (None, 0.05, 0.02),
    "strong-dfc": (None, 0.05, 0.005),
    "ep-directed": (None, 0.01, 0.01),
    "hep": (None, 0.01, 0.005),
    "csdp-unsupervised": (None, 0.01, 0.005),
    "csdp": (None, 0.002, 0.01),
    "csdp-memristor": (None, 0.01, 0.01),
    "tdca-unevolved": (None, None, 0.0005),
}
"""On digits, MNIST and Fashion-MNIST; None if none was tuned, or if the best lies at an end of the range tried."""


def _column(place: int) -> dict[str, float]:
    return {rule: rate for rule, rates in _RATES.items() if (rate := rates[place]) is not None}


DIGITS = _column(0)
"""The best of twelve learning rates of SGD with every other setting at its default (results/rates-digits): batches of 32
digits, `mlp-256-256`, 20 epochs. With other data, widths or epochs they are often worse than the common one. TDCA's rate is
from a second sweep with five seeds (results/rates-digits-tdca): on the 240 validation images of one seed, its rates from
0.005 to 0.05 were within two images of each other."""

MNIST, FASHION = _column(1), _column(2)
"""The best of thirteen learning rates on 10,000 images (results/rates-mnist, rates-fashion-mnist; rates-costly-... for
the slowest rules, rates-spiking-... for spiking ones, rates-memristor-... for memristors), if it lies inside the range
tried."""

SMALL = Recipe(model="mlp-256-256", epochs=5, batch_size=64, train_limit=10_000)
TABLES = (
    (Recipe(), DIGITS),
    (replace(SMALL, data="mnist"), MNIST),
    (replace(SMALL, data="fashion-mnist"), FASHION),
)
"""Settings in which rates were tuned, with all other settings at their defaults, and the rates."""

TUNED = ("data", "model", "epochs", "batch_size", "optimizer", "momentum", "weight_decay", "loss", "train_limit")
"""Settings that must equal those of a table for its learning rates to apply."""

AS = {"pc-one-step": "pc-error", "ddtp-control": "ddtp-linear"}
"""Controls that use the learning rate of the rule they are compared with, where the name does not show it."""

ADAM = {"csdp": 4e-2}
"""Rules that train with Adam and no weight decay if neither optimiser nor learning rate is given, as their paper's code
does, and the rate, from a prototype on 2000 images of MNIST. With the common SGD they learn far less."""


def own_training(recipe: Recipe) -> dict[str, Any]:
    """Return the optimiser, learning rate and weight decay that replace a rule's common ones; empty for most rules.

    >>> own_training(Recipe(rule="csdp-unsupervised")), own_training(Recipe(rule="bp"))
    ({'optimizer': 'adam', 'lr': (0.04,), 'weight_decay': (0.0,)}, {})
    """
    rate = ADAM.get(bare_rule(recipe.rule).partition("-")[0])
    return {} if rate is None else {"optimizer": "adam", "lr": (rate,), "weight_decay": (0.0,)}


def tuned_rate(recipe: Recipe) -> float | None:
    """Return the tuned learning rate for a recipe, or for the rule that its rule is a variant of; None if not tuned.

    >>> tuned_rate(Recipe(rule="ccl-frozen")), tuned_rate(Recipe(rule="grapes:bp")), tuned_rate(Recipe(rule="ep"))
    (0.2, 0.05, None)
    >>> tuned_rate(Recipe(rule="bp", epochs=5))
    """
    for common, rates in TABLES:
        setting = replace(common, **own_training(recipe))
        if all(getattr(recipe, name) == getattr(setting, name) for name in TUNED):
            return _of(recipe.rule, rates)
    return None


def _of(rule: str, rates: Mapping[str, float]) -> float | None:
    if rule in rates:  # a rule around another, tuned as a whole
        return rates[rule]
    name = bare_rule(rule)
    name = AS.get(name, name)
    while name not in rates and "-" in name:
        name = name.rpartition("-")[0]
    return rates.get(name)
