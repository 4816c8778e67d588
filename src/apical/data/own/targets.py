"""Targets of user data: detect classes or numbers, and set samples aside for testing."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apical.errors import DataError

Array = NDArray[Any]
SHARE = 0.2
"""Share of the samples set aside for testing if the data have no test samples."""
_LISTED = 8


class Raw(NamedTuple):
    """Output of a reader.

    Attributes:
        inputs: inputs of training and, if present, test samples, each (N, ...).
        targets: targets of the same samples, unconverted.
        where: name of the data, for messages.
        source: origin of the data, in words.
        standardise: whether to scale inputs to mean 0 and deviation 1.
        names: names of the classes 0, 1, ... if the data give them.
        notes: choices that were made, each in a few words.
        parts: names of training and test samples in messages.
        exact: whether textual targets have been converted to real numbers if they were written as such.
    """

    inputs: tuple[Array, Array | None]
    targets: tuple[Array, Array | None]
    where: str
    source: str
    standardise: bool
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    parts: tuple[str, str] = ("training samples", "test samples")


@dataclass(frozen=True)
class Targets:
    """Labels 0, 1, ... (N,) int64 or numbers (N, M) float32 of training and, if present, test samples."""

    values: list[Array]
    classes: int
    are_numbers: bool
    names: tuple[str, ...] = ()
    told: str = ""
    notes: list[str] = field(default_factory=list)

    def check_seen(self, train: Tensor, test: Tensor, where: str) -> None:
        """Raise an error if a test sample has a class that no training sample has.

        Raises:
            DataError: names the class.
        """
        if self.are_numbers:
            return
        unseen = ~torch.isin(test, train)
        if bool(unseen.any()):
            index = int(unseen.nonzero()[0])
            name = self.names[int(test[index])] if self.names else int(test[index])
            raise DataError(f"{where}: test sample {index} has class {name}, which no training sample has")


def number_classes(raw: Raw, *, numbers: bool) -> tuple[Raw, Targets]:
    """Convert targets to numbers or to classes 0, 1, ...; return them with the data.

    Args:
        numbers: treat integer targets as regression targets.

    Raises:
        DataError: targets are neither classes nor numbers, or there are almost as many classes as samples.
    """
    parts = [
        _plain(np.asarray(y), f"{raw.where}, {part}")
        for y, part in zip(raw.targets, raw.parts, strict=True)
        if y is not None
    ]
    for y, x, part in zip(parts, raw.inputs, raw.parts, strict=False):
        if x is not None and not x.shape:
            raise DataError(f"{raw.where}, {part}: the inputs are a single number; provide one row per sample")
        if x is not None and len(x) != len(y):
            hint = (
                "" if len(parts) == 1 else "; four arrays are training inputs, training targets, test inputs, test targets"
            )
            raise DataError(f"{raw.where}, {part}: {len(x):,} inputs but {len(y):,} targets{hint}")
        if len(y) == 0:
            raise DataError(f"{raw.where}, {part}: there are no samples")
    kinds = {"number" if y.dtype.kind == "f" else "text" if y.dtype.kind in "US" else "whole" for y in parts}
    if len(kinds) > 1 and kinds != {"number", "whole"}:
        raise DataError(f"{raw.where}: some targets are strings and some numbers")
    wide = [y.shape[1] for y in map(np.asarray, raw.targets) if y.ndim == 2]
    if kinds == {"whole"} and len(set(wide)) > 1:
        raise DataError(f"{raw.where}: one-hot rows of training and test targets have {wide[0]} and {wide[1]} columns")
    if "number" in kinds or (numbers and kinds == {"whole"}):
        return raw, _as_numbers(parts, raw)
    return raw, _as_classes(parts, raw)


def _plain(y: Array, where: str) -> Array:
    """Return targets without a second dimension of size one, and one-hot rows as classes."""
    if y.dtype.kind not in "biufUS":
        raise DataError(f"{where}: targets must be integers, strings or real numbers; got {y.dtype}")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim == 2 and y.dtype.kind in "biu":
        if not (((y == 0) | (y == 1)).all() and (y.sum(1) == 1).all()):
            raise DataError(f"{where}: integers of shape {y.shape} are not labels: provide (N,), one-hot rows, or floats")
        labels: Array = y.argmax(1)
        return labels
    if y.ndim == 0 or (y.ndim != 1 and y.dtype.kind != "f") or y.ndim > 2:
        raise DataError(f"{where}: targets must be labels (N,) or numbers (N, M); got shape {y.shape}")
    return _texts(y, where) if y.dtype.kind == "S" else y


def _texts(y: Array, where: str) -> Array:
    """Decode bytes to strings."""
    try:
        return np.char.decode(y, "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: the labels are bytes that are not UTF-8 ({error}); provide strings") from error


def _as_numbers(parts: list[Array], raw: Raw) -> Targets:
    with np.errstate(over="ignore"):
        values = [y.astype(np.float32).reshape(len(y), -1) for y in parts]
    wide = {y.shape[1] for y in values}
    if len(wide) > 1:
        raise DataError(f"{raw.where}: training and test targets differ in shape, {values[0].shape} and {values[1].shape}")
    for y, part in zip(values, raw.parts, strict=False):
        wrong = ~np.isfinite(y).all(1)
        if wrong.any():
            raise DataError(f"{raw.where}, {part}: NaN or infinity in target {int(wrong.argmax())}")
    notes = []
    few = len(np.unique(values[0], axis=0)) <= _most_classes(len(values[0]))
    if few and (values[0] == np.round(values[0])).all() and any(y.dtype.kind == "f" for y in parts):
        notes.append("all targets are whole numbers: write them as integers if they are classes")
    elif values[0].std() > 100:
        notes.append(f"targets have a deviation of {values[0].std():.3g}: consider rescaling them")
    return Targets(values, values[0].shape[1], are_numbers=True, notes=notes)


def _most_classes(samples: int) -> int:
    """Return the largest number of distinct targets that count as classes."""
    return max(4, samples // 2)


def _as_classes(parts: list[Array], raw: Raw) -> Targets:
    train = parts[0]
    whole = train.dtype.kind in "biu"
    if raw.names and whole:
        return Targets([y.astype(np.int64) for y in parts], len(raw.names), False, raw.names, _listed(raw.names))
    if not whole and any((y == "").any() for y in parts):
        raise DataError(f"{raw.where}: a sample has an empty label")
    labels = np.unique(np.concatenate(parts))
    if whole and train.dtype.kind == "i" and labels[0] < 0 and list(labels) != [-1, 1]:
        raise DataError(f"{raw.where}: label {labels[0]} is negative; number classes from 0")
    if len(labels) < 2:
        raise DataError(f"{raw.where}: all samples have the same label, {labels[0]!s}")
    if len(labels) > _most_classes(len(train)):
        remedy = "for regression use floats or --loss mse" if whole else "name the label column target"
        told = "".join(f", where {note}" for note in raw.notes if note.startswith("the label is"))
        raise DataError(f"{raw.where}: {len(labels):,} different labels in {len(train):,} training samples{told}; {remedy}")
    values = [np.searchsorted(labels, y).astype(np.int64) for y in parts]
    names = tuple(str(label) for label in labels)
    if names == tuple(map(str, range(len(labels)))):
        return Targets(values, len(labels), False, (), f"{len(labels)} classes")
    return Targets(values, len(labels), False, names, _listed(names))


def _listed(names: tuple[str, ...]) -> str:
    beginning = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
    return f"{len(names)} classes ({beginning})"


def divide(y: Array, *, stratify: bool, where: str) -> tuple[Tensor, Tensor, str]:
    """Return indices of training and test samples, determined by the targets, and a note.

    With `stratify`, each class is split in the same proportion.

    Raises:
        DataError: there are too few samples.
    """
    if len(y) < 5:
        raise DataError(f"{where}: {len(y)} samples are too few to set some aside for testing")
    order = np.random.default_rng(0).permutation(len(y))
    groups = [order[y[order] == label] for label in np.unique(y)] if stratify else [order]
    tests = [group[: max(1, round(SHARE * len(group)))] if len(group) > 1 else group[:0] for group in groups]
    test = np.sort(np.concatenate(tests))
    train = np.setdiff1d(np.arange(len(y)), test)
    note = f"no test samples are given: a random fifth is set aside for testing (seed 0{', by class' if stratify else ''})"
    return torch.from_numpy(train), torch.from_numpy(test), note
