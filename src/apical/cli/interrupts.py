"""Ctrl-C outside a training: one line and exit status 130, whatever is being imported or computed."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STATUS = 130
LINE = "apical: interrupted"


def end(signum: int, frame: FrameType | None) -> None:
    """Handler of SIGINT for times in which nothing is written: ends the process, with one line.

    An exception would be printed by what is being imported, or get lost in it.
    """
    try:
        sys.stdout.flush()
    finally:
        os.write(2, f"{LINE}\n".encode())
        os._exit(STATUS)


class Raise:
    """Handler of SIGINT that raises KeyboardInterrupt.

    Attributes:
        came: whether it did: the exception may get lost on its way, and a training that starts afterwards stops at once.
    """

    came = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """A signal."""
        self.came = True
        raise KeyboardInterrupt


@contextmanager
def handled(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Within, SIGINT is handled so, unless it is ignored or somebody else's."""
    before = signal.getsignal(signal.SIGINT)
    try:
        if before is end or before is signal.default_int_handler:
            signal.signal(signal.SIGINT, handler)
    except ValueError:  # not the main thread, which alone hears signals
        before = None
    try:
        yield
    finally:
        if before is end or before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)
