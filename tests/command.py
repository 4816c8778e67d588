"""`apical`, or pytest, in a process of its own that starts without importing torch again, for tests not about starting.

A server imports everything once (`multiprocessing`'s "forkserver") and forks for every command. Tests of interrupts start
`python -m apical`.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from subprocess import TimeoutExpired

IMPORTED = ("torch._dynamo", "apical.cli.commands", "apical.cli.evolve", "apical.cli.sweep", "apical.data.digits")


class Command:
    """A running `apical ARGUMENTS`, with what tests use of `subprocess.Popen`."""

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        run: Callable[[], int] | None = None,
    ) -> None:
        """Start it, its output going to files in `folder`, with variables added to its environment.

        Args:
            run: what else is to run with these arguments; it returns the exit status.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(IMPORTED))
        self._arguments, self._files = arguments, (folder / "stdout", folder / "stderr")
        self._process = context.Process(target=_run, args=(run or _apical, arguments, *self._files, dict(environment or {})))
        self._process.start()

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status, minus the signal that killed it, or None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Likewise."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        """Exit status, once it has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutExpired(["apical", *self._arguments], timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that it wrote to stdout and stderr, once it has ended."""
        self.wait(timeout)
        output, errors = (file.read_text(encoding="utf-8") if file.exists() else "" for file in self._files)
        return output, errors

    def send_signal(self, signum: int) -> None:
        """As from the shell."""
        os.kill(self.pid, signum)

    def kill(self) -> None:
        """With SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def end(self) -> None:
        """Kill it if it still runs, so that the end of the tests does not wait for it."""
        if self._process.exitcode is None:
            self.kill()
            self._process.join()


def _run(
    run: Callable[[], int], arguments: Sequence[str], stdout: Path, stderr: Path, environment: Mapping[str, str]
) -> None:
    for path, number in ((stdout, 1), (stderr, 2)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})  # a test may have begun the server
    signal.signal(signal.SIGINT, signal.default_int_handler)  # while they were held or ignored
    os.environ.update(environment, OMP_NUM_THREADS="1", COLUMNS="100")
    sys.argv = ["apical", *arguments]
    sys.exit(run())


def _apical() -> int:
    from apical.__main__ import main

    return main()


def run_pytest() -> int:
    """What `python -m pytest ARGUMENTS` does where the environment's PWD is."""
    import pytest

    os.chdir(os.environ["PWD"])
    sys.path.insert(0, os.environ["PWD"])
    return int(pytest.main(sys.argv[1:]))
