"""Processes of a study obey their parent, whatever began the server that they are forked from."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apical.bench import cells, workers
from apical.bench.signals import StopSignals


def train(seed: int, stop: StopSignals) -> None:
    """What a comparison's process does: here nothing."""


def make(folder: Path) -> None:
    """The first part waits for the second, which says who it is and works for ever, and then fails."""
    pid = folder.parent / "pid"
    if folder.name == "first":
        while not pid.exists():
            time.sleep(0.01)
        raise ValueError("planted")
    (folder.parent / "part").write_text(str(os.getpid()))
    (folder.parent / "part").rename(pid)
    time.sleep(120)


def works(pid: str) -> bool:
    """Whether the process is there and not a zombie; it may go between two looks, so one look has to do."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def main(folder: Path) -> None:
    with StopSignals() as stop:
        workers.run([0], 1, train, stop, lambda: None)
    with pytest.raises(ValueError, match="planted"):
        list(cells.side_by_side(2, [folder / "first", folder / "second"], make, folder))
    other = (folder / "pid").read_text()
    deadline = time.monotonic() + 30
    while works(other):
        assert time.monotonic() < deadline, "the other process goes on"
        time.sleep(0.01)
    os._exit(0)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes through /proc")
def test_a_failure_ends_the_others_though_a_comparison_began_the_server(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, __file__, tmp_path], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    main(Path(sys.argv[1]))
