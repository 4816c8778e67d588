"""Training steps against their lower bounds: target propagation by its matrix products, feedback by passes over memory.

One process, one thread, everything in turns, medians of ratios within a round.

    python benchmarks/floors.py [--out benchmarks/floors.json] [--rounds 25]

*Targets*: a step of every kind of target propagation, gradients and optimiser included, against backpropagation's,
with the ratio of their counted multiply-adds. *Passes*: rules whose feedback weight depends on the forward weight
must compute it in every step; this is the time of that pass over memory, in PyTorch's operations, as a share of a whole
step of backpropagation on the network on which such rules are timed. The share is a lower bound on the extra cost of these
rules.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import apical
from apical import models
from apical.diagnostics.cost import multiply_adds
from run import environment, save

SHAPE = (1, 28, 28)
TP = apical.DifferenceTargetPropagation
MODEL, BATCH = "mlp-tanh-256-256-256-256-256", 128
TARGETS: dict[str, Callable[[nn.Module], apical.CreditRule]] = {
    "bp": apical.Backprop,
    "dfa": apical.DirectFeedbackAlignment,
    "dtp": partial(TP, variant="dtp"),
    "dtp-drl": partial(TP, variant="drl"),
    "ddtp-linear": partial(TP, variant="linear"),
    "ddtp-rhl": partial(TP, variant="hidden"),
    "ddtp-control": partial(TP, variant="control"),
}
PASSES_MODEL, PASSES_BATCH = "mlp-512-512", 64


def step(rule: apical.CreditRule, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    rule(x, y).backward()
    optimizer.step()


def in_turns(runs: dict[str, Callable[[], None]], rounds: int, times: int) -> dict[str, list[float]]:
    """Return the seconds of each, by round; each has one untimed run before the timed ones."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            begun = time.process_time()
            for _ in range(times):
                run()
            seconds[name].append((time.process_time() - begun) / times)
    return seconds


def to_bp(seconds: dict[str, list[float]], name: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[name], seconds["bp"], strict=True))


def targets(rounds: int) -> list[dict[str, Any]]:
    """Return a row per kind of target propagation."""
    x, y = torch.rand(BATCH, *SHAPE), torch.randint(10, (BATCH,))
    runs: dict[str, Callable[[], None]] = {}
    counted = {}
    for name, make in TARGETS.items():
        torch.manual_seed(0)
        rule = make(models.build(MODEL, SHAPE, 10))
        runs[name] = partial(step, rule, torch.optim.SGD(rule.parameters(), 1e-3), x, y)
        counted[name] = multiply_adds(lambda rule=rule: rule(x, y).backward())
    seconds = in_turns(runs, rounds, 3)
    rows = []
    for name, found in seconds.items():
        row = {
            "rule": name,
            "model": MODEL,
            "batch": BATCH,
            "ms_per_step": round(1e3 * statistics.median(found), 3),
            "ratio_to_bp": round(to_bp(seconds, name), 3),
            "multiply_adds_to_bp": round(counted[name] / counted["bp"], 3),
        }
        rows.append(row)
        print(
            f"{name:14s} {row['ms_per_step']:9.3f} ms  {row['ratio_to_bp']:6.2f} x bp  "
            f"{row['multiply_adds_to_bp']:6.2f} x its products"
        )
    return rows


def passes(rounds: int) -> list[dict[str, Any]]:
    """Return a row per way to compute feedback weights from forward weights."""
    x, y = torch.rand(PASSES_BATCH, *SHAPE), torch.randint(10, (PASSES_BATCH,))
    torch.manual_seed(0)
    rule = apical.Backprop(models.build(PASSES_MODEL, SHAPE, 10))
    weights = [m.weight.detach() for m in rule.model.modules() if isinstance(m, nn.Linear)][1:]
    others = [torch.randn_like(w) for w in weights]
    scale, size = torch.tensor(0.3), torch.tensor(0.03)

    def each(make: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            for w, other in zip(weights, others, strict=True):
                make(w, other)

        return run

    optimizer = torch.optim.SGD(rule.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    runs: dict[str, Callable[[], None]] = {
        "bp": partial(step, rule, optimizer, x, y),
        "kp": each(lambda w, e: torch.addcmul(w, e, scale)),
        "usf": each(lambda w, e: w.sign().mul_(size)),
        "frsf": each(lambda w, e: w.sign().mul_(e)),
    }
    seconds = in_turns(runs, rounds, 20)
    what = {"kp": "W + c E", "usf": "s sign(W)", "frsf": "|U| sign(W)"}
    rows = []
    for name, formula in what.items():
        row = {
            "rule": name,
            "what": formula,
            "us_per_step": round(1e6 * statistics.median(seconds[name]), 1),
            "share_of_bp": round(to_bp(seconds, name), 4),
        }
        rows.append(row)
        print(f"{name:14s} {formula:12s} {row['us_per_step']:9.1f} us  {100 * row['share_of_bp']:5.1f} % of a step of bp")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "floors.json")
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with_targets = targets(options.rounds)
    save(
        options.out,
        {"environment": environment(torch.device("cpu")), "targets": with_targets, "passes": passes(options.rounds)},
    )


if __name__ == "__main__":
    main()
