"""Time of one training step of the feedback-control rules relative to backpropagation, and of their simulation.

The same protocol as run.py: one process, one thread, process time, rules in turns of several steps in a new random order
every round, ratio = median over rounds of (rule / backprop in the same round). A step is zero_grad, forward, backward and
SGD with momentum and decay; its floor is a step of backpropagation plus the extra time of the rule's matrix products and
linear solves, timed alone in the same run. The simulation is timed per controller step against its unavoidable matrix
products, run alone on the same shapes (its floor).

    python benchmarks/control.py [--out benchmarks/control.json] [--only mlp]
"""

import argparse
import gc
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import apical
from apical import models
from apical.core.losses import output_error
from apical.rules.feedback_control import states as control
from apical.rules.feedback_control.trajectory import Loop, trajectory
from limits import limits
from run import environment, save, timed

DFC = apical.DeepFeedbackControl
STRONG = apical.StrongDeepFeedbackControl
BATCH = 128
MLP, AUTOENCODER = "MLP 784-256-256-256-10 tanh", "autoencoder 784-256-32-256-784"

# row -> (rule, options, phase, target: upper bound of the ratio, the authors' published ratio: (ms, ms of their BP))
Entry = tuple[Any, dict[str, Any], str, float | None, tuple[float, float] | None]
RULES: dict[str, Entry] = {
    "bp": (apical.Backprop, {}, "both", None, None),
    "dfc-ssa": (DFC, {"variant": "ssa"}, "forward", 2.8, (17.0, 5.49)),
    "dfc-ss": (DFC, {"variant": "ss"}, "forward", 4.0, (1963.0, 5.49)),
    "dfc": (DFC, {"variant": "dfc"}, "forward", 3.5, (5528.0, 5.49)),
    "dfc feedback update": (DFC, {"variant": "ssa"}, "feedback", 2.5, (150.0, 5.49)),
    "dfc-ssa with feedback": (DFC, {"variant": "ssa"}, "both", None, None),
    "strong-dfc": (STRONG, {"alpha": 8.082e-3, "label": 0.9}, "both", 8.0, (3497.0, 5.3)),
    "strong-dfc, alpha 7.6e-6": (STRONG, {"alpha": 7.609e-6, "label": 0.99}, "both", 8.0, (3497.0, 5.3)),
}
WIDE: dict[str, Entry] = {
    "bp": (apical.Backprop, {}, "both", None, None),
    "dfc-ssa": (DFC, {"variant": "ssa", "alpha": 3.688e-2}, "forward", None, None),
    "dfc-ssa, dense solve": (DFC, {"variant": "ssa", "alpha": 3.688e-2, "learn_output": True}, "forward", None, None),
}


def make(entry: Entry, name: str) -> tuple[Callable[[], None], Any]:
    """Return one training step, and the rule."""
    kind, options, phase, _, _ = entry
    torch.manual_seed(0)
    wide = name == AUTOENCODER
    model = models.build("autoencoder-256-32-256" if wide else "mlp-tanh-256-256-256", (1, 28, 28), 784 if wide else 10)
    rule = kind(model, F.mse_loss if wide else F.cross_entropy, **options)
    rule.phase = phase
    inputs = torch.randn(BATCH, 1, 28, 28)
    targets = inputs.flatten(1) if wide else torch.randint(0, 10, (BATCH,))
    optimizer = torch.optim.SGD(rule.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        rule(inputs, targets).backward()
        optimizer.step()

    return step, rule


def bench(name: str, entries: dict[str, Entry], rounds: int, times: int) -> list[dict[str, Any]]:
    """Return the rows of one network."""
    steps = {row: make(entry, name)[0] for row, entry in entries.items()}
    for step in steps.values():
        step()
    cpu, order = torch.device("cpu"), random.Random(0)
    seconds: dict[str, list[float]] = {row: [] for row in entries}
    gc.disable()
    for _ in range(rounds):
        for row in order.sample(list(entries), len(entries)):
            seconds[row].append(timed(steps[row], 1 if "dense" in row else times, cpu))
    gc.enable()
    floors = {
        row: limits(
            row, steps[row], steps["bp"], 0, 0.0, max(3, rounds // 5), 1 if name == AUTOENCODER else max(1, times // 2)
        )
        for row in entries
        if row != "bp"
    }
    rows = []
    for row, (_, _, _, target, published) in entries.items():
        ratios = [a / b for a, b in zip(seconds[row], seconds["bp"], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        ratio = statistics.median(ratios)
        theirs = None if published is None else published[0] / published[1]
        rows.append(
            {
                "rule": row,
                "model": name,
                "batch": BATCH,
                "precision": "float32",
                "ms_per_step": round(1e3 * statistics.median(seconds[row]), 4),
                "ratio_to_bp": round(ratio, 4),
                "quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
                "target": target,
                "within_target": None if target is None else ratio <= target,
                "ratio_of_authors": None if theirs is None else round(theirs, 1),
                "faster_than_authors": None if theirs is None else round(theirs / ratio, 1),
                "rounds": rounds,
                "steps_per_round": times,
                **floors.get(row, {}),
            }
        )
        verdict = "" if target is None else "  ok" if ratio <= target else f"  above {target}"
        verdict += f"  floor {floors[row]['floor']}" if row in floors else ""
        print(f"{name:32s} {row:26s} {rows[-1]['ms_per_step']:9.3f} ms  {ratio:7.3f} x bp{verdict}", flush=True)
    return rows


def simulation(rounds: int, points: int = 101) -> list[dict[str, Any]]:
    """Time one controller step against its matrix products alone."""
    _, rule = make((DFC, {"variant": "ss", "solver": "simulate"}, "forward", None, None), MLP)
    inputs, targets = torch.randn(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,))
    loop, chain, q = Loop(1e-3, 2.0, 0.02, points, 0.2), rule.chain, [each.detach() for each in rule.q]
    with torch.no_grad():
        states = rule.run(inputs)
        delta = rule.delta(output_error(rule.loss, states.r[-1], targets)[1])
        weights = [w.detach() for w in chain.weights]
        rates, u = [torch.randn(BATCH, stage.size) for stage in chain.stages], torch.randn(BATCH, 10)
        held = [torch.empty(BATCH, stage.size) for stage in chain.stages]

        def walk(basal: bool) -> None:
            for _ in trajectory(chain, states, q, lambda rho: delta - rho, loop, basal=basal):
                pass

        def products() -> None:
            for _ in range(points - 1):
                for i, out in enumerate(held):
                    torch.mm(u, q[i].T, out=out)
                    if i:
                        torch.mm(rates[i - 1], weights[i].T, out=out)

        kinds = {"steady state": lambda: walk(False), "with basal compartments": lambda: walk(True), "floor": products}
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for kind, run in kinds.items():
                start = time.process_time()
                run()
                seconds[kind].append((time.process_time() - start) / (points - 1))
    rows = []
    for kind in ("steady state", "with basal compartments"):
        ratio = statistics.median(a / b for a, b in zip(seconds[kind], seconds["floor"], strict=True))
        target = 1.3 if kind == "steady state" else None
        rows.append(
            {
                "simulation": kind,
                "model": MLP,
                "batch": BATCH,
                "ms_per_controller_step": round(1e3 * statistics.median(seconds[kind]), 4),
                "floor_ms": round(1e3 * statistics.median(seconds["floor"]), 4),
                "ratio_to_floor": round(ratio, 4),
                "target": target,
                "within_target": None if target is None else ratio <= target,
            }
        )
        print(
            f"simulation, {kind}: {rows[-1]['ms_per_controller_step']:.3f} ms per step, {ratio:.3f} x its floor", flush=True
        )
    return rows


def solves(rounds: int) -> list[dict[str, Any]]:
    """Time the autoencoder's linear solve through the layer below against the dense one."""
    _, rule = make(WIDE["dfc-ssa"], AUTOENCODER)
    inputs = torch.randn(BATCH, 1, 28, 28)
    with torch.no_grad():
        states = rule.run(inputs)
        rhs: Tensor = torch.randn(BATCH, 784)
        start = time.process_time()
        for _ in range(rounds):
            control.WideResolvent(rule.chain, states, rule.q, rule.loop.a).solve(rhs)
        below = (time.process_time() - start) / rounds
        start = time.process_time()
        control.Resolvent(rule.chain, states, rule.q, rule.loop.a).solve(rhs)
        dense = time.process_time() - start
    print(f"autoencoder solve: {1e3 * below:.1f} ms through the layer below, {1e3 * dense:.1f} ms dense", flush=True)
    return [{"solve": "784 outputs", "batch": BATCH, "ms_below": round(1e3 * below, 2), "ms_dense": round(1e3 * dense, 2)}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "control.json")
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # about loops that would be unstable if they were simulated
    rows = bench(MLP, RULES, options.rounds, 8)
    rows += bench(AUTOENCODER, {k: v for k, v in WIDE.items() if "dense" not in k}, max(3, options.rounds // 5), 2)
    walks, solve = simulation(options.rounds), solves(3)
    content = {"environment": environment(torch.device("cpu")), "rows": rows, "simulation": walks, "solve": solve}
    save(options.out, content)


if __name__ == "__main__":
    main()
