"""CIFAR in a compact lossless form: one .xz file per batch.

Decompressed, a batch is one line of JSON (`n`, `label_keys`, `planes`, `images_sha256`), then 3 n 32 32 residuals
(plane, image, row, column), then n bytes for every label key, then the file names. The planes are green,
red - green and blue - green. A residual is the zigzag code of (value - prediction) modulo 256, where the
prediction is the median of west, north and west + north - north-west in the same plane, zero outside the image.

Decoding takes seconds, so the decoded bytes are kept in the cache folder; a damaged copy there is rebuilt.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apical.data import containers
from apical.data.arrays import Arrays, Labelled, read_npz
from apical.data.roots import cache_folder
from apical.errors import DataError

_SIDE, _HEADER = 32, 1 << 16
_NAMES = ("train_images", "train_labels", "test_images", "test_labels")


def _decode(residuals: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Decode residuals (3, N, 32, 32) to images (N, 3, 32, 32) in the order red, green, blue."""
    count = residuals.shape[1]
    images = np.empty((count, 3, _SIDE, _SIDE), np.uint8)
    green = np.zeros((_SIDE, _SIDE, count), np.int16)
    for code, channel in zip(residuals, (1, 0, 2), strict=True):
        signed = np.ascontiguousarray(code.transpose(1, 2, 0)).astype(np.int16)
        signed = (signed >> 1) ^ -(signed & 1)
        plane = np.zeros((_SIDE + 1, _SIDE + 1, count), np.int16)  # a zero border north and west
        values = np.empty_like(green)
        for row in range(_SIDE):
            for column in range(_SIDE):
                north, west, corner = plane[row, column + 1], plane[row + 1, column], plane[row, column]
                predicted = np.clip(north + west - corner, np.minimum(north, west), np.maximum(north, west))
                base = green[row, column]
                values[row, column] = (base + predicted + signed[row, column]) & 255
                plane[row + 1, column + 1] = values[row, column] - base
        images[:, channel] = values.transpose(2, 0, 1)
        if channel == 1:
            green = values
    return images


def read_batch(path: Path, label_key: str, remedy: str = "replace it") -> Labelled:
    """Read images (N, 3, 32, 32) uint8 and labels (N,) from one .xz batch; raise `DataError` if it is damaged."""
    try:
        content = containers.xz(containers.content(path))
        header = content[:_HEADER].partition(b"\n")[0]
        body = memoryview(content)[len(header) + 1 :]
        facts = json.loads(header)
        count, keys, digest = int(facts["n"]), list(facts["label_keys"]), str(facts["images_sha256"])
        planes, position = facts["planes"], keys.index(label_key)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} is damaged or not a compact CIFAR batch ({reason}); {remedy}") from error
    pixels = 3 * count * _SIDE**2
    if planes != "g,r-g,b-g" or count < 1 or len(body) < pixels + count * len(keys):
        raise DataError(f"{path} is truncated or not a compact CIFAR batch; {remedy}")
    images = _decode(np.frombuffer(body, np.uint8, pixels).reshape(3, count, _SIDE, _SIDE))
    if hashlib.sha256(images.transpose(0, 2, 3, 1).tobytes()).hexdigest() != digest:
        raise DataError(f"{path} is damaged (the decoded images fail their checksum); {remedy}")
    return images, np.frombuffer(body, np.uint8, count, offset=pixels + position * count).copy()


def read_folder(folder: Path, remedy: str, *, train: str, test: str, label_key: str) -> Arrays:
    """Read every batch that matches the pattern `train`, sorted by name, and the batch `test`."""
    files = [*sorted(folder.glob(train)), folder / test]
    copy = _copy_of(folder.name, files)
    arrays = _read_copy(copy)
    if arrays is not None:
        return arrays
    batches = [read_batch(path, label_key, remedy) for path in files]
    images = np.concatenate([images for images, _ in batches[:-1]])
    labels = np.concatenate([labels for _, labels in batches[:-1]])
    arrays = Arrays((images, labels), batches[-1])
    _write_copy(copy, arrays)
    return arrays


def _copy_of(name: str, files: list[Path]) -> Path:
    """Return the path of the decoded copy; it changes when a batch file changes."""
    try:
        facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror})") from error
    return cache_folder() / "decoded" / f"{name}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.npz"


def _read_copy(path: Path) -> Arrays | None:
    if not path.is_file():
        return None
    try:
        train_images, train_labels, test_images, test_labels = read_npz(path, _NAMES)
    except DataError:
        return None
    for images, labels in ((train_images, train_labels), (test_images, test_labels)):
        if images.dtype != np.uint8 or images.shape != (len(labels), 3, _SIDE, _SIDE):
            return None
    return Arrays((train_images, train_labels), (test_images, test_labels))


def _write_copy(path: Path, arrays: Arrays) -> None:
    """Store the decoded arrays atomically; a folder that is not writable only costs time."""
    assert arrays.train is not None
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            contents: dict[str, Any] = dict(zip(_NAMES, (*arrays.train, *arrays.test), strict=True))
            np.savez(file, **contents)
        os.replace(temporary, path)
    except OSError:
        pass
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
