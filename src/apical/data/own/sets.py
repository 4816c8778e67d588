"""Data returned by code: a Dataset, a pair of Datasets (train, test), or arrays."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from apical import own_code
from apical.data import dataset as loaded
from apical.data.own.files import names_of
from apical.data.own.targets import Raw
from apical.errors import ApicalError, DataError

Make = Callable[[], Raw]
FORMS = (
    "a torch.utils.data.Dataset, a pair of them (train, test), or arrays (training inputs, training targets, "
    "test inputs, test targets)"
)
_TWICE = 4
"""Number of samples that are read twice, to check that they do not change."""


def from_code(value: Any, name: str) -> Make:
    """Return a reader of the data returned by the function `value`, named "FILE.py:FUNCTION" or "module:NAME".

    The function is called without arguments, with the global generators of torch, NumPy and Python seeded.
    """

    def make() -> Raw:
        where, path = name.rpartition("/")[2], own_code.file_of(name)
        source = value
        if callable(source) and not isinstance(source, Dataset):
            needed = _needed(source)
            if needed:
                raise DataError(f"{where} needs an argument {needed!r}, but is called without arguments; give it a default")
            source = _guarded(value, where, path)
        raw: Raw = _guarded(lambda: from_value(source, where, name), where, path)
        return raw

    return make


def _guarded(call: Callable[[], Any], where: str, path: Any) -> Any:
    try:
        with own_code.settings_kept(where, DataError), own_code.generators_kept(seed=0):
            return call()
    except ApicalError:
        raise
    except (Exception, SystemExit) as error:
        raise DataError(f"{where} failed: {own_code.described(error, path)}") from error


def _needed(function: Callable[..., Any]) -> str | None:
    """Return the name of the first parameter without a default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return next((item.name for item in parameters if item.kind in plain and item.default is inspect.Parameter.empty), None)


def from_value(value: Any, where: str, source: str = "memory") -> Raw:
    """Convert the return value of a function, or data in memory, to arrays.

    Raises:
        DataError: the value has none of the accepted forms.
    """
    if isinstance(value, loaded.Dataset):
        value = (value.train.inputs, value.train.targets, value.test.inputs, value.test.targets)
    if isinstance(value, Mapping):
        names, _ = names_of([key for key in value if isinstance(key, str)], where, "entries")
        value = tuple(value[key] for key in names)  # only data and target, of a scikit-learn Bunch
    if isinstance(value, DataLoader):
        raise DataError(f"{where} is a DataLoader: pass its Dataset instead, apical makes the batches")
    if isinstance(value, Dataset):
        x, y, names = _samples(value, where, "training samples")
        return Raw((x, None), (y, None), where, source, False, names)
    if isinstance(value, tuple | list) and len(value) == 2:
        if all(isinstance(item, Dataset) for item in value):
            x, y, names = _samples(value[0], where, "training samples")
            x_test, y_test, _ = _samples(value[1], where, "test samples")
            return Raw((x, x_test), (y, y_test), where, source, False, names)
        if all(isinstance(item, tuple) and len(item) == 2 for item in value):
            value = (*value[0], *value[1])  # ((x_train, y_train), (x_test, y_test))
        else:
            return Raw((_array(value[0], where), None), (_array(value[1], where), None), where, source, False)
    if isinstance(value, tuple | list) and len(value) == 4:
        x, y, x_test, y_test = (_array(item, where) for item in value)
        return Raw((x, x_test), (y, y_test), where, source, False)
    size = f" of length {len(value)}" if isinstance(value, tuple | list) else ""
    raise DataError(f"{where}: got {type(value).__name__}{size}; expected {FORMS}")


def _array(value: Any, where: str) -> Any:
    """Convert a tensor, array, list or table to an array of numbers or strings."""
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise DataError(f"{where}: an array has masked values; fill them or drop these samples")
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise DataError(f"{where}: samples have different shapes ({error})") from error
    if array.dtype.kind == "O":
        if array.ndim == 1 and all(isinstance(item, str) for item in array):
            return array.astype(np.str_)
        kind = f"a {type(value).__name__}" if array.ndim == 0 else "an array of Python objects"
        raise DataError(f"{where}: {kind} is not supported; pass arrays of numbers")
    if array.dtype == np.uint8 and array.ndim > 2:
        raise DataError(f"{where}: inputs are 8-bit pixels, 0 to 255; convert them to floats, such as x / 255")
    return array


def _samples(data: Dataset[Any], where: str, part: str) -> tuple[Any, Any, tuple[str, ...]]:
    """Return inputs, targets and, if the Dataset has them, the class names. Each sample is read once."""
    names = tuple(map(str, getattr(data, "classes", ()) or ()))
    if isinstance(data, TensorDataset):
        if len(data.tensors) != 2:
            raise DataError(f"{where}, {part}: needs inputs and targets; the TensorDataset has {len(data.tensors)} tensors")
        x, y = (_array(tensor, where) for tensor in data.tensors)
        return x, y, names
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        raise DataError(f"{where}, {part}: the Dataset must have a length and support indexing")
    if len(data) == 0:
        raise DataError(f"{where}, {part}: there are no samples")
    samples = [_sample(data[i], i, where, part) for i in range(len(data))]
    for i in range(min(_TWICE, len(samples))):
        again = _sample(data[i], i, where, part)
        if again[0].shape != samples[i][0].shape or not np.array_equal(again[0], samples[i][0]):
            raise DataError(
                f"{where}, {part}: sample {i} differs when it is read again; samples are read once, so remove random "
                "augmentation (--flip and --crop augment images)"
            )
    shapes = {x.shape: i for i, (x, _) in reversed(list(enumerate(samples)))}
    if len(shapes) > 1:
        (a, i), (b, j) = sorted(shapes.items(), key=lambda item: item[1])[:2]
        raise DataError(f"{where}, {part}: sample {i} has shape {a}, sample {j} has {b}; all must have the same shape")
    return np.stack([x for x, _ in samples]), np.array([y for _, y in samples]), names


def _sample(sample: Any, index: int, where: str, part: str) -> tuple[Any, Any]:
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        raise DataError(f"{where}, {part}: samples must be (input, target); sample {index} has type {type(sample).__name__}")
    x, y = sample
    if type(x).__module__.startswith("PIL"):
        raise DataError(f"{where}, {part}: sample {index} is a PIL image; convert it to a float tensor")
    x, y = _array(x, where), _array(y, where)
    return (x[()] if x.ndim == 0 else x), (y[()] if y.ndim == 0 else y)
