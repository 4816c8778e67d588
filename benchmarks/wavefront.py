"""Counter-current learning has no backward locking: batch t+1 goes forward while batch t is still being learned.

Every weight belongs to one pair, and a pair is complete as soon as its two activities are (l < L; U_L has the loss):

    forward   a_l = phi(a_{l-1} U_l^T)              feedback  b_l = phi(b_{l+1} V_{l+1}^T),  b_L = I (a row per class)
    pair l    U_l, V_{l+1} -= lr clip(gradient of the inner pair loss (a_l, b_l)), each matrix clipped by its own norm

What must wait for what, with (t) the batch:

    forward l (t+1)    after  update l (t)                             no other update: U_l is in one pair only
    feedback  (t+1)    after  update L-1 (t), with it all before it    its first matrix V_L is in the last pair
    update l  (t)      after  forward l (t) and feedback (t)

So of two workers P goes forward through batch t+1 one layer behind Q, which updates by batch t. P makes the feedback pass
when update L-1 is done, before its own layer L-1: Q needs the codes next, and has only update L to do until they are there.
Hence the ideal step takes max(T_P, T_Q), T_P = feedback + forward, T_Q = updates; or max(T_P, T_Q + feedback - update L),
as the cycle update 1..L-1 -> feedback -> update 1 leaves Q nothing else to do. In backpropagation the first update of a
batch is that of layer L, so that nothing of this overlaps.

Activities have two buffers, by the parity of t: forward l (t+2) follows update l (t+1), and by then Q is done with batch t.
The codes need only one. Every operation is the same, on the same shapes, as in the sequential order: so are the weights, bit
for bit, which is checked. On a CPU the workers are two processes with shared tensors and a semaphore per layer and direction
(they count steps, order memory, and sleep in the kernel); on a GPU they are two streams with events, launched one by one or
as a CUDA graph.

    python benchmarks/wavefront.py [--out benchmarks/wavefront.json] [--device cuda] [--quick]
"""

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical import models
from apical.core.activations import pulled_back
from apical.core.pairing import inner, membership

BATCHES, ELU, SCALE = 8, nn.ELU(), 0.5
"""An even number of batches, so that a CUDA graph of one round of them keeps the buffers' parity."""

MODELS = {
    "MLP 784-256x5-10": ("mlp-elu-256-256-256-256-256", (1, 28, 28)),
    "MLP 3072-1024x3-10": ("mlp-elu-1024-1024-1024", (3, 32, 32)),
}
SPINS = 400
"""Tries before a worker sleeps, about 0.1 ms: waking up costs as much."""

Key = tuple[str, int]
"""What a worker has done: ("made", l), ("updated", l) or ("coded", 0)."""


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

    def share(self) -> "Net":
        for tensor in self.tensors():
            tensor.share_memory_()
        return self

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


def sequential(net: Net, first: int, steps: int) -> None:
    """The reference: G's pass, F's pass, all updates."""
    for t in range(first, first + steps):
        net.feedback()
        for run in (net.forward, net.update):
            for level in range(1, net.last + 1):
                run(level, t)


def single_sweep(net: Net, first: int, steps: int) -> None:
    """One process, too, but every layer is updated while its activity is in the cache."""
    for t in range(first, first + steps):
        net.feedback()
        for level in range(1, net.last + 1):
            net.forward(level, t)
            net.update(level, t)


class Signals(Protocol):
    """How one worker learns what the other has done; every post is waited for once."""

    def wait(self, key: Key) -> None: ...

    def post(self, key: Key) -> None: ...


def keys(last: int) -> list[Key]:
    return [("coded", 0), *((what, level) for level in range(1, last + 1) for what in ("made", "updated"))]


def lead(schedule: str, net: Net, signals: Signals, t: int, fresh: bool) -> None:
    """P's part of batch t. `fresh`: no batch before it, to whose updates to wait for."""
    if schedule == "concurrent" and not fresh:
        signals.wait(("updated", net.last))
    for level in range(1, net.last + 1):
        if schedule == "wavefront":
            if not fresh:
                signals.wait(("updated", level))
            if level == (1 if fresh else net.last - 1):
                net.feedback()
                signals.post(("coded", 0))
        net.forward(level, t)
        if schedule == "wavefront" or level == net.last:
            signals.post(("made", level))


def follow(schedule: str, net: Net, signals: Signals, t: int) -> None:
    """Q's part of batch t: the updates; if only F and G are concurrent, G's pass before them."""
    if schedule == "concurrent":
        net.feedback()
        signals.wait(("made", net.last))
    else:
        signals.wait(("coded", 0))
    for level in range(1, net.last + 1):
        if schedule == "wavefront":
            signals.wait(("made", level))
        net.update(level, t)
        if schedule == "wavefront" or level == net.last:
            signals.post(("updated", level))


def settle(schedule: str, net: Net, signals: Signals) -> None:
    """P waits for the last batch's updates."""
    for level in range(1 if schedule == "wavefront" else net.last, net.last + 1):
        signals.wait(("updated", level))


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
    """Process Q: runs its part of every turn it is told of, until None or until the pipe is closed."""
    torch.set_num_threads(1)
    parent = mp.parent_process()
    signals = Semaphores(semaphores, lambda: parent is not None and parent.is_alive(), patience)
    try:
        while (turn := pipe.recv()) is not None:
            schedule, first, steps = turn
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
            settle(schedule, net, self.signals)
        except (PartnerError, OSError) as error:
            self.close()
            raise PartnerError(f"{error}; its exit code: {self.process.exitcode}") from error

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


def two_streams(schedule: str, net: Net, signals: Signals, streams: Iterable[Any], first: int, steps: int) -> None:
    """Both workers from one host thread. Without streams (None, None) simply in that order, for tests of the schedule."""
    p, q = streams
    for stream in (p, q):
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
    for t in range(first, first + steps):
        with torch.cuda.stream(p):
            lead(schedule, net, signals, t, t == first)
        with torch.cuda.stream(q):
            follow(schedule, net, signals, t)
    settle(schedule, net, signals)
    for stream in (p, q):
        if stream is not None:
            torch.cuda.current_stream().wait_stream(stream)


def captured(run: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """The same as a CUDA graph of one round of batches; to be called with whole rounds."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(0, BATCHES)  # libraries make their workspaces
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(0, BATCHES)

    def replay(first: int, steps: int) -> None:
        for _ in range(steps // BATCHES):
            graph.replay()

    return replay
