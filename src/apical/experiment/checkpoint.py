"""Checkpoints that are either whole or not there, and that load without running code."""

import io
import os
from pathlib import Path
from typing import Any

import torch

from apical.errors import CheckpointError

FORMAT = 1
FIELDS: dict[str, type | tuple[type, ...]] = {
    "format": int,
    "config": dict,
    "rule": dict,
    "optimizer": dict,
    "rng": dict,
    "epoch": int,
    "step": int,
    "partial": dict,
    "seconds": float,
    "metrics": dict,
    "peak_memory_mb": (float, type(None)),
}


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` at `path` so that a crash at any moment leaves the old file or the new one.

    Raises:
        OSError: it cannot be written; the old file is still there and nothing else is left behind.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames within `folder` survive a power cut, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint with the fields of `FIELDS` atomically.

    Raises:
        OSError: it cannot be written; an older checkpoint stays.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU.

    Raises:
        CheckpointError: the file is damaged or lacks a field; the message names both.
        OSError: it is not there or may not be read.
    """
    remedy = "start again with --overwrite or in another folder"
    file = open(path, "rb")  # noqa: SIM115 - closed below; torch answers some damage with an OSError, this does not
    try:
        with file:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise almost anything
        raise CheckpointError(f"checkpoint {path} is damaged ({_first_line(error)}); {remedy}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint {path} is no checkpoint of apical; {remedy}")
    for field, kind in FIELDS.items():
        if not isinstance(state.get(field), kind):
            raise CheckpointError(f"checkpoint {path}: field {field!r} is missing or damaged; {remedy}")
    if state["format"] != FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {state['format']}, this version reads {FORMAT}; {remedy}")
    return state


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0][:120].rstrip(".")


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """State of torch's global generators: "cpu", and "cuda" when `device` is one."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Inverse of :func:`rng_state`; a CUDA state is ignored where there is no CUDA device."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
