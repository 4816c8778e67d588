"""The setting in which all rules of the library are tuned equally, written before the run."""

from collections.abc import Mapping, Sequence
from typing import Any

from apical.bench.names import AROUND, RULES
from apical.bench.recipe import Recipe

DATA = ("mnist", "fashion-mnist")
RATES = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Learning rates tried for every rule."""
SEEDS = 5
"""Seeds of the test, none of which is used in a trial."""

SETTING = Recipe(model="mlp-256-256", epochs=5, batch_size=64, validation=2_000, train_limit=10_000)
"""Everything else is the library's default: SGD with momentum 0.9, weight decay 1e-4; all test images."""
LEAST = {"trials": 12, "seeds": SEEDS, "train_limit": SETTING.train_limit, "epochs": SETTING.epochs}
"""Smallest sizes of a fair table, by rule and data set."""
WORDS = {"train_limit": "training images"}

CHEAP = (
    ("bp", "fa", "dfa", "usf", "kp", "pfa-o"),
    ("ccl", "tdca", "local-pred", "mono-forward", "dualprop", "dtp"),
    ("frsf", "brsf", "pfa", "wm", "ff", "local-sim"),
    ("grapes:bp", "matched:bp", "pc-one-step", "ddtp-linear", "dfc-ssa", "ccl-readout", "ff-readout", "tdca-silent"),
    ("pc-error", "pc", "scff", "local-both", "sibp", "cwu:bp", "dfc", "dtp-drl"),
    ("kp-mirror", "pfa-mirror", "pfa-o-mirror", "ccl-free", "ccl-frozen", "ddtp-control", "tdca-unevolved"),
)
"""Rules in the order in which they run; a tier is added to the previous ones when all of it is done."""
COSTLY = (
    ("bp", "dfc-fixed", "dfc-ssa-fixed", "dfc-ss", "dfc-ss-fixed", "ddtp-rhl"),
    ("ep-one-sided", "corinfomax"),
    ("ep", "pc-incremental"),
    ("strong-dfc", "ep-directed"),
    ("hep",),
)
"""Likewise, rules of up to a hundred times backpropagation's time, in a separate sweep; backpropagation is in all."""
SPIKING = (("bp", "csdp-unsupervised"), ("csdp",))
"""Likewise spiking networks."""
MEMRISTOR = (("bp", "csdp-memristor"),)
"""Likewise memristors."""
SWEEPS = {"rates": CHEAP, "rates-costly": COSTLY, "rates-spiking": SPIKING, "rates-memristor": MEMRISTOR}
"""Prefixes of the sweeps' folders, and their tiers."""
FOLDERS = {f"{name}-{data}": data for data in DATA for name in SWEEPS}
"""The folders of all sweeps, and their data."""
EVERY = (*RULES, *(f"{name}:bp" for name in AROUND))
"""Every rule of the library, and every wrapping rule around backpropagation."""


def arguments(data: str, rules: tuple[str, ...], out: str) -> list[str]:
    """Return the options of `apical sweep` that tune and test the rules.

    >>> " ".join(arguments("mnist", ("bp", "fa"), "results/rates-mnist"))[:46]
    'sweep --rules bp fa --data mnist --model mlp-2'
    """
    fields = ("model", "epochs", "batch_size", "validation", "train_limit")
    options = [text for name in fields for text in (f"--{name.replace('_', '-')}", str(getattr(SETTING, name)))]
    rates = ",".join(f"{rate:g}" for rate in RATES)
    run = ["--space", f"lr={rates}", "--final-seeds", str(SEEDS), "--threads", "1", "--jobs", "1", "--out", out, "--resume"]
    return ["sweep", "--rules", *rules, "--data", data, *options, *run]


def shortfall(
    trials: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any]
) -> list[str]:
    """Return what a sweep lacks for the intended table; empty if nothing.

    Args:
        trials: trials from sweep.json.
        rows: rows of the summary of the tested best trials.
        recipe: the recipe common to all rules.

    >>> rows = [{"rule": "bp"}] * 4
    >>> shortfall([{"rule": "bp"}] * 12, rows, {"train_limit": 2_000, "epochs": 5})[:2]
    ['4 of 5 seeds', '2,000 of 10,000 training images']
    """
    tested = [row["rule"] for row in rows]
    had = {
        "trials": min((sum(trial["rule"] == rule for trial in trials) for rule in set(tested)), default=0),
        "seeds": min((tested.count(rule) for rule in set(tested)), default=0),
        "train_limit": recipe["train_limit"] or LEAST["train_limit"],
        "epochs": recipe["epochs"],
    }
    less = [f"{had[key]:,} of {least:,} {WORDS.get(key, key)}" for key, least in LEAST.items() if had[key] < least]
    left = [rule for rule in EVERY if rule.replace(":", "-") not in tested]
    return less + ([f"{len(EVERY) - len(left)} of {len(EVERY)} rules"] if left else [])
