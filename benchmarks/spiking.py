"""A simulation step of contrastive plasticity, learning included, against its matrix products alone.

One process, one thread, in turns, medians over rounds.

    python benchmarks/spiking.py [--out benchmarks/spiking.json] [--rounds 9]

Products are those of the currents and of the synaptic updates, for positive and negative samples, on the same spikes; passes
are the remaining operations of a step, called one by one in the same order. Every stimulus starts at rest, because traces
that decay for hundreds of steps become subnormal numbers, with which processors are slow.

The floor is the minimum in PyTorch for any order of calls: bytes that passes read and write, at the speed of copying memory
larger than the second-level cache, and calls at the cost of one on a single number.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import apical
from apical import models
from apical.rules.contrastive_plasticity.network import charge_all_, goodness_of, modulate_, products, read_products
from apical.rules.contrastive_plasticity.neurons import draw_with_shift_, fire_
from floors import in_turns
from run import environment, save

SETTINGS = (((128, 64), 100), ((256, 64), 100), ((512, 128), 100), ((1024, 128), 100))
"""Widths of the hidden layers, and batch; the last is the released code's default network."""

STEPS = 40
TARGET = 1.5
COPIED = 2**20
"""Number of entries in the copy that times memory."""


class Calls(TorchDispatchMode):
    """Counts operations, and the bytes of operations that are neither products nor views."""

    def __init__(self) -> None:
        super().__init__()
        self.number = self.bytes = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = call(*args, **(kwargs or {}))
        name = call._schema.name.split("::")[1]
        if name not in ("addmm_", "addmm", "mm") and not call.is_view:
            self.number += 1
            tensors = {id(t): t for t in (*args, made, *(kwargs or {}).values()) if isinstance(t, Tensor)}.values()
            written = sum(t.nbytes for t in args[:1] if isinstance(t, Tensor) and name.endswith("_"))
            self.bytes += sum(t.nbytes for t in tensors) + written
        return made


@torch.no_grad()
def row(widths: tuple[int, ...], batch: int, rounds: int) -> dict[str, Any]:
    """Return the row of one network."""
    torch.manual_seed(0)
    rule = apical.ContrastiveSignalPlasticity(models.spiking(784, widths, 10), steps=STEPS)
    ink = torch.rand(batch, 784) < 0.2
    stimulus = rule._stimulus(torch.rand(batch, 784) * ink, torch.arange(batch) % 10)
    sums, synapses = rule._zeros(), rule._matrices()
    add, right = rule._into(sums), stimulus.target
    shift = torch.rand(2, 1, 784)
    begin = partial(rule._rest, stimulus.x, context=True)
    state, _ = rule._taught(stimulus, begin(), 3, sums)

    def alone() -> None:
        begin()
        for _ in range(STEPS):
            charge_all_(state, synapses, rule.constants)
            products(state, synapses, rule.constants, [layer.t for layer in state.layers], add)
            read_products(state, rule.constants, state.readout.t[:batch], add)

    def passes() -> None:
        resting = begin()
        for _ in range(STEPS):
            fire_(resting.neurons, resting.member, rule.constants)
            modulate_(resting, rule._slope(goodness_of(resting), stimulus.y, batch), right)
            draw_with_shift_(resting.inputs, stimulus.x, stimulus.phase, shift)

    with Calls() as counted:
        passes()
    one, source = torch.zeros(1), torch.rand(COPIED)
    target = torch.empty_like(source)
    runs: dict[str, Callable[[], Any]] = {
        "products": alone,
        "passes": passes,
        "step": lambda: rule._taught(stimulus, begin(), STEPS, sums),
        "calls": lambda: [one.add_(one) for _ in range(1000)],
        "copies": lambda: [target.copy_(source) for _ in range(10)],
    }
    seconds = in_turns(runs, rounds, 1)
    ratio = statistics.median(a / b for a, b in zip(seconds["step"], seconds["products"], strict=True))
    ms = {name: 1e3 * statistics.median(each) for name, each in seconds.items()}
    bytes_a_ms = 10 * 2 * source.nbytes / ms["copies"]
    floor = counted.number / STEPS * ms["calls"] / 1000 + counted.bytes / STEPS / bytes_a_ms
    made = {
        "rule": "csdp",
        "model": "spiking-" + "-".join(map(str, widths)),
        "batch": batch,
        "ms_products": round(ms["products"] / STEPS, 3),
        "ms_passes": round(ms["passes"] / STEPS, 3),
        "ms_per_step": round(ms["step"] / STEPS, 3),
        "ratio": round(ratio, 3),
        "calls": round(counted.number / STEPS),
        "us_call": round(ms["calls"], 2),
        "mb": round(counted.bytes / STEPS / 1e6, 2),
        "gb_per_s": round(bytes_a_ms / 1e6, 1),
        "floor": round(1 + floor / (ms["products"] / STEPS), 3),
        "target": TARGET,
        "within_target": ratio <= TARGET,
    }
    print(made)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "spiking.json")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [row(widths, batch, options.rounds) for widths, batch in SETTINGS]
    save(options.out, {"environment": environment(torch.device("cpu")), "rows": found})


if __name__ == "__main__":
    main()
