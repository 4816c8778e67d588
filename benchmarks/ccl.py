"""Time of counter-current learning's training step relative to backpropagation's, measured in one run on one thread.

The perceptrons are those of arXiv 2409.19841 for MNIST and CIFAR-10, the convolutional network that for CIFAR-10: the same
model for both rules, without normalisation, random images and labels. A step is zero_grad, forward and backward pass and
plain SGD; the rules take turns as in `benchmarks/run.py`. The floor is a step of backpropagation, plus the difference in
time of counter-current learning's matrix products (timed alone), plus the optimiser's reads and writes of the weights that
backpropagation does not have.

    python benchmarks/ccl.py [--out benchmarks/ccl.json] [--only mnist]
"""

import argparse
import gc
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import apical
from apical import models
from limits import limits, seconds_per_byte
from run import environment, save, timed

# title, model, input shape, batch, rounds, timed steps per turn, largest allowed ratio
CASES: list[tuple[str, str, tuple[int, ...], int, int, int, float | None]] = [
    ("MNIST MLP 784-256x5-10", "mlp-elu-256-256-256-256-256", (1, 28, 28), 32, 40, 20, None),
    ("MNIST MLP 784-256x5-10", "mlp-elu-256-256-256-256-256", (1, 28, 28), 128, 40, 20, 1.00),
    ("MNIST MLP 784-256x5-10", "mlp-elu-256-256-256-256-256", (1, 28, 28), 256, 40, 12, 1.00),
    ("CIFAR MLP 3072-1024x3-10", "mlp-elu-1024-1024-1024", (3, 32, 32), 128, 15, 3, None),
    ("CIFAR CNN 128-128-256-256-512", "cnn-elu-128-128-256-256-512", (3, 32, 32), 128, 7, 1, 1.05),
]

UPDATED = 12
"""Bytes that plain SGD reads and writes per float32 weight: the weight, its gradient, the new weight."""


def make_step(rule_name: str, model_name: str, shape: tuple[int, ...], size: int) -> tuple[Callable[[], None], list[Tensor]]:
    """Return one full training step, and the parameters that it updates."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(size, *shape), torch.randint(0, 10, (size,))
    model = models.build(model_name, shape, 10)
    rule = apical.Backprop(model) if rule_name == "bp" else apical.CounterCurrentLearning(model, input_shape=shape)
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        rule(inputs, labels).backward()
        optimizer.step()

    return step, list(rule.parameters())


def bench(case: tuple[str, str, tuple[int, ...], int, int, int, float | None]) -> list[dict[str, Any]]:
    """Return the rows of one case."""
    title, model_name, shape, size, rounds, times, target = case
    steps, moved = {}, {}
    for name in ("bp", "ccl"):
        steps[name], moved[name] = make_step(name, model_name, shape, size)
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order, device = random.Random(0), torch.device("cpu")
    gc.disable()
    for _ in range(rounds):
        for name in order.sample(list(steps), 2):
            seconds[name].append(timed(steps[name], times, device))
    gc.enable()
    ratios = [mine / theirs for mine, theirs in zip(seconds["ccl"], seconds["bp"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    numbers = {name: sum(p.numel() for p in parameters) for name, parameters in moved.items()}
    least = limits(
        "ccl",
        steps["ccl"],
        steps["bp"],
        fed_back=0,
        per_byte=seconds_per_byte([p.shape for p in moved["ccl"]]),
        rounds=max(3, rounds // 4),
        times=max(1, times // 4),
        more=UPDATED * (numbers["ccl"] - numbers["bp"]),
    )
    rows = []
    for name in steps:
        middle = quartiles[1] if name == "ccl" else 1.0
        goal = target if name == "ccl" else None
        row: dict[str, Any] = {
            "rule": name,
            "model": title,
            "batch": size,
            "device": "cpu",
            "precision": "float32",
            "ms_per_step": round(1e3 * statistics.median(seconds[name]), 4),
            "ratio_to_bp": round(middle, 4),
            "quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)] if name == "ccl" else [1.0, 1.0],
            "target": goal,
            "within_target": None if goal is None else middle <= goal,
            "rounds": rounds,
            "steps_per_round": times,
            **(least if name == "ccl" else {}),
        }
        rows.append(row)
        print(
            f"{title:32s} batch {size:4d} {name:4s} {row['ms_per_step']:9.3f} ms  {middle:.3f} x bp  "
            f"{goal or ''}" + (f"  floor {least['floor']}" if name == "ccl" else ""),
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "ccl.json")
    parser.add_argument("--only", default="", help="run the models whose name contains this (case ignored)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for case in CASES if options.only.lower() in case[0].lower() for row in bench(case)]
    save(options.out, {"environment": environment(torch.device("cpu")), "rows": rows})


if __name__ == "__main__":
    main()
