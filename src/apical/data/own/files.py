"""Readers of a user's .npz and .csv files."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apical.data import arrays, containers
from apical.data.own.targets import Raw
from apical.errors import DataError

Array = NDArray[Any]
_STEMS = (("x", "y"), ("X", "y"), ("X", "Y"), ("data", "target"), ("inputs", "targets"), ("images", "labels"))
LABELS = ("target", "label", "y")
"""Accepted names of the label column."""


def _split_names(part: str) -> list[tuple[str, str]]:
    """Return x_train and y_train, and other common names for them."""
    return [(pattern.format(a, part), pattern.format(b, part)) for a, b in _STEMS for pattern in ("{}_{}", "{1}_{0}")]


def read_npz(path: Path) -> Raw:
    """Read the arrays x_train, y_train, x_test, y_test, or only x and y, or other common names for these.

    Raises:
        DataError: none of them exists, or the file is damaged or contains Python objects.
    """
    try:
        containers.check_zip(path, 1 << 34)
        with np.load(path, allow_pickle=False) as archive:
            keys = list(archive.files)
            names, test = names_of(keys, str(path), "arrays")
            values = [np.asarray(archive[name]) for name in names]
    except DataError:
        raise
    except arrays.NPZ_DAMAGE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "allow_pickle" in reason:
            raise DataError(f"{path} contains Python objects, which are not unpickled; save arrays of numbers") from error
        raise DataError(f"{path} is damaged or not an .npz file ({reason})") from error
    notes: list[str] = [f"read from {', '.join(names)}"] if names != ("x_train", "y_train", "x_test", "y_test") else []
    left = [key for key in keys if key not in names]
    notes += [f"{', '.join(left)} ignored"] if left else []
    inputs = []
    for x in values[::2]:
        x, note = _images(x)
        notes += [note] if note and note not in notes else []
        inputs.append(x)
    second = (inputs[1], values[3]) if test else (None, None)
    return Raw((inputs[0], second[0]), (values[1], second[1]), path.name, str(path.resolve()), True, notes=tuple(notes))


def names_of(keys: list[str], where: str, what: str) -> tuple[tuple[str, ...], bool]:
    """Return the names of training inputs and targets, plus those of test samples if present, and whether they are.

    Raises:
        DataError: no pair is found, or only one name of a pair.
    """
    train = _pair(keys, [*_split_names("train"), *_STEMS])
    test = _pair(keys, [*_split_names("test"), *_split_names("val")])
    if train is None:
        listing = ", ".join(keys) or "nothing"
        raise DataError(f"{where}: needs {what} x_train, y_train, x_test and y_test, or x and y; it contains {listing}")
    if test is None and (alone := [name for name in keys if "test" in name.lower()]):
        raise DataError(f"{where}: {alone[0]} has no counterpart; provide both x_test and y_test")
    return (*train, *(test or ())), test is not None


def _pair(names: list[str], pairs: list[tuple[str, str]]) -> tuple[str, str] | None:
    lower = {name.lower(): name for name in names}
    for a, b in pairs:
        if a.lower() in lower and b.lower() in lower:
            return lower[a.lower()], lower[b.lower()]
    return None


def _images(x: Array) -> tuple[Array, str]:
    """Return inputs with image channels first, and a note."""
    colours = (1, 3, 4)
    if x.ndim == 3 and x.dtype == np.uint8:
        return x[:, None], "8-bit arrays (N, H, W) read as grey images"
    if x.ndim == 4 and x.shape[3] in colours and x.shape[1] not in colours:
        return x.transpose(0, 3, 1, 2), "channels are last"
    return x, ""


def read_csv(path: Path) -> Raw:
    """Read a table with a header; the label column is target, label or y, otherwise the last one.

    Raises:
        DataError: the file is not a table of numbers with a label; names line and column.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            mark = max((",", ";", "\t"), key=first.count)
            file.seek(0)
            lines = csv.reader(file, delimiter=mark, skipinitialspace=True, strict=True)
            rows = [(lines.line_num, row) for row in lines if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a table in UTF-8 ({error})") from error
    if len(rows) < 2:
        has = f"has {len(rows)} line" if rows else "is empty"
        raise DataError(f"{path}: needs a line of column names followed by lines of numbers; it {has}")
    header = [name.strip() for name in rows.pop(0)[1]]
    _check_header(path, header)
    column = _label_column(path, header)
    for number, row in rows:
        if len(row) != len(header):
            raise DataError(f"{path}, line {number}: {len(row)} values, but {len(header)} columns")
    texts = np.array([row for _, row in rows], dtype=np.str_)
    texts = np.char.strip(texts)
    places = [number for number, _ in rows]
    inputs = [_numbers(texts[:, i], path, header[i], places) for i in range(len(header)) if i != column]
    label, kind = _label(texts[:, column], path, header[column], places)
    notes = [f"the label is column {header[column]!r} ({kind})"]
    notes += [f"columns are separated by {'tabs' if mark == chr(9) else 'semicolons'}"] if mark != "," else []
    x = np.stack(inputs, axis=1)
    return Raw(
        (x, None), (label, None), path.name, str(path.resolve()), True, notes=tuple(notes), parts=("rows", "test rows")
    )


def _check_header(path: Path, header: list[str]) -> None:
    if len(header) < 2:
        raise DataError(f"{path}: needs at least two columns, one of them the label")
    if all(_is_number(name) for name in header):
        raise DataError(f"{path}: the first line must name the columns; it has numbers")
    nameless = next((i for i, name in enumerate(header) if name == "" or name.startswith("Unnamed: ")), None)
    if nameless is not None:  # pandas names an index it wrote "Unnamed: 0"
        raise DataError(f"{path}: column {nameless + 1} has no name (if it is an index, omit it when writing the file)")
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: two columns are called {twice!r}")


def _label_column(path: Path, header: list[str]) -> int:
    named = [i for i, name in enumerate(header) if name.lower() in LABELS]
    if len(named) > 1:
        raise DataError(
            f"{path}: columns {' and '.join(repr(header[i]) for i in named)} could both be the label; rename one"
        )
    return named[0] if named else len(header) - 1


def _label(texts: Array, path: Path, name: str, places: list[int]) -> tuple[Array, str]:
    empty = texts == ""
    if empty.any():
        raise DataError(f"{path}, line {places[int(empty.argmax())]}: column {name!r}, the label, is empty")
    try:
        return texts.astype(np.int64), "whole numbers"
    except (ValueError, OverflowError):
        pass
    words = np.array([not _is_number(text) for text in texts])
    if words.all():
        return texts, "texts"
    if words.any():  # most often a marker for a missing value, which is not a class
        at = int(words.argmax())
        raise DataError(
            f"{path}, line {places[at]}: column {name!r}, the label, is {texts[at][:30]!r}, but others are numbers; classes "
            "are all whole numbers or all words"
        )
    return _numbers(texts, path, name, places), "real numbers"


def _numbers(texts: Array, path: Path, name: str, places: list[int]) -> Array:
    """Return a column as float64."""
    try:
        values = texts.astype(np.float64)
        wrong = ~np.isfinite(values)
    except ValueError:
        wrong = np.array([not _is_number(text) for text in texts])
        values = np.zeros(0)
    if wrong.any():
        at = int(wrong.argmax())
        what = f"is {str(texts[at])[:30]!r}, which is not a finite number" if texts[at] != "" else "is empty"
        hint = "use a decimal point and no thousands separators" if "," in texts[at] else "only the label may be text"
        raise DataError(f"{path}, line {places[at]}: column {name!r} {what}; {hint}")
    return values


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
