"""Time of a training step of predictive coding and dual propagation relative to backpropagation's, and their floors.

A step is zero_grad, forward and backward pass, without an optimiser: one forward-backward equivalent is backpropagation's
step, measured in the same run; the rules take turns as in `benchmarks/run.py`. The target of T steps of inference is T + 1.5
equivalents, that of dual propagation 1.15 at width 1024. The floor is the ratio of the unavoidable multiply-adds, which is
also what the rules use (tests count them).

    python benchmarks/predictive_coding.py [--out benchmarks/predictive_coding.json] [--only 1024]
"""

import argparse
import gc
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import apical
from apical import models
from run import environment, save, timed

# title, model, input shape, batch, rounds, timed steps per turn
CASES: list[tuple[str, str, tuple[int, ...], int, int, int]] = [
    ("MLP 64-64-10", "mlp-64", (1, 8, 8), 32, 30, 20),
    ("MLP 784-256x2-10", "mlp-256x2", (1, 28, 28), 100, 25, 6),
    ("MLP 784-128x9-10", "mlp-128x9", (1, 28, 28), 64, 20, 4),
    ("MLP 784-1024x3-10", "mlp-1024x3", (1, 28, 28), 128, 9, 1),
    ("mu MLP 784-128x29-10", "mlp-mu-128x29", (1, 28, 28), 64, 9, 2),
]

# name, inference, T; T = 0 is dual propagation, whose sweep costs what backpropagation does
ARMS: list[tuple[str, str, int]] = [
    ("pc-error", "error", 5),
    ("pc-error", "error", 20),
    ("pc", "state", 5),
    ("pc", "state", 20),
    ("dualprop", "", 0),
]


def make_step(inference: str, steps: int, model_name: str, shape: tuple[int, ...], size: int) -> tuple[Any, nn.Module]:
    """Return one step without an optimiser; None if the rule does not train the model."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(size, *shape), torch.randint(0, 10, (size,))
    model = models.build(model_name, shape, 10)
    rule: apical.CreditRule = apical.Backprop(model)
    if inference and inference != "bp":
        rule = apical.PredictiveCoding(model, inference=inference, steps=steps, rate=0.05)  # type: ignore[arg-type]
        rule._silent = True  # the error need not have reached every state
    elif not inference:
        if "mu" in model_name:
            return None, model
        rule = apical.DualPropagation(model)

    def step() -> None:
        rule.zero_grad()
        rule(inputs, labels).backward()

    return step, model


def floor(model: nn.Module, steps: int) -> float:
    """Return the unavoidable multiply-adds over those of backpropagation."""
    sizes = [p.numel() for p in model.parameters() if p.dim() == 2]
    whole, first = sum(sizes), sizes[0]
    return (2 * whole + 2 * steps * (whole - first)) / (3 * whole - first) if steps else 1.0


def bench(case: tuple[str, str, tuple[int, ...], int, int, int]) -> list[dict[str, Any]]:
    """Return the rows of one case."""
    title, model_name, shape, size, rounds, times = case
    steps: dict[tuple[str, int], Callable[[], None]] = {}
    floors: dict[tuple[str, int], float] = {}
    for name, inference, number in [("bp", "bp", 0), *ARMS]:
        step, model = make_step(inference, number, model_name, shape, size)
        if step is not None:
            steps[name, number], floors[name, number] = step, floor(model, number)
            step()
    seconds: dict[tuple[str, int], list[float]] = {arm: [] for arm in steps}
    order, device = random.Random(0), torch.device("cpu")
    gc.disable()
    for _ in range(rounds):
        for arm in order.sample(list(steps), len(steps)):
            seconds[arm].append(timed(steps[arm], times, device))
    gc.enable()
    rows = []
    for (name, number), measured in seconds.items():
        ratios = [mine / theirs for mine, theirs in zip(measured, seconds["bp", 0], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        target = number + 1.5 if number else 1.15 if name == "dualprop" and "1024" in title else None
        row: dict[str, Any] = {
            "rule": name,
            "steps": number or None,
            "model": title,
            "batch": size,
            "device": "cpu",
            "precision": "float32",
            "ms_per_step": round(1e3 * statistics.median(measured), 4),
            "ratio_to_bp": round(quartiles[1], 4),
            "quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
            "floor": round(floors[name, number], 3),
            "target": target,
            "within_target": None if target is None else quartiles[1] <= target,
            "rounds": rounds,
            "steps_per_round": times,
        }
        rows.append(row)
        print(f"{title:22s} {name:9s} T {number:2d} {row['ms_per_step']:9.3f} ms  {quartiles[1]:6.2f} x bp  "
              f"floor {row['floor']:5.2f}  target {target}", flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "predictive_coding.json")
    parser.add_argument("--only", default="", help="run the models whose name contains this (case ignored)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for case in CASES if options.only.lower() in case[0].lower() for row in bench(case)]
    save(options.out, {"environment": environment(torch.device("cpu")), "rows": rows})


if __name__ == "__main__":
    main()
