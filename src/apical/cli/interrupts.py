"""Handle Ctrl-C outside a training: one line and exit status 130, whatever is being imported or computed."""

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
    """Handle SIGINT while nothing is being written: print one line and end the process.

    An exception would be printed, or swallowed, by the module being imported.
    """
    try:
        sys.stdout.flush()
    finally:
        os.write(2, f"{LINE}\n".encode())
        os._exit(STATUS)


class Raise:
    """Handler of SIGINT that raises KeyboardInterrupt.

    Attributes:
        came: whether SIGINT was received. The exception may be swallowed; a training that starts later stops at its start.
    """

    came = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """A signal."""
        self.came = True
        raise KeyboardInterrupt


@contextmanager
def handled(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Handle SIGINT this way within the block, unless it is ignored or other code handles it."""
    before = signal.getsignal(signal.SIGINT)
    try:
        if before is end or before is signal.default_int_handler:
            signal.signal(signal.SIGINT, handler)
    except ValueError:  # not the main thread, which alone receives signals
        before = None
    try:
        yield
    finally:
        if before is end or before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)
