"""CIFAR-10 and CIFAR-100 in their standard Python layout, read without trusting the pickles.

The files are pickles (protocol 2) of a dict with one uint8 array and lists of labels. A pickle can name any
callable, so this reader resolves none: the four globals that such a file needs are replaced by stubs that only
record their arguments, and every other global raises an error.
"""

import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apical.data import containers
from apical.data.arrays import Arrays, Labelled
from apical.errors import DataError

TRAIN_10 = tuple(f"data_batch_{k}" for k in range(1, 6))


class _Array:
    """An array under construction: shape and bytes only, unsigned and in row-major order."""

    __slots__ = ("array",)

    array: NDArray[np.uint8]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, column_major, data = state
        if not isinstance(dtype, _Bytes) or column_major or not isinstance(data, bytes):
            raise pickle.UnpicklingError("only row-major arrays of unsigned bytes are allowed")
        if not all(isinstance(size, int) and size >= 0 for size in shape) or math.prod(shape) != len(data):
            raise pickle.UnpicklingError("an array's shape does not fit its data")
        self.array = np.frombuffer(data, np.uint8).reshape(shape)


class _Bytes:
    """The dtype of unsigned bytes; NumPy's byte-order state does not matter for it."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Do nothing: there is no state to set."""


class _StandIn:
    """Callable that replaces a global; it has no attribute that a pickle could set."""

    __slots__ = ("_call",)

    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("a pickle may not change its reader")


def _dtype(code: str | bytes, *_: Any) -> _Bytes:
    if code not in ("u1", b"u1", "|u1", b"|u1"):
        raise pickle.UnpicklingError(f"only arrays of unsigned bytes are allowed, not {code!r}")
    return _Bytes()


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r} is not allowed")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], object] = {
    ("numpy.core.multiarray", "_reconstruct"): _StandIn(lambda *_: _Array()),
    ("numpy._core.multiarray", "_reconstruct"): _StandIn(lambda *_: _Array()),
    ("numpy", "ndarray"): object(),
    ("numpy", "dtype"): _StandIn(_dtype),
    ("_codecs", "encode"): _StandIn(_encode),
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not allowed") from None


def read_batch(path: Path, label_key: str, remedy: str = "replace it") -> Labelled:
    """Read images (N, 3, 32, 32) uint8 and labels (N,) int64 from one batch file; nothing in it is executed.

    Raises a `DataError` that names the file if it is damaged or if the pickle contains more than plain data.
    """
    try:
        content = _Reader(io.BytesIO(containers.content(path)), encoding="bytes").load()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); {remedy}") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} is damaged or not a CIFAR batch ({reason}); {remedy}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a CIFAR batch (it does not contain a dict); {remedy}")
    table = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}
    data, labels = table.get("data"), table.get(label_key)
    images = getattr(data, "array", None) if isinstance(data, _Array) else None
    if images is None or images.ndim != 2 or images.shape[1] != 3072:
        raise DataError(f"{path} is not a CIFAR batch (no 'data' of N rows of 3072 bytes); {remedy}")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(f"{path} is not a CIFAR batch (no list of integers {label_key!r}); {remedy}")
    if len(labels) != len(images):
        raise DataError(f"{path} has {len(images)} images but {len(labels)} labels; {remedy}")
    return images.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def read_cifar10(folder: Path, remedy: str) -> Arrays:
    """Read CIFAR-10 from `cifar-10-batches-py`."""
    batches = [read_batch(folder / name, "labels", remedy) for name in TRAIN_10]
    images = np.concatenate([images for images, _ in batches])
    labels = np.concatenate([labels for _, labels in batches])
    return Arrays((images, labels), read_batch(folder / "test_batch", "labels", remedy))


def read_cifar100(folder: Path, remedy: str) -> Arrays:
    """Read CIFAR-100 with its 100 fine labels from `cifar-100-python`."""
    train, test = (read_batch(folder / name, "fine_labels", remedy) for name in ("train", "test"))
    return Arrays(train, test)
