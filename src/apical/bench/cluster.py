"""Trainings as tasks of a Ray cluster that sees their folders; tasks lost with a worker or its machine are restarted."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from apical.bench.signals import Interrupted, StopSignals
from apical.errors import ApicalError
from apical.evolution.workers import RETRIES, connected, lost

Run = Callable[[Callable[..., None], Sequence[tuple[Any, ...]], StopSignals, Callable[[], None]], None]
"""Calls a function, importable by name, with each of the arguments in a separate task; calls the last one periodically."""


@contextmanager
def cluster(address: str, jobs: int | None) -> Iterator[Run]:
    """Connect to a cluster, or start a local one that is shut down afterwards.

    A task stopped by a signal is killed: its run continues from its last checkpoint. A task whose worker is lost is
    restarted, at most :data:`RETRIES` times.

    Args:
        address: address of the cluster, or "local".
        jobs: number of workers of a local cluster; None means one per core.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers.
    """
    ray, started = connected(address, jobs)

    def run(
        body: Callable[..., None], calls: Sequence[tuple[Any, ...]], stop: StopSignals, refresh: Callable[[], None]
    ) -> None:
        remote = ray.remote(num_cpus=1, max_retries=RETRIES)(body)
        pending = [remote.remote(*arguments) for arguments in calls]
        ended = 0
        try:
            while pending and not stop.signum:
                ready, pending = ray.wait(pending, timeout=0.5)
                ray.get(ready)
                ended += len(ready)
                refresh()
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ApicalError | OSError):
                raise error.cause from None
            raise error.as_instanceof_cause() from None
        except ray.exceptions.RayError as error:
            raise lost(error) from None
        finally:
            for task in pending:
                ray.cancel(task, force=True)
        if stop.signum:
            raise Interrupted(stop.signum, f"{ended} of {len(calls)} tasks of this batch")

    try:
        yield run
    finally:
        if started:
            ray.shutdown()
