"""Content of environment.json: versions, commit and machine."""

import platform
import subprocess
import sys
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any


def environment(device: str, threads: int, processes: int = 1) -> dict[str, Any]:
    """Return the content of environment.json: versions, commit, machine, device, start time."""
    import torch

    import apical

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "apical": apical.__version__,
        "commit": commit(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": threads,
        "processes": processes,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@lru_cache(maxsize=1)
def commit() -> str | None:
    """Return the git commit from which apical runs, with "+changes" if files differ; None for an installed package."""
    folder = Path(__file__).resolve().parents[1]
    try:
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        return _git(folder, "rev-parse", "HEAD") + ("+changes" if _git(folder, "status", "--porcelain", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()


def _cpu_name() -> str:
    if sys.platform == "linux":
        try:
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        except OSError:
            pass
    return platform.processor() or platform.machine()
