"""`apical.pipeline`: train a chain on several processes in parallel, by rules without backward locking.

    part 2      learn t-1      learn t        learn t+1      the upper blocks, from what part 1 made
    part 1      learn t        learn t+1      learn t+2      the lower blocks, from the inputs

In backpropagation a layer's gradient comes after those of all layers above it (backward locking), so two such parts would
wait for each other. Blocks that learn from what is there when they have run need not (:mod:`apical.core.part`). Every
number is the one that serial training makes. Parameters and buffers move to shared memory; this process has the first
part, each other part a process of its own.
"""

import itertools
import pickle
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from apical.core.batch import require_samples
from apical.core.channel import Channel, Way, channel
from apical.core.credit import CreditRule
from apical.core.layers import is_random
from apical.core.part import Part, Separable, divided, learn, tried, work
from apical.errors import ApicalError, ConfigError, UnsupportedModelError

SEPARATE = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta", "ASGD", "Rprop")
"""Optimisers of PyTorch that move each parameter by its own gradient alone."""

PATIENCE = 30.0
"""Seconds that a process may take to end once its pipe has closed."""


def pipeline(rule: CreditRule, optimizer: Optimizer, workers: int = 2, split: Sequence[int] | None = None) -> "Pipeline":
    """Train a chain on several processes in parallel, by a rule without backward locking; bit for bit as in one.

    Calling what is returned learns a batch. Leave the `with` block, or call its `wait()`, before anything reads the weights.
    The first batch is the largest; it is tried in parts and as a whole, whose gradients must be equal bits. A script needs
    `if __name__ == "__main__":`, as always where Python starts processes.

    Args:
        rule: counter-current learning (without `mask`), direct feedback alignment or local classifiers, on the CPU, of a
            model that is a row of blocks without random modules.
        optimizer: of PyTorch, for the rule's parameters, that moves each parameter by itself; learning rates may change.
        workers: processes, this one included.
        split: numbers of blocks in each; by default the work of the busiest is least.

    Raises:
        ConfigError: the optimiser, `workers` or `split`; or, in use, a batch larger than the first.
        UnsupportedModelError: the rule has backward locking, or the model is no such row.
        ApicalError: in use, a process failed or was killed.

    >>> import apical
    >>> rule = apical.Backprop(torch.nn.Linear(4, 3))
    >>> pipeline(rule, torch.optim.SGD(rule.parameters(), lr=0.1))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    apical.errors.UnsupportedModelError: Backprop has backward locking: its first layer learns last; a pipeline takes ...
    """
    name = type(rule).__name__
    if not isinstance(rule, Separable):
        why = (
            "has backward locking: its first layer learns last"
            if rule.chains_errors
            else "has no parts that learn independently"
        )
        raise UnsupportedModelError(
            f"{name} {why}; a pipeline takes CounterCurrentLearning, DirectFeedbackAlignment and LocalClassifiers"
        )
    if type(optimizer).__name__ not in SEPARATE or type(optimizer).__module__.partition(".")[0] != "torch":
        raise ConfigError(
            f"{type(optimizer).__name__} may use several parameters together, which are in different processes; use one "
            f"of PyTorch's {', '.join(SEPARATE)}"
        )
    if any(tensor.device.type != "cpu" for tensor in (*rule.parameters(), *rule.buffers())):
        raise UnsupportedModelError(f"the pipeline's processes are on the CPU; move the {name} there")
    odd = next((name for name, module in rule.named_modules() if is_random(module)), None)
    if odd is not None:
        raise UnsupportedModelError(f"module {odd!r} draws random numbers, in a different order in each process; remove it")
    if workers < 2:
        raise ConfigError(f"a pipeline needs at least 2 workers, not {workers}")
    return Pipeline(rule, optimizer, workers, split)


class Worker(NamedTuple):
    """Another process with its part."""

    process: Any
    orders: Channel
    reports: Connection


class Pipeline:
    """A rule that learns on several processes, see :func:`pipeline`.

    Attributes:
        losses: of every batch up to the last :meth:`wait`.
        parts: indices of each process's blocks, once the first batch has come.
    """

    def __init__(self, rule: CreditRule, optimizer: Optimizer, workers: int, split: Sequence[int] | None) -> None:
        self.rule: Any = rule
        self.optimizer, self.workers, self.split = optimizer, workers, split
        self.losses: list[float] = []
        self.parts: list[range] = []
        self._workers: list[Worker] = []
        self._part = Part(range(0))
        self._ends: Sequence[Channel] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self.close()

    def __call__(self, inputs: Tensor, targets: Tensor) -> None:
        """Learn a batch: `inputs` (batch, ...) and their targets. Other parts may still be learning it on return."""
        require_samples(inputs)
        if not self._workers:
            self._start(inputs, targets)
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        with self._watched():
            for worker in self._workers:
                worker.orders.send(targets, options)
            self.optimizer.zero_grad()
            learn(self.rule, self._part, inputs, targets)
            self.optimizer.step()

    def wait(self) -> None:
        """Return once all is learned: weights and the state of the optimiser are then those of serial training."""
        parameters = list(self.rule.parameters())
        with self._watched():
            for worker in self._workers:
                worker.orders.send(worker.orders.slots[0][:0], None)
            for worker in self._workers:
                losses, state = pickle.loads(worker.reports.recv_bytes())
                self.losses += losses
                self.optimizer.state.update({parameters[i]: value for i, value in state.items()})

    def close(self) -> None:
        """End the other processes; what they have not learned yet is lost."""
        for worker in self._workers:
            worker.orders.pipe.close()
        for end in self._ends:
            end.pipe.close()
        for worker in self._workers:
            worker.process.join(1.0)
            worker.process.kill()
            worker.process.join()
        self._workers = []

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Within, a process that ended is named in one line; after any error the others are ended too."""
        try:
            yield
        except (EOFError, ConnectionError) as error:
            ended = wait([worker.process.sentinel for worker in self._workers], PATIENCE)
            for worker in self._workers:
                if worker.process.sentinel in ended:
                    worker.process.join()  # the sentinel may close before the pipes and the exit status are there
            ends = [self._end(number, worker) for number, worker in enumerate(self._workers, 2)]
            self.close()
            raise ApicalError(next((end for end in ends if end), "a process of the pipeline ended")) from error
        except BaseException:
            self.close()
            raise

    def _end(self, number: int, worker: Worker) -> str:
        """Return why a process ended; empty if it did not, or was told to."""
        code, why = worker.process.exitcode, ""
        try:
            if worker.reports.poll():
                why = f"failed: {worker.reports.recv_bytes().decode()}"
        except EOFError:
            if code:
                how = f"was killed by signal {-code}, possibly out of memory" if code < 0 else f"ended with status {code}"
                why = f"{how}; the parts have learned different batches, so continue from a checkpoint"
        return why and f"process {number} of {self.workers} of the pipeline {why}"

    def _start(self, inputs: Tensor, targets: Tensor) -> None:
        """Divide the blocks, see on this batch that the parts learn what the rule does, and start the processes."""
        rule = self.rule
        kept = [(buffer, buffer.clone()) for buffer in rule.model.buffers()]
        try:
            head, row = rule.chain(inputs.shape[1:])
            with torch.no_grad():
                costs = work(head, row, inputs)
            self.parts = divided(costs, self.workers, self.split)
            sent = tried(rule, self.parts, inputs, targets)
        finally:
            rule.zero_grad()
            with torch.no_grad():
                for buffer, before in kept:
                    buffer.copy_(before)
        for tensor in (*rule.parameters(), *rule.buffers()):
            tensor.share_memory_()
        context = get_context("spawn")
        ways = [(channel(context, up), channel(context, down)) for up, down in sent]
        ups = [Way(up[0], down[1]) for up, down in ways]
        downs = [Way(down[0], up[1]) for up, down in ways]
        self._part, *others = [Part(*each) for each in zip(self.parts, [None, *downs], [*ups, None], strict=True)]
        for part in others:
            ours, theirs = channel(context, [targets])
            reports, sender = context.Pipe(duplex=False)
            arguments = (rule, self.optimizer, part, theirs, sender, torch.get_num_threads(), torch.get_default_dtype())
            process = context.Process(target=serve, args=arguments, daemon=True)
            try:
                process.start()
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                self.close()
                raise ConfigError(
                    f"the rule cannot be sent to another process ({error}); give it a loss and modules that are defined in "
                    "a file, not within a function"
                ) from error
            self._workers.append(Worker(process, ours, reports))
            sender.close()
            theirs.pipe.close()
        self._ends = ups[0]
        for end in itertools.chain(*ups[1:], *downs):
            end.pipe.close()


def serve(
    rule: Any, optimizer: Optimizer, part: Part, orders: Channel, reports: Connection, threads: int, dtype: torch.dtype
) -> None:
    """Learn a part of every requested batch in a separate process until the request pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    losses: list[float] = []
    try:
        while True:
            targets, options = orders.receive_noted()
            if options is None:
                learned = [(i, p) for i, p in enumerate(rule.parameters()) if p.grad is not None]
                state = {i: optimizer.state[p] for i, p in learned if p in optimizer.state}
                reports.send_bytes(pickle.dumps((losses, state)))
                losses = []
                continue
            for group, option in zip(optimizer.param_groups, options, strict=True):
                group.update(option)
            optimizer.zero_grad()
            loss = learn(rule, part, targets, targets)
            optimizer.step()
            losses += [] if loss is None else [loss.item()]
    except (EOFError, ConnectionError):
        return
    except Exception as error:
        reports.send_bytes(f"{type(error).__name__}: {error}".encode())
        raise SystemExit(1) from None
