"""The folder of one run: config.json, environment.json, metrics.jsonl, checkpoint.pt and, written last, result.json."""

import io
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from torch import Tensor

from apical.bench import own_rules
from apical.bench.checkpoint import REMEDY, write_atomically
from apical.bench.distributed import World
from apical.bench.folders import LOCK, check_writable, is_used, refuse_unlike, refuse_used
from apical.bench.provenance import commit as commit
from apical.bench.provenance import environment as environment
from apical.bench.recipe import Recipe, bare_rule, differences, from_json
from apical.bench.report.checks import check_result
from apical.bench.restore import check_measurements
from apical.bench.state import append_line, brief, read_json, read_lines, write_lines, write_state
from apical.bench.state import write_json as write_json
from apical.bench.tensorboard import Events
from apical.core.credit import Panel
from apical.errors import CheckpointError, ConfigError

PATIENCE = 10.0
"""Seconds to wait for a terminating process to release a folder."""
State = Literal["fresh", "resumable", "finished", "diverged"]


class RunFolder:
    """Paths, checks, reading and writing of one run folder. Creating the object does not touch the disk.

    Args:
        events: also write each epoch as TensorBoard events, into events/.
    """

    def __init__(self, path: Path, *, events: bool = False) -> None:
        self.path = path
        self._events = Events(path / "events") if events else None
        self.config, self.environment = path / "config.json", path / "environment.json"
        self.metrics, self.checkpoint, self.result = path / "metrics.jsonl", path / "checkpoint.pt", path / "result.json"
        self.examples, self.trajectory = path / "examples.npz", path / "trajectory.pt"
        self.panels = path / "panels.json"
        self._lock = FolderLock(path)

    def check(self, recipe: Recipe, *, resume: bool, overwrite: bool) -> State:
        """Return the state from which a run of `recipe` would start here. Writes nothing.

        Raises:
            ConfigError: the folder cannot be created or written, or is not empty and neither flag is given.
            CheckpointError: the run in it has other options or is longer than requested.
        """
        check_writable(self.path, self.config.name)
        if not (resume or overwrite):
            refuse_used(self.path)
        if overwrite or not self.config.exists():
            if resume and self.checkpoint.exists():
                raise CheckpointError(f"{self.path} has a checkpoint but no config.json; start again with --overwrite")
            return "fresh"
        saved = read_json(self.config)
        changes = own_rules.changes(bare_rule(recipe.rule), saved.get("notes"))
        refuse_unlike(self.path, differences(saved, recipe.to_json()) + changes)
        if self.result.exists():
            result = read_json(self.result)
            if result.get("status") == "diverged":
                return "diverged"
            done = result.get("epochs")
            if not isinstance(done, int) or result.get("status") != "finished":
                raise CheckpointError(f"{self.result} is damaged; start again with --overwrite or in another folder")
            if done > recipe.epochs:
                raise CheckpointError(f"{self.path} has {done} finished epochs, more than --epochs {recipe.epochs}")
            if done == recipe.epochs:
                return "finished"
        return "resumable" if self.checkpoint.exists() else "fresh"

    def claim(self, recipe: Recipe, *, resume: bool, overwrite: bool, world: World | None = None) -> State:
        """:meth:`check` the folder, lock it for this process, and check again: its last holder may have left a run in it.

        Under torchrun every process checks and the main process holds the lock.

        Raises:
            ConfigError, CheckpointError: as :meth:`check` does, or another process trains in it.
        """
        self.check(recipe, resume=resume, overwrite=overwrite)
        if world is not None:
            world.barrier()
        if world is None or world.is_main:
            self.lock()
        if world is not None:
            world.barrier()
        return self.check(recipe, resume=resume, overwrite=overwrite)

    def create(self, recipe: Recipe, *, command: str, notes: list[str], environment: dict[str, Any]) -> None:
        """Create the folder, remove an older run's files, write config.json and environment.json.

        Raises:
            OSError: disk full or no permission.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.clear()
        self.write_config(recipe, command=command, notes=notes)
        write_state(self.environment, environment)

    def write_config(self, recipe: Recipe, *, command: str, notes: list[str]) -> None:
        """Write config.json: the recipe's fields, the command, and notes on automatic choices."""
        write_state(self.config, {**recipe.to_json(), "command": command, "notes": notes})

    def recipe(self) -> Recipe:
        """Return the recipe in config.json.

        Raises:
            CheckpointError: it is damaged.
        """
        try:
            return from_json(read_json(self.config))
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{self.config} is damaged ({error})") from error

    def clear(self) -> None:
        """Remove the files of a run, and nothing else."""
        written = (self.result, self.checkpoint, self.metrics, self.environment, self.config, self.examples, self.trajectory)
        for path in (*written, self.panels, self.path / "placement.json", self.path / "sample.json"):
            path.unlink(missing_ok=True)
            path.with_name(path.name + ".tmp").unlink(missing_ok=True)

    def lock(self, wait: float | None = None) -> None:
        """Lock the folder for this process; see :meth:`FolderLock.hold`."""
        self._lock.hold("training", wait)

    def unlock(self, *, remove: bool = False) -> None:
        """Release the folder; see :meth:`FolderLock.release`."""
        self._lock.release(remove=remove)

    def check_held(self) -> None:
        """Check that the folder is still there; see :meth:`FolderLock.check`."""
        self._lock.check()

    def write_examples(self, examples: tuple[Tensor, Tensor] | None) -> None:
        """Save images and their reconstructions, both (n, channels, height, width), in examples.npz."""
        if examples is None:
            return
        buffer = io.BytesIO()
        np.savez_compressed(buffer, images=examples[0].float().cpu().numpy(), made=examples[1].float().cpu().numpy())
        write_atomically(self.examples, buffer.getvalue())

    def write_panels(self, panels: Sequence[Panel]) -> None:
        """Save the numbers of the network's figures in panels.json."""
        if panels:
            entries = [
                asdict(replace(panel, values={})) | {"values": {name: _listed(v) for name, v in panel.values.items()}}
                for panel in panels
            ]
            write_state(self.panels, {"panels": entries})

    def read_result(self) -> dict[str, Any]:
        """Return the content of result.json.

        Raises:
            CheckpointError: it is damaged.
        """
        result = read_json(self.result)
        try:
            check_result(result)
            if not {"rule", "seed", "status", "test_loss", "train_loss", "ms_per_step"} <= result.keys():
                raise TypeError("it lacks a measurement")
            if None in (result["rule"], result["seed"], result["status"]):
                raise TypeError("it does not say to which run it belongs")
        except TypeError as error:
            raise CheckpointError(f"{self.result} is damaged ({brief(error)}); {REMEDY}") from None
        return result

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Append one finished epoch to metrics.jsonl and force it to disk."""
        append_line(self.metrics, line)
        if self._events is not None:
            self._events.add(line)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl; an incomplete last line is left out.

        Raises:
            CheckpointError: a line before the last is damaged.
        """
        return read_lines(self.metrics, _check_line)

    def rewind_metrics(self, last: dict[str, Any]) -> None:
        """Rewind metrics.jsonl to the checkpoint whose last finished epoch has the line `last`.

        Newer and incomplete lines are removed; the line itself is written again if it is missing.

        Raises:
            CheckpointError: an earlier epoch is missing.
        """
        epoch = last["epoch"]
        lines = [line for line in self.read_metrics() if line["epoch"] < epoch]
        if [line["epoch"] for line in lines] != list(range(epoch)):
            raise CheckpointError(f"{self.metrics} lacks an epoch before {epoch}; start again with --overwrite")
        write_lines(self.metrics, [*lines, last])


class FolderLock:
    """Lock that keeps other processes from writing to a folder. Creating the object does not touch the disk.

    Args:
        name: name of the lock file in it.
    """

    def __init__(self, folder: Path, name: str = LOCK) -> None:
        self.folder, self.path = folder, folder / name
        self._file: IO[str] | None = None

    def hold(self, doing: str, wait: float | None = None) -> None:
        """Lock the folder, creating it if needed, until the process ends in any way.

        The folder may have changed since it was last checked: check it again once it is locked.

        Args:
            doing: what the holder of such a folder does, for the message.
            wait: seconds to wait for a terminating holder; None waits :data:`PATIENCE`.

        Raises:
            ConfigError: another process holds it.
        """
        if os.name != "posix" or self._file is not None:
            return
        import fcntl

        deadline = time.monotonic() + (PATIENCE if wait is None else wait)
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(self.path, "a")  # noqa: SIM115 - stays open as long as the lock is held
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(file, self.path):
                    self._file = file
                    return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(f"another process is {doing} in {self.folder}; choose another --out") from None
                time.sleep(0.1)
            finally:
                if self._file is None:
                    file.close()

    def check(self) -> None:
        """Check that the locked folder is still the one at its path: a new one there may belong to another process.

        Raises:
            CheckpointError: it was moved, removed or replaced.
        """
        if self._file is not None and not _is_at(self._file, self.path):
            raise CheckpointError(
                f"{self.folder} was moved, removed or replaced while results were written to it; if it was moved, resume at "
                "its new location"
            )

    def release(self, *, remove: bool = False) -> None:
        """Release the folder.

        Args:
            remove: also remove the lock file, and the folder if it is then empty.
        """
        if self._file is None:
            return
        if remove:
            self.path.unlink(missing_ok=True)
            with suppress(OSError):  # unless it is not empty
                self.folder.rmdir()
        self._file.close()
        self._file = None

    @contextmanager
    def held(self, doing: str, wait: float | None = None) -> Iterator[None]:
        """Hold the lock within the block; after an error before anything was written, no trace is left."""
        was_there = self.folder.is_dir()
        self.hold(doing, wait)
        try:
            yield
        except BaseException:
            self.release(remove=not was_there and not is_used(self.folder))
            raise
        self.release()


def _check_line(line: dict[str, Any]) -> None:
    if type(line.get("epoch")) is not int:
        raise ValueError("it has no epoch")
    check_measurements(line)


def _listed(values: Tensor) -> list[Any]:
    """Return numbers for a JSON file, rounded; None if they are not finite."""
    if values.dim() > 1:
        return [_listed(row) for row in values]
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]


def _is_at(file: IO[str], path: Path) -> bool:
    """Return whether the open file is still the one at `path`: its last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False
