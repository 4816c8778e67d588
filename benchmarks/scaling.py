"""Growth of time and memory with depth, width and batch, for one rule of each kind; prints the exponents.

Along each axis everything else is fixed: 4 hidden layers of 256 and batch 64. A step is zero_grad, forward and backward pass
and SGD; memory is the peak of a step, gradients included. Exponents are slopes in logarithms over the upper half of the
axis, where constant costs are small.

    python benchmarks/scaling.py [--out benchmarks/scaling.json] [--rounds 3]
"""

import argparse
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import apical
from apical import models
from apical.diagnostics.memory import step_bytes
from limits import in_turns
from run import environment, save

SHAPE = (1, 28, 28)
RULES: dict[str, Callable[[nn.Module], apical.CreditRule]] = {
    "bp": apical.Backprop,
    "fa": apical.FeedbackAlignment,
    "kp": apical.KolenPollack,
    "pfa": apical.ProductFeedbackAlignment,
    "dfa": apical.DirectFeedbackAlignment,
    "ccl": apical.CounterCurrentLearning,
}
BASE = {"depth": 4, "width": 256, "batch": 64}
AXES = {
    "depth": (2, 4, 8, 16, 32),
    "width": (64, 128, 256, 512, 1024, 2048),
    "batch": (1, 4, 16, 64, 256, 1024),
}
LAWS = {"depth": 1, "width": 2, "batch": 1}
"""Growth of the products, which no exponent of time may exceed by more than 0.2."""


def step(rule: apical.CreditRule, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    rule(x, y).backward()
    optimizer.step()


def exponent(sizes: tuple[int, ...], values: list[float]) -> float:
    """Return the slope of log(value) over log(size), least squares over the upper half."""
    half = len(sizes) // 2
    xs, ys = [math.log(s) for s in sizes[half:]], [math.log(max(v, 1e-12)) for v in values[half:]]
    x, y = statistics.mean(xs), statistics.mean(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def measure(settings: dict[str, int], rounds: int) -> dict[str, tuple[float, int]]:
    """Return seconds per step and bytes held, of every rule in turns."""
    x, y = torch.rand(settings["batch"], *SHAPE), torch.randint(10, (settings["batch"],))
    runs, memory = [], []
    for make in RULES.values():
        torch.manual_seed(0)
        rule = make(models.build("mlp" + f"-{settings['width']}" * settings["depth"], SHAPE, 10))
        run = partial(step, rule, torch.optim.SGD(rule.parameters(), 1e-3), x, y)
        for _ in range(4):
            run()
        rule.zero_grad()
        memory.append(step_bytes(rule, x, y))
        runs.append(run)
    seconds = in_turns(runs, rounds, 1 if settings["width"] > 512 or settings["batch"] > 256 else 5)
    return {name: (statistics.median(s), m) for name, s, m in zip(RULES, seconds, memory, strict=True)}


def axis(name: str, sizes: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """Return a row per rule: times, memory and their exponents along one axis."""
    found = [measure(BASE | {name: size}, rounds) for size in sizes]
    rows = []
    for rule in RULES:
        seconds, memory = ([f[rule][k] for f in found] for k in (0, 1))
        of_time, of_memory = exponent(sizes, seconds), exponent(sizes, memory)
        rows.append(
            {
                "axis": name,
                "rule": rule,
                "sizes": sizes,
                "ms_per_step": [round(1e3 * s, 3) for s in seconds],
                "mb": [round(m / 1e6, 3) for m in memory],
                "exponent_time": round(of_time, 2),
                "exponent_memory": round(of_memory, 2),
                "ratio_to_bp": round(seconds[-1] / found[-1]["bp"][0], 3),
                "memory_to_bp": round(memory[-1] / found[-1]["bp"][1], 3),
                "target": LAWS[name] + 0.2,
                "within_target": of_time <= LAWS[name] + 0.2,
            }
        )
        print(f"{name:6s} {rule:4s} time ~ {name}^{of_time:.2f}   memory ~ {name}^{of_memory:.2f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "scaling.json")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name, sizes in AXES.items() for row in axis(name, sizes, options.rounds)]
    save(options.out, {"environment": environment(torch.device("cpu")), "rows": rows})


if __name__ == "__main__":
    main()
