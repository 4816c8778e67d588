"""The setting in which every rule of the library is tuned alike, written before the run."""

from apical.bench.recipe import Recipe

DATA = ("mnist", "fashion-mnist")
RATES = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Learning rates that every rule is tried with."""
SEEDS = 5
"""Seeds of the test, none of which a trial had."""
LEAST = {"trials": 12, "seeds": 5, "train_limit": 10_000}
"""What a fair table takes, by rule and data set."""

SETTING = Recipe(model="mlp-256-256", epochs=5, batch_size=64, validation=2_000, train_limit=10_000)
"""Everything else is the library's default: SGD with momentum 0.9, weight decay 1e-4; all test images."""

TIERS = (
    ("bp", "fa", "dfa", "usf", "kp", "pfa-o"),
    ("ccl", "tdca", "local-pred", "mono-forward", "scff", "dualprop"),
    ("frsf", "brsf", "pfa", "wm", "ff", "local-sim"),
    ("grapes:bp", "matched:bp", "sibp", "pc-error", "ddtp-linear", "dtp"),
    ("cwu:bp", "dfc-ssa", "pc", "local-both", "ccl-free", "dtp-drl"),
    ("cwu:dfa", "pc-incremental", "pc-one-step", "mupc", "ddtp-control", "kp-mirror"),
)
"""Rules in the order in which they run, cheap ones first; a tier is joined to those before when all of it is done."""
RULES = tuple(rule for tier in TIERS for rule in tier)


def arguments(data: str, rules: tuple[str, ...], out: str) -> list[str]:
    """The options of `apical sweep` that tune and test the rules.

    >>> " ".join(arguments("mnist", ("bp", "fa"), "results/rates-mnist"))[:46]
    'sweep --rules bp fa --data mnist --model mlp-2'
    """
    fields = ("model", "epochs", "batch_size", "validation", "train_limit")
    options = [text for name in fields for text in (f"--{name.replace('_', '-')}", str(getattr(SETTING, name)))]
    rates = ",".join(f"{rate:g}" for rate in RATES)
    run = ["--space", f"lr={rates}", "--final-seeds", str(SEEDS), "--threads", "1", "--jobs", "1", "--out", out, "--resume"]
    return ["sweep", "--rules", *rules, "--data", data, *options, *run]
