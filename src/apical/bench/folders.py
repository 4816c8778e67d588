"""Checks before a command writes, on option values and folders; and removal of a folder's content and nothing else."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apical.errors import CheckpointError, ConfigError

LOCK = ".lock"
"""Lock file of a process that writes to a folder."""
MARKS = {
    "compare.json": "a comparison",
    "plan.json": "a sweep",
    "config.json": "a run",
    "audit.json": "an audit",
    "measure.json": "measures",
    "landscape.json": "a landscape",
}
"""The file that identifies the content of a folder."""


def check_least(options: Any, **least: int) -> None:
    """Raise ConfigError for every option whose number is too small; None is not checked."""
    values = {name: getattr(options, name) for name in least}
    low = [name for name, value in values.items() if value is not None and value < least[name]]
    if low:
        texts = (f"--{name.replace('_', '-')} must be at least {least[name]}, got {values[name]}" for name in low)
        raise ConfigError("; ".join(texts))


def refuse_both(options: Any) -> None:
    """Raise ConfigError if a command is asked both to continue and to start again."""
    if getattr(options, "resume", False) and getattr(options, "overwrite", False):
        raise ConfigError("--resume continues what is in the folder and --overwrite replaces it: give only one of them")


def check_writable(path: Path, mark: str = "") -> None:
    """Raise ConfigError unless `path` is a writable folder or can be created, and no other command has filled it.

    Args:
        mark: the command's own mark, from :data:`MARKS`; without one, its files may share a folder with others.
    """
    existing = path.absolute()
    while not existing.exists() and existing.parent != existing:
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(f"--out {path}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {path}: no permission to write in {existing}")
    if other := next((name for name in MARKS if mark and name != mark and (path / name).is_file()), ""):
        raise ConfigError(f"--out {path} contains {MARKS[other]}, which must not be mixed with others; choose another --out")


def is_used(path: Path) -> bool:
    """Return whether the folder exists and contains anything but a lock."""
    return path.is_dir() and any(file.name != LOCK for file in path.iterdir())


def refuse_used(path: Path, remedy: str = "add --resume to continue it, --overwrite to start again") -> None:
    """Raise ConfigError if the folder contains anything but a lock."""
    if is_used(path):
        raise ConfigError(f"--out {path} is not empty; {remedy}")


def refuse_unlike(path: Path, unlike: Sequence[str]) -> None:
    """Raise CheckpointError if what the folder holds was made with other options: each as "name: saved vs given"."""
    if unlike:
        raise CheckpointError(
            f"{path} was made with other options (saved vs given): {'; '.join(unlike)}; "
            "resume with the saved ones or choose another --out"
        )


def refuse_links(path: Path, out: Path) -> None:
    """Raise ConfigError if `path` in the folder `out` leads outside through a link: nothing outside is removed."""
    if not path.resolve().is_relative_to(out.resolve()):
        raise ConfigError(
            f"--overwrite removes nothing outside {out}, but {path} is a link to {path.resolve()}; "
            "remove the link or choose another --out"
        )


def remove_tree(path: Path, out: Path) -> None:
    """Remove the folder `path` in `out` with its content, if it exists; links in it are removed, their targets are kept.

    Raises:
        ConfigError: `path` leads out of the folder.
        OSError: something cannot be removed.
    """
    refuse_links(path, out)
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
