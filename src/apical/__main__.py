"""`python -m apical` and the command `apical`: Ctrl-C ends it in one line from its first moment, also while it imports."""

import signal
import sys

from apical.cli.interrupts import end


def main() -> int:
    """Run the command line; returns the exit status."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # for names of folders that are no text

    from apical.cli.main import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
