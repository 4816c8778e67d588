"""`python -m apical` and the command `apical`. Ctrl-C ends it with a single line at any time, also during imports."""

import os
import signal
import sys
import warnings

from apical.cli.interrupts import end


def _open_closed() -> None:
    """Reopen stdin, stdout and stderr if they were closed at startup, so that no other file gets their numbers."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
            os.set_inheritable(descriptor, True)
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def main() -> int:
    """Run the command line and return the exit status."""
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
