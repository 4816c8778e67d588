"""A user's own data: FILE.npz, FILE.csv, FILE.txt, a FOLDER of images, FILE.py:FUNCTION, or Datasets in memory, as tensors.

Data from files are standardised with the statistics of the training samples; data from code are used unchanged. Nothing is
unpickled.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from apical import own_code
from apical.data.dataset import Samples, check
from apical.data.own import files, images, sets
from apical.data.own.targets import Raw, divide, number_classes
from apical.data.text import files as text_files
from apical.data.text.sequences import Make
from apical.errors import DataError

IN_MEMORY = "in-memory:"
"""Prefix of the names of data that exist only in this process."""

FORMS = "FILE.npz, FILE.csv, FILE.txt, a FOLDER of images, FILE.py:FUNCTION"
_TEXT = ".txt"
_OTHER = (
    *(".npy", ".pkl", ".pickle", ".pt", ".pth", ".mat", ".h5", ".hdf5"),
    *(".parquet", ".xlsx", ".tsv", ".json", ".zip", ".gz"),
)
_memory: dict[str, Samples] = {}
_read: dict[tuple[object, ...], Samples] = {}


def is_own(name: str) -> bool:
    """Return whether a name that is not a built-in data set can only refer to the user's own data."""
    return (
        name.startswith(IN_MEMORY)
        or own_code.is_code(name)
        or name.lower().endswith((".npz", ".csv", _TEXT, *_OTHER))
        or os.sep in name
        or Path(name).is_dir()
    )


def absolute(name: str) -> str:
    """Return the name with an absolute path, so that it does not depend on the working directory."""
    if name.startswith(IN_MEMORY):
        return name
    return own_code.absolute(name) if own_code.is_code(name) else str(Path(name).expanduser().resolve())


def read(name: str, *, numbers: bool = False) -> Samples:
    """Read the data of a name outside the catalogue; unchanged data are read once per process.

    Args:
        name: a file, a folder, code, or a name returned by :func:`remember`.
        numbers: treat integer targets as regression targets instead of classes.

    Raises:
        DataError: the data do not exist or are not usable; says where and why.
    """
    if name.startswith(IN_MEMORY):
        if name not in _memory:
            raise DataError(
                f"the data {name!r} existed only in the memory of the program that started this run; "
                "pass them again to apical.compare(..., resume=True)"
            )
        return _memory[name]
    if own_code.is_code(name):
        value = own_code.import_from(name, "data", "my_data.py:make", DataError)
        return _once((name, numbers, id(value)), sets.from_code(value, name), numbers)
    path = Path(name).expanduser()
    suffix = path.suffix.lower()
    if not path.exists():
        raise DataError(f"--data {name}: no such file or folder")
    if path.is_dir():
        return _once(
            (str(path.resolve()), numbers, *_state(file for depth in ("*/*", "*/*/*") for file in path.glob(depth))),
            lambda: images.read(path),
            numbers,
        )
    if suffix not in (".npz", ".csv"):
        raise DataError(f"--data {name}: unsupported kind of file; pass {FORMS}")
    reader = files.read_npz if suffix == ".npz" else files.read_csv
    return _once((str(path.resolve()), numbers, *_state([path])), lambda: reader(path), numbers)


def text_reader(name: str) -> Make | None:
    """Return a function that makes windows of the text file `name`; None for other data.

    Raises:
        DataError: the file does not exist.
    """
    if name.startswith(IN_MEMORY) or own_code.is_code(name) or not name.lower().endswith(_TEXT) or Path(name).is_dir():
        return None
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(f"--data {name}: no such file or folder")
    return partial(text_files.read, path)


def _state(paths: Iterable[Path]) -> tuple[tuple[str, int, int], ...]:
    """Return a fingerprint that changes when a file does."""
    states = [(str(path), path.lstat()) for path in paths]
    return tuple(sorted((name, state.st_mtime_ns, state.st_size) for name, state in states))


def _once(key: tuple[object, ...], make: sets.Make, numbers: bool) -> Samples:
    if key not in _read:
        data = finish(make(), numbers)
        _read.clear()
        _read[key] = data
    return _read[key]


def remember(value: object, *, numbers: bool = False) -> str:
    """Register in-memory Datasets, tensors or arrays; return the name under which :func:`read` finds them."""
    name = IN_MEMORY + type(value[0] if isinstance(value, tuple | list) and value else value).__name__
    _memory[name] = finish(sets.from_value(value, "data"), numbers)
    return name


def finish(raw: Raw, numbers: bool = False) -> Samples:
    """Split, number the classes, check and standardise the data, and describe how they were interpreted.

    Raises:
        DataError: see :func:`read`.
    """
    notes = list(raw.notes)
    raw, targets = number_classes(raw, numbers=numbers)
    notes += targets.notes
    precision = np.float64 if raw.standardise else np.float32
    tensors = [
        _inputs(x, f"{raw.where}, {part}", precision) for x, part in zip(raw.inputs, raw.parts, strict=True) if x is not None
    ]
    labels = [torch.from_numpy(np.ascontiguousarray(y)) for y in targets.values]
    for x, y, part in zip(tensors, labels, raw.parts, strict=False):
        check(x, y, targets.classes, f"{raw.where}, {part}")
    if len(tensors) == 1:
        first, second, note = divide(labels[0].numpy(), stratify=not targets.are_numbers, where=raw.where)
        tensors, labels = [tensors[0][i] for i in (first, second)], [labels[0][i] for i in (first, second)]
        notes.append(note)
    train, test = zip(tensors, labels, strict=True)
    if train[0].shape[1:] != test[0].shape[1:]:
        shapes = f"{tuple(train[0].shape[1:])} and {tuple(test[0].shape[1:])}"
        raise DataError(f"{raw.where}: training and test samples have different shapes, {shapes}")
    targets.check_seen(train[1], test[1], raw.where)
    digest = _checksum([*train, *test], targets.names)
    if raw.standardise:
        train, test, constant = _standardised(train, test)
        what = "channel" if train[0].dim() == 4 else "column"
        notes.append(f"inputs standardised per {what}")
        notes += [f"{int(constant.sum())} of {constant.numel()} {what}s constant"] if bool(constant.any()) else []
    kind = f"regression on {targets.classes} number{'s' * (targets.classes > 1)}" if targets.are_numbers else targets.told
    sizes = f"{len(train[1]):,} training and {len(test[1]):,} test samples of shape {tuple(train[0].shape[1:])}"
    about = f"{raw.where}: {sizes}; {'; '.join([kind, *notes])}"
    source = f"{raw.source}, sha256 {digest}"
    return Samples(train, test, targets.classes, targets.names, about, digest, source)


def _inputs(values: NDArray[Any], where: str, precision: DTypeLike) -> Tensor:
    """Return inputs (N, ...) in the given precision; 64-bit integers, such as word indices, are kept."""
    if values.dtype.kind not in "uifb":
        raise DataError(f"{where}: inputs must be numbers; got {values.dtype}")
    if values.ndim == 1:
        values = values[:, None]
    with np.errstate(over="ignore"):  # non-finite values raise an error later
        numbers = values if values.dtype == np.int64 else values.astype(precision)
    return torch.from_numpy(np.require(numbers, requirements=["C", "W"]))


def _standardised(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Standardise inputs to mean 0 and deviation 1 over training samples, per channel (N, C, H, W) or per last entry.

    Also return which of these are constant up to rounding; they get mean 0.
    """
    x = train[0].double()
    mean, std, constant = moments(x, (0, 2, 3) if x.dim() == 4 else tuple(range(x.dim() - 1)))
    a, b = (((part[0].double() - mean) / std).float() for part in (train, test))
    return (a, train[1]), (b, test[1]), constant


def moments(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return means and deviations over axes, kept, and which are constant up to rounding; these have deviation 1."""
    largest = x.abs().amax(axes, keepdim=True)
    # dividing by a power of two does not round, and keeps squares in the range of float64
    unit = torch.exp2(torch.frexp(largest).exponent.double() - 1)
    mean, std = (x / unit).mean(axes, keepdim=True) * unit, (x / unit).std(axes, keepdim=True, correction=0) * unit
    constant = std <= 1e-12 * largest
    std[constant] = 1.0
    return mean, std, constant


def _checksum(tensors: Sequence[Tensor], names: Sequence[str]) -> str:
    digest = hashlib.sha256("\0".join(names).encode(errors="backslashreplace"))
    for tensor in tensors:
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()[:16]
