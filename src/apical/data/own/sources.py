"""A user's own data: FILE.npz, FILE.csv, FILE.txt, a FOLDER of images, FILE.py:FUNCTION, or Datasets in memory, as tensors.

What files hold is standardised by the training samples; what code returns is used as it is. Nothing is unpickled.
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
"""How names of data begin that only this process has."""

FORMS = "FILE.npz, FILE.csv, FILE.txt, a FOLDER of images, FILE.py:FUNCTION"
_TEXT = ".txt"
_OTHER = (
    *(".npy", ".pkl", ".pickle", ".pt", ".pth", ".mat", ".h5", ".hdf5"),
    *(".parquet", ".xlsx", ".tsv", ".json", ".zip", ".gz"),
)
_memory: dict[str, Samples] = {}
_read: dict[tuple[object, ...], Samples] = {}


def is_own(name: str) -> bool:
    """Whether a name, which is no data set's, can only mean the user's own data."""
    return (
        name.startswith(IN_MEMORY)
        or own_code.is_code(name)
        or name.lower().endswith((".npz", ".csv", _TEXT, *_OTHER))
        or os.sep in name
        or Path(name).is_dir()
    )


def absolute(name: str) -> str:
    """The same name, whatever the current folder."""
    if name.startswith(IN_MEMORY):
        return name
    return own_code.absolute(name) if own_code.is_code(name) else str(Path(name).expanduser().resolve())


def read(name: str, *, numbers: bool = False) -> Samples:
    """The data that a name outside the catalogue stands for; what is unchanged is read once in a process.

    Args:
        name: a file, a folder, code, or what :func:`remember` returned.
        numbers: whole numbers as targets are numbers to be approximated instead of classes.

    Raises:
        DataError: it is not there, or not usable; says where and why.
    """
    if name.startswith(IN_MEMORY):
        if name not in _memory:
            raise DataError(
                f"the data {name!r} were in the memory of the program that began this; "
                "give them again, with apical.compare(..., resume=True)"
            )
        return _memory[name]
    if own_code.is_code(name):
        value = own_code.import_from(name, "data", "my_data.py:make", DataError)
        return _once((name, numbers, id(value)), sets.from_code(value, name), numbers)
    path = Path(name).expanduser()
    suffix = path.suffix.lower()
    if not path.exists():
        raise DataError(f"--data {name}: there is no such file or folder")
    if path.is_dir():
        return _once(
            (str(path.resolve()), numbers, *_state(file for depth in ("*/*", "*/*/*") for file in path.glob(depth))),
            lambda: images.read(path),
            numbers,
        )
    if suffix not in (".npz", ".csv"):
        raise DataError(f"--data {name}: this kind of file is not read; give {FORMS}")
    reader = files.read_npz if suffix == ".npz" else files.read_csv
    return _once((str(path.resolve()), numbers, *_state([path])), lambda: reader(path), numbers)


def text_reader(name: str) -> Make | None:
    """What makes windows of the text file that a name says; None for other data.

    Raises:
        DataError: there is no such file.
    """
    if name.startswith(IN_MEMORY) or own_code.is_code(name) or not name.lower().endswith(_TEXT) or Path(name).is_dir():
        return None
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(f"--data {name}: there is no such file or folder")
    return partial(text_files.read, path)


def _state(paths: Iterable[Path]) -> tuple[tuple[str, int, int], ...]:
    """What changes when a file does."""
    states = [(str(path), path.lstat()) for path in paths]
    return tuple(sorted((name, state.st_mtime_ns, state.st_size) for name, state in states))


def _once(key: tuple[object, ...], make: sets.Make, numbers: bool) -> Samples:
    if key not in _read:
        data = finish(make(), numbers)
        _read.clear()
        _read[key] = data
    return _read[key]


def remember(value: object, *, numbers: bool = False) -> str:
    """Keep Datasets, tensors or arrays of this process; returns the name by which :func:`read` knows them."""
    name = IN_MEMORY + type(value[0] if isinstance(value, tuple | list) and value else value).__name__
    _memory[name] = finish(sets.from_value(value, "data"), numbers)
    return name


def finish(raw: Raw, numbers: bool = False) -> Samples:
    """Split, number the classes, check, standardise, and say what was understood.

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
    """Inputs (N, ...) of that precision; 64-bit integers, such as numbers of words, stay."""
    if values.dtype.kind not in "uifb":
        raise DataError(f"{where}: inputs must be numbers; got {values.dtype}")
    if values.ndim == 1:
        values = values[:, None]
    with np.errstate(over="ignore"):  # what is not finite then is refused
        numbers = values if values.dtype == np.int64 else values.astype(precision)
    return torch.from_numpy(np.require(numbers, requirements=["C", "W"]))


def _standardised(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Inputs with mean 0 and deviation 1 over the training samples, of each channel (N, C, H, W) or of each last entry.

    And which of these are constant, to rounding: they get mean 0.
    """
    x = train[0].double()
    mean, std, constant = moments(x, (0, 2, 3) if x.dim() == 4 else tuple(range(x.dim() - 1)))
    a, b = (((part[0].double() - mean) / std).float() for part in (train, test))
    return (a, train[1]), (b, test[1]), constant


def moments(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Means and deviations over axes that stay, and which are constant, to rounding: these have deviation 1."""
    largest = x.abs().amax(axes, keepdim=True)
    # a power of two, by which one divides without rounding, so that no square leaves the range of float64
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
