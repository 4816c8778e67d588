"""Predictive coding on MNIST: the short runs of published notebooks.

Numbers tagged "code" are printed in notebooks: JPC's (thebuckleylab/jpc) for inference in states, in errors and in the mu
parametrisation, and PRECO's (bjornvz/PRECO) for tanh networks. JPC divides the energy by the batch size before it
differentiates by the states, so its rate 0.5 at batch 64 is 0.0078 here. Its first network settles with a solver of
differential equations, ours with 50 steps. Deep networks in the mu parametrisation take 5 steps at 0.05 where the notebook
takes 30 at 0.0078: the product is the same, so hidden gradients are equally far from backpropagation's. Networks have the
notebooks' initial weights, and activations before layers (PRECO's also before the first). JPC draws its 300 batches from all
images, ours are from the first 19,200. PRECO sums gradients over the batch and adds 1e-7 to the root of the second moment,
which is 5e-10 for the mean; its clipping has no effect, because its result is not used.

`pc-one-step` is the control: one step of inference, after which every hidden gradient equals backpropagation's up to its
size and O(g). Where it performs as well, the accuracy says nothing about predictive coding.
"""

from dataclasses import replace
from typing import Any

from apical.bench.recipe import Recipe
from apical.bench.study import Published, Row, Study, rows_of

_BASE = Recipe(
    data="mnist",
    loss="squared",
    optimizer="adam",
    lr=(1e-3,),
    weight_decay=(0.0,),
    batch_size=64,
    epochs=1,
    clip=1e6,
    probe=0,
)
"""No clipping."""


def _rows(
    base: Recipe, rule: str, options: tuple[str, ...], value: float, tolerance: float, epoch: int = 1
) -> dict[str, Row]:
    settings: dict[str, dict[str, Any]] = {"bp": {}, rule: {"rule_options": options}, "pc-one-step": {}}
    return rows_of(base, settings, {rule: (Published("accuracy", epoch, value, tolerance, "code"),)})


_NETWORKS = "apical_papers.predictive_coding.networks"
_STATES = replace(_BASE, model=f"{_NETWORKS}:wide", train_limit=19200)
_DEEP = replace(_STATES, model=f"{_NETWORKS}:pre_activated")
_MU = replace(_BASE, model="mlp-mu-128x29", train_limit=57600, lr=(0.1,))
_TANH = replace(_BASE, model=f"{_NETWORKS}:tanh", batch_size=200, epochs=30, lr=(1e-4,), eps=5e-10, validation=10000)

STUDIES: dict[str, Study] = {
    "pc-states": Study(
        "Predictive coding in states on MNIST, 784-300-300-10, 300 batches",
        "seconds",
        _rows(_STATES, "pc", ("steps=50",), 95.9, 1.5),
        _STATES,
    ),
    "pc-deep": Study(
        "Predictive coding in errors on MNIST, ten plain layers, 300 batches",
        "a minute on one CPU core",
        _rows(_DEEP, "pc-error", ("steps=10", "rate=0.0078"), 91.6, 4.0),
        _DEEP,
    ),
    "pc-mu": Study(
        "Predictive coding in the mu parametrisation on MNIST, 30 layers, 900 batches",
        "two minutes on one CPU core",
        _rows(_MU, "mupc", ("steps=5", "rate=0.05"), 93.3, 1.5),
        _MU,
    ),
    "pc-tanh": Study(
        "Predictive coding in states on MNIST, 784-32-16-10 tanh, 30 epochs",
        "two minutes on one CPU core",
        _rows(_TANH, "pc", ("steps=5", "rate=0.5"), 93.6, 1.5, 30),
        _TANH,
    ),
}
