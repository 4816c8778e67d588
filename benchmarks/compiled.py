"""Compiled and eager training steps, for rules of every kind.

A step is zero_grad, forward and backward pass and SGD with momentum; compiled, the rule's credit comes from torch.compile,
as under `--compile True`. All rules, eager and compiled, take turns as in `benchmarks/run.py`; ratios are relative to
backpropagation in the same mode. Compilation time is that of the first three steps. Needs a C++ compiler; without one
nothing is measured.

    python benchmarks/compiled.py [--out benchmarks/compiled.json] [--rules fa ep]
"""

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor

from apical import models
from apical.bench.compilation import CompiledStep, check_compiler
from apical.bench.names import make_rule
from apical.bench.recipe import Recipe
from apical.errors import ConfigError
from run import environment, save, timed

RULES = (
    *("bp", "fa", "dfa", "kp", "pfa", "tdca", "ccl", "dfc-ssa", "dfc-ss", "dfc", "dtp-drl", "ep", "corinfomax"),
    *("pc", "dualprop"),
)
MODEL, SHAPE, BATCH, ROUNDS, TIMES = "mlp-256-256", (1, 28, 28), 64, 15, 3


def make_step(name: str, inputs: Tensor, targets: Tensor, mode: str) -> Callable[[], None]:
    """Return one training step, eager or compiled, with the rule's own options."""
    torch.manual_seed(0)
    rule = make_rule(Recipe(rule=name), models.build(MODEL, SHAPE, 10), SHAPE)
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.001, momentum=0.9)
    call = rule if mode == "eager" else CompiledStep(rule, inputs, targets)

    def step() -> None:
        optimizer.zero_grad()
        call(inputs, targets).backward()
        optimizer.step()

    return step


def bench(rules: tuple[str, ...], device: torch.device) -> list[dict[str, Any]]:
    """Return a row for each rule."""
    torch.manual_seed(0)
    inputs, targets = torch.rand(BATCH, *SHAPE), torch.randint(0, 10, (BATCH,))
    steps: dict[tuple[str, str], Callable[[], None]] = {}
    first: dict[str, float] = {}
    for name in rules:
        for mode in ("eager", "compiled"):
            began = time.perf_counter()
            steps[name, mode] = make_step(name, inputs, targets, mode)
            for _ in range(3):
                steps[name, mode]()
            first[name] = time.perf_counter() - began
        print(f"{name:14s} compiled in {first[name]:.1f} s", flush=True)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    gc.disable()
    order = random.Random(0)
    for _ in range(ROUNDS):
        for key in order.sample(list(steps), len(steps)):
            seconds[key].append(timed(steps[key], TIMES, device))
    gc.enable()

    def ratio(one: tuple[str, str], other: tuple[str, str]) -> float:
        return round(statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True)), 4)

    rows = []
    for name in rules:
        eager, compiled = (name, "eager"), (name, "compiled")
        row = {
            "rule": name,
            "eager_ms": round(1e3 * statistics.median(seconds[eager]), 4),
            "compiled_ms": round(1e3 * statistics.median(seconds[compiled]), 4),
            "eager_to_bp": ratio(eager, ("bp", "eager")),
            "compiled_to_bp": ratio(compiled, ("bp", "compiled")),
            "compiled_to_eager": ratio(compiled, eager),
            "compile_seconds": round(first[name], 1),
        }
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "compiled.json")
    parser.add_argument("--rules", nargs="+", default=RULES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    inductor.force_disable_caches = True  # time compilation as on its first run on a machine
    device = torch.device("cpu")
    try:
        check_compiler(device)
    except ConfigError as error:
        print(f"nothing measured: {error}")
        return
    rows = bench(tuple(dict.fromkeys(("bp", *options.rules))), device)
    about = {"model": MODEL, "batch": BATCH, "precision": "float32"}
    save(options.out, {"environment": environment(device), "rows": [{**about, **row} for row in rows]})


if __name__ == "__main__":
    main()
