"""Time of one settling step of equilibrium networks against their matrix products, and of a training step against backprop.

One process, one thread, everything in turns, medians of ratios within a round. Two floors at batch 128: *forward* is the
matrix products of one forward pass through the whole model, *own* the step's unavoidable ones (each weight between two
states once in each direction; the input's drive is computed once per phase), run alone on the same shapes.

    python benchmarks/settling.py [--out benchmarks/settling.json] [--device cpu] [--rounds 25]
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
from apical.core.losses import squared_error, wanted
from apical.rules.corinfomax import Layers
from apical.rules.equilibrium.phases import phases
from run import environment, save

BATCH, STEPS = 128, 20
SHAPE = (1, 28, 28)
EP = apical.EquilibriumPropagation
TARGET = 1.3
RULES: dict[str, tuple[str, Callable[[nn.Module], apical.CreditRule]]] = {
    "bp": ("mlp-256-256", apical.Backprop),
    "ep": ("mlp-sigmoid-256-256", EP),
    "ep, 500 hidden": ("mlp-clip-500", partial(EP, loss=squared_error)),
    "ep-directed": ("mlp-sigmoid-256-256", partial(EP, weights="directed")),
    "hep, N = 6": ("mlp-sigmoid-256-256", partial(EP, estimator="holomorphic", points=6)),
    "corinfomax, 500 hidden": ("mlp-box-500", apical.CorInfoMax),
}


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def products(pairs: list[tuple[Tensor, Tensor]], times: int) -> None:
    """Compute matrix products into preallocated memory."""
    held = [a.new_empty(len(a), b.shape[1]) for a, b in pairs]
    for _ in range(times):
        for (a, b), out in zip(pairs, held, strict=True):
            torch.mm(a, b, out=out)


def cases(name: str, device: torch.device) -> dict[str, Callable[[], None]]:
    """Return the timed calls for one rule, each repeated `STEPS` times: a free step, a nudged step, and the floors."""
    kind, make = RULES[name]
    torch.manual_seed(0)
    rule = make(models.build(kind, SHAPE, 10)).to(device)
    x = torch.rand(BATCH, 784, device=device)
    y = torch.randint(10, (BATCH,), device=device)
    layers = rule.chain.stages
    forward = [(torch.rand(BATCH, s.layer.in_features, device=device), s.layer.weight.detach().T) for s in layers]
    found: dict[str, Callable[[], None]] = {"forward": lambda: products(forward, STEPS)}
    if isinstance(rule, apical.CorInfoMax):
        label = wanted(torch.zeros(BATCH, 10, device=device), y)
        state = [torch.rand(BATCH, s.size, device=device) for s in layers]
        start = Layers(state, state, [])
        own = [forward[1], (state[1], rule.backward[0].detach().T)] + [
            (r, b) for r, b in zip(state, rule.inverses(), strict=True)
        ]
        push = torch.ones((), device=device)
        found["free"] = lambda: rule.settle(x, start, STEPS) and None
        found["nudged"] = lambda: rule.settle(x, start, STEPS, push, label) and None
        found["own, free"] = found["own, nudged"] = lambda: products(own, STEPS)
        return found
    assert isinstance(rule, EP)
    network = rule.network
    beta, _ = phases(rule.estimator, rule.beta, rule.points, x, rule.generator)
    q, back = len(beta.im), [each.detach() for each in rule._back()]
    rows = BATCH * (len(beta.re) + q)
    free = [torch.rand(BATCH, *s.shape, device=device) for s in network.stages]
    nudged = [torch.rand(rows, *s.shape, device=device) for s in network.stages]
    given, given_nudged, label = network.given(x), network.given(x, beta), wanted(torch.zeros(BATCH, 10, device=device), y)

    def push(s: list[Tensor]) -> Tensor:
        return network.nudged_by(network.errors(rule.loss, s, label, q), beta, s)

    def own(states: list[Tensor], *, nudge: bool) -> list[tuple[Tensor, Tensor]]:
        pairs = [(states[k - 1], s.layer.weight.detach().T) for k, s in enumerate(network.stages) if k]
        pairs += [(states[k + 1], b) for k, b in enumerate(back)]
        if nudge and network.reader is not None:
            weight = network.reader.layer.weight.detach()
            pairs += [(states[-1], weight.T), (torch.rand(len(states[-1]), 10, device=device), weight)]
        return pairs

    found["free"] = lambda: network.settle(free, given, back, STEPS) and None
    found["nudged"] = lambda: network.settle(nudged, given_nudged, back, STEPS, push, imaginary=q * BATCH) and None
    found["own, free"] = lambda: products(own(free, nudge=False), STEPS)
    found["own, nudged"] = lambda: products(own(nudged, nudge=True), STEPS)
    wide = [(torch.rand(rows, a.shape[1], device=device), b) for a, b in forward]
    found["forward, nudged"] = lambda: products(wide, STEPS)
    return found


def settling(rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Return a row per rule and phase."""
    rows = []
    with torch.no_grad():
        for name in [each for each in RULES if each != "bp"]:
            found = cases(name, device)
            for run in found.values():
                run()
            seconds: dict[str, list[float]] = {key: [] for key in found}
            for _ in range(rounds):
                for key, run in found.items():
                    begun = clock(device)
                    run()
                    seconds[key].append((clock(device) - begun) / STEPS)
            for phase in ("free", "nudged"):
                whole = "forward, nudged" if phase == "nudged" and "forward, nudged" in found else "forward"

                def ratio(floor: str, phase: str = phase, seconds: dict[str, list[float]] = seconds) -> float:
                    pairs = zip(seconds[phase], seconds[floor], strict=True)
                    return round(statistics.median(a / b for a, b in pairs), 3)

                to_forward = ratio(whole)
                rows.append(
                    {
                        "rule": name,
                        "phase": phase,
                        "batch": BATCH,
                        "ms_per_step": round(1e3 * statistics.median(seconds[phase]), 4),
                        "forward_ms": round(1e3 * statistics.median(seconds[whole]), 4),
                        "ratio_to_forward": to_forward,
                        "ratio_to_own": ratio(f"own, {phase}"),
                        "target": TARGET,
                        "within_target": to_forward <= TARGET,
                    }
                )
                print(
                    f"{name:24s} {phase:7s} {rows[-1]['ms_per_step']:8.4f} ms  {to_forward:6.3f} x forward  "
                    f"{rows[-1]['ratio_to_own']:6.3f} x own products",
                    flush=True,
                )
    return rows


def training(rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Time one whole training step of each rule, at its default numbers of steps, against backpropagation's."""
    x, y = torch.rand(BATCH, *SHAPE, device=device), torch.randint(10, (BATCH,), device=device)
    steps: dict[str, Callable[[], None]] = {}

    def step(rule: apical.CreditRule, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        rule(x, y).backward()
        optimizer.step()

    for name, (kind, make) in RULES.items():
        torch.manual_seed(0)
        rule = make(models.build(kind, SHAPE, 10)).to(device)
        steps[name] = partial(step, rule, torch.optim.SGD(rule.parameters(), 1e-3))
        steps[name]()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, run in steps.items():
            begun = clock(device)
            run()
            seconds[name].append(clock(device) - begun)
    rows = []
    for name, found in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(found, seconds["bp"], strict=True))
        rows.append(
            {
                "rule": name,
                "model": RULES[name][0],
                "batch": BATCH,
                "ms_per_step": round(1e3 * statistics.median(found), 3),
                "ratio_to_bp": round(ratio, 2),
            }
        )
        print(f"{name:24s} {rows[-1]['ms_per_step']:9.3f} ms  {ratio:7.2f} x bp", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "settling.json")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    found = {"settling": settling(options.rounds, device), "training": training(max(3, options.rounds // 3), device)}
    save(options.out, {"environment": environment(device), **found})


if __name__ == "__main__":
    main()
