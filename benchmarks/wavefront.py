"""Training without backward locking: `apical.pipeline` on two processes against the same rule on one.

Kinds of steps take turns in every round: the rule on one process ("serial"), the pipeline, and backpropagation on one
process. Times are wall-clock times, so other jobs on the machine mostly slow down two processes. "cores" is the speed-up of
two independent processes over one. "limit" does not depend on that: processor time of a step on one process, over that of
the busier process in the pipeline.

    python benchmarks/wavefront.py [--out benchmarks/wavefront.json] [--quick]
"""

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

import apical
from apical import models

BATCHES, BATCH = 8, 128
RULES: dict[str, Callable[..., Any]] = {
    "ccl": apical.CounterCurrentLearning,
    "dfa": apical.DirectFeedbackAlignment,
    "local-pred": apical.LocalClassifiers,
    "mono-forward": partial(apical.LocalClassifiers, local="projection"),
    "bp": apical.Backprop,
}
MODELS = {  # model, input shape, rounds, timed steps per turn
    "MLP 784-256x5-10": ("mlp-elu-256-256-256-256-256", (1, 28, 28), 13, 12),
    "MLP 3072-1024x3-10": ("mlp-elu-1024-1024-1024", (3, 32, 32), 7, 4),
}
Step = Callable[[int], None]


def processor_time(pid: int) -> float:
    """Return the processor seconds of a process so far, to a hundredth."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def made(rule: str, title: str, batch: int) -> tuple[Any, torch.optim.Optimizer, list[tuple[Tensor, Tensor]]]:
    """Return a rule, its optimiser and the data, all with seed 0."""
    model, shape, *_ = MODELS[title]
    torch.manual_seed(0)
    built = RULES[rule](models.build(model, shape, 10))
    data = [(torch.randn(batch, *shape), torch.randint(0, 10, (batch,))) for _ in range(BATCHES)]
    return built, torch.optim.SGD(built.parameters(), lr=0.05), data


def serial(rule: str, title: str, batch: int) -> tuple[Any, Step]:
    """The rule on one process."""
    built, optimizer, data = made(rule, title, batch)

    def step(t: int) -> None:
        optimizer.zero_grad()
        built(*data[t % BATCHES]).backward()
        optimizer.step()

    return built, step


def serve(rule: str, title: str, batch: int, pipe: Connection) -> None:
    """Run in another process: as many serial steps as requested, until the pipe is closed."""
    torch.set_num_threads(1)
    _, step = serial(rule, title, batch)
    try:
        while True:
            for t in range(pipe.recv()):
                step(t)
            pipe.send(None)
    except EOFError:
        return


def bench(rule: str, title: str, batch: int, quick: bool) -> dict[str, Any]:
    """A row."""
    _, _, rounds, times = MODELS[title]
    rounds, times = (3, 4) if quick else (rounds, times)
    whole, step = serial(rule, title, batch)
    built, optimizer, data = made(rule, title, batch)
    pipe = apical.pipeline(built, optimizer)
    pipe(*data[0])
    step(0)
    _, bp = serial("bp", title, batch)
    ours, theirs = mp.get_context("spawn").Pipe()
    other = mp.get_context("spawn").Process(target=serve, args=(rule, title, batch, theirs), daemon=True)
    other.start()
    theirs.close()

    def turn(kind: Step) -> Callable[[int, int], None]:
        return lambda start, count: [kind(t) for t in range(start, start + count)] and None  # type: ignore[func-returns-value]

    def piped(start: int, count: int) -> None:
        turn(lambda t: pipe(*data[t % BATCHES]))(start, count)
        pipe.wait()

    _, beside = serial(rule, title, batch)

    def apart(start: int, count: int) -> None:
        ours.send(count)
        turn(beside)(start, count)
        ours.recv()

    turns = {
        "serial": turn(step),
        "pipeline": piped,
        "apart": apart,
        "bp": turn(bp),
    }
    ms: dict[str, list[float]] = {kind: [] for kind in turns}
    pids = {"one": os.getpid(), "two": pipe._workers[0].process.pid}
    spent: dict[tuple[str, str], float] = dict.fromkeys(((k, who) for k in turns for who in pids), 0.0)
    gc.disable()
    for number in range(rounds):
        for kind, run in turns.items():
            run(1 + 2 * number * times, times)
            before = {who: processor_time(pid) for who, pid in pids.items()}
            start = time.perf_counter()
            run(1 + (2 * number + 1) * times, times)
            ms[kind].append(1e3 * (time.perf_counter() - start) / times)
            for who, pid in pids.items():
                spent[kind, who] += processor_time(pid) - before[who]
    gc.enable()
    pipe.close()
    ours.close()
    other.join()
    middle = {kind: statistics.median(values) for kind, values in ms.items()}
    low, speed_up, high = statistics.quantiles([a / b for a, b in zip(ms["serial"], ms["pipeline"], strict=True)], n=4)
    row: dict[str, Any] = {"rule": rule, "model": title, "batch": batch, "rounds": rounds, "steps_per_round": times}
    row["blocks"] = [len(part) for part in pipe.parts]
    row |= {f"ms_{kind}": round(value, 4) for kind, value in middle.items()}
    row |= {"speed_up": round(speed_up, 4), "quartiles": [round(low, 4), round(high, 4)]}
    row |= {f"cpu_{who}": round(1e3 * spent["pipeline", who] / rounds / times, 4) for who in pids}
    row["cpu_serial"] = round(1e3 * spent["serial", "one"] / rounds / times, 4)
    row["limit"] = round(row["cpu_serial"] / max(row["cpu_one"], row["cpu_two"]), 4)
    row["cores"] = round(statistics.median(2 * a / b for a, b in zip(ms["serial"], ms["apart"], strict=True)), 4)
    row["bit_equal"] = all(map(torch.equal, whole.state_dict().values(), built.state_dict().values()))
    return row


def main() -> None:
    from run import environment, save  # next to this file when run as a script; tests import it from the root

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "wavefront.json")
    parser.add_argument("--quick", action="store_true", help="a smoke run: the small model, few rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for title in list(MODELS)[: 1 if options.quick else None]:
        for rule in list(RULES)[:-1]:
            rows.append(bench(rule, title, BATCH, options.quick))
            print(json.dumps(rows[-1]), flush=True)
    save(options.out, {"environment": {**environment(torch.device("cpu")), "clock": "wall"}, "rows": rows})


if __name__ == "__main__":
    main()
