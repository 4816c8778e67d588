"""Learning rates that were tuned, for the setting in which they were."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from apical.bench.recipe import Recipe, bare_rule

DIGITS = {
    "bp": 0.05,
    "fa": 0.005,
    "dfa": 0.005,
    "usf": 0.02,
    "frsf": 0.1,
    "brsf": 0.02,
    "kp": 0.1,
    "wm": 0.02,
    "pfa": 0.05,
    "pfa-o": 0.1,
    "ccl": 0.2,
    "tdca": 0.05,
    "local-pred": 0.1,
    "local-sim": 0.02,
    "mono-forward": 0.1,
    "ff": 0.002,
    "scff": 0.5,
    "dualprop": 0.05,
    "dtp": 0.005,
    "ddtp-linear": 0.01,
    "dfc-ssa": 0.05,
    "pc-error": 0.005,
}
"""The best of twelve learning rates of SGD with every other setting at its default (results/rates-digits): a batch of 32
digits, `mlp-256-256`, 20 epochs. With other data, widths or epochs they are often worse than the common one. TDCA's is
from a second sweep, with five seeds (results/rates-digits-tdca): one seed's 240 validation images had its rates from 0.005
to 0.05 within two images of each other."""

MNIST = {
    "bp": 0.05,
    "fa": 0.005,
    "dfa": 0.005,
    "usf": 0.05,
    "kp": 0.02,
    "pfa-o": 0.02,
    "ccl": 0.5,
    "tdca": 0.02,
    "local-pred": 0.02,
    "mono-forward": 0.05,
    "dualprop": 0.02,
    "dtp": 0.02,
    "frsf": 0.05,
    "brsf": 0.02,
    "pfa": 0.05,
    "wm": 0.005,
    "ff": 0.001,
    "local-sim": 0.1,
    "grapes:bp": 0.02,
    "matched:bp": 0.02,
    "pc-one-step": 0.02,
    "ddtp-linear": 0.02,
    "dfc-ssa": 0.02,
    "ccl-readout": 0.05,
    "ff-readout": 0.02,
    "tdca-silent": 0.02,
    "pc-error": 0.05,
    "pc": 0.2,
    "scff": 0.02,
    "local-both": 0.1,
    "sibp": 0.05,
    "cwu:bp": 0.05,
    "dfc": 0.02,
    "dtp-drl": 0.02,
    "kp-mirror": 0.05,
    "pfa-mirror": 0.02,
    "pfa-o-mirror": 0.02,
    "ccl-free": 0.2,
    "ccl-frozen": 0.5,
    "ddtp-control": 0.02,
    "dfc-fixed": 0.02,
    "dfc-ssa-fixed": 0.02,
    "dfc-ss": 0.02,
    "dfc-ss-fixed": 0.02,
    "ddtp-rhl": 0.01,
    "ep-one-sided": 0.01,
    "corinfomax": 0.05,
    "ep": 0.01,
    "pc-incremental": 0.05,
    "strong-dfc": 0.05,
    "ep-directed": 0.01,
    "hep": 0.01,
    "csdp-unsupervised": 0.01,
    "csdp": 0.002,
}
FASHION = {
    "bp": 0.05,
    "fa": 0.005,
    "dfa": 0.002,
    "usf": 0.002,
    "kp": 0.05,
    "pfa-o": 0.02,
    "ccl": 0.2,
    "tdca": 0.005,
    "local-pred": 0.05,
    "mono-forward": 0.01,
    "dualprop": 0.002,
    "dtp": 0.005,
    "frsf": 0.02,
    "brsf": 0.002,
    "pfa": 0.05,
    "wm": 0.01,
    "ff": 0.001,
    "local-sim": 0.1,
    "grapes:bp": 0.005,
    "matched:bp": 0.005,
    "pc-one-step": 0.002,
    "ddtp-linear": 0.01,
    "dfc-ssa": 0.005,
    "ccl-readout": 0.01,
    "ff-readout": 0.005,
    "tdca-silent": 0.1,
    "pc-error": 0.002,
    "pc": 0.01,
    "scff": 0.05,
    "local-both": 0.1,
    "sibp": 0.05,
    "cwu:bp": 0.02,
    "dfc": 0.005,
    "dtp-drl": 0.01,
    "kp-mirror": 0.005,
    "pfa-mirror": 0.005,
    "pfa-o-mirror": 0.02,
    "ccl-free": 0.2,
    "ccl-frozen": 0.2,
    "ddtp-control": 0.01,
    "tdca-unevolved": 0.0005,
    "dfc-fixed": 0.005,
    "dfc-ssa-fixed": 0.005,
    "dfc-ss": 0.02,
    "dfc-ss-fixed": 0.005,
    "ddtp-rhl": 0.01,
    "ep-one-sided": 0.005,
    "corinfomax": 0.02,
    "ep": 0.01,
    "pc-incremental": 0.02,
    "strong-dfc": 0.005,
    "ep-directed": 0.01,
    "hep": 0.005,
    "csdp-unsupervised": 0.005,
    "csdp": 0.01,
}
"""The best of thirteen learning rates on 10,000 images (results/rates-mnist, rates-fashion-mnist; rates-costly-... for
rules that take longest, rates-spiking-... for spiking ones, rates-memristor-... for memristors), where it lies inside what
was tried."""

SMALL = Recipe(model="mlp-256-256", epochs=5, batch_size=64, train_limit=10_000)
TABLES = (
    (Recipe(), DIGITS),
    (replace(SMALL, data="mnist"), MNIST),
    (replace(SMALL, data="fashion-mnist"), FASHION),
)
"""Settings in which rates were tuned, all else at its default, and the rates."""

TUNED = ("data", "model", "epochs", "batch_size", "optimizer", "momentum", "weight_decay", "loss", "train_limit")
"""Settings that must be those of a table for its learning rates."""

AS = {"pc-one-step": "pc-error", "ddtp-control": "ddtp-linear"}
"""Controls whose learning rate is that of the rule they are held against, where the name does not tell."""

ADAM = {"csdp": 4e-2}
"""Rules that train with Adam and no weight decay where neither optimiser nor learning rate is asked for, as their paper's
code does, and the rate: that of a prototype on 2000 images of MNIST. With the common SGD they learn far less."""


def own_training(recipe: Recipe) -> dict[str, Any]:
    """The optimiser, learning rate and weight decay that a rule has instead of the common ones; empty for most.

    >>> own_training(Recipe(rule="csdp-unsupervised")), own_training(Recipe(rule="bp"))
    ({'optimizer': 'adam', 'lr': (0.04,), 'weight_decay': (0.0,)}, {})
    """
    rate = ADAM.get(bare_rule(recipe.rule).partition("-")[0])
    return {} if rate is None else {"optimizer": "adam", "lr": (rate,), "weight_decay": (0.0,)}


def tuned_rate(recipe: Recipe) -> float | None:
    """The learning rate that was tuned for a recipe, or for the rule that its rule is a variant of; None where none was.

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
    if rule in rates:  # a rule around another, tuned with it
        return rates[rule]
    name = bare_rule(rule)
    name = AS.get(name, name)
    while name not in rates and "-" in name:
        name = name.rpartition("-")[0]
    return rates.get(name)
