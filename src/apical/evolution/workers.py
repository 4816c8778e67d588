"""Who evaluates a population: this process, or a Ray cluster, chunk by chunk and with the same result.

A chunk is evaluated alone, by whoever takes it, so a result depends on the size of the chunks and on nothing else.
"""

import socket
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from apical.errors import ApicalError, ConfigError

RETRIES = 5
"""How often a piece of work whose worker was lost is given to another one."""


class Task(Protocol):
    """What top-down networks are evolved for. It must survive pickling, and hold no state from call to call.

    Attributes:
        start: weights (D,) that evolution starts from.
    """

    start: Tensor

    def fitness(self, individuals: Tensor, generation: int) -> Tensor:
        """Fitness (P,) of individuals (P, D), higher being better; all randomness follows from the generation."""
        ...


class Workers(Protocol):
    """Evaluates populations, until closed."""

    def evaluate(self, task: Task, individuals: Tensor, generation: int) -> Tensor:
        """Fitness (P,) of individuals (P, D)."""
        ...

    def close(self) -> None:
        """Let the workers go."""
        ...


class Here:
    """This process, one chunk after the other.

    Args:
        chunk: individuals evaluated at once; memory grows with it, and with nothing else of the population.
    """

    def __init__(self, chunk: int = 64) -> None:
        self.chunk = _checked(chunk)

    def evaluate(self, task: Task, individuals: Tensor, generation: int) -> Tensor:
        """Fitness (P,) of individuals (P, D)."""
        return torch.cat([task.fitness(part, generation) for part in individuals.split(self.chunk)])

    def close(self) -> None:
        """Nothing to let go."""


class RayWorkers:
    """A Ray cluster: chunks are sent to whatever worker is free, and sent again when a worker or its machine is lost.

    Args:
        address: "local" starts Ray on this machine; otherwise the address of a running cluster (`ray start --head`).
        count: workers on this machine, for "local"; None takes one per core.
        chunk: individuals per piece of work.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers at the address.
    """

    def __init__(self, address: str = "local", count: int | None = None, chunk: int = 64) -> None:
        self.chunk = _checked(chunk)
        self._ray, self._started = connected(address, count)
        # The chunk of a worker that is lost is evaluated again; an error of the task's own is not repeated.
        self._remote = self._ray.remote(num_cpus=1, max_retries=RETRIES)(_evaluate)
        self._sent: tuple[Task, Any] | None = None

    def evaluate(self, task: Task, individuals: Tensor, generation: int) -> Tensor:
        """Fitness (P,) of individuals (P, D)."""
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
        """Leave the cluster; one that was started here ends."""
        if self._started and self._ray.is_initialized():
            self._ray.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def lost(error: Exception) -> ApicalError:
    """Ray's error for work whose workers were lost again and again, in one line."""
    what = str(error).strip().partition("\n")[0].rstrip(".")
    return ApicalError(
        f"Ray lost the workers of one task {RETRIES + 1} times, possibly out of memory, or because its code ends them "
        f"({type(error).__name__}: {what[:120]}); continue with --resume"
    )


def connected(address: str, count: int | None) -> tuple[Any, bool]:
    """Ray, and whether it was started or joined here: then whoever asked for it shuts it down.

    Args:
        address: "local" starts Ray on this machine; otherwise the address of a running cluster (`ray start --head`).
        count: cores to use on this machine, for "local"; None takes all.

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
    """Fail soon where nobody listens at host:port: Ray itself would try for minutes."""
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
        raise ConfigError(f"a chunk has at least one individual; got {chunk}")
    return chunk
