"""Evaluate a population in this process or on a Ray cluster, in chunks and with the same result.

Each chunk is evaluated independently by any worker, so a result depends only on the chunk size.
"""

import socket
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from apical.errors import ApicalError, ConfigError

RETRIES = 5
"""How often a chunk is retried after its worker was lost."""


class Task(Protocol):
    """Task that top-down networks are evolved for. It must be picklable and keep no state between calls.

    Attributes:
        start: weights (D,) that evolution starts from.
    """

    start: Tensor

    def fitness(self, individuals: Tensor, generation: int) -> Tensor:
        """Return fitness (P,) of individuals (P, D), higher being better; all randomness derives from the generation."""
        ...


class Workers(Protocol):
    """Evaluator of populations, until closed."""

    def evaluate(self, task: Task, individuals: Tensor, generation: int) -> Tensor:
        """Return fitness (P,) of individuals (P, D)."""
        ...

    def close(self) -> None:
        """Release the workers."""
        ...


class Here:
    """Evaluation in this process, one chunk after the other.

    Args:
        chunk: individuals evaluated together; memory depends on this, not on the size of the population.
    """

    def __init__(self, chunk: int = 64) -> None:
        self.chunk = _checked(chunk)

    def evaluate(self, task: Task, individuals: Tensor, generation: int) -> Tensor:
        """Return fitness (P,) of individuals (P, D)."""
        return torch.cat([task.fitness(part, generation) for part in individuals.split(self.chunk)])

    def close(self) -> None:
        """Do nothing: there are no workers to release."""


class RayWorkers:
    """A Ray cluster: chunks are sent to any free worker, and sent again if a worker or its machine is lost.

    Args:
        address: "local" starts Ray on this machine; otherwise the address of a running cluster (`ray start --head`).
        count: workers on this machine, for "local"; None means one per core.
        chunk: individuals per chunk.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers at the address.
    """

    def __init__(self, address: str = "local", count: int | None = None, chunk: int = 64) -> None:
        self.chunk = _checked(chunk)
        self._ray, self._started = connected(address, count)
        # The chunk of a lost worker is evaluated again; an error in the task itself is not retried.
        self._remote = self._ray.remote(num_cpus=1, max_retries=RETRIES)(_evaluate)
        self._sent: tuple[Task, Any] | None = None

    def evaluate(self, task: Task, individuals: Tensor, generation: int) -> Tensor:
        """Return fitness (P,) of individuals (P, D)."""
        if self._sent is None or self._sent[0] is not task:
            self._sent = (task, self._ray.put(task))
        held, dtype = self._sent[1], torch.get_default_dtype()
        pending = [self._remote.remote(held, part.clone(), generation, dtype) for part in individuals.split(self.chunk)]
        try:
            return torch.cat(self._ray.get(pending))
        except self._ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from None
        except self._ray.exceptions.RayError as error:
            raise lost(error) from None

    def close(self) -> None:
        """Disconnect from the cluster; shut it down if it was started here."""
        if self._started and self._ray.is_initialized():
            self._ray.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def lost(error: Exception) -> ApicalError:
    """Return a one-line error for work whose workers were lost repeatedly."""
    what = str(error).strip().partition("\n")[0].rstrip(".")
    return ApicalError(
        f"Ray lost the workers of one task {RETRIES + 1} times, possibly out of memory, or because its code terminates them "
        f"({type(error).__name__}: {what[:120]}); continue with --resume"
    )


def connected(address: str, count: int | None) -> tuple[Any, bool]:
    """Return Ray and whether it was started or joined here; if so, the caller must shut it down.

    Args:
        address: "local" starts Ray on this machine; otherwise the address of a running cluster (`ray start --head`).
        count: cores to use on this machine, for "local"; None means all.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(f"--ray needs Ray: pip install 'apical[evolution]' ({error})") from error
    library: Any = ray
    if library.is_initialized():
        return library, False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        library.init(address="local", num_cpus=count, include_dashboard=False, **quiet)
        return library, True
    _knock(address)
    try:
        library.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise ConfigError(f"no Ray cluster answers at {address!r}: start one with `ray start --head`") from error
    return library, True


def _knock(address: str, seconds: float = 5.0) -> None:
    """Fail quickly if nothing listens at host:port; Ray itself would retry for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), seconds).close()
    except OSError as error:
        message = f"no Ray cluster answers at {address!r} ({error}): start one with `ray start --head`"
        raise ConfigError(message) from error


def _evaluate(task: Task, individuals: Tensor, generation: int, dtype: torch.dtype) -> Tensor:
    torch.set_num_threads(1)  # one core per worker
    torch.set_default_dtype(dtype)
    return task.fitness(individuals, generation)


def _checked(chunk: int) -> int:
    if chunk < 1:
        raise ConfigError(f"a chunk needs at least one individual; got {chunk}")
    return chunk
