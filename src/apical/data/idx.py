"""IDX, the format of MNIST and its relatives.

A file holds two zero bytes, a type code (8: unsigned bytes), the number of dimensions, every dimension as a
big-endian 32-bit integer, and then the values in row-major order. It may be gzip-compressed.
"""

import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apical.data import containers
from apical.data.arrays import Arrays
from apical.errors import DataError

_UNSIGNED_BYTES = 8
_GZIP_MAGIC = b"\x1f\x8b"
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def read_idx(path: Path, dimensions: int, remedy: str = "replace it") -> NDArray[np.uint8]:
    """Read the bytes of one IDX file, plain or gzip, as an array with `dimensions` axes.

    Raises a `DataError` that names the file and ends with `remedy` unless the file is complete and undamaged.
    """
    content = _content(path, remedy)
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise DataError(f"{path} is truncated: {len(content)} bytes, its header alone needs {header}; {remedy}")
    if content[:4] != bytes((0, 0, _UNSIGNED_BYTES, dimensions)):
        magic = content[:4].hex(" ")
        raise DataError(f"{path} is not an IDX file of bytes with {dimensions} dimensions (it starts {magic}); {remedy}")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, offset=4))
    expected = header + math.prod(shape)
    if len(content) != expected:
        problem = "is truncated" if len(content) < expected else "is longer than its header says"
        raise DataError(f"{path} {problem}: {len(content)} bytes instead of {expected} for {shape}; {remedy}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def present(folder: Path, name: str) -> Path | None:
    """Return the path of the file `name` in `folder`, plain or with `.gz`, or None."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_folder(folder: Path, remedy: str) -> Arrays:
    """Read images (N, 1, H, W) and labels (N,) of both splits from the four IDX files of the MNIST family."""
    arrays = []
    for name in FILES:
        path = present(folder, name)
        if path is None:
            raise DataError(f"{folder / name} is missing; {remedy}")
        arrays.append(read_idx(path, 3 if "images" in name else 1, remedy))
    train_images, train_labels, test_images, test_labels = arrays
    return Arrays((train_images[:, None], train_labels), (test_images[:, None], test_labels))


def _content(path: Path, remedy: str) -> bytes:
    try:
        content = containers.content(path)
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); {remedy}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); {remedy}") from error
    if not content.startswith(_GZIP_MAGIC):
        return content
    try:
        return containers.gunzip(content)
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); {remedy}") from error
    except EOFError as error:
        raise DataError(f"{path} is truncated (its gzip stream ends early); {remedy}") from error
    except (OSError, zlib.error) as error:
        raise DataError(f"{path} is damaged gzip ({error}); {remedy}") from error
