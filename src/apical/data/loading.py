"""Load a data set by name, as checked and normalised tensors."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apical.data.arrays import Arrays
from apical.data.catalogue import ENTRIES, Entry, Layout, entry
from apical.data.dataset import Dataset, Samples, Split, check
from apical.data.own import sources as own
from apical.data.roots import roots
from apical.data.text.sequences import Level
from apical.errors import ConfigError, DataError

_CHUNK = 512


class Status(NamedTuple):
    """One row of `status`: the set, its content, where it was found (or the remedy), the number of images."""

    name: str
    what: str
    where: str
    images: str


def names() -> list[str]:
    """Return the names that `load` accepts, the embedded default first."""
    return list(ENTRIES)


def status() -> list[Status]:
    """Return one row for every data set, found or not, without reading the images."""
    rows = []
    for name, dataset in ENTRIES.items():
        where, images = f"not found: apical data fetch {name}", ""
        if dataset.sequences is not None:
            where = "generated, in windows of --context tokens"
        elif dataset.made is not None:
            where, images = dataset.made.source, f"{dataset.made.train:,} + {dataset.made.test:,}"
        elif place := _find(dataset, None):
            layout, _, root = place
            where = str(root / layout.folder)
            images = f"{layout.train:,} + {layout.test:,}" + (f" ({layout.note})" if layout.note else "")
        rows.append(Status(name, dataset.what, where, images))
    return rows


def load(
    name: str,
    *,
    root: Path | None = None,
    validation: int = 0,
    train_limit: int | None = None,
    test_limit: int | None = None,
    seed: int = 0,
    numbers: bool = False,
    context: int = 64,
    tokens: Level = "characters",
) -> Dataset:
    """Load the data set `name`: normalised float32 images (N, C, H, W), int64 labels (N,) or float32 numbers (N, classes).

    Any other name refers to the user's own data (:mod:`apical.data.own.sources`): a .npz, .csv or .txt file, a folder of
    images, or "path/to/file.py:FUNCTION". Their integer targets are classes or, with `numbers`, regression targets.
    A text is cut into windows of `context` characters or bytes (`tokens`).

    If `root` is given, only this folder is searched; otherwise $APICAL_DATA and then the cache folder. `validation`
    training images are held out, and `train_limit` of the rest and `test_limit` test images are kept. These are random
    subsets that depend only on `seed`. The held-out images do not depend on `train_limit`.

    Raises `ConfigError` for an unknown name or impossible sizes, `DataError` for a missing or damaged set.
    """
    choice = _Choice(name, validation, train_limit, test_limit, seed)
    make = own.text_reader(name) if name not in ENTRIES else ENTRIES[name].sequences
    if make is not None:
        return _chosen(make(context, tokens), choice, "windows")
    if name not in ENTRIES and own.is_own(name):
        return _chosen(own.read(name, numbers=numbers), choice, "samples")
    about = entry(name)
    for option, value in (("train_limit", train_limit), ("test_limit", test_limit)):
        if value is not None and value <= 0:
            raise ConfigError(f"{option} must be at least 1; got {value}")
    if validation < 0:
        raise ConfigError(f"validation must not be negative; got {validation}")
    arrays, source = read(name, root)
    if arrays.train is None:
        raise DataError(f"{name} in {source} has no training split; run: apical data fetch {name}")

    train = _tensors(*arrays.train, about, f"{name} train split")
    test = _tensors(*arrays.test, about, f"{name} test split")
    train_kept, held_out, test_kept = _indices(len(train[1]), len(test[1]), choice, "images")
    return Dataset(
        name=name,
        train=_split(*train, train_kept, about),
        validation=_split(*train, held_out, about) if validation else None,
        test=_split(*test, test_kept, about),
        classes=about.classes,
        mean=about.mean,
        std=about.std,
        source=source,
    )


class _Choice(NamedTuple):
    """Which samples of a data set to load; see :func:`load`."""

    name: str
    validation: int
    train_limit: int | None
    test_limit: int | None
    seed: int


def _chosen(samples: Samples, choice: _Choice, noun: str) -> Dataset:
    """Return the data set of samples that are already normalised."""
    train_kept, held_out, test_kept = _indices(len(samples.train[1]), len(samples.test[1]), choice, noun)
    return Dataset(
        name=choice.name,
        train=Split(*(part[train_kept] for part in samples.train)),
        validation=Split(*(part[held_out] for part in samples.train)) if choice.validation else None,
        test=Split(*(part[test_kept] for part in samples.test)),
        classes=samples.classes,
        mean=(),
        std=(),
        source=samples.source,
        sha256=samples.sha256,
        about=samples.about,
        class_names=samples.names,
        is_text=samples.is_text,
    )


def _indices(train: int, test: int, choice: _Choice, noun: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the indices of the training, held-out and test samples."""
    name, validation, train_limit, test_limit, seed = choice
    if validation >= train:
        raise ConfigError(f"validation={validation} leaves none of the {train} training {noun} of {name}")
    held_out, train_kept = _held_out(train, validation, train_limit, seed, f"train_limit for {name}")
    _, test_kept = _held_out(test, 0, test_limit, seed, f"test_limit for {name}")
    return train_kept, held_out, test_kept


def read(name: str, root: Path | None = None) -> tuple[Arrays, str]:
    """Return the raw arrays of a data set and their origin in words; raise as `load` does."""
    dataset = entry(name)
    if dataset.made is not None:
        return dataset.made.make(), dataset.made.source
    source = _find(dataset, root)
    if source is None:
        raise DataError(f"{name} not found: looked in {_looked(dataset, root)}; run: apical data fetch {name}")
    layout, place, folder = source
    remedy = f"delete it and run: apical data fetch {name}"
    note = f", {layout.note}" if layout.note else ""
    return layout.read(folder / layout.folder, remedy), f"{layout.folder} ({place}{note})"


def _find(dataset: Entry, root: Path | None) -> tuple[Layout, str, Path] | None:
    """Return the first complete copy in the order of the folders, or the first partial one if none is complete."""
    places = roots(root)
    for wants_whole in (True, False):
        for place, folder in places:
            for layout in dataset.layouts:
                if wants_whole != bool(layout.note) and layout.missing(folder) == []:
                    return layout, place, folder
    return None


def _looked(dataset: Entry, root: Path | None) -> str:
    """List every folder searched, with the files that incomplete copies lack."""
    parts = []
    for _, folder in roots(root):
        lacking = [
            f"its {layout.folder} lacks {', '.join(missing)}"
            for layout in dataset.layouts
            if (missing := layout.missing(folder))
        ]
        parts.append(f"{folder} ({lacking[0]})" if lacking else str(folder))
    return " and ".join(parts)


def _tensors(images: NDArray[Any], labels: NDArray[Any], dataset: Entry, where: str) -> tuple[Tensor, Tensor]:
    """Return checked raw images (N, C, H, W), uncopied if possible, and int64 labels (N,) or float32 numbers (N, M)."""
    kinds = "f" if dataset.targets == "numbers" else "ui"
    if images.dtype.kind not in "uif" or labels.dtype.kind not in kinds:
        raise DataError(f"{where}: expected numbers; got images {images.dtype} and labels {labels.dtype}")
    if images.shape[1:] != dataset.shape:
        expected, actual = ("x".join(map(str, shape)) for shape in (dataset.shape, images.shape[1:]))
        raise DataError(f"{where}: expected images {expected}; got {actual}")
    plain = images.dtype if images.dtype in (np.dtype(np.uint8), np.dtype(np.int16)) else np.dtype(np.float32)
    pixels = torch.from_numpy(np.require(images, plain, ["C", "W"]))
    targets = torch.from_numpy(labels.astype(np.float32 if dataset.targets == "numbers" else np.int64))
    check(pixels, targets, dataset.classes, where)
    return pixels, targets


def _held_out(total: int, held: int, limit: int | None, seed: int, what: str) -> tuple[Tensor, Tensor]:
    """Return sorted indices of `held` random items and of `limit` others (None: all others)."""
    available = total - held
    if limit is not None and limit > available:
        raise ConfigError(f"{what} is {limit}, but only {available} samples are available")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    rest = order[held : held + (available if limit is None else limit)]
    return order[:held].sort().values, rest.sort().values


def _split(images: Tensor, targets: Tensor, index: Tensor, dataset: Entry) -> Split:
    """Return the selected images, normalised in chunks that fit into the processor's cache."""
    channels = (1, -1, *[1] * (images.dim() - 2))
    mean, std = (torch.tensor(values).view(channels) for values in (dataset.mean, dataset.std))
    inputs = torch.empty((len(index), *images.shape[1:]))
    for start in range(0, len(index), _CHUNK):
        chunk = inputs[start : start + _CHUNK]
        chunk.copy_(images[index[start : start + _CHUNK]])
        if dataset.low:
            chunk.sub_(dataset.low)
        chunk.div_(dataset.high - dataset.low).sub_(mean).div_(std)
    return Split(inputs, inputs.flatten(1) if dataset.targets == "images" else targets[index])
