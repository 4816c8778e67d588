"""`python -m apical` and the command `apical`: Ctrl-C ends it in one line from its first moment, also while it imports."""

import os
import signal
import sys
import warnings

from apical.cli.interrupts import end


def _open_closed() -> None:
    """Open those of stdin, stdout and stderr that were closed when the process began: no other file gets their number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # has the lowest number that is free
            os.set_inheritable(descriptor, True)
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def main() -> int:
    """Run the command line; returns the exit status."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)
    _open_closed()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # for names of folders that are no text

    from apical.cli.main import main as run
    from apical.errors import warning_line

    warnings.formatwarning = warning_line

    return run()


if __name__ == "__main__":
    sys.exit(main())
