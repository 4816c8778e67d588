"""Counter-current learning has no backward locking: batch t+1 goes forward while batch t is still being learned.

    forward   a_l = phi(a_{l-1} U_l^T)              feedback  b_l = phi(b_{l+1} V_{l+1}^T),  b_L = I (a row per class)
    update l  U_l, V_{l+1} -= lr clip(gradient of the inner pair loss of a_l, b_l)            U_L: of the cross-entropy

Every matrix is clipped by its own norm: a norm over all of them would be a barrier.

What must wait for what:

    forward l (t+1)    after  update l (t)       no other: U_l is in one pair only
    feedback  (t+1)    after  update L-1 (t)     its first matrix, V_L, is in the last pair
    update l  (t)      after  forward l (t), feedback (t)

P goes forward through batch t+1 one layer behind Q, which updates by batch t; the feedback pass is P's too, as soon as
update L-1 is done, for Q then has only update L left to do. So a step takes at least max(T_P, T_Q), where T_P = feedback +
forward, T_Q = updates ("limit"); the cycle update 1..L-1 -> feedback -> update 1 sharpens that to max(T_P, T_Q + max(0,
feedback - update L)) ("limit_of_cycle"). In backpropagation the layer that goes forward first is updated last: no overlap.

Activities have two buffers, by the parity of t: forward l (t+2) follows update l (t+1), when Q is done with batch t. All is
computed by the same operations on the same shapes as in sequence, so weights must be equal bit for bit. On a CPU the workers
are two processes with shared tensors and semaphores per layer (they count steps, order memory, sleep in the kernel); on a
GPU two streams with events. "cores" says what a second process is worth at the time: how many times the steps of one are
done by two that have nothing to do with each other. Where it is well below 2, other jobs took the cores.

    python benchmarks/wavefront.py [--out benchmarks/wavefront.json] [--device cuda] [--quick]
"""

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical import models
from apical.core.activations import pulled_back
from apical.rules.counter_current.pairing import inner, membership

BATCHES, ELU, SCALE = 8, nn.ELU(), 0.5
SPINS = 400  # tries before a worker sleeps, about 0.1 ms: waking up costs as much
MODELS = {  # model, input shape, rounds, timed steps per turn
    "MLP 784-256x5-10": ("mlp-elu-256-256-256-256-256", (1, 28, 28), 31, 12),
    "MLP 3072-1024x3-10": ("mlp-elu-1024-1024-1024", (3, 32, 32), 13, 6),
}

Key = tuple[str, int]  # what a worker has done: ("made", l), ("updated", l) or ("coded", 0)


class PartnerError(RuntimeError):
    """The other worker ended, or does not come on."""


@dataclass
class Net:
    """Weights, activities and data of one network: `forth[l - 1]` is U_l and `back[l - 1]` is V_{l+1}, l = 1..L."""

    forth: list[Tensor]
    back: list[Tensor]
    a: tuple[list[Tensor], list[Tensor]]  # by the parity of t; a[0] is not used
    b: list[Tensor]
    inputs: Tensor  # (BATCHES, batch, d_0)
    members: Tensor  # M of every batch
    lr: float = 0.05
    clip: float = 1.0

    @property
    def last(self) -> int:
        return len(self.forth)

    def tensors(self) -> list[Tensor]:
        return [*self.forth, *self.back, *self.a[0], *self.a[1], *self.b, self.inputs, self.members]

    def feedback(self) -> None:
        """G's pass on the codes."""
        for level in range(self.last - 1, 0, -1):
            F.elu(torch.mm(self.b[level + 1], self.back[level - 1].T, out=self.b[level]), inplace=True)

    def forward(self, level: int, t: int) -> None:
        """One layer of F."""
        made = torch.mm(self._given(level, t), self.forth[level - 1].T, out=self.a[t % 2][level])
        if level < self.last:
            F.elu(made, inplace=True)

    def update(self, level: int, t: int) -> None:
        """Gradients and SGD of the matrices that meet at a depth; at the last one of U_L, by cross-entropy."""
        a, given, members = self.a[t % 2][level], self._given(level, t), self.members[t % BATCHES]
        if level == self.last:
            self._descend(self.forth[-1], ((a.softmax(1) - members) / len(a)).T @ given)
            return
        b = self.b[level]
        _, for_a, for_b = inner(a, b, members, SCALE)
        self._descend(self.forth[level - 1], pulled_back(ELU, a, a, for_a).T @ given)
        self._descend(self.back[level - 1], pulled_back(ELU, b, b, for_b).T @ self.b[level + 1])

    def _given(self, level: int, t: int) -> Tensor:
        return self.inputs[t % BATCHES] if level == 1 else self.a[t % 2][level - 1]

    def _descend(self, weight: Tensor, gradient: Tensor) -> None:
        gradient.mul_((self.clip / (torch.linalg.vector_norm(gradient) + 1e-6)).clamp_(max=1.0))
        weight.add_(gradient, alpha=-self.lr)


def make_net(model: str, shape: tuple[int, ...], batch: int, device: str = "cpu", **options: float) -> Net:
    """The weights of `CounterCurrentLearning` on the model, drawn from seed 0, as all the data."""
    torch.manual_seed(0)
    rule = apical.CounterCurrentLearning(models.build(model, shape, 10))
    forth = [weight.detach().clone().to(device) for weight in rule.model.parameters()]
    back = [weight.detach().clone().to(device) for weight in rule.feedback_parameters()][::-1]  # kept from the top
    inputs, labels = torch.randn(BATCHES, batch, forth[0].shape[1]), torch.randint(0, 10, (BATCHES, batch))
    members = torch.stack([membership(row, 10, inputs.dtype) for row in labels]).to(device)
    sizes = [0, *(len(weight) for weight in forth)]
    first, second = ([torch.empty(batch, size, device=device) for size in sizes] for _ in range(2))
    b = [torch.empty(10, size, device=device) for size in sizes[:-1]] + [torch.eye(10, device=device)]
    return Net(forth, back, (first, second), b, inputs.to(device), members, **options)


def sequential(net: Net, first: int, steps: int, sweep: bool = False) -> None:
    """The reference: G's pass, F's pass, all updates. Or in one sweep: a layer is updated while its activity is cached."""
    for t in range(first, first + steps):
        net.feedback()
        for runs in ((net.forward, net.update),) if sweep else ((net.forward,), (net.update,)):
            for level in range(1, net.last + 1):
                for run in runs:
                    run(level, t)


def settle(net: Net, signals: Any) -> None:
    """P waits for all updates of a batch."""
    for level in range(1, net.last + 1):
        signals.wait(("updated", level))


def lead(schedule: str, net: Net, signals: Any, t: int, fresh: bool) -> None:
    """P's part of batch t; `fresh`: there are no updates of a batch before to wait for. Every post is waited for once."""
    ahead = schedule == "wavefront"
    if not (ahead or fresh):
        settle(net, signals)
    for level in range(1, net.last + 1):
        if ahead and not fresh:
            signals.wait(("updated", level))
        if ahead and level == (1 if fresh else net.last - 1):
            net.feedback()
            signals.post(("coded", 0))
        net.forward(level, t)
        signals.post(("made", level))


def follow(schedule: str, net: Net, signals: Any, t: int) -> None:
    """Q's part of batch t: the updates; where only F and G are concurrent, G's pass before them."""
    if schedule == "wavefront":
        signals.wait(("coded", 0))
    else:
        net.feedback()
        for level in range(1, net.last + 1):
            signals.wait(("made", level))
    for level in range(1, net.last + 1):
        if schedule == "wavefront":
            signals.wait(("made", level))
        net.update(level, t)
        signals.post(("updated", level))


def keys(last: int) -> list[Key]:
    return [("coded", 0), *((what, level) for level in range(1, last + 1) for what in ("made", "updated"))]


class Semaphores:
    """Signals between processes. A partner that ended is noticed at once, one that hangs after `patience` seconds."""

    def __init__(self, semaphores: dict[Key, Semaphore], alive: Callable[[], bool], patience: float) -> None:
        self.semaphores, self.alive, self.patience = semaphores, alive, patience

    def post(self, key: Key) -> None:
        self.semaphores[key].release()

    def wait(self, key: Key) -> None:
        semaphore = self.semaphores[key]
        for _ in range(SPINS):
            if semaphore.acquire(False):
                return
        until = time.monotonic() + self.patience
        while not semaphore.acquire(True, 0.05):
            if not self.alive():
                raise PartnerError(f"the other process ended before {key}")
            if time.monotonic() > until:
                raise PartnerError(f"the other process hangs: no {key} in {self.patience} s")


def serve(nets: dict[str, Net], semaphores: dict[Key, Semaphore], pipe: Connection, patience: float) -> None:
    """Process Q: runs its part of every turn it is told of, until the pipe is closed."""
    torch.set_num_threads(1)
    parent = mp.parent_process()
    signals = Semaphores(semaphores, lambda: parent is not None and parent.is_alive(), patience)
    try:
        while True:
            schedule, first, steps = pipe.recv()
            if schedule == "apart":
                sequential(nets[schedule], first, steps)
                signals.post(("coded", 0))
                continue
            for t in range(first, first + steps):
                follow(schedule, nets[schedule], signals, t)
    except EOFError:
        return


class TwoProcesses:
    """This process as P and a new one as Q; `nets` has a network in shared memory per schedule.

    Raises:
        PartnerError: from :meth:`run`, when Q ended or hangs; Q is then killed, and the weights are of no use.
    """

    def __init__(self, nets: dict[str, Net], patience: float = 60.0) -> None:
        context = mp.get_context("spawn")
        self.nets = nets
        for tensor in (tensor for net in nets.values() for tensor in net.tensors()):
            tensor.share_memory_()
        semaphores = {key: context.Semaphore(0) for key in keys(max(net.last for net in nets.values()))}
        self.pipe, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=serve, args=(nets, semaphores, theirs, patience), daemon=True)
        self.process.start()
        theirs.close()
        self.signals = Semaphores(semaphores, self.process.is_alive, patience)

    def run(self, schedule: str, first: int, steps: int) -> None:
        net = self.nets[schedule]
        try:
            self.pipe.send((schedule, first, steps))
            for t in range(first, first + steps):
                lead(schedule, net, self.signals, t, t == first)
            settle(net, self.signals)
        except (PartnerError, OSError) as error:
            self.close()
            raise PartnerError(f"{error}; its exit code: {self.process.exitcode}") from error

    def apart(self, net: Net, first: int, steps: int) -> None:
        """A control: both processes train in sequence, each a network of its own."""
        self.pipe.send(("apart", first, steps))
        sequential(net, first, steps)
        self.signals.wait(("coded", 0))

    def close(self) -> None:
        self.pipe.close()  # an idle Q ends by that
        self.process.join(0.5)
        self.process.kill()
        self.process.join()


class Events:
    """Signals between streams: a wait is for the latest record, which the host has queued before."""

    def __init__(self, last: int) -> None:
        self.events = {key: torch.cuda.Event() for key in keys(last)}

    def post(self, key: Key) -> None:
        self.events[key].record()

    def wait(self, key: Key) -> None:
        torch.cuda.current_stream().wait_event(self.events[key])


def two_streams(schedule: str, net: Net, signals: Any, streams: tuple[Any, Any], first: int, steps: int) -> None:
    """Queue both workers' parts from one host thread, between synchronisations; with streams (None, None) run them so."""
    for t in range(first, first + steps):
        with torch.cuda.stream(streams[0]):
            lead(schedule, net, signals, t, t == first)
        with torch.cuda.stream(streams[1]):
            follow(schedule, net, signals, t)


def bench(title: str, batch: int, device: str, quick: bool) -> dict[str, Any]:
    """A row: all kinds of steps take turns in every round, each turn with as many steps not timed before it."""
    model, shape, rounds, times = MODELS[title]
    rounds, times = (3, 4) if quick else (rounds, times)
    both = ("wavefront", "concurrent")
    nets = {kind: make_net(model, shape, batch, device) for kind in ("sequential", "sweep", *both, "alone", "apart")}
    alone, rule = nets["alone"], apical.Backprop(models.build(model, shape, 10).to(device))
    optimizer, levels = torch.optim.SGD(rule.parameters(), lr=alone.lr), range(1, alone.last + 1)
    images, labels = alone.inputs.view(BATCHES, batch, *shape), alone.members.argmax(2)

    def bp(first: int, steps: int) -> None:
        for t in range(first, first + steps):
            optimizer.zero_grad()
            rule(images[t % BATCHES], labels[t % BATCHES]).backward()
            optimizer.step()

    def piece(calls: list[Callable[[], None]], first: int, steps: int) -> None:
        for call in calls * steps:
            call()

    turns: dict[str, Callable[[int, int], None]] = {
        "sequential": partial(sequential, nets["sequential"]),
        "sweep": partial(sequential, nets["sweep"], sweep=True),
        "forward": partial(piece, [partial(alone.forward, level, 0) for level in levels]),
        "feedback": partial(piece, [alone.feedback]),
        "update": partial(piece, [partial(alone.update, level, 0) for level in levels]),
        "update_last": partial(piece, [partial(alone.update, alone.last, 0)]),
        "bp": bp,
    }
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    workers = None if device == "cuda" else TwoProcesses({kind: nets[kind] for kind in (*both, "apart")})
    for kind in both:
        if workers is None:
            streams = torch.cuda.Stream(), torch.cuda.Stream()
            turns[kind] = partial(two_streams, kind, nets[kind], Events(alone.last), streams)
        else:
            turns[kind] = partial(workers.run, kind)
    if workers is not None:
        turns["apart"] = partial(workers.apart, alone)
    turns = {kind: turns[kind] for kind in ("sequential", "wavefront", *reversed(turns))}  # what is compared is neighbours
    sequential(alone, 0, 1)  # activities for the pieces
    ms: dict[str, list[float]] = {kind: [] for kind in turns}
    gc.disable()
    for turn in range(rounds):
        for kind, run in turns.items():
            run(2 * turn * times, times)
            wait()
            start = time.perf_counter()
            run((2 * turn + 1) * times, times)
            wait()
            ms[kind].append(1e3 * (time.perf_counter() - start) / times)
    gc.enable()
    if workers is not None:
        workers.close()
    weights = {kind: [*net.forth, *net.back] for kind, net in nets.items()}
    equal = {kind: all(map(torch.equal, weights["sequential"], weights[kind])) for kind in ("sweep", *both)}
    middle = {kind: statistics.median(values) for kind, values in ms.items()}
    low, speed_up, high = statistics.quantiles([a / b for a, b in zip(ms["sequential"], ms["wavefront"], strict=True)], n=4)
    p, q = middle["feedback"] + middle["forward"], middle["update"]
    cycle = q + max(0.0, middle["feedback"] - middle["update_last"])
    row: dict[str, Any] = {"model": title, "batch": batch, "device": device, "rounds": rounds, "steps_per_round": times}
    row |= {f"ms_{kind}": round(value, 4) for kind, value in middle.items()}
    row |= {"speed_up": round(speed_up, 4), "quartiles": [round(low, 4), round(high, 4)]}
    row["speed_up_of_minima"] = round(min(ms["sequential"]) / min(ms["wavefront"]), 4)
    row["limit"] = round(middle["sequential"] / max(p, q), 4)
    row["limit_of_cycle"] = round(middle["sequential"] / max(p, cycle), 4)
    if "apart" in ms:
        row["cores"] = round(statistics.median(2 * a / b for a, b in zip(ms["sequential"], ms["apart"], strict=True)), 4)
    row |= {"bit_equal": equal["wavefront"], "bit_equal_sweep": equal["sweep"], "bit_equal_concurrent": equal["concurrent"]}
    return row


def main() -> None:
    from run import environment, save  # beside this file where it is a script; tests import it from the root

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "wavefront.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a smoke run: the small model, one batch size, few rounds")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS promises no equal bits on several streams
    torch.set_num_threads(1)
    rows = []
    for title in list(MODELS)[: 1 if options.quick else None]:
        for batch in (128,) if options.quick else (128, 256):
            rows.append(bench(title, batch, options.device, options.quick))
            print(json.dumps(rows[-1]), flush=True)
    found = {**environment(torch.device(options.device)), "clock": "wall"}
    save(options.out, {"environment": found, "rows": rows})


if __name__ == "__main__":
    main()
