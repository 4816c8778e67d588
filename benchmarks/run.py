"""Time and memory of one training step of every rule, relative to backpropagation, measured in one run.

All rules take turns in one process, in a new random order every round, so that disturbances affect them equally. A turn is
one untimed step, to bring the rule's data into the caches as in training, and then a few timed steps. The ratio is the
median over rounds of (the rule's time / backprop's time in the same round). On a CPU the time is process time of one
thread, and the same run also times the step's lower bounds (`limits.py`).

    python benchmarks/run.py [--out benchmarks/results.json] [--only mlp] [--device cuda]
"""

import argparse
import gc
import json
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical import models
from apical.diagnostics.memory import step_bytes
from apical.losses import token_cross_entropy
from limits import limits, seconds_per_byte

RULES: dict[str, Callable[[nn.Module], apical.CreditRule]] = {
    "bp": apical.Backprop,
    "fa": apical.FeedbackAlignment,
    "dfa": apical.DirectFeedbackAlignment,
    "usf": apical.SignSymmetry,
    "brsf": partial(apical.SignSymmetry, variant="batchwise"),
    "frsf": partial(apical.SignSymmetry, variant="fixed"),
    "kp": apical.KolenPollack,
    "wm": apical.WeightMirror,
    "pfa": apical.ProductFeedbackAlignment,
    "pfa-o": partial(apical.ProductFeedbackAlignment, feedback="orthogonal"),
    "pfa-explicit": partial(apical.ProductFeedbackAlignment, form="explicit"),
}

TDCA: dict[str, Callable[..., apical.CreditRule]] = {
    "tdca": apical.TopDownCreditAssignment,
    "tdca-classes": partial(apical.TopDownCreditAssignment, teacher="classes"),
}
"""With an unevolved teacher, which costs the same as an evolved one of its size, and with that for any number of classes."""

OF_TOKENS: dict[str, Callable[[nn.Module], apical.CreditRule]] = {
    name: partial(make, loss=token_cross_entropy, **({"units": "block"} if name in ("dfa", *TDCA) else {}))
    for name, make in {**RULES, **TDCA}.items()
    if name not in ("brsf", "frsf")
}
"""Rules of a language model."""


class Case(NamedTuple):
    """A timed case.

    Attributes:
        shape: shape of a sample.
        rounds, times: number of rounds, and of timed steps per turn.
        tokens: size of the vocabulary from which samples and targets are drawn; 0 for numbers and ten classes.
    """

    title: str
    model: str
    shape: tuple[int, ...]
    batch: int
    rounds: int
    times: int
    tokens: int = 0

    @property
    def rules(self) -> dict[str, Callable[[nn.Module], apical.CreditRule]]:
        return OF_TOKENS if self.tokens else RULES

    @property
    def classes(self) -> int:
        return self.tokens or 10

    def samples(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return a batch of inputs and targets."""
        if self.tokens:
            inputs, targets = torch.randint(0, self.tokens, (2, self.batch, *self.shape), device=device)
            return inputs, targets
        inputs = torch.randn(self.batch, *self.shape, device=device)
        return inputs, torch.randint(0, self.classes, (self.batch,), device=device)


CASES = [
    Case("MLP 784-512-512-10", "mlp-512-512", (1, 28, 28), 64, 25, 40),
    Case("LeNet-CIFAR", "lenet-cifar", (3, 32, 32), 128, 20, 2),
    Case("ResNet-20", "resnet20", (3, 32, 32), 128, 5, 1),
    Case("GPT of 2 blocks of 96, 64 tokens", "gpt-2x96", (64,), 32, 9, 1, tokens=96),
]
GPU_CASES = [
    Case("ResNet-20", "resnet20", (3, 32, 32), 128, 40, 5),
    Case("ResNet-18", "resnet18", (3, 32, 32), 128, 40, 5),
]

CLOSE = dict.fromkeys(("fa", "usf", "frsf", "kp"), 1.05)
EVERY = {**CLOSE, **dict.fromkeys(("dfa", "brsf", "wm", "pfa", "pfa-o"), 1.05), "bp": 1.03}
TARGETS = {
    "MLP 784-512-512-10": {**CLOSE, "pfa-o": 1.08, "pfa": 1.15, "dfa": 1.00, "bp": 1.03},
    "LeNet-CIFAR": EVERY,
    "ResNet-20": EVERY,
    "GPT of 2 blocks of 96, 64 tokens": {
        **dict.fromkeys(("fa", "kp", "pfa", "pfa-o"), 1.08),
        **dict.fromkeys(("usf", "dfa"), 1.10),
        **dict.fromkeys(TDCA, 1.25),
        "pfa-explicit": 1.30,
        "bp": 1.03,
    },
}
"""Upper bounds of ratio_to_bp; that of bp is for `apical` BP over plain torch."""


class Plain:
    """The same training step without `apical`, for comparison."""

    def __init__(self, model: nn.Module, tokens: bool) -> None:
        self.model, self.loss = model, token_cross_entropy if tokens else F.cross_entropy

    def parameters(self) -> Any:
        return self.model.parameters()

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        self.loss(self.model(inputs), targets).backward()


def make_step(name: str, case: Case, batch: tuple[Tensor, Tensor], amp: bool) -> tuple[Callable[[], None], Any]:
    """Return one full training step: zero_grad, forward, backward, SGD with momentum and decay; AdamW for tokens."""
    device = batch[0].device
    torch.manual_seed(0)
    model = models.build(case.model, case.shape, case.classes).to(device)
    rule: Any = Plain(model, tokens=case.tokens > 0) if name == "torch" else case.rules[name](model)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(rule.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    if case.tokens:
        optimizer = torch.optim.AdamW(rule.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            credit = None if name == "torch" else rule(*batch)
        if credit is None:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
                loss = rule.loss(rule.model(batch[0]), batch[1])
            loss.backward()
        else:
            credit.backward()
        optimizer.step()

    return step, rule


def timed(step: Callable[[], None], times: int, device: torch.device) -> float:
    """Return seconds per step over one turn: process time on a CPU, wall time between synchronisations on a GPU."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    step()
    wait()
    start = clock()
    for _ in range(times):
        step()
    wait()
    return (clock() - start) / times


def bench(case: Case, device: torch.device, amp: bool = False) -> list[dict[str, Any]]:
    """Return the rows of one model."""
    title, size, rounds, times = case.title, case.batch, case.rounds, case.times
    batch = case.samples(device)
    names = ["torch", *case.rules]
    steps, rules = {}, {}
    for name in names:
        steps[name], rules[name] = make_step(name, case, batch, amp)
        for _ in range(3):
            steps[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.disable()
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(names, len(names)):
            seconds[name].append(timed(steps[name], times, device))
    gc.enable()
    peak = {}
    for name in case.rules:
        rules[name].zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            peak[name] = step_bytes(rules[name], *batch)
    weights = sum(p.numel() for p in rules["bp"].model.parameters())
    floors = {}
    if device.type == "cpu":
        fed_back = [layer.weight.shape for layer in rules["fa"].layers.values()]
        per_byte, numbers = seconds_per_byte(fed_back), sum(shape.numel() for shape in fed_back)
        for name in case.rules:
            floors[name] = limits(name, steps[name], steps["bp"], numbers, per_byte, max(2, rounds // 4), max(1, times // 4))
    rows = []
    for name in names:
        base = "torch" if name == "bp" else "bp"
        ratios = [a / b for a, b in zip(seconds[name], seconds["bp"], strict=True)]
        to_torch = [a / b for a, b in zip(seconds[name], seconds["torch"], strict=True)]
        quartiles = statistics.quantiles(to_torch if base == "torch" else ratios, n=4)
        target = TARGETS.get(title, {}).get(name) if device.type == "cpu" else None
        measured = quartiles[1]
        row: dict[str, Any] = {
            "rule": name,
            "model": title,
            "batch": size,
            "device": device.type,
            "precision": "bf16 autocast" if amp else "float32",
            "ms_per_step": round(1e3 * statistics.median(seconds[name]), 4),
            "ratio_to_bp": round(statistics.median(ratios), 4),
            "ratio_to_torch": round(statistics.median(to_torch), 4),
            "quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
            "target": target,
            "within_target": None if target is None else measured <= target,
            "rounds": rounds,
            "steps_per_round": times,
        }
        if name != "torch":
            stored = [*rules[name].parameters(), *rules[name].buffers()]
            buffers = sum(b.numel() for b in rules[name].model.buffers())
            row["peak_memory_ratio"] = round(peak[name] / peak["bp"], 4)
            row |= floors.get(name, {})
            row["stored_numbers_per_weight"] = round((sum(t.numel() for t in stored) - buffers) / weights - 1, 4)
        rows.append(row)
        verdict = "" if row["within_target"] is None else "  ok" if row["within_target"] else f"  above {target}"
        verdict += f"  floor {row['floor']} {row['floor_watched']}" if "floor" in row else ""
        print(
            f"{title:20s} {row['precision']:8s} {name:13s} {row['ms_per_step']:9.3f} ms   "
            f"{row['ratio_to_bp']:.3f} x bp   {row['ratio_to_torch']:.3f} x torch   memory {row.get('peak_memory_ratio', 0)}"
            f"{verdict}",
            flush=True,
        )
    return rows


def environment(device: torch.device) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    dirty = subprocess.run(["git", "status", "--porcelain", "src"], capture_output=True, text=True, check=False).stdout
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0] if names else processor
    return {
        "commit": commit + ("+" if dirty else ""),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": torch.cuda.get_device_name() if device.type == "cuda" else processor,
        "threads": torch.get_num_threads(),
        "clock": "wall, synchronised" if device.type == "cuda" else "process time",
    }


def save(out: Path, content: dict[str, Any]) -> None:
    """Write measurements atomically."""
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(out)
    print(f"written: {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.json")
    parser.add_argument("--only", default="", help="run the models whose name contains this (case ignored)")
    parser.add_argument("--rounds", type=int, default=0, help="rounds per model; 0: as many as each case says")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    rows = []
    for case in CASES if device.type == "cpu" else GPU_CASES:
        if options.rounds:
            case = case._replace(rounds=options.rounds)
        if options.only.lower() in case.title.lower():
            for amp in (False,) if device.type == "cpu" else (False, True):
                rows += bench(case, device, amp)
    save(options.out, {"environment": environment(device), "rows": rows})


if __name__ == "__main__":
    main()
