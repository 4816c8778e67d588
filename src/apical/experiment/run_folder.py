"""The folder of one run: config.json, environment.json, metrics.jsonl, checkpoint.pt and, written last, result.json."""

import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from torch import Tensor

from apical.errors import CheckpointError, ConfigError
from apical.experiment.checkpoint import write_atomically
from apical.experiment.recipe import Recipe, differences
from apical.experiment.tensorboard import Events

LOCK = ".lock"
PATIENCE = 10.0
"""Seconds that a dying holder of a folder is waited for."""
State = Literal["fresh", "resumable", "finished", "diverged"]


class RunFolder:
    """Paths, checks, reading and writing of one run folder. Making the object touches nothing on disk.

    Args:
        path: the folder.
        events: also write each epoch as TensorBoard events, into events/.
    """

    def __init__(self, path: Path, *, events: bool = False) -> None:
        self.path = path
        self._events = Events(path / "events") if events else None
        self.config, self.environment = path / "config.json", path / "environment.json"
        self.metrics, self.checkpoint, self.result = path / "metrics.jsonl", path / "checkpoint.pt", path / "result.json"
        self.examples, self.trajectory = path / "examples.npz", path / "trajectory.pt"
        self._lock = FolderLock(path)

    def check(self, recipe: Recipe, *, resume: bool, overwrite: bool) -> State:
        """What starting `recipe` here would mean. Writes nothing.

        Raises:
            ConfigError: the folder cannot be made or written, or holds something and neither flag is given.
            CheckpointError: the run in it has other options or is longer than asked.
        """
        check_writable(self.path)
        if not (resume or overwrite):
            refuse_used(self.path)
        if overwrite or not self.config.exists():
            if resume and self.checkpoint.exists():
                raise CheckpointError(f"{self.path} has a checkpoint but no config.json; start again with --overwrite")
            return "fresh"
        saved = read_json(self.config)
        unlike = differences(saved, recipe.to_json())
        if unlike:
            raise CheckpointError(
                f"{self.path} was made with other options (saved vs asked): {'; '.join(unlike)}; "
                "resume with the saved ones or choose another --out"
            )
        if self.result.exists():
            result = read_json(self.result)
            if result.get("status") == "diverged":
                return "diverged"
            done = int(result.get("epochs", 0))
            if done > recipe.epochs:
                raise CheckpointError(f"{self.path} has {done} finished epochs, more than --epochs {recipe.epochs}")
            if done == recipe.epochs:
                return "finished"
        return "resumable" if self.checkpoint.exists() else "fresh"

    def create(self, recipe: Recipe, *, command: str, notes: list[str], environment: dict[str, Any]) -> None:
        """Make the folder, remove an older run's files, write config.json and environment.json.

        Raises:
            OSError: disk full or no permission.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.clear()
        self.write_config(recipe, command=command, notes=notes)
        write_json(self.environment, environment)

    def write_config(self, recipe: Recipe, *, command: str, notes: list[str]) -> None:
        """Write config.json: the recipe's fields, the command, and notes on what was chosen for the user."""
        write_json(self.config, {**recipe.to_json(), "command": command, "notes": notes})

    def clear(self) -> None:
        """Remove the files of a run, and nothing else."""
        written = (self.result, self.checkpoint, self.metrics, self.environment, self.config, self.examples, self.trajectory)
        for path in (*written, self.path / "placement.json"):
            path.unlink(missing_ok=True)
            path.with_name(path.name + ".tmp").unlink(missing_ok=True)

    def lock(self, wait: float | None = None) -> None:
        """Hold the folder for this process; see :meth:`FolderLock.hold`."""
        self._lock.hold("training", wait)

    def unlock(self) -> None:
        """Let others have the folder."""
        self._lock.release()

    def write_examples(self, examples: tuple[Tensor, Tensor] | None) -> None:
        """Keep images and what the model made of them, both (n, channels, height, width), in examples.npz."""
        if examples is None:
            return
        temporary = self.examples.with_name(self.examples.name + ".tmp")
        with open(temporary, "wb") as file:
            np.savez_compressed(file, images=examples[0].float().cpu().numpy(), made=examples[1].float().cpu().numpy())
        temporary.replace(self.examples)

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Append one finished epoch to metrics.jsonl and force it to disk."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self._events is not None:
            self._events.add(line)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a torn last line is left out.

        Raises:
            CheckpointError: a line before the last is damaged.
        """
        if not self.metrics.exists():
            return []
        lines: list[dict[str, Any]] = []
        texts = self.metrics.read_text(encoding="utf-8", errors="replace").split("\n")
        for number, text in enumerate(texts, start=1):
            if not text:
                continue
            try:
                line = json.loads(text)
                if not isinstance(line, dict) or not isinstance(line.get("epoch"), int):
                    raise ValueError
                lines.append(line)
            except ValueError:
                if number >= len(texts) - 1:
                    break
                raise CheckpointError(f"{self.metrics}, line {number}, is damaged; start again with --overwrite") from None
        return lines

    def rewind_metrics(self, last: dict[str, Any]) -> None:
        """Bring metrics.jsonl back to the checkpoint whose last finished epoch has the line `last`.

        Newer lines and a torn one go; the line itself is written again if it got lost.

        Raises:
            CheckpointError: an earlier epoch is missing.
        """
        epoch = last["epoch"]
        lines = [line for line in self.read_metrics() if line["epoch"] < epoch]
        if [line["epoch"] for line in lines] != list(range(epoch)):
            raise CheckpointError(f"{self.metrics} lacks an epoch before {epoch}; start again with --overwrite")
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in [*lines, last])
        write_atomically(self.metrics, text.encode())


class FolderLock:
    """Keeps other processes from writing a folder. Making the object touches nothing on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: IO[str] | None = None

    def hold(self, doing: str, wait: float | None = None) -> None:
        """Hold the folder, made if need be, until the process ends, however it ends.

        Args:
            doing: what holders do in such a folder, for the message.
            wait: seconds to wait for a dying holder; None waits :data:`PATIENCE`.

        Raises:
            ConfigError: another process holds it.
        """
        if os.name != "posix" or self._file is not None:
            return
        import fcntl

        self.folder.mkdir(parents=True, exist_ok=True)
        file = open(self.folder / LOCK, "w")  # noqa: SIM115 - stays open as long as the lock is held
        deadline = time.monotonic() + (PATIENCE if wait is None else wait)
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._file = file
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.close()
                    raise ConfigError(f"another process is {doing} in {self.folder}; choose another --out") from None
                time.sleep(0.1)

    def release(self) -> None:
        """Let others have the folder."""
        if self._file is not None:
            self._file.close()
            self._file = None


def check_writable(path: Path) -> None:
    """Raise ConfigError unless `path` is a writable folder or can be made. Creates nothing."""
    existing = path.absolute()
    while not existing.exists() and existing.parent != existing:
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(f"--out {path}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {path}: no permission to write in {existing}")


def refuse_used(path: Path) -> None:
    """Raise ConfigError if the folder holds anything but a lock."""
    if path.is_dir() and any(file.name != LOCK for file in path.iterdir()):
        raise ConfigError(f"--out {path} is not empty; add --resume to continue it, --overwrite to start again")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: it is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged; start again with --overwrite or in another folder")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def environment(device: str, threads: int, processes: int = 1) -> dict[str, Any]:
    """What environment.json says: versions, commit, machine, device, start time."""
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
    """The git commit apical runs from, with "+changes" if the files differ from it; None for an installed package."""
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
