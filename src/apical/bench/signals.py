"""Handling of Ctrl-C and SIGTERM that finishes and saves the current training step."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupted(Exception):  # noqa: N818 - not an error
    """Training was asked to stop; everything up to here is saved.

    Attributes:
        signum: the signal; a shell expects the exit status 128 + signum.
        where: the position as text, such as "epoch 3, step 12".
    """

    def __init__(self, signum: int, where: str = "") -> None:
        super().__init__(where)
        self.signum = signum
        self.where = where


class StopSignals:
    """While entered, SIGINT and SIGTERM only set `signum`; the loop checks it after each step.

    Args:
        impatient: a second SIGINT raises KeyboardInterrupt immediately.
    """

    def __init__(self, *, impatient: bool = True) -> None:
        self.signum: int | None = None
        self._impatient = impatient
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._receive)
                if getattr(self._previous[signum], "came", False):  # earlier, and its exception was swallowed
                    self.signum = signum
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for signum, previous in self._previous.items():
            signal.signal(signum, previous)
        self._previous.clear()

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and self._impatient and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = self.signum or signum
