"""Checkpoints that are either complete or absent, carry checksums of their content, and load without running code."""

import hashlib
import io
import math
import os
import random
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
SEAL = "sha256"
"""Field with the SHA-256 of every other field."""
REMEDY = "start again with --overwrite or in another folder"


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a crash at any moment leaves the old file or the new one.

    A link at `path` is replaced; its target is unchanged.

    Raises:
        OSError: it cannot be written; the error names `path`, the old file is still there and no other file is left behind.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        try:
            temporary.unlink(missing_ok=True)
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise


def sync_folder(folder: Path) -> None:
    """Make renames within `folder` survive a power failure, if the system supports it."""
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
    write_sealed(path, {"format": FORMAT, **state})


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU.

    Raises:
        CheckpointError: the file is damaged or lacks a field; the message names both.
        OSError: it is not there or may not be read.
    """
    state = read_sealed(path, f"checkpoint {path}")
    for field, kind in FIELDS.items():
        if field not in state or not isinstance(state[field], kind) or isinstance(state[field], bool):
            raise CheckpointError(f"checkpoint {path}: field {field!r} is missing or damaged; {REMEDY}")
    if state["format"] != FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {state['format']}, this version reads {FORMAT}; {REMEDY}")
    for field in ("epoch", "step", "seconds", "peak_memory_mb"):
        if state[field] is not None and not 0 <= state[field] < math.inf:
            raise CheckpointError(f"checkpoint {path}: field {field!r} is {state[field]}; {REMEDY}")
    return state


def write_sealed(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors, numbers, texts and containers of them atomically, with the checksum of every field.

    Raises:
        OSError: it cannot be written; an older file stays.
    """
    buffer = io.BytesIO()
    torch.save({**state, SEAL: {name: digest(value) for name, value in state.items()}}, buffer)
    write_atomically(path, buffer.getvalue())


def read_sealed(path: Path, name: str) -> dict[str, Any]:
    """Return the fields of such a file, on the CPU, after comparing each with its checksum.

    A file without checksums is from an earlier version: it is read, and a line on stderr says so; the checksums that zip
    stores for its members are still compared.

    Raises:
        CheckpointError: the file is damaged.
        OSError: it is not there or may not be read.
    """
    file = open(path, "rb")  # noqa: SIM115 - closed below; an OSError from torch means damage, one from open does not
    try:
        with file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings about damage
            with zipfile.ZipFile(file) as archive:
                if (member := archive.testzip()) is not None:
                    raise ValueError(f"{member} in it fails its checksum")
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError("it contains no fields")
        seal = state.pop(SEAL, None)
        if seal is None:
            print(f"apical: {name} is from an earlier version and has no checksums of its content", file=sys.stderr)
            return state
        wrong = next((field for field in {**state, **seal} if seal.get(field) != digest(state.get(field))), None)
    except Exception as error:  # a damaged file makes torch raise almost anything
        raise CheckpointError(f"{name} is damaged ({_first_line(error)}); {REMEDY}") from error
    if wrong is not None:
        raise CheckpointError(f"{name}: field {wrong!r} is damaged (its checksum does not match); {REMEDY}")
    return state


def digest(value: Any) -> str:
    """Return the SHA-256 of nested dictionaries, lists and tuples of tensors, numbers and texts: type, shape, every bit."""
    seen = hashlib.sha256()
    _add(seen, value)
    return seen.hexdigest()


def _add(seen: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        seen.update(f"tensor {plain.dtype} {tuple(plain.shape)};".encode())
        seen.update(plain.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        seen.update(f"mapping {len(value)};".encode())
        for key, inner in value.items():
            _add(seen, key)
            _add(seen, inner)
    elif isinstance(value, list | tuple):
        seen.update(f"{'list' if isinstance(value, list) else 'tuple'} {len(value)};".encode())
        for inner in value:
            _add(seen, inner)
    else:
        seen.update(f"{type(value).__name__} {value!r};".encode(errors="surrogatepass"))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0][:120].rstrip(".")


def seed_all(seed: int) -> None:
    """Seed the global generators: PyTorch's, which layers use, and Python's and NumPy's, which a user's model may use."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators within the block and restore them afterwards. CPU only."""
    cpu = torch.device("cpu")
    before = rng_state(cpu)
    seed_all(seed)
    try:
        yield
    finally:
        set_rng_state(before, cpu)


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the state of the global generators: "cpu", "python", "numpy", and "cuda" if `device` is one."""
    _, words, normal = random.getstate()
    numpy: Any = np.random.get_state(legacy=True)
    _, keys, *rest = numpy
    state = {
        "cpu": torch.get_rng_state(),
        "python": [torch.tensor(words), normal],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), *rest],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Invert :func:`rng_state`; a CUDA state is ignored if there is no CUDA device.

    Checkpoints of earlier versions lack the states of Python's and NumPy's generators, which are then left unchanged.
    """
    torch.set_rng_state(state["cpu"])
    if "python" in state:
        words, normal = state["python"]
        random.setstate((random.getstate()[0], tuple(words.tolist()), normal))
    if "numpy" in state:
        keys, place, has_normal, normal = state["numpy"]
        if not (type(place) is int and 0 <= place <= len(keys)):
            raise ValueError(f"the place in NumPy's generator is {place}")
        np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), place, int(has_normal), float(normal)))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
