"""Worker processes for the seeds of a comparison: they obey signals, report why they ended, and end with their parent."""

import multiprocessing
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from apical import own_code
from apical.bench.signals import Interrupted, StopSignals
from apical.core import children
from apical.errors import ApicalError, out_of_memory, warning_line

Body = Callable[[int, StopSignals], None]
"""Trains one seed; raises Interrupted once everything is saved. Importable by name."""


DONE = "done"
"""A worker's final message."""


def run(seeds: Sequence[int], at_once: int, body: Body, stop: StopSignals, refresh: Callable[[], None]) -> None:
    """Call `body` for each seed in a separate process, `at_once` at a time; `refresh` is called periodically.

    Raises:
        Interrupted: a signal came and was passed on; every worker has ended.
        ApicalError: a worker failed; the others were told to save and stop.
        OSError: likewise, disk full or no permission.
    """
    context = children.context("apical.bench.compare")
    running: dict[int, tuple[BaseProcess, Connection]] = {}
    failures: list[Exception] = []
    waiting, told = list(seeds), False
    try:
        while waiting or running:
            while waiting and len(running) < at_once and not told:
                seed = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                child = context.Process(
                    target=_work, args=(body, seed, sender, dict(os.environ)), name=f"apical seed {seed}"
                )
                with _held_signals():
                    child.start()
                sender.close()
                running[seed] = (child, receiver)
            wait([process.sentinel for process, _ in running.values()], timeout=0.25)
            for seed, (process, receiver) in list(running.items()):
                if not process.is_alive():
                    del running[seed]
                    failures += _outcome(seed, process, receiver)
            if (stop.signum or failures) and not told:
                told = True
                waiting.clear()
                for process, _ in running.values():
                    process.terminate()
            refresh()
    finally:
        for process, _ in running.values():
            process.kill()
            process.join()
    if stop.signum:
        raise Interrupted(stop.signum, "a step of each run")
    if failures:
        raise failures[0]


@contextmanager
def _held_signals() -> Iterator[None]:
    """Defer Ctrl-C and SIGTERM within the block; a process started here receives them once it can obey them."""
    if os.name != "posix":
        yield
        return
    resource_tracker.ensure_running()  # it would unblock both if it were started with the first process
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _outcome(seed: int, process: BaseProcess, receiver: Connection) -> list[Exception]:
    """Return what went wrong in an ended worker; empty if nothing did or it was told to stop."""
    process.join()
    try:
        answer = receiver.recv() if receiver.poll() else None
    except EOFError:
        answer = None
    finally:
        receiver.close()
    if answer is not None:
        return [] if answer == DONE or isinstance(answer, Interrupted) else [answer]
    code = process.exitcode or 0  # 0 without a message: the process ended by os._exit
    how = f"was killed by signal {-code}, possibly out of memory" if code < 0 else f"ended with status {code}"
    return [ApicalError(f"the process of seed {seed} {how}; continue with --resume, with fewer --jobs if necessary")]


def _work(body: Body, seed: int, sender: Connection, environment: dict[str, str]) -> None:
    """Run a worker process; send the exception that ended it, if any."""
    children.adopt(environment)
    warnings.formatwarning = warning_line
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with StopSignals(impatient=False) as stop:
        if os.name == "posix":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            body(seed, stop)
            sender.send(DONE)
        except (ApicalError, OSError, Interrupted) as error:
            sender.send(error)
        except SystemExit as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{frame.filename}, line {frame.lineno}"
            sender.send(ApicalError(f"{where}, ended the process of seed {seed} (SystemExit: {error.code})"))
        except BaseException as error:  # also what pytest.skip raises
            if (told := out_of_memory(error) or own_code.blamed(error)) is None:
                raise
            sender.send(ApicalError(f"{told}, in the process of seed {seed}"))


def _die_with_parent() -> None:
    """End this process immediately when its parent is gone; saved state can be resumed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
