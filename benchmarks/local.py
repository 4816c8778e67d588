"""Training steps of rules with independently learning blocks: time, and memory if one block's activities are held at a time.

One process, one thread, everything in turns, medians of ratios within a round.

    python benchmarks/local.py [--out benchmarks/local.json] [--rounds 25]

Time is that of gradients alone, in which rules differ. *Activities*: the largest number of bytes held at the same time from
the batch to the last gradient, without the gradients themselves. Backpropagation computes gradients only once it has all
activities, so its number is that of the forward pass. *Peak*: that of the whole step, gradients included.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import apical
from apical import models
from apical.diagnostics.memory import peak_bytes, step_bytes
from floors import in_turns, to_bp
from run import environment, save

SHAPE = (1, 28, 28)
LOCAL, FF = apical.LocalClassifiers, apical.ForwardForward
RULES: dict[str, Callable[[nn.Module], apical.CreditRule]] = {
    "bp": apical.Backprop,
    "local-pred": LOCAL,
    "mono-forward": partial(LOCAL, local="projection"),
    "local-sim": partial(LOCAL, local="similarity"),
    "local-both": partial(LOCAL, local="both"),
    "ff": FF,
    "scff": partial(FF, negatives="images"),
}
SETTINGS = ((512, 128), (256, 1024))
"""Width of ten hidden layers, and batch."""

TARGETS = {name: (1.3, 0.5) for name in ("local-pred", "mono-forward")}
"""Largest allowed ratios of time and activities to backpropagation."""


def gradients(rule: apical.CreditRule, x: Tensor, y: Tensor) -> None:
    rule.zero_grad()
    rule(x, y).backward()


def activities(name: str, rule: apical.CreditRule, x: Tensor, y: Tensor) -> int:
    """Return the bytes of the call, without those of its gradients."""
    made = 0 if name == "bp" else sum(p.numel() * p.element_size() for p in rule.parameters())
    return peak_bytes(lambda: rule(x, y), [*rule.parameters(), *rule.buffers(), x, y]) - made


def rows(width: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row per rule."""
    model = "mlp-" + "-".join([str(width)] * 10)
    x, y = torch.rand(batch, *SHAPE), torch.randint(10, (batch,))
    rules = {}
    for name, make in RULES.items():
        torch.manual_seed(0)
        rules[name] = make(models.build(model, SHAPE, 10))
        gradients(rules[name], x, y)  # rules inspect their first batch
    seconds = in_turns({name: partial(gradients, rule, x, y) for name, rule in rules.items()}, rounds, 2)
    held = {name: activities(name, rule, x, y) for name, rule in rules.items()}
    for rule in rules.values():
        rule.zero_grad()
    peak = {name: step_bytes(rule, x, y) for name, rule in rules.items()}
    found = []
    for name in rules:
        time, memory = TARGETS.get(name, (None, None))
        row = {
            "rule": name,
            "model": f"ten layers of {width}",
            "batch": batch,
            "ms_per_step": round(1e3 * statistics.median(seconds[name]), 3),
            "ratio_to_bp": round(to_bp(seconds, name), 3),
            "activities_to_bp": round(held[name] / held["bp"], 3),
            "peak_to_bp": round(peak[name] / peak["bp"], 3),
            "target": time,
            "target_activities": memory,
        }
        row["within_target"] = time is None or (row["ratio_to_bp"] <= time and row["activities_to_bp"] <= memory)
        found.append(row)
        print(
            f"{width:4d} x 10, batch {batch:5d}  {name:13s} {row['ms_per_step']:9.3f} ms  {row['ratio_to_bp']:5.2f} x bp  "
            f"activities {row['activities_to_bp']:5.2f}  peak {row['peak_to_bp']:5.2f}"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "local.json")
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [row for width, batch in SETTINGS for row in rows(width, batch, options.rounds)]
    save(options.out, {"environment": environment(torch.device("cpu")), "rows": found})


if __name__ == "__main__":
    main()
