"""Parts of a study, each saved to a JSON file as soon as it is finished, so that nothing is computed twice or lost."""

import json
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from apical.bench.state import read_json, write_state
from apical.core import children
from apical.errors import ApicalError, CheckpointError, warning_line


def kept(path: Path, config: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `make` returns, from the file if it has the same configuration; `seconds` is the time that `make` took.

    Args:
        config: the settings that determine it; tuples in it are lists in the file.

    Raises:
        CheckpointError: the file is damaged, or has a different configuration.
    """
    config = json.loads(json.dumps(dict(config)))
    if path.exists():
        cell = read_json(path)
        saved = cell.get("config")
        unlike = {key: value for key, value in config.items() if not isinstance(saved, dict) or saved.get(key) != value}
        if unlike:
            raise CheckpointError(f"{path} was made with other settings than {unlike}; choose another --out")
        return cell
    start = time.perf_counter()
    results = make()
    content = {"config": config, "seconds": round(time.perf_counter() - start, 2), **results}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_state(path, content)
    return content


Part = TypeVar("Part")
Made = TypeVar("Made")


def side_by_side(jobs: int, parts: Sequence[Part], make: Callable[[Part], Made], out: Path) -> Iterator[tuple[Part, Made]]:
    """Yield each part with the result of `make`, in the order in which they finish; every part uses one torch thread.

    Args:
        jobs: processes, 0 for one per core; 1 stays in this process.
        parts: passed to other processes, as `make` is, so both must be picklable.
        out: named in the error if a process was killed; parts that `make` saved there are not computed again.

    Raises:
        ApicalError: a process was killed.
    """
    threads = torch.get_num_threads()
    jobs = min(jobs or os.cpu_count() or 1, len(parts))
    if jobs == 1:
        torch.set_num_threads(1)
        try:
            for part in parts:
                yield part, make(part)
        finally:
            torch.set_num_threads(threads)
        return
    with ProcessPoolExecutor(jobs, children.context(__name__), _begin, (dict(os.environ),)) as pool:
        with _interrupts_ignored():
            running = {pool.submit(make, part): part for part in parts}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        except BrokenProcessPool as error:
            raise ApicalError(f"a training was killed; run the same command again to continue from {out}") from error
        except BaseException:
            for process in list(pool._processes.values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin(environment: dict[str, str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server may have started before it was ignored
    if os.name == "posix":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # or while it was blocked
    children.adopt(environment)
    warnings.formatwarning = warning_line
    torch.set_num_threads(1)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Shield processes started within from Ctrl-C, which would make each print a traceback; this process ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
