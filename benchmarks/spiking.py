"""A step of the simulation of contrastive plasticity, learning included, against its matrix products alone.

One process, one thread, in turns, medians over rounds.

    python benchmarks/spiking.py [--out benchmarks/spiking.json] [--rounds 7]

Products are those of the currents and of what synapses learn, of positive and negative samples, on the same spikes.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch

import apical
from apical import models
from apical.rules.contrastive_plasticity.network import charge_all_, products, read_products
from floors import in_turns
from run import environment, save

SETTINGS = (((128, 64), 100), ((256, 64), 100), ((512, 128), 100), ((1024, 128), 100))
"""Widths of the hidden layers, and batch; the last is the released code's default network."""

STEPS = 20
TARGET = 1.5


@torch.no_grad()
def row(widths: tuple[int, ...], batch: int, rounds: int) -> dict[str, Any]:
    """Of one network."""
    torch.manual_seed(0)
    rule = apical.ContrastiveSignalPlasticity(models.spiking(784, widths, 10))
    ink = torch.rand(batch, 784) < 0.2
    held = rule._begun(torch.rand(batch, 784) * ink, torch.arange(batch) % 10, torch.zeros(batch, 10))
    sums = rule._zeros()
    state, _ = rule._taught(held.stimulus, held.state, 3, sums)
    synapses, add = rule._matrices(), rule._into(sums)

    def alone() -> None:
        for _ in range(STEPS):
            charge_all_(state, synapses, rule.constants)
            products(state, synapses, rule.constants, [layer.t for layer in state.layers], add)
            read_products(state, rule.constants, state.readout.t[:batch], add)

    runs = {"products": alone, "step": partial(rule._taught, held.stimulus, state, STEPS, sums)}
    seconds = in_turns(runs, rounds, 1)
    ratio = statistics.median(a / b for a, b in zip(seconds["step"], seconds["products"], strict=True))
    made = {
        "rule": "csdp",
        "model": "spiking-" + "-".join(map(str, widths)),
        "batch": batch,
        "ms_products": round(1e3 * statistics.median(seconds["products"]) / STEPS, 3),
        "ms_per_step": round(1e3 * statistics.median(seconds["step"]) / STEPS, 3),
        "ratio": round(ratio, 3),
        "target": TARGET,
        "within_target": ratio <= TARGET,
    }
    print(made)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "spiking.json")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [row(widths, batch, options.rounds) for widths, batch in SETTINGS]
    save(options.out, {"environment": environment(torch.device("cpu")), "rows": found})


if __name__ == "__main__":
    main()
