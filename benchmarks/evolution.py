"""A population's lifetimes in parallel and in sequence, memory against chunk size, two workers against one; and the cost of
a generation of 64 lifetimes in each task for which top-down networks are evolved.

The inner task is that of our specification of TDCA (arXiv 2208.01416): 16 inputs, 24 tanh units, 4 classes, 256 examples, 40
full-batch steps of Adam; a top-down network of 628 weights; 256 individuals. The plain loop is the obvious implementation:
the rule, `torch.optim.Adam`, `clip_grad_norm_`.

    python benchmarks/evolution.py [--out benchmarks/evolution.json]
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import apical
from apical.evolution.classification import Classification
from apical.evolution.minimisation import Minimisation
from apical.evolution.population import Lifetime, Population, losses
from apical.evolution.reinforcement import Known, Reinforcement, by_hand
from apical.evolution.seeds import seed_of
from apical.evolution.workers import Here, RayWorkers, Task
from apical.rules.top_down.teacher import TopDownNetwork
from apical_papers.tdca.classification import study as classification
from apical_papers.tdca.diffusion import study as diffusion
from apical_papers.tdca.functions import study as functions
from apical_papers.tdca.reinforcement import study as reinforcement
from run import environment, save

INPUTS, UNITS, CLASSES, EXAMPLES, HIDDEN, POPULATION = 16, 24, 4, 256, 12, 256
LIFETIME = Lifetime(steps=40, lr=0.02)
ROUNDS = 5
LIFETIMES, CHUNK, DIFFUSION = 64, 33, 32
"""Lifetimes of a generation, and how many the studies of classification and diffusion train together."""
TARGET = 0.5
"""Largest allowed CPU seconds of a generation."""


def learner() -> nn.Sequential:
    return nn.Sequential(nn.Linear(INPUTS, UNITS), nn.Tanh(), nn.Linear(UNITS, CLASSES))


class Inner:
    """The specification's inner task: Gaussian clusters, three per class."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        centres = torch.randn(CLASSES * 3, INPUTS)
        which = torch.arange(EXAMPLES) % len(centres)
        self.inputs, self.targets = centres[which] + 0.45 * torch.randn(EXAMPLES, INPUTS), which % CLASSES
        self.state = {name: value.clone() for name, value in learner().state_dict().items()}
        network = TopDownNetwork(CLASSES, [UNITS], HIDDEN)
        self.start = torch.cat([p.detach().flatten() for p in network.parameters()])

    def fitness(self, individuals: Tensor, generation: int) -> Tensor:
        torch.manual_seed(0)
        model = learner()
        rule = apical.TopDownCreditAssignment(model, teacher=TopDownNetwork(CLASSES, [UNITS], HIDDEN))
        population = Population(rule, self.inputs, self.targets, "teacher.")
        model.load_state_dict(self.state)
        weights = population.train(population.start(model), individuals, self.inputs, self.targets, LIFETIME)
        return -losses(population.outputs(weights, self.inputs), self.targets)

    def plain(self, individual: Tensor) -> float:
        model, network = learner(), TopDownNetwork(CLASSES, [UNITS], HIDDEN)
        model.load_state_dict(self.state)
        nn.utils.vector_to_parameters(individual, network.parameters())
        rule = apical.TopDownCreditAssignment(model, teacher=network)
        optimizer = torch.optim.Adam(model.parameters(), lr=LIFETIME.lr)
        for _ in range(LIFETIME.steps):
            optimizer.zero_grad()
            rule(self.inputs, self.targets).backward()
            nn.utils.clip_grad_norm_(model.parameters(), LIFETIME.clip)
            optimizer.step()
        with torch.no_grad():
            return -float(nn.functional.cross_entropy(model(self.inputs), self.targets))


def individuals(task: Inner, number: int = POPULATION) -> Tensor:
    torch.manual_seed(1)
    return task.start + 0.1 * torch.randn(number, len(task.start))


def seconds(call: Any) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def throughput(chunks: tuple[int, ...] = (16, 64, 256)) -> list[dict[str, Any]]:
    """Return milliseconds per lifetime, in turns: the plain loop on 16 individuals, and chunks of several sizes on all."""
    task = Inner()
    everyone = individuals(task)
    few = everyone[:16]
    together = Here(64).evaluate(task, few, 0)
    apart = torch.tensor([task.plain(one) for one in few])
    assert (together - apart).abs().max() < 1e-3, "the two do not compute the same"
    plain: list[float] = []
    found: dict[int, list[float]] = {chunk: [] for chunk in chunks}
    for _ in range(ROUNDS):
        plain.append(seconds(lambda: [task.plain(one) for one in few]) / len(few))
        for chunk, times in found.items():
            times.append(seconds(lambda chunk=chunk: Here(chunk).evaluate(task, everyone, 0)) / POPULATION)
    rows = [{"what": "plain loop", "ms_per_lifetime": round(1e3 * statistics.median(plain), 3), "speed_up": 1.0}]
    for chunk, times in found.items():
        ratios = [a / b for a, b in zip(plain, times, strict=True)]
        rows.append(
            {
                "what": f"chunks of {chunk}",
                "chunk": chunk,
                "ms_per_lifetime": round(1e3 * statistics.median(times), 3),
                "speed_up": round(statistics.median(ratios), 2),
                "generations_per_hour": round(3600 / (statistics.median(times) * POPULATION)),
                "peak_memory_mb": memory(chunk),
            }
        )
    return rows


def memory(chunk: int) -> float | None:
    """Return the extra peak MB of a separate process that evaluates the population; on Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    code = f"import evolution; print(evolution.grown({chunk}))"
    here = Path(__file__).parent
    ended = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True)
    return float(ended.stdout)


def grown(chunk: int) -> float:
    torch.set_num_threads(1)
    task = Inner()
    Here(2).evaluate(task, individuals(task, 2), 0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    Here(chunk).evaluate(task, individuals(task), 0)
    return round(resident("VmHWM") - before, 1)


def resident(field: str) -> float:
    """Return MB as counted by Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def workers() -> list[dict[str, Any]]:
    """Return seconds for the population with one and with two Ray workers on this machine."""
    task = Inner()
    everyone = individuals(task)
    rows: list[dict[str, Any]] = []
    for count in (1, 2):
        with RayWorkers("local", count, chunk=64) as there:
            result = there.evaluate(task, everyone, 0)  # starts the processes
            times = [seconds(lambda there=there: there.evaluate(task, everyone, 0)) for _ in range(ROUNDS)]
        assert torch.equal(result, Here(64).evaluate(task, everyone, 0)), "Ray changes the result"
        rows.append({"what": f"{count} Ray worker{'s' * (count > 1)}", "seconds": round(statistics.median(times), 3)})
    rows[1]["speed_up"] = round(rows[0]["seconds"] / rows[1]["seconds"], 2)
    return rows


def tasks() -> dict[str, Callable[[], Any]]:
    """Return a generation of 64 lifetimes for each task."""
    made: dict[str, Callable[[], Any]] = {}

    def add(name: str, task: Task, chunk: int) -> None:
        torch.manual_seed(2)
        near = task.start + 0.1 * torch.randn(LIFETIMES, len(task.start))
        made[name] = lambda: Here(chunk).evaluate(task, near, 0)

    train, _ = classification.digits()
    for name, setting in classification.ARMS.items():
        add(f"classification, {name}", Classification([train], setting), CHUNK)
    for case in (functions.PLANE[0], functions.LARGE[0], functions.STATELESS[0]):
        add(f"{case.title}, {case.kind} network", Minimisation(case.setting(0)), LIFETIMES)
    for arm in ("weight", "unit"):
        add(f"diffusion, credit per {arm}", diffusion.task(arm, train, 0), DIFFUSION)
    for case in reinforcement.CASES.values():
        for state in (False, True):
            learner = Reinforcement(replace(case.setting, state=state))
            made[f"{case.title}{', network that sees the state' * state}"] = partial(learned, learner)
    return made


def learned(task: Reinforcement) -> None:
    """Run lifetimes whose policies learn: a network is evaluated, and its answer replaced by hand-built credit.

    Episodes are then as long as at the end of evolution; under a random network CartPole's end early.
    """
    torch.manual_seed(2)
    asked = task.credits(task.start + 0.1 * torch.randn(LIFETIMES, len(task.start)))

    def credits(episode: Known) -> tuple[Tensor | None, Tensor]:
        asked(episode)
        return by_hand(episode)

    start = task.policy.start(seed_of(0, "policy")).repeat(LIFETIMES, 1)
    task.live(start, credits, task.drawn(0, LIFETIMES), [0])


def generations() -> list[dict[str, Any]]:
    """Return CPU seconds of a generation of 64 lifetimes, tasks in turns, so that other load affects all equally."""
    everything = tasks()
    times: dict[str, list[float]] = {name: [] for name in everything}
    for turn in range(ROUNDS + 1):
        for name, run in everything.items():
            begun = time.process_time()
            run()
            if turn:  # the first compiles and fills caches
                times[name].append(time.process_time() - begun)
    return [
        {
            "what": name,
            "cpu_seconds": round(statistics.median(values), 3),
            "least": round(min(values), 3),
            "most": round(max(values), 3),
            "target": TARGET,
            "within_target": statistics.median(values) < TARGET,
        }
        for name, values in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, each, scaling = throughput(), generations(), workers()
    for row in [*rows, *each, *scaling]:
        print(row)
    around = {**environment(torch.device("cpu")), "clock": "wall"}  # workers are other processes
    save(options.out, {"rows": rows, "generations": each, "workers": scaling, "environment": around})


if __name__ == "__main__":
    main()
