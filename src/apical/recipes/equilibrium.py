"""Equilibrium propagation: its studies.

The first paper's cost has no half: its beta is half of ours, and its learning rates are half of ours. Its errors on MNIST
were found in no source that could be read; what stands beside ours is the implementation that the CorInfoMax repository
compares with (arXiv 2306.04810), which trains for 50 epochs. Departure: a free phase starts from zeros, not from the state
in which the same image left it an epoch ago.
"""

from dataclasses import replace

from apical.experiment.recipe import Recipe
from apical.recipes.study import Claim, Row, Study

ORIGINAL = ("beta=1.0", "free_steps=20", "nudged_steps=4", "damping=0.5", "rates=(1.0, 0.5)")
"""One hidden layer: 20 free and 4 nudged steps of size 1/2, the rate of the lower layer twice that of the upper."""


def _digits() -> Study:
    base = Recipe(
        data="digits", model="mlp-sigmoid-64-64", epochs=20, batch_size=20, lr=(0.1,), momentum=0.0, weight_decay=(0.0,)
    )
    rows = {
        "bp": Row(replace(base, rule="bp"), ()),
        "ep": Row(replace(base, rule="ep"), ()),
        "ep-one-sided": Row(replace(base, rule="ep-one-sided"), ()),
        "ep-directed": Row(replace(base, rule="ep-directed", weight_decay=(1e-3,)), ()),
        "hep": Row(replace(base, rule="hep"), ()),
    }
    claims = (Claim("ep", "bp", 20, -2.0), Claim("hep", "bp", 20, -2.0), Claim("ep", "ep-one-sided", 20, 0.0))
    return Study("Equilibrium propagation on digits, 64-64-64-10", "seconds", rows, base, claims)


def _mnist() -> Study:
    base = Recipe(
        data="mnist-raw",
        model="mlp-clip-500",
        loss="squared",
        epochs=25,
        batch_size=20,
        lr=(0.2,),
        momentum=0.0,
        weight_decay=(0.0,),
        validation=10000,
    )
    rows = {
        "bp": Row(replace(base, rule="bp", model="mlp-500", lr=(0.05,)), ()),
        "ep-one-sided": Row(replace(base, rule="ep-one-sided", rule_options=ORIGINAL), ()),
        "ep": Row(replace(base, rule="ep", rule_options=ORIGINAL), ()),
    }
    claims = (Claim("ep-one-sided", "bp", 10, -1.0), Claim("ep", "bp", 10, -1.0))
    return Study("Equilibrium propagation on MNIST, 784-500-10", "minutes per epoch", rows, base, claims)


STUDIES = {"ep-digits": _digits(), "ep-mnist": _mnist()}
